"""Runs the items of batches through the endpoints that HTTP uses, and writes down what they answer.

Rules:
- Items run behind everything else (``PRIORITY``). A server that is too busy, or restarts its engine, is asked again
  until the batch's time is over; an item that ran and failed is not.
- An answer is on disk before anybody is told that the item is done, and it is told before the next one is written: so the
  sizes in the log say exactly which lines are true. ``cut`` takes away the rest.
- A refusal is recorded as one that came over HTTP is.
"""

import asyncio
from collections.abc import Callable
from http import HTTPStatus
from typing import Any

import msgspec
from aiohttp import web

from gptoss.actors.batch_actor import FileSizes, ItemAnswer
from gptoss.clock import NS_PER_S
from gptoss.errors import GptossError, MemoryExhausted, Overloaded, RequestError
from gptoss.http.answering import Call, whole_answer
from gptoss.http.batch_file import BatchLine, Lines
from gptoss.http.body import MIB
from gptoss.http.chat import CHAT
from gptoss.http.choices import Choices, start_choices
from gptoss.http.completions import COMPLETIONS
from gptoss.http.context import CONTEXT
from gptoss.http.endpoint import Endpoint
from gptoss.http.errors import error_body
from gptoss.http.file_store import FileNote, FileStore
from gptoss.http.intake import Caller
from gptoss.http.responses import RESPONSES
from gptoss.messages.batch import Batch, BatchFault

ENDPOINTS: dict[str, Endpoint] = {each.path: each for each in (CHAT, COMPLETIONS, RESPONSES)}
PRIORITY = 2**30
RETRY_S_MAX = 30.0
TRIES_AFTER_ADMISSION = 3
_NEVER_RAN = {
    "expired": ("batch_expired", "This request could not be executed before the completion window expired."),
    "cancelled": ("batch_cancelled", "This request was not executed, since its batch was cancelled."),
}


