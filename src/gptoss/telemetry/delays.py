"""Who delayed a request: the other requests and the faults that its time went to, folded from the records of its life.

Four kinds, each a question about one stretch of the life:
- ``queue``: who held a slot, and its memory, while the request waited for admission;
- ``engine``: who had rows in the steps that the engine ran before the request's first row, or its first after it lost
  its memory;
- ``step``: who prefilled in steps that the request decoded in. What it cost is how much longer those steps took than
  the request's median step without anybody's prefill, shared out by prefill tokens;
- ``preemption`` and ``restart``: what the request lost its memory or its engine to, until it ran again.

Those who held slots did so side by side, so the times of one kind may add up to more than the stretch took.
"""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from statistics import median
from typing import Literal, TypeAlias

import msgspec

from gptoss.clock import NS_PER_MS
from gptoss.errors import RequestNotFound
from gptoss.messages import events as ev
from gptoss.messages.envelope import Record
from gptoss.telemetry.request_records import RecordSource, request_records
from gptoss.telemetry.request_view import request_id_of
from gptoss.telemetry.shared_steps import SharedSteps, StepColumn
from gptoss.telemetry.timeline import Timeline, timeline
from gptoss.telemetry.timeline_phases import many, size

RECORDS_MAX = 300_000
"""Records of a life that are looked at; a longer one is cut, and says so."""

SHARE_MIN = 0.005
"""What cost less of a life than this is no delay; faults are told all the same."""

DelayKind: TypeAlias = Literal["queue", "engine", "step", "preemption", "restart"]


class Delay(msgspec.Struct, frozen=True, kw_only=True):
    """What one other request, or one fault, cost; milliseconds since the delayed request was received.

    Attributes:
        who: the other request, or the executor for what was nobody's doing.
        took_ms: of the time between ``start_ms`` and ``end_ms``, what went to this.
        share: ``took_ms`` as a part of the delayed request's whole time, 0 to 1.
    """

    kind: DelayKind
    who: str
    start_ms: float
    end_ms: float
    took_ms: float
    share: float
    detail: str = ""


class Story(msgspec.Struct, frozen=True, kw_only=True):
    """A request's timeline and what delayed it, the dearest of each kind first.

    Attributes:
        steps: those that it had a part in.
        is_cut: the life has more records than are looked at; the delays are of its beginning.
    """

    timeline: Timeline
    delays: tuple[Delay, ...] = ()
    is_cut: bool = False
    steps: tuple[StepColumn, ...] = ()


def story(source: RecordSource, request_id: str) -> Story:
    """What happened to a request and who delayed it.

    Raises:
        RequestNotFound: no record names the request, or not its arrival.
        JournalCorrupt: bytes that may concern it fail their checksum.
    """
    own = request_records(source, request_id)
    if not own:
        raise RequestNotFound(f"no record names the request {request_id}")
    life = timeline(own, request_id)
    received = next(r for r in reversed(own) if isinstance(r.event, ev.RequestReceived))
    boot = received.meta.boot
    # What came after its own last record delays a request only while it is open.
    last = max(r.meta.pos for r in own if r.meta.boot == boot) if life.outcome != "open" else None
    fold = DelayFold(request_id, received.meta.mono_ns)
    steps = SharedSteps(request_id, received.meta.mono_ns)
    is_cut = False
    for count, record in enumerate(source.read(boot=boot, after=received.meta.pos - 1)):
        if last is not None and record.meta.pos > last:
            break
        if count == RECORDS_MAX:
            is_cut = True
            break
        fold.add(record)
        if isinstance(record.event, ev.StepCommitted):
            steps.add(record.event)
    return Story(timeline=life, delays=tuple(fold.delays(life)), is_cut=is_cut, steps=steps.columns())


@dataclass(slots=True)
class _Hold:
    """A slot that another request held; None is before, or after, what was looked at."""

    start_ns: int | None = None
    end_ns: int | None = None


@dataclass(slots=True)
class _Share:
    """What another request had of some steps."""

    start_ns: int = 0
    end_ns: int = 0
    took_ns: float = 0.0
    steps: int = 0
    prefilled: int = 0

    def add(self, step: ev.StepCommitted, took_ns: float, prefilled: int) -> None:
        self.start_ns = self.start_ns or step.started_ns
        self.end_ns = step.started_ns + step.duration_ns
        self.took_ns += took_ns
        self.prefilled += prefilled
        self.steps += 1


