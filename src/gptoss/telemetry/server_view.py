"""Counts, windows and state of the whole server, folded from the journal for one boot."""

import json
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from gptoss.clock import NS_PER_MS, NS_PER_S
from gptoss.messages import events as ev
from gptoss.messages.envelope import Event, Record
from gptoss.telemetry.logs import LEVELS, log_line
from gptoss.telemetry.request_view import RequestView, is_crash_end
from gptoss.telemetry.wall_clock import wall_offset_ns

SAMPLES_MAX = 1024
ERRORS_MAX = 100
RATE_WINDOW_S = 10
MS_PER_S = 1000
WINDOWS = ("ttft_ms", "e2e_ms", "queue_ms", "prefill_ms", "decode_ms_per_token", "tokens_per_s")


def _windows() -> dict[str, deque[float]]:
    return {name: deque(maxlen=SAMPLES_MAX) for name in WINDOWS}


@dataclass(slots=True)
class ServerView:
    """The server so far.

    Attributes:
        wall_offset_ns: wall time minus monotonic time, from the newest clock anchor.
        escalated: the child that a supervisor has given up, or empty.
        log_degraded: why the journal's disk failed, or empty.
        missed: records that live folding had to leave out.
        windows: the newest ``SAMPLES_MAX`` values of each latency.
        produced: (second, tokens produced in it) of the last seconds in which there were any, newest last.
        spans: what became of exported spans; ``host``: the newest reading of the machine.
        errors: the newest ``ERRORS_MAX`` warnings and errors, as log lines.
    """

    boot: str = ""
    node: ev.NodeStarted | None = None
    settings: dict[str, Any] = field(default_factory=dict[str, Any])
    live: dict[str, Any] = field(default_factory=dict[str, Any])
    started_ns: int = 0
    newest_ns: int = 0
    newest_pos: int = -1
    wall_offset_ns: int | None = None
    draining: bool = False
    escalated: str = ""
    log_degraded: str = ""
    requests: Counter[str] = field(default_factory=Counter[str])
    tokens: Counter[str] = field(default_factory=Counter[str])
    admission: Counter[str] = field(default_factory=Counter[str])
    routes: Counter[str] = field(default_factory=Counter[str])
    route_reasons: Counter[str] = field(default_factory=Counter[str])
    route_kinds: Counter[str] = field(default_factory=Counter[str])
    faults: Counter[str] = field(default_factory=Counter[str])
    spans: Counter[str] = field(default_factory=Counter[str])
    host: ev.HostObserved | None = None
    missed: int = 0
    windows: dict[str, deque[float]] = field(default_factory=_windows)
    produced: deque[tuple[int, int]] = field(default_factory=lambda: deque(maxlen=RATE_WINDOW_S + 1))
    errors: deque[dict[str, Any]] = field(default_factory=lambda: deque(maxlen=ERRORS_MAX))

    def fold(self, record: Record, request: RequestView | None) -> None:
        """Take one record in.

        Args:
            record: the record.
            request: the view of the request that it changed, already up to date.
        """
        event, kind = record.event, type(record.event)
        self.newest_ns = record.meta.mono_ns
        if isinstance(event, ev.StepCommitted):
            self._fold_step(record.meta.mono_ns, event)
            return
        handler = _HANDLERS.get(kind)
        if handler is not None:
            handler(self, record, event)
        if request is not None and kind in _OF_REQUESTS:
            self._fold_request(record, request)
        line = log_line(record, request)
        if line is not None and LEVELS[line["level"]] >= LEVELS["warning"]:
            self.errors.append({"mono_ns": record.meta.mono_ns, **line})

    def tokens_per_s(self, end_ns: int) -> float:
        """Tokens produced in the ``RATE_WINDOW_S`` seconds up to ``end_ns``, per second."""
        last = end_ns // NS_PER_S
        return sum(tokens for second, tokens in self.produced if last - RATE_WINDOW_S < second <= last) / RATE_WINDOW_S

    def _fold_request(self, record: Record, request: RequestView) -> None:
        if isinstance(record.event, ev.RequestReceived):
            self.requests["total"] += 1
        elif isinstance(record.event, ev.FirstTokenProduced):
            self._sample("ttft_ms", request.ttft_ns)
            self._sample("prefill_ms", request.prefill_ns)
        if not request.is_over:
            return
        self.requests[request.state] += 1
        self.tokens["prompt"] += request.prompt_tokens if request.accepted_ns is not None else 0
        self.tokens["cached"] += request.cached_tokens
        if request.state == "completed":
            self.requests["looked_up"] += 1
            self.requests["cache_hits"] += request.cached_tokens > 0
            self._sample("e2e_ms", request.e2e_ns)
            self._sample("queue_ms", request.queued_ns)
            if request.tokens_per_s is not None:
                self.windows["tokens_per_s"].append(request.tokens_per_s)
                self.windows["decode_ms_per_token"].append(MS_PER_S / request.tokens_per_s)

    def _sample(self, name: str, nanoseconds: int | None) -> None:
        if nanoseconds is not None:
            self.windows[name].append(nanoseconds / NS_PER_MS)

    def _fold_step(self, mono_ns: int, event: ev.StepCommitted) -> None:
        tokens = prefilled = 0
        for row in event.rows:
            tokens += row.tokens
            prefilled += row.prefilled
        self.tokens["generated"] += tokens
        self.tokens["prefilled"] += prefilled
        second = mono_ns // NS_PER_S
        if self.produced and self.produced[-1][0] == second:
            tokens += self.produced.pop()[1]
        self.produced.append((second, tokens))


