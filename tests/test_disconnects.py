"""Clients that go while their request is under way: it ends once, soon, and leaves nothing behind, whatever it was at."""

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from typing import Any

import msgspec
import psutil
import pytest

from gptoss.app import ServingSystem
from gptoss.config import Settings
from gptoss.engine.model_source import PreparedModel
from gptoss.http.server import RunningServer, serve
from gptoss.messages import events as ev
from gptoss.messages.envelope import Record
from gptoss.serving_context import make_app
from gptoss.testing import FAKE_MODEL, FakeDriver, FakeOptions, FakeRenderer, fake_text, fake_token, run_until_idle

MODEL = PreparedModel(folder="", model_name=FAKE_MODEL, source="test", max_model_len=4096)
WAIT_S = 10.0
STEPS_TO_CANCEL_MAX = 2


@asynccontextmanager
async def served(step_s: float = 0.01, slots: int = 4) -> AsyncGenerator[tuple[ServingSystem, RunningServer]]:
    options = FakeOptions(step_s=step_s, max_batch_size=slots)
    async with ServingSystem(
        Settings(journal="memory", devices="cpu", max_batch_size=slots),
        drivers=lambda _: FakeDriver(options),
        renderer=FakeRenderer(),
        model=MODEL,
    ) as system:
        await system.ready(WAIT_S)
        server = await serve(make_app(system), "127.0.0.1", 0)
        try:
            yield system, server
        finally:
            await server.close()


