"""Runs the decisions of a recording again and compares: one pass, in the order of the records.

Rules:
- Deciders are the classes that ran live, made from the settings that the boot recorded (``actors.deciders``).
- Memory is bounded by what is in flight: states of the deciders, requests that have not ended, and a bounded number of
  those that have, for commands that come late.
- Deciders run on one event loop, one command at a time. So only the last command of a boot can have events that a crash
  cut off; and the last one of a decider's stream, where a bundle ends.
"""

import functools
from collections import OrderedDict
from collections.abc import Callable, Iterable

import msgspec

from gptoss.actors.deciders import Deciders, decider_with, deciders_of
from gptoss.actors.directory import DECIDER_NAMES, EXECUTOR_PREFIX, STANDING_DECIDERS
from gptoss.clock import NS_PER_S, Clock, SystemClock
from gptoss.config import Settings
from gptoss.messages import events as ev
from gptoss.messages.envelope import Record
from gptoss.replay.chain import causal_chain
from gptoss.replay.diff import plan_divergence
from gptoss.replay.lives import TERMINALS, Lives
from gptoss.replay.plans import ExecutorLog, ExecutorLogs
from gptoss.replay.recorded import settings_of
from gptoss.replay.result import Checked, Divergence, VerifyResult
from gptoss.replay.stream import DeciderStream, Tally
from gptoss.telemetry.recording import Recording

ENDED_STREAMS_MAX = 1000
PROBLEMS_MAX = 100
PROGRESS_EVERY = 10_000
DECIDERS = ("admission", "memory", "router", "request", "batches", "scheduler")
"""In the order of the report."""