# ---------------------------------------------------------------- one function an event


def _started(view: ServerView, record: Record, event: ev.NodeStarted) -> None:
    _anchored(view, record, event)
    view.node, view.started_ns = event, record.meta.mono_ns
    view.settings = json.loads(event.settings or "{}")


def _anchored(view: ServerView, record: Record, _: Event) -> None:
    view.wall_offset_ns = wall_offset_ns(record, view.wall_offset_ns)


def _configured(view: ServerView, record: Record, event: ev.ConfigChanged) -> None:
    if record.meta.stream == "system":  # each decider's stream has it too
        view.live = event.settings


def _drains(view: ServerView, _: Record, _event: Event) -> None:
    view.draining = True


def _escalated(view: ServerView, _: Record, event: ev.SupervisorEscalated) -> None:
    view.escalated = event.child


def _degraded(view: ServerView, _: Record, event: ev.LogDegraded) -> None:
    view.log_degraded = event.reason


def _host_observed(view: ServerView, _: Record, event: ev.HostObserved) -> None:
    view.host = event


def _spans_exported(view: ServerView, _: Record, event: ev.SpansExported) -> None:
    view.spans["exported"] += event.exported
    view.spans["dropped"] += event.refused + event.overflowed


def _admitted(view: ServerView, _: Record, event: ev.AdmissionDecided) -> None:
    view.admission[event.action] += 1


def _routed(view: ServerView, _: Record, event: ev.RouteDecided) -> None:
    view.routes[event.executor or "none"] += 1
    view.route_reasons[event.reason] += 1
    chosen = next((each for each in event.candidates if each.executor == event.executor), None)
    if chosen is not None:
        view.route_kinds["multi_gpu" if chosen.multi_device else "single_gpu"] += 1
        view.route_kinds["affinity"] += bool(chosen.cached_tokens or chosen.session)


def _exited(view: ServerView, _: Record, event: ev.EngineExited) -> None:
    view.faults["engine_restarts" if event.planned else "engine_exits"] += 1


def _failed(view: ServerView, _: Record, event: ev.RequestFailed) -> None:
    if is_crash_end(event):
        view.faults["aborted_by_crash"] += 1


def _counts(fault: str) -> Callable[[ServerView, Record, Event], None]:
    def count(view: ServerView, _: Record, _event: Event) -> None:
        view.faults[fault] += 1

    return count


# Most records concern none of these, and one look tells.
_HANDLERS: dict[type[Event], Callable[[ServerView, Record, Any], None]] = {
    ev.NodeStarted: _started,
    ev.ClockAnchored: _anchored,
    ev.ConfigChanged: _configured,
    ev.DrainStarted: _drains,
    ev.AdmissionClosed: _drains,
    ev.NodeStopped: _drains,
    ev.SupervisorEscalated: _escalated,
    ev.LogDegraded: _degraded,
    ev.HostObserved: _host_observed,
    ev.SpansExported: _spans_exported,
    ev.AdmissionDecided: _admitted,
    ev.RouteDecided: _routed,
    ev.EngineExited: _exited,
    ev.RequestFailed: _failed,
    ev.DeadLettered: _counts("dead_letters"),
    ev.EngineStalled: _counts("engine_stalls"),
    ev.EngineSickened: _counts("engines_sick"),
    ev.ActorRestarted: _counts("actor_restarts"),
}
_OF_REQUESTS = frozenset({ev.RequestReceived, ev.FirstTokenProduced, *ev.TERMINAL_EVENTS})
