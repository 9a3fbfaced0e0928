"""Many clients at once: is what is promised about them kept, and how long does it take?

    python benchmarks/bench_load.py                              everything, two minutes
    python benchmarks/bench_load.py streams --seconds 600        500 streams at 10 tokens/s for 10 minutes
    python benchmarks/bench_load.py overload|idle|scrapes

The server runs in this process, so that the lag of its event loop, its memory, tasks and descriptors can be read; its
engine and its clients are processes of their own. Exit status 1 if a promise that does not hang on speed is broken.
"""

import argparse
import asyncio
import gc
import multiprocessing
import resource
import statistics
import sys
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

import aiohttp
import psutil

from gptoss.app import ServingSystem
from gptoss.bench.client import ChatClient, chat_body
from gptoss.bench.fake_system import FakeShape, fake_system
from gptoss.clock import SystemClock
from gptoss.http.server import serve
from gptoss.serving_context import make_app
from gptoss.testing import fake_text, fake_token

STREAMS = 500
STEP_MS = 100.0
IDLE = 2000
RUNNING, QUEUED = 256, 512
SCRAPES = 100
ENDLESS = 500_000


class Lag:
    """How late the event loop is, in milliseconds, sampled."""

    def __init__(self) -> None:
        self.samples: list[float] = []
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> "Lag":
        self._task = asyncio.ensure_future(self._sample())
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._task is not None
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    async def _sample(self) -> None:
        while True:
            before = time.perf_counter()
            await asyncio.sleep(0.005)
            self.samples.append((time.perf_counter() - before - 0.005) * 1e3)

    def __str__(self) -> str:
        ordered = sorted(self.samples)
        return (
            f"p50 {statistics.median(ordered):.1f} ms, p99 {ordered[len(ordered) * 99 // 100]:.1f} ms, "
            f"max {ordered[-1]:.1f} ms"
        )


@dataclass(frozen=True)
class Holding:
    """What the server's process holds."""

    memory_mb: float
    tasks: int
    descriptors: int

    def __str__(self) -> str:
        return f"{self.memory_mb:.1f} MB, {self.tasks} tasks, {self.descriptors} descriptors"


def holding() -> Holding:
    gc.collect()
    me = psutil.Process()
    return Holding(me.memory_info().rss / 1e6, len(asyncio.all_tasks()), me.num_fds())


@asynccontextmanager
async def served(shape: FakeShape) -> AsyncGenerator[tuple[ServingSystem, str]]:
    async with fake_system(shape) as (system, _):
        server = await serve(make_app(system), "127.0.0.1", 0)
        yield system, server.url
        await server.close()


def session_of(url: str) -> aiohttp.ClientSession:
    return aiohttp.ClientSession(url, connector=aiohttp.TCPConnector(limit=0), timeout=aiohttp.ClientTimeout(None))


def body(number: int, tokens: int) -> dict[str, object]:
    return chat_body([{"role": "user", "content": "hello there"}], tokens, {"seed": number, "ignore_eos": True})


async def in_child(work: Callable[..., object], *args: object) -> object:
    """Run ``work`` in a process of its own and return what it returns."""
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        return await asyncio.to_thread(pool.apply, work, args)


async def wait_until(is_so: Callable[[], bool], timeout_s: float = 60.0) -> None:
    async with asyncio.timeout(timeout_s):
        while not is_so():
            await asyncio.sleep(0.05)


# ---------------------------------------------------------------- streams


def stream_clients(url: str, streams: int, tokens: int) -> tuple[int, list[str]]:
    """Streams that came whole, and what was wrong with the others. In the clients' process."""

    async def run() -> tuple[int, list[str]]:
        async with session_of(url) as session:
            client = ChatClient(session, "/v1", SystemClock())
            timed = await asyncio.gather(*(client.ask(body(number, tokens)) for number in range(streams)))
        wrong: list[str] = []
        for number, each in enumerate(timed):
            expected = "".join(fake_text(fake_token(number, position)) for position in range(tokens))
            if each.error or each.text != expected:
                wrong.append(f"stream {number}: {each.error or f'{len(each.text)} of {len(expected)} characters'}")
        return streams - len(wrong), wrong

    return asyncio.run(run())


async def streams(options: argparse.Namespace) -> bool:
    tokens = int(options.seconds * 1000 / STEP_MS)
    shape = FakeShape(slots=STREAMS, step_ms=STEP_MS, max_queue=STREAMS, request_timeout_s=2 * options.seconds + 60)
    async with served(shape) as (system, url):
        await in_child(stream_clients, url, STREAMS, 20)  # warm
        await wait_until(lambda: not system.gateway.running)
        before = holding()
        async with Lag() as lag:
            began, spent = time.perf_counter(), time.process_time()
            found = await in_child(stream_clients, url, STREAMS, tokens)
            wall, spent = time.perf_counter() - began, time.process_time() - spent
        await wait_until(lambda: not system.gateway.running)
        await asyncio.sleep(1.0)
        after = holding()
    assert isinstance(found, tuple)
    whole, wrong = found
    print(f"{STREAMS} streams of {tokens} tokens, one each {STEP_MS:g} ms: {whole} whole and in order in {wall:.0f} s")
    print(f"  event loop's lag: {lag} (to be under 50 ms at p99)")
    print(f"  processor: {spent / wall:.0%} of a core, {spent / (STREAMS * tokens) * 1e6:.1f} us a token")
    growth = 100 * (after.memory_mb / before.memory_mb - 1)
    print(f"  before: {before}\n  after:  {after}; memory {growth:+.1f}% (to be under 2%)", flush=True)
    for line in wrong[:5]:
        print(f"  {line}")
    return not wrong and after.tasks <= before.tasks and after.descriptors <= before.descriptors


