"""Many clients at once, over HTTP: what is promised to each of them holds. How fast is for benchmarks/bench_load.py."""

import asyncio
import resource
import socket
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
import pytest

from gptoss.app import ServingSystem
from gptoss.bench.client import ChatClient, chat_body
from gptoss.bench.fake_system import FakeShape
from gptoss.bench.over_http import own_server
from gptoss.clock import SystemClock
from gptoss.config import Settings
from gptoss.engine.model_source import PreparedModel
from gptoss.http.server import RunningServer, serve
from gptoss.messages import events as ev
from gptoss.messages.envelope import Origin
from gptoss.serving_context import Scrapes, make_app
from gptoss.testing import FAKE_MODEL, FakeDriver, FakeOptions, FakeRenderer, fake_text, fake_token

pytestmark = [pytest.mark.slow, pytest.mark.timeout(120)]

MODEL = PreparedModel(folder="", model_name=FAKE_MODEL, source="test", max_model_len=100_000)
ENDLESS = 50_000
WAIT_S = 60.0


@asynccontextmanager
async def served(
    folder: Path, options: FakeOptions, **settings: Any
) -> AsyncGenerator[tuple[ServingSystem, RunningServer]]:
    system = ServingSystem(
        Settings(devices="cpu", data_dir=str(folder), max_batch_size=options.max_batch_size, **settings),
        drivers=lambda _: FakeDriver(options),
        renderer=FakeRenderer(),
        model=MODEL,
    )
    async with system:
        await system.ready(10.0)
        server = await serve(make_app(system), "127.0.0.1", 0)
        yield system, server
        await server.close()


def session_of(url: str) -> aiohttp.ClientSession:
    return aiohttp.ClientSession(url, connector=aiohttp.TCPConnector(limit=0), timeout=aiohttp.ClientTimeout(WAIT_S))


def body(number: int, tokens: int) -> dict[str, object]:
    return chat_body([{"role": "user", "content": "hello there"}], tokens, {"seed": number, "ignore_eos": True})


async def until(system: ServingSystem, is_so: Callable[[], bool]) -> None:
    async with asyncio.timeout(WAIT_S):
        while not is_so():
            await asyncio.sleep(0.05)
            await system.caught_up()


def reserved_bytes(system: ServingSystem) -> int:
    return system.projection.memory_stats()["kv_reserved_bytes"]


async def test_with_256_running_and_512_queued_number_769_is_told_when_to_come_again(tmp_path: Path) -> None:
    options = FakeOptions(step_s=0.2, max_batch_size=256, max_model_len=100_000, kv_budget_bytes=1 << 40)
    async with served(tmp_path, options, max_queue=512) as (system, server), session_of(server.url) as session:

        async def hold(number: int) -> None:
            async with session.post("/v1/chat/completions", json=body(number, ENDLESS)) as answer:
                await answer.read()

        held = [asyncio.ensure_future(hold(number)) for number in range(768)]

        def is_full() -> bool:
            stats = system.projection.stats()
            return (stats["running"], stats["queued"]) == (256, 512)

        await until(system, is_full)
        async with session.post("/v1/chat/completions", json=body(768, ENDLESS)) as answer:
            assert answer.status == 429
            assert int(answer.headers["Retry-After"]) >= 1
            assert (await answer.json())["error"]["code"] == "queue_full"
        for task in held:
            task.cancel()
        await asyncio.gather(*held, return_exceptions=True)
        await until(system, lambda: not system.gateway.running)
        await until(system, lambda: reserved_bytes(system) == 0)
        ends = [type(record.event) for record in system.journal.read() if isinstance(record.event, ev.TERMINAL_EVENTS)]
        assert sorted(kind.__name__ for kind in ends) == ["RequestCancelled"] * 768 + ["RequestRejected"]