@dataclass(slots=True)
class DelayFold:
    """Takes in the records of one boot, from a request's arrival to its end; the fields are how far it has come."""

    request_id: str
    begin_ns: int
    enqueued_ns: int | None = None
    left_queue_ns: int | None = None
    newest_ns: int = 0
    holds: dict[str, _Hold] = field(default_factory=lambda: defaultdict[str, _Hold](_Hold))
    kv_bytes: dict[str, int] = field(default_factory=dict[str, int])
    executor: str = ""
    waits_in_engine: bool = False
    engine: dict[str, _Share] = field(default_factory=lambda: defaultdict[str, _Share](_Share))
    mixed: list[ev.StepCommitted] = field(default_factory=list[ev.StepCommitted])
    plain_ns: list[int] = field(default_factory=list[int])
    lost_memory: list[tuple[ev.Preempted, int, str]] = field(default_factory=list[tuple[ev.Preempted, int, str]])
    lost_engine: tuple[str, int, str] | None = None
    faults: list[tuple[DelayKind, str, int, int, str]] = field(
        default_factory=list[tuple[DelayKind, str, int, int, str]]
    )
    newcomers: dict[int, str] = field(default_factory=dict[int, str])

    def add(self, record: Record) -> None:
        """Take one record in."""
        event, now_ns = record.event, record.meta.mono_ns
        if isinstance(event, ev.CommandConsumed):
            return
        self.newest_ns = now_ns
        if isinstance(event, ev.StepCommitted):
            self._step(event)
        elif isinstance(event, ev.AdmissionDecided | ev.SlotReleased) and event.request_id != self.request_id:
            self._hold(event, now_ns)
        elif isinstance(event, ev.ReservationGranted | ev.ReservationReleased):
            self.kv_bytes[event.request_id] = event.kv_bytes
        if request_id_of(record) == self.request_id:
            self._own(record, now_ns)

    def _own(self, record: Record, now_ns: int) -> None:
        event = record.event
        if isinstance(event, ev.Enqueued) and self.enqueued_ns is None:
            self.enqueued_ns = now_ns
        elif isinstance(event, ev.Dequeued):
            self.left_queue_ns = now_ns
        elif isinstance(event, ev.ExecutorAccepted):
            self.executor, self.waits_in_engine = event.executor, True
            if self.lost_engine is not None:
                executor, since_ns, detail = self.lost_engine
                self.faults.append(("restart", executor, since_ns, now_ns, detail))
                self.lost_engine = None
        elif isinstance(event, ev.Preempted):
            self.waits_in_engine = True
            self.lost_memory.append((event, now_ns, self.newcomers.get(event.step, "") or event.executor))
        elif isinstance(event, ev.ExecutorFaulted) and event.lost:
            self.lost_engine = (event.executor, now_ns, f"{event.code}: {event.message}")
            self.waits_in_engine = False

    def _hold(self, event: ev.AdmissionDecided | ev.SlotReleased, now_ns: int) -> None:
        if isinstance(event, ev.SlotReleased):
            hold = self.holds[event.request_id]
            hold.end_ns = now_ns
            hold.start_ns = now_ns - event.ran_ns if hold.start_ns is None else hold.start_ns
        elif event.action in {"accept", "shrink", "route_multi"}:
            self.holds[event.request_id].start_ns = now_ns

    def _step(self, step: ev.StepCommitted) -> None:
        others = [row for row in step.rows if row.request_id != self.request_id]
        for row in others:
            self.holds[row.request_id]  # it holds a slot, since before what was looked at if nothing else is known
        if step.executor != self.executor:
            return
        if step.preemptions:
            self.newcomers[step.step] = next((s.request_id for s in step.starts if s.request_id != self.request_id), "")
        own = next((row for row in step.rows if row.request_id == self.request_id), None)
        if own is not None:
            self._ran(step, own, others)
        elif self.waits_in_engine:
            positions = sum(row.prefilled + row.tokens for row in others) or 1
            for row in others:
                part = (row.prefilled + row.tokens) / positions
                self.engine[row.request_id].add(step, step.duration_ns * part, row.prefilled)

    def _ran(self, step: ev.StepCommitted, own: ev.CommittedRow, others: list[ev.CommittedRow]) -> None:
        self.waits_in_engine = False
        for lost, since_ns, winner in self.lost_memory:
            detail = f"preempted at step {lost.step}: {lost.reason}"
            self.faults.append(("preemption", winner, since_ns, step.started_ns, detail))
        self.lost_memory.clear()
        if any(row.prefilled for row in others):
            self.mixed.append(step)
        elif own.tokens and not own.prefilled:
            self.plain_ns.append(step.duration_ns)

    def delays(self, life: Timeline) -> list[Delay]:
        """What was found, kinds in the order of a life, the dearest of each first."""
        found: list[Delay] = []
        # An open life goes on for as long as there are records of others.
        total_ms = life.total_ms if life.outcome != "open" else (self.newest_ns - self.begin_ns) / NS_PER_MS

        def add(kind: DelayKind, who: str, start_ns: int, end_ns: int, took_ns: float, detail: str) -> None:
            took_ms = round(took_ns / NS_PER_MS, 3)
            share = round(min(1.0, took_ms / total_ms), 4) if total_ms else 0.0
            if share < SHARE_MIN and kind in {"queue", "engine", "step"}:
                return
            # The first step that it waited for may have begun before it came.
            start_ms, end_ms = (round(max(0, at - self.begin_ns) / NS_PER_MS, 3) for at in (start_ns, end_ns))
            found.append(
                Delay(kind=kind, who=who, start_ms=start_ms, end_ms=end_ms, took_ms=took_ms, share=share, detail=detail)
            )

        for who, start_ns, end_ns in self._holders():
            kv_bytes = self.kv_bytes.get(who, 0)
            detail = f"held a slot and {size(kv_bytes)} of KV" if kv_bytes else "held a slot"
            add("queue", who, start_ns, end_ns, end_ns - start_ns, detail)
        shares: dict[DelayKind, dict[str, _Share]] = {"engine": self.engine, "step": self._prefillers()}
        for kind, parts in shares.items():
            for who, part in parts.items():
                steps = many(part.steps, "step")
                done = f"prefilled {many(part.prefilled, 'token')}" if part.prefilled else "decoded"
                detail = f"{done} in {steps} {'before its turn' if kind == 'engine' else 'that it decoded in'}"
                add(kind, who, part.start_ns, part.end_ns, part.took_ns, detail)
        faults = list(self.faults)
        if self.lost_engine is not None:
            executor, since_ns, detail = self.lost_engine
            faults.append(("restart", executor, since_ns, self.newest_ns, detail))
        for kind, who, start_ns, end_ns, detail in faults:
            add(kind, who, start_ns, end_ns, end_ns - start_ns, detail)
        return sorted(found, key=lambda delay: (_KINDS.index(delay.kind), -delay.took_ms, delay.start_ms))

    def _holders(self) -> Iterator[tuple[str, int, int]]:
        if self.enqueued_ns is None:
            return
        left_ns = self.left_queue_ns if self.left_queue_ns is not None else self.newest_ns
        for who, hold in self.holds.items():
            start_ns = max(self.enqueued_ns, hold.start_ns if hold.start_ns is not None else self.enqueued_ns)
            end_ns = min(left_ns, hold.end_ns if hold.end_ns is not None else left_ns)
            if end_ns > start_ns:
                yield who, start_ns, end_ns

    def _prefillers(self) -> dict[str, _Share]:
        usual_ns = median(self.plain_ns) if self.plain_ns else 0.0
        shares: dict[str, _Share] = defaultdict(_Share)
        for step in self.mixed:
            own = next(row for row in step.rows if row.request_id == self.request_id)
            if own.prefilled:
                continue  # Its own prompt ran too: whose part was what cannot be told apart.
            prefilled = sum(row.prefilled for row in step.rows)
            extra_ns = max(0.0, step.duration_ns - usual_ns)
            for row in step.rows:
                if row.prefilled and row.request_id != self.request_id:
                    shares[row.request_id].add(step, extra_ns * row.prefilled / prefilled, row.prefilled)
        return shares


_KINDS: tuple[DelayKind, ...] = ("queue", "engine", "step", "preemption", "restart")