# ---------------------------------------------------------------- overload


def hold_clients(url: str, number: int, ready: str) -> list[tuple[float, int, str]]:
    """Fill the server, then send some more: the time, status and Retry-After of each of those."""

    async def run() -> list[tuple[float, int, str]]:
        async with session_of(url) as session:

            async def hold(seed: int) -> None:
                async with session.post("/v1/chat/completions", json=body(seed, ENDLESS)) as answer:
                    await answer.read()

            held = [asyncio.ensure_future(hold(seed)) for seed in range(number)]
            stats: dict[str, int] = {}
            while (stats.get("running"), stats.get("queued")) != (RUNNING, QUEUED):
                await asyncio.sleep(0.2)
                async with session.get(ready) as answer:
                    stats = await answer.json()
            found: list[tuple[float, int, str]] = []
            for seed in range(50):
                began = time.perf_counter()
                async with session.post("/v1/chat/completions", json=body(seed, ENDLESS)) as answer:
                    await answer.read()
                    took = time.perf_counter() - began
                    found.append((took * 1e3, answer.status, answer.headers.get("Retry-After", "")))
                await asyncio.sleep(0.02)
            for task in held:
                task.cancel()
            await asyncio.gather(*held, return_exceptions=True)
            return found

    return asyncio.run(run())


async def overload(_: argparse.Namespace) -> bool:
    shape = FakeShape(slots=RUNNING, step_ms=STEP_MS, max_queue=QUEUED)
    async with served(shape) as (system, url):
        found = await in_child(hold_clients, url, RUNNING + QUEUED, "/stats")
        assert isinstance(found, list)
        await wait_until(lambda: not system.gateway.running)
        await system.caught_up()
        held_bytes = system.projection.memory_stats()["kv_reserved_bytes"]
    times = sorted(took for took, _, _ in found)
    good = all(status == 429 and int(retry or 0) >= 1 for _, status, retry in found)
    print(f"{RUNNING} running and {QUEUED} queued; {len(found)} more: {'all 429 with Retry-After' if good else found}")
    print(f"  answered in p50 {statistics.median(times):.1f} ms, max {times[-1]:.1f} ms (to be under 50 ms)")
    print(f"  KV memory held after everybody left: {held_bytes} bytes", flush=True)
    return good and held_bytes == 0


# ---------------------------------------------------------------- idle connections, scrapes


def idle_clients(url: str, number: int) -> tuple[int, float]:
    """Connections that are still open after 3 s, and how long a chat took beside them, in ms."""

    async def run() -> tuple[int, float]:
        port = int(url.rpartition(":")[2])
        idle = [await asyncio.open_connection("127.0.0.1", port) for _ in range(number)]
        await asyncio.sleep(3.0)
        async with session_of(url) as session:
            timed = await ChatClient(session, "/v1", SystemClock()).ask(body(1, 1))
        is_open = sum(not reader.at_eof() for reader, _ in idle)
        for _, writer in idle:
            writer.transport.abort()
        return (is_open if not timed.error else 0), timed.total_s * 1e3

    return asyncio.run(run())


async def idle(_: argparse.Namespace) -> bool:
    async with served(FakeShape()) as (_system, url):
        before = holding()
        async with Lag() as lag:
            found = await in_child(idle_clients, url, IDLE)
        await asyncio.sleep(0.5)
        after = holding()
    assert isinstance(found, tuple)
    print(f"{IDLE} idle connections: {found[0]} stay open, a chat of one token beside them takes {found[1]:.1f} ms")
    print(f"  event loop's lag: {lag}\n  before: {before}\n  after:  {after}", flush=True)
    return found[0] == IDLE and after.descriptors <= before.descriptors


def scrape_clients(url: str, number: int) -> int:
    """Scrapes at once that were answered."""

    async def run() -> int:
        async with session_of(url) as session:

            async def scrape() -> bool:
                async with session.get("/metrics") as answer:
                    return answer.status == 200 and b"vllm:num_requests_running" in await answer.read()

            return sum(await asyncio.gather(*(scrape() for _ in range(number))))

    return asyncio.run(run())


async def scrapes(_: argparse.Namespace) -> bool:
    shape = FakeShape(slots=64, step_ms=20)
    async with served(shape) as (system, url):
        running = asyncio.ensure_future(in_child(stream_clients, url, 64, 200))
        await wait_until(lambda: system.gateway.running == 64)
        async with Lag() as lag:
            answered = await in_child(scrape_clients, url, SCRAPES)
        found = await running
    assert isinstance(found, tuple)
    print(f"{SCRAPES} scrapes at once beside 64 streams: {answered} answered, {found[0]} streams whole")
    print(f"  event loop's lag: {lag} (to be under 50 ms)", flush=True)
    return answered == SCRAPES and found[0] == 64


PARTS: dict[str, Callable[[argparse.Namespace], Awaitable[bool]]] = {
    "overload": overload,
    "idle": idle,
    "scrapes": scrapes,
    "streams": streams,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", nargs="?", choices=PARTS)
    parser.add_argument("--seconds", type=float, default=30.0, help="of the streams")
    options = parser.parse_args()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, 4 * IDLE)), hard))
    kept = [asyncio.run(PARTS[name](options)) for name in ([options.part] if options.part else PARTS)]
    return 0 if all(kept) else 1


if __name__ == "__main__":
    sys.exit(main())
