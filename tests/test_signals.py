"""A server process that is told to stop, or that cannot go on: what its clients see, and its exit status."""

import asyncio
import re
import signal
import subprocess
import sys
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
import pytest

from gptoss.messages import events as ev
from gptoss.telemetry.segment_reader import SegmentReader
from gptoss.testing import fake_text, fake_token

pytestmark = [pytest.mark.slow, pytest.mark.timeout(60)]

PROGRAM = Path(__file__).with_name("serving_process.py")
WAIT_S = 20.0
ENDLESS = 50_000


class Served:
    """A server in a process of its own, and a client of it."""

    def __init__(self, process: subprocess.Popen[str], session: aiohttp.ClientSession) -> None:
        self.process = process
        self.session = session

    async def exit_status(self) -> int:
        return await asyncio.to_thread(self.process.wait, WAIT_S)

    async def ready(self) -> tuple[int, str]:
        """Status and reason of the readiness probe."""
        async with self.session.get("/health/ready") as answer:
            return answer.status, str((await answer.json()).get("reason", ""))

    async def until_unready(self) -> str:
        """Waits until the server says that it is not ready; returns why."""
        async with asyncio.timeout(WAIT_S):
            while (found := await self.ready())[0] != 503:
                await asyncio.sleep(0.01)
        return found[1]

    def ask(self, max_tokens: int) -> Any:
        """A stream that waits to be read."""
        body: dict[str, Any] = {"messages": [{"role": "user", "content": "x"}], "seed": 3, "stream": True}
        return self.session.post("/v1/chat/completions", json=body | {"max_tokens": max_tokens, "ignore_eos": True})


@asynccontextmanager
async def served(folder: Path, step_s: float = 0.02, **settings: Any) -> AsyncGenerator[Served]:
    values = msgspec.json.encode({"port": 0, "devices": "cpu", "data_dir": str(folder), **settings}).decode()
    command = [sys.executable, str(PROGRAM), str(step_s), values]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        url = await asyncio.to_thread(_address, process.stderr)
        async with aiohttp.ClientSession(url, timeout=aiohttp.ClientTimeout(WAIT_S)) as session:
            yield Served(process, session)
    finally:
        process.kill()
        process.communicate()


def _address(lines: Any) -> str:
    for line in lines:
        if found := re.search(r"http://[\d.]+:\d+", line):
            return found.group()
    raise AssertionError("the server ended before it was ready")


async def frames(answer: aiohttp.ClientResponse) -> list[str]:
    """The events of a stream that has begun, to its end."""
    return [line[6:].decode().strip() async for line in answer.content if line.startswith(b"data: ")]


def text_of(found: list[str]) -> str:
    pieces = [msgspec.json.decode(frame)["choices"] for frame in found if frame != "[DONE]"]
    return "".join(choice["delta"].get("content") or "" for choices in pieces for choice in choices)


def recorded(folder: Path, *kinds: Any) -> list[Any]:
    return [r.event for r in SegmentReader(folder / "journal").read() if isinstance(r.event, kinds)]


async def test_the_first_signal_lets_running_requests_finish_and_takes_no_new_ones(tmp_path: Path) -> None:
    async with served(tmp_path) as server, server.ask(150) as running:
        first = await running.content.readline()
        server.process.send_signal(signal.SIGTERM)
        assert await server.until_unready() == "draining"
        async with server.ask(1) as late:
            assert late.status == 503
            assert (await late.json())["error"]["code"] == "not_ready"
            assert int(late.headers["Retry-After"]) >= 1
        async with server.session.get("/health/live") as alive:
            assert alive.status == 200
        found = [first[6:].decode().strip(), *await frames(running)]
        assert found[-1] == "[DONE]"
        assert text_of(found) == "".join(fake_text(fake_token(3, position)) for position in range(150))
        assert await server.exit_status() == 0
    assert [type(end).__name__ for end in recorded(tmp_path, *ev.TERMINAL_EVENTS)] == [
        "RequestRejected",
        "RequestCompleted",
    ]


async def test_who_outlives_the_drain_is_told_so_in_the_last_frame(tmp_path: Path) -> None:
    async with served(tmp_path, drain_timeout_s=0.3) as server, server.ask(ENDLESS) as running:
        await running.content.readline()
        server.process.send_signal(signal.SIGTERM)
        found = await frames(running)
        assert msgspec.json.decode(found[-1])["error"]["code"] == "not_ready"
        assert "[DONE]" not in found
        assert await server.exit_status() == 0
    ends = recorded(tmp_path, *ev.TERMINAL_EVENTS)
    assert [(type(end), end.reason) for end in ends] == [(ev.RequestCancelled, "shutdown")]
    assert recorded(tmp_path, ev.NodeStopped)


async def test_the_second_signal_ends_the_process_at_once_and_the_next_start_tells_who_was_cut_off(
    tmp_path: Path,
) -> None:
    async with served(tmp_path, drain_timeout_s=600.0) as server, server.ask(ENDLESS) as running:
        await running.content.readline()
        async with asyncio.timeout(WAIT_S):
            while not recorded(tmp_path, ev.FirstTokenProduced):
                await asyncio.sleep(0.02)
        server.process.send_signal(signal.SIGTERM)
        await server.until_unready()
        server.process.send_signal(signal.SIGTERM)
        assert await server.exit_status() == -signal.SIGTERM
    assert recorded(tmp_path, *ev.TERMINAL_EVENTS) == []
    async with served(tmp_path) as again:
        assert (await again.ready())[0] == 200
    ends = recorded(tmp_path, *ev.TERMINAL_EVENTS)
    assert [(type(end), end.code) for end in ends] == [(ev.RequestFailed, "aborted_by_crash")]


async def test_an_actor_that_fails_again_and_again_takes_the_server_down_with_a_status_that_says_so(
    tmp_path: Path,
) -> None:
    async with served(tmp_path, drain_timeout_s=1.0) as server, server.ask(ENDLESS) as running:
        await running.content.readline()
        async with asyncio.timeout(WAIT_S):
            while (found := await server.ready())[0] != 503:
                server.process.send_signal(signal.SIGUSR1)
                await asyncio.sleep(0.05)
        assert found[1] in {"draining", "memory failed too often and stays down"}
        assert "error" in msgspec.json.decode((await frames(running))[-1])
        assert await server.exit_status() == 1
    (escalated,) = recorded(tmp_path, ev.SupervisorEscalated)
    assert (escalated.child, escalated.restarts) == ("memory", 3)
    assert len(recorded(tmp_path, ev.ActorRestarted)) == 3
