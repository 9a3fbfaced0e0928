"""Batches on a whole server, as OpenAI's client sees them: order, run, stop, and go on after a restart or a crash."""

import asyncio
import shutil
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Literal

import msgspec
import openai
import pytest
from openai.types import Batch

import gptoss
from gptoss.app import ServingSystem
from gptoss.config import Settings
from gptoss.engine.model_source import PreparedModel
from gptoss.http import batches
from gptoss.http.batch_runner import PRIORITY
from gptoss.http.server import serve
from gptoss.messages import batch_events as bev
from gptoss.messages import events as ev
from gptoss.replay.verify import verify
from gptoss.telemetry.recording import JournalRecording, LiveRecording
from gptoss.testing import FAKE_MODEL, FakeDriver, FakeOptions, FakeRenderer

MODEL = PreparedModel(folder="", model_name=FAKE_MODEL, source="test", max_model_len=4096)
Endpoint = Literal["/v1/chat/completions", "/v1/completions", "/v1/responses"]
CHAT: Endpoint = "/v1/chat/completions"
OVER = {"completed", "failed", "expired", "cancelled"}


@asynccontextmanager
async def serving(
    folder: Path | None = None, options: FakeOptions | None = None, **settings: Any
) -> AsyncGenerator[tuple[ServingSystem, openai.AsyncOpenAI]]:
    kept: dict[str, Any] = {"journal": "memory"} if folder is None else {"data_dir": str(folder)}
    values: dict[str, Any] = {"devices": "cpu", **kept, **settings}
    async with ServingSystem(
        Settings(**values), drivers=lambda _: FakeDriver(options), renderer=FakeRenderer(), model=MODEL
    ) as system:
        await system.ready(10.0)
        server = await serve(gptoss.make_app(system), "127.0.0.1", 0)
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0) as client:
            yield system, client
        await system.drain(0.5)
        await server.close()


def jsonl(*lines: dict[str, Any]) -> bytes:
    return b"".join(msgspec.json.encode(line) + b"\n" for line in lines)