async def test_a_client_that_reads_nothing_is_dropped_and_its_memory_is_free(tmp_path: Path) -> None:
    options = FakeOptions(step_s=0.001, max_model_len=100_000, kv_budget_bytes=1 << 40)
    async with served(tmp_path, options, client_stall_s=0.5) as (system, server):
        client = socket.socket()
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2304)
        client.setblocking(False)
        loop = asyncio.get_running_loop()
        await loop.sock_connect(client, ("127.0.0.1", server.port))
        sent = msgspec.json.encode(body(1, ENDLESS))
        head = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        await loop.sock_sendall(client, f"{head}Content-Length: {len(sent)}\r\n\r\n".encode() + sent)
        await until(system, lambda: reserved_bytes(system) > 0)
        await until(system, lambda: reserved_bytes(system) == 0 and not system.gateway.running)
        client.close()
        ends = [record.event for record in system.journal.read() if isinstance(record.event, ev.TERMINAL_EVENTS)]
        assert [(type(end), getattr(end, "reason", "")) for end in ends] == [(ev.RequestCancelled, "slow_client")]
        assert any(isinstance(record.event, ev.ClientSlow) for record in system.journal.read())


async def test_a_hundred_scrapes_at_once_are_answered_while_streams_run(tmp_path: Path) -> None:
    options = FakeOptions(step_s=0.005, max_model_len=100_000, kv_budget_bytes=1 << 40)
    async with served(tmp_path, options) as (_, server), session_of(server.url) as session:

        async def scrape() -> str:
            async with session.get("/metrics") as answer:
                assert answer.status == 200
                return await answer.text()

        client = ChatClient(session, "/v1", SystemClock())
        streams = [asyncio.ensure_future(client.ask(body(number, 60))) for number in range(8)]
        texts = await asyncio.gather(*(scrape() for _ in range(100)))
        timed = await asyncio.gather(*streams)
    assert all("vllm:num_requests_running" in text for text in texts)
    assert [(each.error, each.tokens) for each in timed] == [("", 60)] * 8


async def test_every_one_of_many_streams_has_all_its_tokens_in_order(tmp_path: Path) -> None:
    options = FakeOptions(step_s=0.01, max_batch_size=150, max_model_len=100_000, kv_budget_bytes=1 << 40)
    async with served(tmp_path, options) as (system, server), session_of(server.url) as session:
        client = ChatClient(session, "/v1", SystemClock())
        timed = await asyncio.gather(*(client.ask(body(number, 25)) for number in range(150)))
        await until(system, lambda: not system.gateway.running)
        assert reserved_bytes(system) == 0
    for number, each in enumerate(timed):
        assert each.error == ""
        assert each.text == "".join(fake_text(fake_token(number, position)) for position in range(25))


async def test_two_thousand_idle_connections_are_kept_and_keep_nobody_from_being_served() -> None:
    number = 2000
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < 2 * number:
        pytest.skip(f"this machine allows {hard} open files")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 2 * number), hard))  # the server's process inherits it
    with own_server(FakeShape()) as server:
        port = int(server.url.rpartition(":")[2].removesuffix("/v1"))
        idle = [await asyncio.open_connection("127.0.0.1", port) for _ in range(number)]
        async with session_of(server.url.removesuffix("/v1")) as session:
            timed = await ChatClient(session, "/v1", SystemClock()).ask(body(1, 5))
        assert (timed.error, timed.tokens) == ("", 5)
        for reader, writer in idle[:: number // 20]:
            writer.write(b"GET /health/live HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert (await asyncio.wait_for(reader.readline(), WAIT_S)).startswith(b"HTTP/1.1 200")
        for _, writer in idle:
            writer.transport.abort()


async def test_scrapes_at_once_share_an_exposition_and_nobody_gets_one_from_before_they_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with served(tmp_path, FakeOptions()) as (system, _):
        rendered: list[bytes] = []
        render = system.metrics.render

        def counted(accept: str = "") -> tuple[bytes, str]:
            dead = ev.DeadLettered(to="a", message_type="m", reason="full")
            body, content_type = render(accept)
            rendered.append(body)
            system.journal.append(dead, Origin(stream="actor/a"))  # so that the next one is another
            return body, content_type

        monkeypatch.setattr(system.metrics, "render", counted)
        scrapes = Scrapes(system)
        found = await asyncio.gather(*(scrapes.scrape("") for _ in range(100)))
        assert len(rendered) == 2, "the first, and one for all that came while it was made"
        assert [body for body, _ in found] == [rendered[0]] + [rendered[1]] * 99
        later, _ = await scrapes.scrape("")
        assert later == rendered[2]
        assert len(set(rendered)) == 3