async def ask(server: RunningServer, name: str, **fields: Any) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Send a request over a connection of its own."""
    content = fields.pop("content", "x")
    body = msgspec.json.encode({"messages": [{"role": "user", "content": content}], "ignore_eos": True, **fields})
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nX-Request-ID: {name}\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    writer.write(head.encode() + body)
    return reader, writer


async def until(is_so: Callable[[], object]) -> None:
    async with asyncio.timeout(WAIT_S):
        while not is_so():
            await asyncio.sleep(0.002)


def of(system: ServingSystem, name: str, *kinds: type[Any]) -> list[Record]:
    return [r for r in system.journal.read(correlation=name) if isinstance(r.event, kinds)]


def rows(system: ServingSystem, name: str, after: int = -1) -> list[ev.CommittedRow]:
    steps = [r.event for r in system.journal.read(after=after) if isinstance(r.event, ev.StepCommitted)]
    return [row for step in steps for row in step.rows if row.request_id == name]


async def left_nothing(system: ServingSystem, server: RunningServer) -> None:
    """Everything is back where it was before the first request, as the next one finds it."""
    await until(lambda: not system.gateway.running)
    await run_until_idle(system.system)
    await system.caught_up()
    assert system.projection.memory_stats()["kv_reserved_bytes"] == 0
    stats = system.projection.stats()
    assert (stats["running"], stats["queued"]) == (0, 0)
    reader, writer = await ask(server, "canary", max_tokens=1)
    assert (await asyncio.wait_for(reader.readline(), WAIT_S)).startswith(b"HTTP/1.1 200")
    writer.close()
    (step,) = [r.event for r in system.journal.read() if isinstance(r.event, ev.StepCommitted) and _has(r, "canary")]
    assert (step.waiting, step.running, step.kv_bytes_in_use) == (0, 0, 0), "in the engine too"


def _has(record: Record, name: str) -> bool:
    return any(row.request_id == name for row in getattr(record.event, "rows", ()))


LONG = "word " * 3000
STAGES: dict[str, tuple[dict[str, Any], Callable[[ServingSystem], object]]] = {
    "queued": ({"max_tokens": 50}, lambda system: of(system, "gone", ev.Enqueued)),
    "prefill": (
        {"max_tokens": 50, "content": LONG},
        lambda system: [row for row in rows(system, "gone") if row.prefilled and not row.tokens],
    ),
    "decode": ({"max_tokens": 2000}, lambda system: len(rows(system, "gone")) > 3),
}


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("stage", STAGES)
async def test_a_client_that_goes_ends_its_request_within_two_steps(stage: str, stream: bool) -> None:
    fields, is_there = STAGES[stage]
    async with served(slots=1 if stage == "queued" else 4) as (system, server):
        _, holder = await ask(server, "stays", max_tokens=4000, stream=True)
        await until(lambda: len(rows(system, "stays")) > 2)
        _, writer = await ask(server, "gone", stream=stream, **fields)
        await until(lambda: is_there(system))
        writer.transport.abort()
        await until(lambda: of(system, "gone", *ev.TERMINAL_EVENTS))
        (end,) = of(system, "gone", *ev.TERMINAL_EVENTS)
        assert isinstance(end.event, ev.RequestCancelled)
        assert end.event.reason == "disconnect"
        (asked,) = of(system, "gone", ev.CancelRequested)
        assert len(rows(system, "gone", after=asked.meta.pos)) <= STEPS_TO_CANCEL_MAX
        await until(lambda: not of(system, "gone", ev.ReservationGranted) or of(system, "gone", ev.ReservationReleased))
        before = len(rows(system, "stays"))
        await until(lambda: len(rows(system, "stays")) > before + 2)  # nobody else is harmed
        assert of(system, "stays", *ev.TERMINAL_EVENTS) == []
        holder.transport.abort()
        await left_nothing(system, server)
        assert len(of(system, "gone", *ev.TERMINAL_EVENTS)) == 1


async def test_a_client_that_goes_at_the_last_chunk_leaves_one_end() -> None:
    async with served(step_s=0.002) as (system, server):
        for number in range(12):
            name = f"last-{number}"
            reader, writer = await ask(server, name, max_tokens=5, seed=3, stream=True)
            await asyncio.wait_for(reader.readuntil(fake_text(fake_token(3, 4)).encode()), WAIT_S)
            writer.transport.abort()
            await until(lambda name=name: of(system, name, *ev.TERMINAL_EVENTS))
        await left_nothing(system, server)
        ends = [r for r in system.journal.read() if isinstance(r.event, ev.TERMINAL_EVENTS)]
        names = [r.meta.correlation for r in ends]
        assert sorted(names) == sorted(["canary", *(f"last-{number}" for number in range(12))])


async def test_a_client_that_goes_during_its_upload_leaves_no_request() -> None:
    async with served() as (system, server):
        _, writer = await asyncio.open_connection("127.0.0.1", server.port)
        head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        writer.write(head + b'Content-Length: 500\r\n\r\n{"messages":')
        await asyncio.sleep(0.05)
        writer.transport.abort()
        await left_nothing(system, server)
        admitted = [r.meta.correlation for r in system.journal.read() if isinstance(r.event, ev.MemoryRequested)]
        assert admitted == ["canary"]


async def test_after_clients_that_came_and_went_neither_tasks_nor_descriptors_are_left() -> None:
    async with served(step_s=0.002, slots=16) as (system, server):

        async def one(number: int) -> None:
            reader, writer = await ask(server, f"r{number}", max_tokens=20 if number % 3 else 2000, stream=True)
            if number % 3:
                await asyncio.wait_for(reader.readuntil(b"[DONE]"), WAIT_S)
                writer.close()
                await writer.wait_closed()
            else:
                await asyncio.wait_for(reader.readuntil(b'"content":"t'), WAIT_S)
                writer.transport.abort()

        async def counts() -> tuple[int, int, int]:
            await until(lambda: not system.gateway.running)
            await run_until_idle(system.system)
            await asyncio.sleep(0.1)  # closed transports go with the loop's next turns
            return len(asyncio.all_tasks()), psutil.Process().num_fds(), len(system.directory.names(""))

        await one(1)  # what the first request makes stays: threads and their descriptors
        before = await counts()
        for _ in range(3):
            await asyncio.gather(*(one(number) for number in range(30)))
        assert await counts() == before
        await left_nothing(system, server)