def chat(custom_id: str, *, max_tokens: int = 3, **fields: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": f"hello {custom_id}"}]
    body = {"model": FAKE_MODEL, "messages": messages, "max_tokens": max_tokens, "seed": 3, **fields}
    return {"custom_id": custom_id, "method": "POST", "url": CHAT, "body": body}


async def order(client: openai.AsyncOpenAI, content: bytes, endpoint: Endpoint = CHAT) -> Batch:
    file = await client.files.create(file=("in.jsonl", content), purpose="batch")
    return await client.batches.create(
        input_file_id=file.id, endpoint=endpoint, completion_window="24h", metadata={"job": "nightly"}
    )


async def until(client: openai.AsyncOpenAI, batch_id: str, *statuses: str) -> Batch:
    async with asyncio.timeout(20):
        while (batch := await client.batches.retrieve(batch_id)).status not in (statuses or OVER):
            await asyncio.sleep(0.01)
    return batch


async def lines_of(client: openai.AsyncOpenAI, file_id: str | None) -> list[Any]:
    assert file_id is not None
    return [msgspec.json.decode(line) for line in (await client.files.content(file_id)).content.splitlines()]


def counts(batch: Batch) -> tuple[int, int, int]:
    assert batch.request_counts is not None
    return batch.request_counts.total, batch.request_counts.completed, batch.request_counts.failed


async def test_a_batch_is_answered_line_by_line() -> None:
    async with serving() as (system, client):
        made = await order(client, jsonl(chat("a"), chat("b", n=2), chat("c", temperature=9)))
        assert made.status in {"validating", "in_progress"}
        batch = await until(client, made.id)
        assert (batch.status, counts(batch), batch.metadata) == ("completed", (3, 2, 1), {"job": "nightly"})
        assert (
            batch.created_at <= (batch.in_progress_at or 0) <= (batch.finalizing_at or 0) <= (batch.completed_at or 0)
        )
        assert batch.expires_at == batch.created_at + 86_400
        answers = {line["custom_id"]: line for line in await lines_of(client, batch.output_file_id)}
        assert answers.keys() == {"a", "b"}
        assert len(answers["b"]["response"]["body"]["choices"]) == 2
        assert answers["a"]["error"] is None
        response = answers["a"]["response"]
        assert (response["status_code"], response["body"]["usage"]["completion_tokens"]) == (200, 3)
        direct: Any = await client.post("/chat/completions", body=chat("a")["body"], cast_to=object)
        assert response["body"]["choices"][0]["message"] == direct["choices"][0]["message"]
        (refused,) = await lines_of(client, batch.error_file_id)
        assert (refused["custom_id"], refused["response"]["status_code"]) == ("c", 400)
        assert refused["response"]["body"]["error"]["param"] == "temperature"
        events = [r.event for r in system.journal.read(correlation=response["request_id"])]
        assert any(isinstance(event, ev.RequestCompleted) for event in events), "an item is a request like any other"
        assert [each.id async for each in client.batches.list()] == [made.id]
        result = verify(LiveRecording(system.journal))
        assert result.first is None
        assert {each.decider for each in result.checked} >= {"batches", "request"}


async def test_other_endpoints_answer_too() -> None:
    async with serving() as (_, client):
        bodies: dict[Endpoint, dict[str, Any]] = {
            "/v1/completions": {"prompt": "Once", "max_tokens": 2},
            "/v1/responses": {"input": "Once", "max_output_tokens": 2},
        }
        texts: list[str] = []
        for endpoint, body in bodies.items():
            line = {"custom_id": "a", "method": "POST", "url": endpoint, "body": body}
            batch = await until(client, (await order(client, jsonl(line), endpoint)).id)
            assert batch.error_file_id is None
            (answer,) = await lines_of(client, batch.output_file_id)
            said = answer["response"]["body"]
            texts.append(said["choices"][0]["text"] if "choices" in said else said["output"][0]["content"][0]["text"])
        assert [text.count("t") for text in texts] == [2, 2]


async def test_a_file_with_bad_lines_fails_the_batch_and_names_them() -> None:
    async with serving() as (_, client):
        content = jsonl(chat("a"), chat("a")) + b"{\n"
        batch = await until(client, (await order(client, content)).id)
        assert batch.status == "failed"
        assert batch.errors is not None
        found = [(error.line, error.code) for error in batch.errors.data or []]
        assert found == [(2, "duplicate_custom_id"), (3, "invalid_json_line")]
        assert (batch.output_file_id, batch.error_file_id, counts(batch)) == (None, None, (0, 0, 0))


async def test_orders_that_cannot_be_honoured() -> None:
    async with serving() as (_, client):
        file = await client.files.create(file=("in", jsonl(chat("a"))), purpose="batch")
        for fields, param in (
            ({"input_file_id": "file-00000000"}, "input_file_id"),
            ({"endpoint": "/v1/embeddings"}, "endpoint"),
            ({"completion_window": "1h"}, "completion_window"),
        ):
            wanted: Any = {"input_file_id": file.id, "endpoint": CHAT, "completion_window": "24h", **fields}
            with pytest.raises(openai.APIStatusError) as refused:
                await client.batches.create(**wanted)
            assert refused.value.param == param
        with pytest.raises(openai.NotFoundError):
            await client.batches.retrieve("batch_0")


async def test_streams_and_priorities_are_refused_in_a_batch() -> None:
    async with serving() as (_, client):
        batch = await until(client, (await order(client, jsonl(chat("a", stream=True), chat("b", priority=-1)))).id)
        assert (batch.status, counts(batch), batch.output_file_id) == ("completed", (2, 0, 2), None)
        refused = await lines_of(client, batch.error_file_id)
        assert sorted(line["response"]["body"]["error"]["param"] for line in refused) == ["priority", "stream"]


async def test_a_batch_runs_behind_others_and_few_at_a_time() -> None:
    options = FakeOptions(step_s=0.005, max_batch_size=2)
    async with serving(options=options, batch_concurrency=2) as (system, client):
        made = await order(client, jsonl(*(chat(f"{n}", max_tokens=40) for n in range(6))))
        await until(client, made.id, "in_progress")
        async with asyncio.timeout(5):
            while not any(isinstance(r.event, ev.FirstTokenProduced) for r in system.journal.read()):
                await asyncio.sleep(0.005)
        await client.chat.completions.create(**chat("interactive", max_tokens=5)["body"])
        while_it_ran = await client.batches.retrieve(made.id)
        assert counts(while_it_ran)[1] <= 3, "it waited for the items that ran, and for no other"
        await until(client, made.id)
        received = [r.event for r in system.journal.read() if isinstance(r.event, ev.RequestReceived)]
        assert sorted({event.priority for event in received}) == [0, PRIORITY]
        running = most = 0
        for record in system.journal.read(stream="batches"):
            running += isinstance(record.event, bev.BatchItemStarted) - isinstance(record.event, bev.BatchItemFinished)
            most = max(most, running)
        assert (running, most) == (0, 2)


async def test_a_cancelled_batch_keeps_its_answers_and_tells_what_never_ran() -> None:
    async with serving(options=FakeOptions(step_s=0.005), batch_concurrency=1) as (system, client):
        made = await order(client, jsonl(chat("a"), *(chat(f"{n}", max_tokens=2000) for n in range(3))))
        async with asyncio.timeout(5):
            while counts(await client.batches.retrieve(made.id))[1] < 1:
                await asyncio.sleep(0.01)
        assert (await client.batches.cancel(made.id)).status in {"cancelling", "finalizing", "cancelled"}
        batch = await until(client, made.id)
        assert (batch.status, counts(batch)) == ("cancelled", (4, 1, 0))
        assert [line["custom_id"] for line in await lines_of(client, batch.output_file_id)] == ["a"]
        never = await lines_of(client, batch.error_file_id)
        assert [(line["custom_id"], line["response"]) for line in never] == [("0", None), ("1", None), ("2", None)]
        assert {line["error"]["code"] for line in never} == {"batch_cancelled"}
        async with asyncio.timeout(5):
            while system.gateway.running:
                await asyncio.sleep(0.01)
        with pytest.raises(openai.BadRequestError):
            await client.batches.cancel(made.id)


async def test_a_file_that_an_open_batch_reads_cannot_be_deleted() -> None:
    async with serving(options=FakeOptions(step_s=0.005)) as (_, client):
        made = await order(client, jsonl(chat("a", max_tokens=2000)))
        await until(client, made.id, "in_progress")
        with pytest.raises(openai.BadRequestError):
            await client.files.delete(made.input_file_id)
        await client.batches.cancel(made.id)
        await until(client, made.id)
        await client.files.delete(made.input_file_id)


async def answered(client: openai.AsyncOpenAI, batch: Batch) -> list[str]:
    return sorted(line["custom_id"] for line in await lines_of(client, batch.output_file_id))


async def test_a_server_that_is_stopped_goes_on_where_it_was(tmp_path: Path) -> None:
    slow = FakeOptions(step_s=0.01)
    names = [f"{n}" for n in range(8)]
    async with serving(tmp_path, slow, batch_concurrency=2) as (_, client):
        made = await order(client, jsonl(*(chat(name, max_tokens=10) for name in names)))
        async with asyncio.timeout(10):
            while counts(before := await client.batches.retrieve(made.id))[1] < 3:
                await asyncio.sleep(0.01)
    assert before.status == "in_progress"
    async with serving(tmp_path, batch_concurrency=2) as (system, client):
        batch = await until(client, made.id)
        assert (batch.status, counts(batch), batch.metadata) == ("completed", (8, 8, 0), {"job": "nightly"})
        assert await answered(client, batch) == names
        finished = [r.event for r in system.journal.read(stream="batches")]
        items = [event.item for event in finished if isinstance(event, bev.BatchItemFinished)]
        assert sorted(items) == list(range(8)), "what was done is not done again"
    result = verify(JournalRecording(tmp_path / "journal"))
    assert result.first is None


async def test_a_crash_loses_nothing_and_runs_nothing_twice_that_was_done(tmp_path: Path) -> None:
    names = [f"{n}" for n in range(8)]
    image = tmp_path / "image"
    async with serving(tmp_path / "live", FakeOptions(step_s=0.01), batch_concurrency=2) as (system, client):
        made = await order(client, jsonl(*(chat(name, max_tokens=10) for name in names)))
        async with asyncio.timeout(10):
            while counts(await client.batches.retrieve(made.id))[1] < 3:
                await asyncio.sleep(0.01)
        assert system.journal.flush()
        shutil.copytree(tmp_path / "live", image)
    # An answer that was on disk when the process died, and that nothing had told of yet.
    output = next(path for path in (image / "files").iterdir() if path.read_bytes().startswith(b'{"id":"batch_req_'))
    with output.open("ab") as file:
        file.write(b'{"id":"batch_req_x","custom_id":"4"}\n{"id":"ba')
    async with serving(image, batch_concurrency=2) as (system, client):
        batch = await until(client, made.id)
        assert (batch.status, counts(batch)) == ("completed", (8, 8, 0))
        assert await answered(client, batch) == names
        finished = [r.event for r in system.journal.read(stream="batches")]
        items = [event.item for event in finished if isinstance(event, bev.BatchItemFinished)]
        assert sorted(items) == list(range(8))
    async with serving(image) as (_, client):
        assert (await client.batches.retrieve(made.id)).model_dump() == batch.model_dump()


async def test_control_events_of_a_batch_hold_none_of_its_text(tmp_path: Path) -> None:
    async with serving(tmp_path) as (system, client):
        line = chat("canary-custom", user="canary-user")
        line["body"]["messages"][0]["content"] = "canary-prompt"
        batch = await until(client, (await order(client, jsonl(line) + b"")).id)
        assert batch.status == "completed"
        assert system.journal.flush()
        control = b"".join(path.read_bytes() for path in (tmp_path / "journal").glob("*control*"))
    assert b"BatchItemFinished" in control
    assert b"canary" not in control


async def test_a_batch_whose_time_is_over_ends_and_tells_what_never_ran(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batches, "WINDOW_S", 1)
    async with serving(options=FakeOptions(step_s=0.005), batch_concurrency=2) as (system, client):
        made = await order(client, jsonl(chat("a"), *(chat(f"{n}", max_tokens=4000) for n in range(3))))
        batch = await until(client, made.id)
        assert (batch.status, counts(batch)) == ("expired", (4, 1, 0))
        assert batch.expired_at is not None
        never = await lines_of(client, batch.error_file_id)
        assert [(line["custom_id"], line["error"]["code"]) for line in never] == [
            (name, "batch_expired") for name in ("0", "1", "2")
        ]
        ends = [record.event for record in system.journal.read() if isinstance(record.event, ev.RequestCancelled)]
        assert len(ends) == 2, "what ran was stopped"


async def test_an_item_waits_while_the_server_is_too_busy_and_fails_only_for_good_reasons() -> None:
    options = FakeOptions(step_s=0.002, max_batch_size=1)
    async with serving(options=options, queue_timeout_s=0.2, batch_concurrency=1) as (system, client):
        wanted = chat("busy", max_tokens=400)["body"]
        busy = asyncio.ensure_future(client.post("/chat/completions", body=wanted, cast_to=object))
        async with asyncio.timeout(5):
            while not any(isinstance(r.event, ev.FirstTokenProduced) for r in system.journal.read()):
                await asyncio.sleep(0.005)
        made = await order(client, jsonl(chat("a"), chat("b", max_tokens=100_000)))
        batch = await until(client, made.id)
        await busy
        assert (batch.status, counts(batch)) == ("completed", (2, 1, 1))
        refusals = [r.event for r in system.journal.read() if isinstance(r.event, ev.RequestRejected)]
        assert any(event.code == "deadline_exceeded" for event in refusals), "it was sent away before it was served"
        (refused,) = await lines_of(client, batch.error_file_id)
        assert refused["response"]["body"]["error"]["code"] == "context_length_exceeded"
