"""Everything that a report shows, gathered from a recording in two readings.

Rules:
- The first reading surveys: requests, decisions, steps, memory, events. The second tells the stories of the requests
  that deserve one: those the recording was cut for, then those that went wrong, then the slowest.
- Memory and the report's size are bounded, whatever the recording holds; what was left out is counted.
"""

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import msgspec

from gptoss.config import Settings
from gptoss.messages import events as ev
from gptoss.messages.envelope import Record
from gptoss.report.series import Series, StepGrid
from gptoss.report.stories import Told, tell
from gptoss.telemetry.event_tail import CHATTER
from gptoss.telemetry.recording import Recording
from gptoss.telemetry.request_view import RequestBook, RequestRow, is_crash_end, request_id_of, request_row
from gptoss.telemetry.wall_clock import wall_offset_ns

STORIES_MAX = 24
ROWS_MAX = 300
DECISIONS_MAX = 400
EVENTS_MAX = 1500
KEPT_REQUESTS_MAX = 20_000

NOTABLE: tuple[type[ev.Event], ...] = (
    *ev.TERMINAL_EVENTS,
    ev.AttemptRetried,
    ev.CancelRequested,
    ev.ClientDisconnected,
    ev.ClientSlow,
    ev.DeadLettered,
    ev.DeadlineExpired,
    ev.EngineExited,
    ev.EngineLoaded,
    ev.EngineLoadFailed,
    ev.EngineStalled,
    ev.ExecutorFaulted,
    ev.LogDegraded,
    ev.NodeStarted,
    ev.NodeStopped,
    ev.DrainStarted,
    ev.ActorFailed,
    ev.ActorRestarted,
    ev.SupervisorEscalated,
    ev.Preempted,
    ev.ReservationRefused,
    ev.RunsAborted,
)
_DECISIONS = (ev.AdmissionDecided, ev.ReservationRefused, ev.RouteDecided)


@dataclass(slots=True)
class BootFacts:
    """One run of the server.

    Attributes:
        origin_ns: monotonic time of its first record; the report's times count from here.
        settings: those that differ from the defaults, name -> (value, default).
        queued, running: requests waiting and running; ``reserved``, ``in_use`` and ``budget`` are KV bytes.
    """

    boot: str
    node: str = ""
    started: ev.NodeStarted | None = None
    origin_ns: int = 0
    last_ns: int = 0
    wall_offset_ns: int | None = None
    settings: dict[str, tuple[Any, Any]] = field(default_factory=dict[str, tuple[Any, Any]])
    engines: list[ev.EngineLoaded] = field(default_factory=list[ev.EngineLoaded])
    grids: dict[str, StepGrid] = field(default_factory=dict[str, StepGrid])
    queued: Series = field(default_factory=Series)
    running: Series = field(default_factory=Series)
    reserved: Series = field(default_factory=Series)
    in_use: Series = field(default_factory=Series)
    budget: int = 0
    records: int = 0


@dataclass(slots=True)
class Facts:
    """See the module's text.

    Attributes:
        requests: newest last; ``requests_left_out`` did not fit.
        timelines: (boot, request) -> for those of ``requests`` that have one.
        events_left_out: events of interest that are not in ``events``.
    """

    boots: list[BootFacts] = field(default_factory=list[BootFacts])
    requests: list[RequestRow] = field(default_factory=list[RequestRow])
    requests_left_out: int = 0
    outcomes: Counter[tuple[str, str]] = field(default_factory=Counter[tuple[str, str]])
    decisions: list[Record] = field(default_factory=list[Record])
    decisions_left_out: int = 0
    events: list[Record] = field(default_factory=list[Record])
    events_left_out: int = 0
    stories: list[Told] = field(default_factory=list[Told])


def gather(recording: Recording, focus: Iterable[str] = ()) -> Facts:
    """Read a recording.

    Args:
        recording: read twice.
        focus: requests that it is about; they come first wherever something must be left out.
    """
    about = frozenset(focus)
    survey = _Survey(about)
    for record in recording.records():
        survey.add(record)
    facts = survey.finish()
    facts.stories = tell(recording, _deserving(facts.requests, about, STORIES_MAX))
    shown = _deserving(facts.requests, about, ROWS_MAX)
    facts.requests_left_out = len(facts.requests) - len(shown)
    facts.requests = shown
    return facts


def _deserving(rows: list[RequestRow], about: frozenset[str], most: int) -> list[RequestRow]:
    """Those that a reader wants to see first, at most so many, in their old order."""

    def rank(row: RequestRow) -> tuple[bool, bool, bool, float]:
        went_wrong = row.state in {"failed", "rejected"} or row.outcome in {"deadline", "slow_client"} or row.retries
        return row.request_id not in about, not went_wrong, row.state == "rejected", -(row.e2e_ms or 0.0)

    chosen = sorted(rows, key=rank)[:most]
    order = {id(row): index for index, row in enumerate(rows)}
    return sorted(chosen, key=lambda row: order[id(row)])


