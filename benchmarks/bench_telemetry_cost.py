"""What recording costs, and all of telemetry: the same load with it on and off, in turn.

    python benchmarks/bench_telemetry_cost.py                  a fake engine with the step times of the demo model
    python benchmarks/bench_telemetry_cost.py --demo           the demo model itself
    python benchmarks/bench_telemetry_cost.py --all            not the journal alone but everything that hangs on it
    python benchmarks/bench_telemetry_cost.py --profile        where the time of recording goes, by cProfile

On is what a server does by default: every event encoded, checksummed, written and synced, commands and token ids too.
Off tells the projections what metrics and readiness are folded from, and drops everything before it is numbered and
encoded; a server has no such switch, for nothing else would be left of the log. With --all, on is a server with log lines, traces
to a collector on this machine and a scrape every five seconds besides, and off tells nobody anything: no journal, no projections,
no metrics, logs or traces. Both are runs of one server, on, off, off, on; each pair gives one difference, and the table shows the median of these and the middle half of them. Processor time
a token is the figure that a busy machine disturbs least; the event objects themselves are built in both.
"""

import argparse
import asyncio
import cProfile
import io
import platform
import pstats
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Collection, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import msgspec

from gptoss.actors.generation import GenerateRequest
from gptoss.actors.journal import Journal
from gptoss.app import ServingSystem, live_surroundings
from gptoss.clock import Clock
from gptoss.config import Settings
from gptoss.engine.model_source import PreparedModel
from gptoss.engine.port import ChatMessage
from gptoss.messages.envelope import Event, Meta, Origin, Record
from gptoss.messages.events import CommandConsumed, SnapshotTaken
from gptoss.messages.sampling import SamplingParams
from gptoss.telemetry.journal_base import Watcher, Watchers
from gptoss.telemetry.logs import LogWriter
from gptoss.testing import FAKE_MODEL, FakeDriver, FakeOptions, FakeRenderer

FAKE = PreparedModel(folder="", model_name=FAKE_MODEL, source="benchmark", max_model_len=4096)
STEP_S = {1: 0.012, 8: 0.018, 32: 0.033}
"""What a step of the demo model takes with so many streams, from RESULTS.md."""
PROMPT = "hello " * 64
SCRAPE_PERIOD_S = 5.0
COLLECTOR = """
import http.server
class Collector(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()
    def log_message(self, *_):
        pass
server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Collector)
print(server.server_port, flush=True)
server.serve_forever()
"""


class SwitchedJournal:
    """The journal of a live server, and a switch. Off, it numbers nothing and tells the projections what they need, if any."""

    def __init__(self, inner: Journal, clock: Clock, *, tells_when_off: bool) -> None:
        self.is_on = True
        self.node, self.boot = inner.node, inner.boot
        self._tells_when_off = tells_when_off
        self._inner = inner
        self._clock = clock
        self._watchers = Watchers()
        self._dropped: Record | None = None

    def __getattr__(self, name: str) -> object:
        return getattr(self._inner, name)

    def append(self, event: Event, origin: Origin) -> Record:
        if self.is_on:
            return self._inner.append(event, origin)
        is_told = self._tells_when_off and not isinstance(event, CommandConsumed | SnapshotTaken)
        if self._dropped is not None and (event.FAMILY == "content" or not is_told):
            return Record(self._dropped.meta, event)
        meta = Meta(
            self.node, self.boot, 0, origin.stream, 0, type(event).__name__, event.VERSION, origin.cause, origin.correlation,
            origin.trace_id, origin.span_id, origin.actor, origin.incarnation, self._clock.monotonic_ns(),
        )  # fmt: skip
        record = Record(meta, event)
        self._watchers.tell((record,))
        self._dropped = self._dropped or record
        return record

    def append_decision(self, command: Event, origin: Origin, led_to: Sequence[tuple[Event, str]]) -> list[Record]:
        if self.is_on:
            return self._inner.append_decision(command, origin, led_to)
        records = [self.append(command, origin)]
        for event, correlation in led_to:
            records.append(self.append(event, msgspec.structs.replace(origin, correlation=correlation)))
        return records

    def subscribe(self, watcher: Watcher, types: Collection[type[Event]] | None = None) -> Callable[[], None]:
        self._watchers.add(watcher, types)
        stop = self._inner.subscribe(watcher, types)

        def unsubscribe() -> None:
            self._watchers.remove(watcher)
            stop()

        return unsubscribe


@dataclass(frozen=True)
class Run:
    """Of one run: p50 and p99 of the time between two tokens of a stream, and processor time of this process."""

    tokens_per_s: float
    p50_ms: float
    p99_ms: float
    cpu_us_per_token: float


