"""What the control plane takes and what it costs, with engines that pretend.

    python benchmarks/bench_control_plane.py                         everything, some minutes
    python benchmarks/bench_control_plane.py goals                   requests/s, latency at 200 requests/s, tokens/s over HTTP
    python benchmarks/bench_control_plane.py growth                  by number of executors, and by number of queued requests
    python benchmarks/bench_control_plane.py profile                 where the processor time of the mailbox test goes

Rates by the clock hold for a machine with nothing else to do; processor time is what a busy one disturbs least, and from it
comes "a core takes": what one core could do that did nothing else. All of it is the live system with its journal on disk,
but for the queue: 100,000 waiting requests would measure how their actors are made, so there the deciders stand alone,
telling each other what they tell each other in a server.
"""

import argparse
import asyncio
import cProfile
import platform
import pstats
import sys
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from gptoss.actors.deciders import deciders_of
from gptoss.bench.fake_system import FakeShape
from gptoss.bench.load import Load, Span
from gptoss.bench.mailboxes import MailboxReport, load_mailboxes
from gptoss.bench.over_http import HttpOptions, HttpReport, load_http
from gptoss.config import Settings
from gptoss.engine import port
from gptoss.fake_engine import FakeEngine, FakeOptions
from gptoss.messages import commands as cmd
from gptoss.messages.commands import Command

EXECUTORS = (1, 4, 16, 64)
QUEUED = (0, 100, 1_000, 10_000, 100_000)
SLOTS = 32


def nothing(_: object) -> None:
    """Nobody looks at the progress."""


def mailboxes(load: Load, shape: FakeShape) -> MailboxReport:
    return asyncio.run(load_mailboxes(load, shape, asyncio.Event(), nothing))


def over_http(load: Load, shape: FakeShape) -> HttpReport:
    return asyncio.run(load_http(load, HttpOptions(shape=shape), asyncio.Event(), nothing))


# ---------------------------------------------------------------- goals


def goals(options: argparse.Namespace) -> None:
    one_token = Load(requests=options.requests, in_flight=256, output=Span(1, 1), duration_s=options.seconds)
    full = mailboxes(one_token, FakeShape(slots=256))
    print("Goal: 5,000 requests/s through all deciders, journal on.")
    print_requests(full)
    slow = Load(requests=1_000_000, rate=200, output=Span(1, 1), duration_s=options.seconds)
    calm = mailboxes(slow, FakeShape(slots=64))
    print(
        "\nGoal: under 1 ms at p50 and 3 ms at p99 added at 200 requests/s: one token of an engine that computes nothing."
    )
    print("| ms since submission | p50 | p90 | p99 | max |\n|---|---|---|---|---|")
    for name, found in calm.stages.items():
        print(f"| {name} | {found.p50:.2f} | {found.p90:.2f} | {found.p99:.2f} | {found.max:.2f} |")
    print(f"\nevent loop's lag p99 {calm.loop_lag.p99:.2f} ms, {calm.cpu_us_per_request:.0f} us a request")
    streams = Load(requests=64 * 4, in_flight=64, output=Span(1024, 1024), duration_s=4 * options.seconds)
    flood = over_http(streams, FakeShape(slots=64))
    print("\nGoal: 100,000 tokens/s over HTTP on one core to 64 clients.")
    print("| tokens/s | tokens a chunk | server us a token | a core takes tokens/s | errors |\n|---|---|---|---|---|")
    cpu_us = flood.server_cpu_us_per_token or 0.0
    print(
        f"| {flood.tokens_per_s:,.0f} | {flood.tokens / max(1, flood.chunks):.2f} | {cpu_us:.2f} "
        f"| {1e6 / cpu_us if cpu_us else 0:,.0f} | {sum(flood.errors.values())} |"
    )


def print_requests(*reports: MailboxReport) -> None:
    print(
        "| executors | requests/s | us a request | a core takes requests/s | records a request | end p50 ms | p99 ms |"
    )
    print("|---|---|---|---|---|---|---|")
    for report in reports:
        end, cpu_us = report.stages["end"], report.cpu_us_per_request
        print(
            f"| {report.shape.executors} | {report.requests_per_s:,.0f} | {cpu_us:,.0f} | {1e6 / max(1.0, cpu_us):,.0f} "
            f"| {report.records_per_request} | {end.p50:.1f} | {end.p99:.1f} |",
            flush=True,
        )


# ---------------------------------------------------------------- growth


def growth(options: argparse.Namespace) -> None:
    print("Executors of 32 slots, two requests a slot at once, one token each:")
    reports: list[MailboxReport] = []
    for executors in EXECUTORS:
        load = Load(
            requests=options.requests,
            in_flight=2 * SLOTS * executors,
            output=Span(1, 1),
            duration_s=options.seconds,
        )
        reports.append(mailboxes(load, FakeShape(executors=executors, slots=SLOTS, max_queue=100_000)))
    print_requests(*reports)
    print("\nThe deciders alone, one request leaving and one coming while so many wait:")
    print("| queued | executors | us a request | filling, us a request |\n|---|---|---|---|", flush=True)
    for executors in (1, 64):
        for queued in QUEUED:
            print(queue_row(executors, queued, options.seconds), flush=True)


