"""What recording costs: the same load with the journal on and off, in turn.

    python benchmarks/bench_telemetry_cost.py                  a fake engine with the step times of the demo model
    python benchmarks/bench_telemetry_cost.py --demo           the demo model itself
    python benchmarks/bench_telemetry_cost.py --profile        where the time of recording goes, by cProfile

On is what a server does by default: every event encoded, checksummed, written and synced, commands and token ids too.
Off keeps the events that metrics and readiness are folded from, and drops everything else before it is encoded; there
is no such setting, for nothing else would be left of the log. Runs go on, off, on, off; each pair gives one difference,
and the table shows the median of these and their spread. Processor time a token is the figure that a busy machine
disturbs least; the event objects themselves are built in both.
"""

import argparse
import asyncio
import cProfile
import io
import platform
import pstats
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import msgspec

from gptoss.actors.generation import GenerateRequest
from gptoss.actors.journal import Journal, JournalHealth
from gptoss.app import ServingSystem, Surroundings, live_surroundings
from gptoss.clock import Clock
from gptoss.config import Settings
from gptoss.engine.model_source import PreparedModel
from gptoss.engine.port import ChatMessage
from gptoss.messages.envelope import Event, Origin, Record
from gptoss.messages.events import CommandConsumed, SnapshotTaken
from gptoss.messages.sampling import SamplingParams
from gptoss.telemetry.journal_base import Sequencer, Watcher, Watchers
from gptoss.testing import FAKE_MODEL, FakeDriver, FakeOptions, FakeRenderer

FAKE = PreparedModel(folder="", model_name=FAKE_MODEL, source="benchmark", max_model_len=4096)
STEP_S = {1: 0.012, 8: 0.018, 32: 0.033}
"""What a step of the demo model takes with so many streams, from RESULTS.md."""
PROMPT = "hello " * 64


class NoJournal:
    """A journal that keeps nothing. It numbers what the projections need and tells them; the rest it drops unseen."""

    node = "bench"

    def __init__(self, boot: str, clock: Clock) -> None:
        self.boot = boot
        self._sequencer = Sequencer(node=self.node, boot=boot, clock=clock)
        self._watchers = Watchers()
        self._dropped: Record | None = None

    @property
    def health(self) -> JournalHealth:
        last_pos = self._sequencer.next_pos("control") - 1
        return JournalHealth(ok=True, reason="", last_pos=last_pos, committed_pos=last_pos, stored_bytes=0)

    def append(self, event: Event, origin: Origin) -> Record:
        if self._dropped is not None and (
            event.FAMILY == "content" or isinstance(event, CommandConsumed | SnapshotTaken)
        ):
            return self._dropped
        record = self._sequencer.draft(event, origin)
        self._sequencer.advance(record)
        self._watchers.tell(record)
        self._dropped = self._dropped or record
        return record

    def flush(self, timeout_s: float = 5.0) -> bool:
        del timeout_s
        return True

    def read(self, **_: object) -> Iterator[Record]:
        return iter(())

    def subscribe(self, watcher: Watcher) -> Callable[[], None]:
        self._watchers.add(watcher)
        return lambda: self._watchers.remove(watcher)

    def close(self) -> None:
        pass


@dataclass(frozen=True)
class Run:
    """Of one run: p50 and p99 of the time between two tokens of a stream, and processor time of this process."""

    tokens_per_s: float
    p50_ms: float
    p99_ms: float
    cpu_us_per_token: float


def surroundings(*, recording: bool) -> Surroundings:
    live = live_surroundings()
    if recording:
        return live

    def off(settings: Settings, boot: str, clock: Clock) -> Journal:
        del settings
        return NoJournal(boot, clock)

    return msgspec.structs.replace(live, open_journal=off)


async def run(options: argparse.Namespace, streams: int, *, recording: bool, profile: cProfile.Profile | None) -> Run:
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        settings = Settings(devices="cpu", data_dir=folder, model="demo", cache_dir=options.cache_dir or "")
        fake = {
            "drivers": lambda _: FakeDriver(FakeOptions(step_s=STEP_S.get(streams, 0.02), max_batch_size=64)),
            "renderer": FakeRenderer(),
            "model": FAKE,
        }
        parts = {} if options.demo else fake
        async with ServingSystem(settings, surroundings=surroundings(recording=recording), **parts) as system:
            await system.ready(120)
            await stream(system, 4, 0)
            before, started = cpu_s(), time.perf_counter()
            with profile or nullcontext():
                gaps = await asyncio.gather(*(stream(system, options.tokens, n) for n in range(streams)))
            wall_s, spent_s = time.perf_counter() - started, cpu_s() - before
    times_ms = sorted(gap * 1e3 for one in gaps for gap in one)
    tokens = streams * options.tokens
    return Run(
        tokens_per_s=tokens / wall_s,
        p50_ms=statistics.median(times_ms),
        p99_ms=times_ms[len(times_ms) * 99 // 100],
        cpu_us_per_token=spent_s / tokens * 1e6,
    )


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


def compare(options: argparse.Namespace, streams: int) -> str:
    on: list[Run] = []
    off: list[Run] = []
    for _ in range(options.rounds):
        on.append(asyncio.run(run(options, streams, recording=True, profile=None)))
        off.append(asyncio.run(run(options, streams, recording=False, profile=None)))
    cells = [str(streams)]
    for name in ("tokens_per_s", "p50_ms", "p99_ms", "cpu_us_per_token"):
        pairs = [(getattr(a, name), getattr(b, name)) for a, b in zip(on, off, strict=True)]
        changes = [100 * (a / b - 1) for a, b in pairs]
        a, b = (statistics.median(values) for values in zip(*pairs, strict=True))
        cells.append(
            f"{a:.1f} / {b:.1f}: {statistics.median(changes):+.1f}% ({min(changes):+.1f} to {max(changes):+.1f})"
        )
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo", action="store_true")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--streams", default="1,8,32")
    parser.add_argument("--tokens", type=int, default=128, help="of each stream")
    parser.add_argument("--rounds", type=int, default=5, help="pairs of runs")
    parser.add_argument("--cache-dir", help="of prepared models")
    parser.add_argument("--folder", type=Path, help="where the journal goes; the default is a temporary folder")
    options = parser.parse_args()
    if options.profile:
        profile = cProfile.Profile()
        asyncio.run(run(options, 32, recording=True, profile=profile))
        text = io.StringIO()
        pstats.Stats(profile, stream=text).sort_stats("tottime").print_stats(30)
        print(text.getvalue())
        return
    print(f"Python {platform.python_version()}, {options.rounds} pairs, on / off: change (spread)\n")
    print("| streams | tokens/s | p50 ms a token | p99 ms a token | processor us a token |\n|---|---|---|---|---|")
    for streams in options.streams.split(","):
        print(compare(options, int(streams)), flush=True)


if __name__ == "__main__":
    main()
