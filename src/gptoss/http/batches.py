"""``/v1/batches``: order, list, retrieve and cancel batches. What they are is decided by ``actors.batches``."""

import asyncio
from typing import Any, Literal

import msgspec
from aiohttp import web

from gptoss.clock import NS_PER_S
from gptoss.errors import BatchUnknown, NotReady, RequestError
from gptoss.http.batch_runner import ENDPOINTS
from gptoss.http.context import BATCHES, CONTEXT
from gptoss.http.decode import BodyDecoder
from gptoss.http.errors import json_response
from gptoss.http.file_store import FILES, new_file_id
from gptoss.http.intake import read_wire
from gptoss.http.paging import page_of
from gptoss.http.schema import Metadata
from gptoss.messages import batch_commands as cmd
from gptoss.messages.batch import Batch, BatchStatus

WINDOW = "24h"
WINDOW_S = 86_400
OPEN_MAX = 100
LIST_MAX = 100
LIST_DEFAULT = 20


class BatchRequest(msgspec.Struct, frozen=True, kw_only=True):
    """The body of ``POST /v1/batches``."""

    input_file_id: str
    endpoint: str
    completion_window: str
    metadata: Metadata | None = None


class BatchErrorBody(msgspec.Struct, frozen=True, kw_only=True):
    """Why a batch failed; ``line`` counts from 1."""

    code: str
    message: str
    line: int | None
    param: str | None


class BatchErrors(msgspec.Struct, frozen=True, kw_only=True):
    """All that is wrong."""

    object: Literal["list"] = "list"
    data: list[BatchErrorBody]


class RequestCounts(msgspec.Struct, frozen=True, kw_only=True):
    """How many requests a batch has, and how they ended."""

    total: int
    completed: int
    failed: int


class BatchBody(msgspec.Struct, frozen=True, kw_only=True):
    """A batch. Times are Unix seconds."""

    id: str
    object: Literal["batch"] = "batch"
    endpoint: str
    errors: BatchErrors | None
    input_file_id: str
    completion_window: str = WINDOW
    status: BatchStatus
    output_file_id: str | None
    error_file_id: str | None
    created_at: int
    in_progress_at: int | None
    expires_at: int
    finalizing_at: int | None
    completed_at: int | None
    failed_at: int | None
    expired_at: int | None
    cancelling_at: int | None
    cancelled_at: int | None
    request_counts: RequestCounts
    metadata: dict[str, str] | None


class BatchList(msgspec.Struct, frozen=True, kw_only=True):
    """The answer of ``GET /v1/batches``."""

    object: Literal["list"] = "list"
    data: list[BatchBody]
    first_id: str | None
    last_id: str | None
    has_more: bool


DECODER = BodyDecoder(BatchRequest)


async def create(request: web.Request) -> web.StreamResponse:
    """``POST /v1/batches``."""
    context, files = request.app[CONTEXT], request.app[FILES]
    wire = await read_wire(request, DECODER)
    if context.draining():
        raise NotReady("the server is shutting down and takes no new batches", retry_after_s=5.0)
    _refuse(wire)
    note = files.note(wire.input_file_id, param="input_file_id")
    if note.purpose != "batch":
        raise RequestError(f"{note.id} has the purpose {note.purpose}, not batch", param="input_file_id")
    desk = request.app[BATCHES]
    if sum(not batch.is_over for batch in desk.batches.values()) >= OPEN_MAX:
        raise RequestError(f"{OPEN_MAX} batches are open already; wait for one or cancel one", param="input_file_id")
    batch_id = context.ids.new_id("batch")
    if wire.metadata:
        await asyncio.to_thread(files.keep_metadata, batch_id, wire.metadata)
    order = cmd.CreateBatch(
        now_ns=context.clock.monotonic_ns(),
        wall_s=_wall_s(request),
        window_s=WINDOW_S,
        batch_id=batch_id,
        endpoint=wire.endpoint,
        input_file_id=note.id,
        output_file_id=new_file_id(context.ids),
        error_file_id=new_file_id(context.ids),
    )
    await desk.order(order)
    return json_response(await _body(request, desk.batches[batch_id]))


async def retrieve(request: web.Request) -> web.StreamResponse:
    """``GET /v1/batches/{batch_id}``."""
    return json_response(await _body(request, _known(request)))


async def cancel(request: web.Request) -> web.StreamResponse:
    """``POST /v1/batches/{batch_id}/cancel``."""
    batch = _known(request)
    if batch.is_over:
        raise RequestError(f"{batch.batch_id} is {batch.status} and cannot be cancelled", param="batch_id")
    order = cmd.CancelBatch(
        now_ns=request.app[CONTEXT].clock.monotonic_ns(), wall_s=_wall_s(request), batch_id=batch.batch_id
    )
    await request.app[BATCHES].order(order)
    return json_response(await _body(request, _known(request)))


async def list_batches(request: web.Request) -> web.StreamResponse:
    """``GET /v1/batches?limit=N&after=ID``: newest first."""
    known = list(request.app[BATCHES].batches.values())
    page = page_of(request.query, known, lambda batch: batch.batch_id, limit_max=LIST_MAX, limit_default=LIST_DEFAULT)
    bodies = [await _body(request, batch) for batch in page.entries]
    return json_response(BatchList(data=bodies, first_id=page.first_id, last_id=page.last_id, has_more=page.has_more))


def _refuse(wire: BatchRequest) -> None:
    if wire.endpoint not in ENDPOINTS:
        raise RequestError(
            f"endpoint is {wire.endpoint[:64]!a}; it must be one of {', '.join(ENDPOINTS)}", param="endpoint"
        )
    if wire.completion_window != WINDOW:
        raise RequestError(
            f"completion_window is {wire.completion_window[:32]!a}; it must be {WINDOW!r}", param="completion_window"
        )


def _known(request: web.Request) -> Batch:
    batch_id = request.match_info["batch_id"]
    found = request.app[BATCHES].batches.get(batch_id)
    if found is None:
        raise BatchUnknown(f"no batch is known under the id {batch_id[:128]!a}", param="batch_id")
    return found


def _wall_s(request: web.Request) -> int:
    return request.app[CONTEXT].clock.wall_ns() // NS_PER_S


async def _body(request: web.Request, batch: Batch) -> BatchBody:
    metadata = await asyncio.to_thread(request.app[FILES].metadata, batch.batch_id)
    faults = [
        BatchErrorBody(code=fault.code, message=fault.message, line=fault.line or None, param=fault.param or None)
        for fault in batch.faults
    ]
    ended: dict[str, Any] = {
        f"{status}_at": batch.ended_s if batch.status == status else None
        for status in ("completed", "failed", "expired", "cancelled")
    }
    has_files = batch.is_over and batch.status != "failed"
    return BatchBody(
        id=batch.batch_id,
        endpoint=batch.endpoint,
        errors=BatchErrors(data=faults) if faults else None,
        input_file_id=batch.input_file_id,
        status=batch.status,
        output_file_id=batch.output_file_id if has_files and batch.output_bytes else None,
        error_file_id=batch.error_file_id if has_files and batch.error_bytes else None,
        created_at=batch.created_s,
        in_progress_at=batch.in_progress_s or None,
        expires_at=batch.expires_s,
        finalizing_at=batch.finalizing_s or None,
        cancelling_at=batch.cancelling_s or None,
        request_counts=RequestCounts(total=batch.total, completed=batch.completed, failed=batch.failed),
        metadata=metadata,
        **ended,
    )