def queue_row(executors: int, queued: int, seconds: float) -> str:
    plane = Plane(executors, queued + 1)
    ends_at = time.process_time() + seconds
    began = time.process_time()
    for _ in range(executors * SLOTS + queued):
        plane.arrive()
        if time.process_time() > ends_at:
            waiting = max(0, plane.arrived - executors * SLOTS)
            return f"| {queued:,} | {executors} | - | over {seconds:.0f} s for the first {waiting:,} |"
    filled = time.process_time() - began
    ends_at, began, turns = time.process_time() + seconds, time.process_time(), 0
    while turns < 2000 and time.process_time() < ends_at:
        plane.leave()
        plane.arrive()
        turns += 1
    spent = time.process_time() - began
    return f"| {queued:,} | {executors} | {spent / turns * 1e6:,.0f} | {filled / plane.arrived * 1e6:,.0f} |"


@dataclass(frozen=True)
class Letter:
    to: str
    command: Command


class Plane:
    """Memory guard, admission and router without actors or journal, and as much of requests as they need."""

    def __init__(self, executors: int, max_queue: int) -> None:
        self.arrived = 0
        self._deciders: dict[str, Any] = {}
        made = deciders_of(Settings(max_queue=max_queue))
        self._deciders = {"memory": made.memory, "admission": made.admission, "router": made.router}
        self._states = {name: decider.initial() for name, decider in self._deciders.items()}
        self._running: deque[str] = deque()
        self._now_ns = 0
        engine = FakeEngine(
            port.Load(folder="", model_name="fake", device="cpu", dtype="float32"),
            FakeOptions(max_batch_size=SLOTS, kv_budget_bytes=1 << 40),
        )
        loaded = engine.handle(port.Load(folder="", model_name="fake", device="cpu", dtype="float32"))[0]
        assert isinstance(loaded, port.Loaded)
        for number in range(executors):
            name, can = f"cpu:{number}", loaded.capabilities
            room = {"executor": name, "slots": SLOTS, "kv_budget_bytes": can.kv_budget_bytes}
            self._tell("memory", cmd.SetMemoryPool(now_ns=0, executor=name, capabilities=can))
            self._tell("router", cmd.SetExecutor(now_ns=0, **room))
            self._tell("admission", cmd.SetCapacity(now_ns=0, **room))

    def arrive(self) -> None:
        """One more request: estimated, admitted or queued."""
        self.arrived += 1
        request_id = f"bench-{self.arrived}"
        self._tell(
            "memory", cmd.EstimateMemory(now_ns=self._now_ns, request_id=request_id, prompt_tokens=32, max_tokens=16)
        )
        self._tell(
            "admission",
            cmd.AdmitRequest(
                now_ns=self._now_ns,
                request_id=request_id,
                prompt_tokens=32,
                max_tokens=16,
                kv_bytes=96,
                kv_bytes_prompt=64,
                priority=0,
                deadline_ns=1 << 62,
            ),
        )

    def leave(self) -> None:
        """The oldest of those that run is over, and the next one in line runs."""
        request_id = self._running.popleft()
        self._tell("router", cmd.ForgetRoute(now_ns=self._now_ns, request_id=request_id))
        self._tell("admission", cmd.WithdrawRequest(now_ns=self._now_ns, request_id=request_id))

    def _tell(self, to: str, command: Command) -> None:
        letters = deque([Letter(to, command)])
        while letters:
            letter = letters.popleft()
            if letter.to.startswith("request/"):
                self._request_told(letter, letters)
                continue
            self._now_ns += 1000
            decider, state = self._deciders[letter.to], self._states[letter.to]
            events = decider.decide(state, letter.command)
            for event in events:
                state = decider.evolve(state, event)
            self._states[letter.to] = state
            for event in events:
                letters.extend(Letter(*told) for told in decider.tells(state, event, self._now_ns))

    def _request_told(self, letter: Letter, letters: deque[Letter]) -> None:
        request_id = letter.to.removeprefix("request/")
        match letter.command:
            case cmd.AdmissionGranted(kv_bytes=kv_bytes):
                route = cmd.RouteRequest(
                    now_ns=self._now_ns, request_id=request_id, kv_bytes=kv_bytes, prompt_tokens=32
                )
                letters.append(Letter("router", route))
            case cmd.RouteFound():
                self._running.append(request_id)
            case cmd.AdmissionRefused(message=message):
                raise RuntimeError(message)
            case _:
                pass


# ---------------------------------------------------------------- profile


def profile(options: argparse.Namespace) -> None:
    load = Load(requests=options.requests, in_flight=256, output=Span(1, 1), duration_s=options.seconds)
    profiler = cProfile.Profile()
    profiler.enable()
    report = mailboxes(load, FakeShape(slots=256))
    profiler.disable()
    print_requests(report)
    pstats.Stats(profiler, stream=sys.stdout).sort_stats("tottime").print_stats(options.lines)


PARTS: dict[str, Callable[[argparse.Namespace], None]] = {"goals": goals, "growth": growth, "profile": profile}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", nargs="?", choices=PARTS, help="goals and growth without it")
    parser.add_argument("--requests", type=int, default=20_000, help="at most so many in one measurement")
    parser.add_argument("--seconds", type=float, default=15.0, help="at most so long for one measurement")
    parser.add_argument("--lines", type=int, default=45, help="of the profile")
    options = parser.parse_args()
    print(f"Python {platform.python_version()}")
    for name in [options.part] if options.part else ["goals", "growth"]:
        print(f"\n## {name}\n", flush=True)
        PARTS[name](options)


if __name__ == "__main__":
    main()