class Bench:
    """One server, loaded again and again, with its journal on and off."""

    def __init__(self, options: argparse.Namespace) -> None:
        self._options = options
        self._journal: SwitchedJournal | None = None

    async def compare(self, streams: int) -> str:
        async with self._server(streams) as system:
            await load(system, streams, 32)
            pairs = [
                await self._pair(system, streams, on_first=number % 2 == 0) for number in range(self._options.rounds)
            ]
        return row(streams, pairs)

    async def _pair(self, system: ServingSystem, streams: int, *, on_first: bool) -> tuple[Run, Run]:
        """A run with it on and one with it off; which goes first changes, so that a machine that tires favours neither."""
        first, second = [await self._run(system, streams, on=on) for on in (on_first, not on_first)]
        return (first, second) if on_first else (second, first)

    async def profile(self, streams: int) -> str:
        profile, text = cProfile.Profile(), io.StringIO()
        async with self._server(streams) as system:
            with profile:
                await load(system, streams, self._options.tokens)
        pstats.Stats(profile, stream=text).sort_stats("tottime").print_stats(30)
        return text.getvalue()

    async def _run(self, system: ServingSystem, streams: int, *, on: bool) -> Run:
        assert self._journal is not None
        self._journal.is_on = on
        before, started = cpu_s(), time.perf_counter()
        gaps = await load(system, streams, self._options.tokens)
        wall_s, spent_s = time.perf_counter() - started, cpu_s() - before
        times_ms = sorted(gap * 1e3 for gap in gaps)
        tokens = streams * self._options.tokens
        return Run(
            tokens_per_s=tokens / wall_s,
            p50_ms=statistics.median(times_ms),
            p99_ms=times_ms[len(times_ms) * 99 // 100],
            cpu_us_per_token=spent_s / tokens * 1e6,
        )

    @asynccontextmanager
    async def _server(self, streams: int) -> AsyncIterator[ServingSystem]:
        options, live = self._options, live_surroundings()

        def open_journal(settings: Settings, boot: str, clock: Clock) -> Journal:
            inner = live.open_journal(settings, boot, clock)
            self._journal = SwitchedJournal(inner, clock, tells_when_off=not options.all)
            return self._journal

        surroundings = msgspec.structs.replace(live, open_journal=open_journal)
        with tempfile.TemporaryDirectory(dir=options.folder) as folder, collector() as endpoint:
            settings = Settings(
                devices="cpu",
                data_dir=folder,
                model="demo",
                cache_dir=options.cache_dir or "",
                otlp_endpoint=endpoint if options.all else "",
            )
            fake = {
                "drivers": lambda _: FakeDriver(FakeOptions(step_s=STEP_S.get(streams, 0.02), max_batch_size=64)),
                "renderer": FakeRenderer(),
                "model": FAKE,
            }
            with Path(folder, "server.log").open("w") as lines:
                log = LogWriter(lines, "json") if options.all else None
                rest = {} if options.demo else fake
                async with ServingSystem(settings, surroundings=surroundings, log=log, **rest) as system:
                    await system.ready(120)
                    scraping = asyncio.create_task(self._scrape(system))
                    yield system
                    scraping.cancel()

    async def _scrape(self, system: ServingSystem) -> None:
        while self._options.all:
            await asyncio.sleep(SCRAPE_PERIOD_S)
            if self._journal is not None and self._journal.is_on:
                await system.caught_up()
                system.metrics.render()


@contextmanager
def collector() -> Iterator[str]:
    """An OTLP collector that takes everything and keeps nothing, in a process of its own; its address."""
    with subprocess.Popen([sys.executable, "-c", COLLECTOR], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        yield f"http://127.0.0.1:{process.stdout.readline().strip()}"
        process.terminate()


async def load(system: ServingSystem, streams: int, tokens: int) -> list[float]:
    """Run so many requests at once; the times between their tokens, in seconds."""
    gaps = await asyncio.gather(*(stream(system, tokens, seed) for seed in range(streams)))
    return [gap for one in gaps for gap in one]


async def stream(system: ServingSystem, tokens: int, seed: int) -> list[float]:
    """Use one request up; the times between its tokens, in seconds."""
    request = GenerateRequest(
        messages=(ChatMessage(role="user", content=f"{PROMPT} {seed}"),),
        sampling=SamplingParams(max_tokens=tokens, seed=seed, ignore_eos=True),
    )
    moments = [time.perf_counter() async for delta in system.submit(request) if delta.token_ids]
    return [after - before for before, after in pairwise(moments)]


def cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def row(streams: int, pairs: Sequence[tuple[Run, Run]]) -> str:
    cells = [str(streams)]
    for name in ("tokens_per_s", "p50_ms", "p99_ms", "cpu_us_per_token"):
        values = [(getattr(on, name), getattr(off, name)) for on, off in pairs]
        changes = sorted(100 * (on / off - 1) for on, off in values)
        on, off = (statistics.median(of_one) for of_one in zip(*values, strict=True))
        middle = f"{changes[len(changes) // 4]:+.1f} to {changes[-1 - len(changes) // 4]:+.1f}"
        cells.append(f"{on:.1f} / {off:.1f}: {statistics.median(changes):+.1f}% ({middle})")
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo", action="store_true")
    parser.add_argument("--all", action="store_true", help="switch all of telemetry, not the journal alone")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--streams", default="1,8,32")
    parser.add_argument("--tokens", type=int, default=128, help="of each stream")
    parser.add_argument("--rounds", type=int, default=9, help="pairs of runs")
    parser.add_argument("--cache-dir", help="of prepared models")
    parser.add_argument("--folder", type=Path, help="where the journal goes; the default is a temporary folder")
    options = parser.parse_args()
    if options.profile:
        print(asyncio.run(Bench(options).profile(32)))
        return
    print(f"Python {platform.python_version()}, {options.rounds} pairs, on / off: change (middle half of the pairs)\n")
    print("| streams | tokens/s | p50 ms a token | p99 ms a token | processor us a token |\n|---|---|---|---|---|")
    for streams in options.streams.split(","):
        print(asyncio.run(Bench(options).compare(int(streams))), flush=True)


if __name__ == "__main__":
    main()