class _Survey:
    def __init__(self, about: frozenset[str]) -> None:
        self._about = about
        self._facts = Facts()
        self._book = RequestBook(finished_max=KEPT_REQUESTS_MAX)
        self._boot = BootFacts(boot="")
        self._reserved: dict[str, int] = {}
        self._running: set[str] = set()
        self._decisions: _Kept = _Kept(DECISIONS_MAX)
        self._events: _Kept = _Kept(EVENTS_MAX)

    def add(self, record: Record) -> None:
        meta, event = record.meta, record.event
        if meta.boot != self._boot.boot:
            self._end_boot()
            self._boot = BootFacts(boot=meta.boot, node=meta.node, origin_ns=meta.mono_ns)
            self._facts.boots.append(self._boot)
        self._boot.last_ns = meta.mono_ns
        self._boot.records += 1
        if isinstance(event, ev.CommandConsumed):
            return
        self._book.fold(record)
        if isinstance(event, ev.StepCommitted):
            self._boot.grids.setdefault(event.executor, StepGrid()).add(event)
            self._boot.in_use.add(meta.mono_ns, event.kv_bytes_in_use)
            return
        self._node(record)
        self._levels(record)
        is_ours = request_id_of(record) in self._about
        if isinstance(event, _DECISIONS):
            is_plain = isinstance(event, ev.AdmissionDecided) and event.action == "accept"
            self._decisions.add(record, matters=is_ours or not is_plain)
        if meta.type not in CHATTER:
            self._events.add(record, matters=is_ours or isinstance(event, NOTABLE))

    def finish(self) -> Facts:
        self._end_boot()
        facts = self._facts
        facts.decisions, facts.decisions_left_out = self._decisions.kept()
        facts.events, facts.events_left_out = self._events.kept()
        for row in facts.requests:
            outcome = "" if row.outcome == row.state else row.outcome
            facts.outcomes[row.state, outcome] += 1
        return facts

    def _node(self, record: Record) -> None:
        event, boot = record.event, self._boot
        boot.wall_offset_ns = wall_offset_ns(record, boot.wall_offset_ns)
        if isinstance(event, ev.NodeStarted):
            boot.started, boot.settings = event, _changed(event.settings)
        elif isinstance(event, ev.EngineLoaded):
            boot.engines.append(event)
        elif isinstance(event, ev.MemoryPoolSet):
            boot.budget = max(boot.budget, event.capabilities.kv_budget_bytes)
        elif is_crash_end(event):
            self._crashed(record)

    def _crashed(self, record: Record) -> None:
        """The end of a request of an earlier boot: its row was written when that boot ended."""
        rows = self._facts.requests
        for index in range(len(rows) - 1, -1, -1):
            if rows[index].request_id == record.meta.correlation and rows[index].boot != record.meta.boot:
                rows[index] = msgspec.structs.replace(rows[index], state="failed", outcome="aborted_by_crash")
                return

    def _levels(self, record: Record) -> None:
        event, at_ns, boot = record.event, record.meta.mono_ns, self._boot
        if isinstance(event, ev.Enqueued | ev.Dequeued):
            boot.queued.add(at_ns, event.queued)
        elif isinstance(event, ev.AdmissionDecided) and event.action in {"accept", "shrink", "route_multi"}:
            self._running.add(event.request_id)
            boot.running.add(at_ns, len(self._running))
        elif isinstance(event, ev.SlotReleased):
            self._running.discard(event.request_id)
            boot.running.add(at_ns, len(self._running))
        elif isinstance(event, ev.ReservationGranted):
            self._reserved[event.request_id] = event.kv_bytes
            boot.reserved.add(at_ns, sum(self._reserved.values()))
        elif isinstance(event, ev.ReservationReleased):
            self._reserved.pop(event.request_id, None)
            boot.reserved.add(at_ns, sum(self._reserved.values()))

    def _end_boot(self) -> None:
        boot, book = self._boot, self._book
        views = sorted([*book.finished.values(), *book.open.values()], key=lambda view: view.received_ns)
        self._facts.requests += [
            request_row(view, boot=boot.boot, wall_offset_ns=boot.wall_offset_ns) for view in views
        ]
        self._reserved.clear()
        self._running.clear()
        self._book = RequestBook(finished_max=KEPT_REQUESTS_MAX)


class _Kept:
    """The first so many records; once there are more, those that matter alone."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._records: list[tuple[Record, bool]] = []
        self._left_out = 0
        self._is_full = False

    def add(self, record: Record, *, matters: bool) -> None:
        if len(self._records) >= self._most and not self._is_full:
            self._is_full = True
            matter = [entry for entry in self._records if entry[1]]
            self._left_out += len(self._records) - len(matter)
            self._records = matter
        if len(self._records) < self._most and (matters or not self._is_full):
            self._records.append((record, matters))
        else:
            self._left_out += 1

    def kept(self) -> tuple[list[Record], int]:
        return [record for record, _ in self._records], self._left_out


def _changed(settings: str) -> dict[str, tuple[Any, Any]]:
    """The settings that differ from the defaults of this program; none if they cannot be read."""
    try:
        written = json.loads(settings)
    except ValueError:
        return {}
    if not isinstance(written, dict):
        return {}
    defaults = msgspec.to_builtins(Settings())
    return {
        str(name): (value, defaults.get(name))  # pyright: ignore[reportUnknownArgumentType]
        for name, value in written.items()  # pyright: ignore[reportUnknownVariableType]
        if value != defaults.get(name)
    }