class Verifier:
    """Takes records in order. ``boots`` come one after the other.

    Attributes:
        boot: whose records are being taken; the attributes below are of that boot.
        streams: deciders' streams by name; requests that ended long ago are left out.
        first: the first divergence found so far.
    """

    def __init__(self) -> None:
        self.boot = ""
        self.boots: list[str] = []
        self.streams: dict[str, DeciderStream] = {}
        self.settings = Settings()
        self.first: Divergence | None = None
        self.num_records = 0
        self.notes: list[str] = []
        self.problems: list[str] = []
        self.tallies: dict[str, Tally] = {name: Tally() for name in DECIDERS}
        self.num_requests = 0
        self._deciders: Deciders = deciders_of(self.settings)
        self._ended: OrderedDict[str, None] = OrderedDict()
        self._executors = ExecutorLogs()
        self._lives = Lives()
        self._open: DeciderStream | None = None
        self._stopped = False

    @property
    def executors(self) -> dict[str, ExecutorLog]:
        """What the executors' logs tell, by stream."""
        return self._executors.by_stream

    def observe(self, record: Record) -> None:
        """Take the next record."""
        meta = record.meta
        self.num_records += 1
        if meta.boot != self.boot:
            self.end_boot()
            self._begin_boot(meta.boot)
        stream = self.streams.get(meta.stream)
        if stream is not None:
            self._observe_decider(record, stream)
        elif meta.stream.startswith(EXECUTOR_PREFIX):
            self._observe_executor(record)
        elif meta.stream == "system":
            self._observe_system(record)
        else:
            self._observe_new(record)
        if meta.correlation and (type(record.event) is not ev.RequestReceived or self._knows_deciders()):
            self._lives.observe(record)

    def end_boot(self) -> None:
        """No more records of this boot will come."""
        for name, stream in self.streams.items():
            if not stream.is_waiting:
                continue
            if stream is self._open or name in STANDING_DECIDERS:
                self.notes.append(f"boot {self.boot}: the recording ends within a command of {name}")
            else:
                for divergence in stream.close():
                    self._note(divergence)
        self._problem(self._lives.end(in_order=self._stopped))
        self.num_requests += self._lives.num_checked

    def result(self, source: str, seconds: float) -> VerifyResult:
        """What was found."""
        checked = [
            Checked(decider=name, **{field: getattr(tally, field) for field in Tally.__slots__})
            for name, tally in self.tallies.items()
        ]
        return VerifyResult(
            source=source,
            boots=tuple(self.boots),
            records=self.num_records,
            seconds=round(seconds, 3),
            checked=tuple(each for each in checked if each.decisions or each.passed_over or each.diverged),
            requests=self.num_requests,
            first=self.first,
            num_diverged=sum(tally.diverged for tally in self.tallies.values()),
            problems=tuple(self.problems),
            notes=tuple(dict.fromkeys(self.notes)),
        )

    # ---- boots

    def _begin_boot(self, boot: str) -> None:
        self.boot = boot
        self.boots.append(boot)
        self.streams = {}
        self._ended.clear()
        self._executors = ExecutorLogs()
        self._lives = Lives()
        self._open = None
        self._stopped = False

    def _observe_system(self, record: Record) -> None:
        if isinstance(record.event, ev.NodeStarted):
            self.settings, notes = settings_of(record.event)
            self.notes += notes
            self._deciders = deciders_of(self.settings)
        elif isinstance(record.event, ev.NodeStopped):
            self._stopped = True

    # ---- deciders

    def _observe_new(self, record: Record) -> None:
        meta = record.meta
        decider = self._deciders.of(meta.stream)
        if decider is not None:
            remake = functools.partial(decider_with, self.settings, meta.stream)
            stream = self.streams[meta.stream] = DeciderStream(decider, meta, self.tallies[decider.name], remake)
            self._observe_decider(record, stream)

    def _observe_decider(self, record: Record, stream: DeciderStream) -> None:
        for divergence in stream.observe(record):
            self._note(divergence)
        kind = type(record.event)
        if kind is ev.CommandConsumed:
            self._open = stream
            if stream.command is not None:
                self._problem(self._lives.command(stream.command))
        elif kind in TERMINALS:
            self._retire(record.meta.stream)

    def _knows_deciders(self) -> bool:
        return all(name in self.streams and self.streams[name].is_known for name in DECIDER_NAMES)

    def _retire(self, name: str) -> None:
        """Keep an ended request a while, for commands that come late."""
        self._ended[name] = None
        self._ended.move_to_end(name)
        if len(self._ended) > ENDED_STREAMS_MAX:
            oldest, _ = self._ended.popitem(last=False)
            self.streams.pop(oldest, None)

    # ---- executors

    def _observe_executor(self, record: Record) -> None:
        meta, event = record.meta, record.event
        log, has_gap = self._executors.of(meta)
        if has_gap:
            self._lives.forget_steps()
        if not isinstance(event, ev.StepCommitted):
            log.observe(event)
            return
        self._lives.step(record, event)
        tally = self.tallies["scheduler"]
        found = log.check(event)
        if found is None:
            tally.passed_over += 1
            return
        tally.decisions += 1
        tally.events += 1
        if found:
            tally.diverged += 1
            self._note(plan_divergence(record, event, found))

    # ---- findings

    def _note(self, divergence: Divergence) -> None:
        if self.first is None:
            self.first = divergence

    def _problem(self, found: Iterable[str]) -> None:
        for problem in found:
            if len(self.problems) < PROBLEMS_MAX:
                self.problems.append(problem)


def verify(
    recording: Recording,
    *,
    source: str = "",
    boot: str | None = None,
    clock: Clock | None = None,
    progress: Callable[[int], None] | None = None,
) -> VerifyResult:
    """Run every decision of a recording again.

    Args:
        recording: what to replay.
        source: its name in the report.
        boot: only this one.
        clock: for the duration.
        progress: called now and then with the number of records read.

    Raises:
        ReplayError, JournalError: the recording cannot be read.
    """
    clock = clock or SystemClock()
    begin_ns = clock.monotonic_ns()
    verifier = Verifier()
    for record in recording.records(boot=boot):
        verifier.observe(record)
        if progress is not None and verifier.num_records % PROGRESS_EVERY == 0:
            progress(verifier.num_records)
    verifier.end_boot()
    result = verifier.result(source, (clock.monotonic_ns() - begin_ns) / NS_PER_S)
    if result.first is not None:
        chain = causal_chain(recording, result.first.boot, result.first.pos)
        result = msgspec.structs.replace(result, first=msgspec.structs.replace(result.first, chain=chain))
    return result