class BatchRunner:
    """``BatchWork`` on an application.

    Args:
        app: whose endpoints are called.
        files: where inputs come from and answers go.
    """

    def __init__(self, app: web.Application, files: FileStore) -> None:
        self._app = app
        self._files = files
        self._context = app[CONTEXT]
        self._lines: dict[str, Lines] = {}
        self._sizes: dict[str, FileSizes] = {}
        self._writing: dict[str, asyncio.Lock] = {}

    async def restore(self, batches: list[Batch]) -> None:
        """See ``BatchWork``."""

        def cut() -> None:
            for batch in batches:
                if not batch.is_over:
                    self._files.cut(batch.output_file_id, batch.output_bytes)
                    self._files.cut(batch.error_file_id, batch.error_bytes)
            self._files.forget_metadata({batch.batch_id for batch in batches})

        await asyncio.to_thread(cut)

    async def validate(self, batch: Batch) -> tuple[int, tuple[BatchFault, ...]]:
        """See ``BatchWork``."""
        lines = self._lines_of(batch)
        model = self._context.gateway.served_model
        try:
            faults = await asyncio.to_thread(lines.index, batch.endpoint, model)
        except FileNotFoundError:
            faults = (BatchFault("invalid_input_file", "the input file was deleted", param="input_file_id"),)
        if faults:
            del self._lines[batch.batch_id]
        return len(lines), faults

    async def run(self, batch: Batch, item: int) -> ItemAnswer:
        """See ``BatchWork``."""
        lines = self._lines_of(batch)
        if not len(lines):
            await asyncio.to_thread(lines.locate)
        line = await asyncio.to_thread(lines.item, item)
        status, request_id, body = await self._answer(batch, item, line)
        answered = {"status_code": status, "request_id": request_id, "body": body}
        record = _record(batch, item, line.custom_id, answered, None)
        return ItemAnswer(status, await self._write(batch, record, is_ok=status == HTTPStatus.OK))

    async def finalize(self, batch: Batch) -> FileSizes:
        """See ``BatchWork``."""
        async with self._lock_of(batch):
            sizes = await asyncio.to_thread(self._complete, batch)
        for kept in (self._lines, self._sizes, self._writing):
            kept.pop(batch.batch_id, None)
        return sizes

    # ---- one item

    async def _answer(self, batch: Batch, item: int, line: BatchLine) -> tuple[int, str, Any]:
        """Status, request id and body of an item's answer."""
        name = f"{batch.batch_id}-{item}"
        caller = Caller(app=self._app, request_id=name)
        tries = TRIES_AFTER_ADMISSION
        while True:
            admitted: list[str] = []
            try:
                call = _behind_all(await ENDPOINTS[batch.endpoint].call(caller, bytes(line.body)))
            except GptossError as error:
                rejected = self._context.gateway.reject(error, endpoint=batch.endpoint, request_id=name)
                return error.status, rejected, error_body(error)
            try:
                return HTTPStatus.OK, *await self._run(call, admitted.append)
            except GptossError as error:
                tries -= bool(admitted)
                if not isinstance(error, Overloaded) or isinstance(error, MemoryExhausted) or not tries:
                    return error.status, admitted[0] if admitted else name, error_body(error)
                await asyncio.sleep(min(error.retry_after_s, RETRY_S_MAX))

    async def _run(self, call: Call, note_admitted: Callable[[str], None]) -> tuple[str, Any]:
        """Request id and body of a call's answer. Raises ``GptossError``."""
        generations = start_choices(self._context.gateway, call.requests)
        choices = Choices(generations, self._context.timing.keepalive_s)
        answer = call.answer(generations)
        try:
            await choices.admitted(_nobody_looks)
            note_admitted(generations[0].request_id)
            return generations[0].request_id, await whole_answer(choices, answer, _nobody_looks)
        except asyncio.CancelledError:
            choices.cancel("shutdown" if self._context.draining() else "client")
            raise
        except GptossError:
            choices.cancel("sibling_failed")
            raise

    # ---- the files

    def _lines_of(self, batch: Batch) -> Lines:
        if batch.batch_id not in self._lines:
            limit = self._context.settings.body_limit_mb * MIB
            self._lines[batch.batch_id] = Lines(self._files.path(batch.input_file_id), limit)
        return self._lines[batch.batch_id]

    def _lock_of(self, batch: Batch) -> asyncio.Lock:
        return self._writing.setdefault(batch.batch_id, asyncio.Lock())

    async def _write(self, batch: Batch, record: bytes, *, is_ok: bool) -> FileSizes:
        async with self._lock_of(batch):
            writing = asyncio.ensure_future(asyncio.to_thread(self._extend, batch, record, is_ok))
            try:
                return await asyncio.shield(writing)
            except asyncio.CancelledError:
                # The answer is there and cannot be taken back: it is told, and whoever cancelled was too late.
                return await writing

    def _extend(self, batch: Batch, record: bytes, is_ok: bool) -> FileSizes:
        sizes = self._sizes.get(batch.batch_id) or FileSizes(batch.output_bytes, batch.error_bytes)
        if is_ok:
            end = self._files.extend(batch.output_file_id, sizes.output_bytes, record)
            sizes = msgspec.structs.replace(sizes, output_bytes=end)
        else:
            end = self._files.extend(batch.error_file_id, sizes.error_bytes, record)
            sizes = msgspec.structs.replace(sizes, error_bytes=end)
        self._sizes[batch.batch_id] = sizes
        return sizes

    def _complete(self, batch: Batch) -> FileSizes:
        """Tell what never ran, and make the files ones that clients see."""
        error_bytes = batch.error_bytes
        if batch.ending in _NEVER_RAN and batch.unfinished:
            code, message = _NEVER_RAN[batch.ending]
            lines = self._lines_of(batch)
            lines.locate()
            records = (
                _record(batch, item, lines.item(item).custom_id, None, {"code": code, "message": message})
                for item in batch.unfinished
            )
            error_bytes = self._files.extend(batch.error_file_id, batch.error_bytes, b"".join(records))
        created_at = self._context.clock.wall_ns() // NS_PER_S
        for file_id, num_bytes, kind in (
            (batch.output_file_id, batch.output_bytes, "output"),
            (batch.error_file_id, error_bytes, "error"),
        ):
            if num_bytes:
                note = FileNote(
                    id=file_id,
                    bytes=num_bytes,
                    created_at=created_at,
                    filename=f"{batch.batch_id}_{kind}.jsonl",
                    purpose="batch_output",
                )
                self._files.publish(note)
        return FileSizes(batch.output_bytes, error_bytes)


def _behind_all(call: Call) -> Call:
    """The call at the priority of batches.

    Raises:
        RequestError: it wants what an item of a batch cannot have.
    """
    if call.stream:
        raise RequestError("stream: the answers of a batch stand in its output file", param="stream")
    if call.requests[0].priority:
        raise RequestError("priority: a batch runs behind everything else", param="priority")
    requests = tuple(msgspec.structs.replace(request, priority=PRIORITY) for request in call.requests)
    return msgspec.structs.replace(call, requests=requests)


def _record(batch: Batch, item: int, custom_id: str, response: Any, error: Any) -> bytes:
    """One line of the output or error file."""
    name = f"batch_req_{batch.batch_id.removeprefix('batch_')}_{item}"
    return msgspec.json.encode({"id": name, "custom_id": custom_id, "response": response, "error": error}) + b"\n"


async def _nobody_looks() -> None:
    """No client waits for an item."""
