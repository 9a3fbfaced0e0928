"""Counts, windows and state of the whole server, folded from the journal for one boot."""

import json
from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeAlias

from gptoss.clock import NS_PER_MS, NS_PER_S
from gptoss.messages import events as ev
from gptoss.messages.envelope import Event, Record
from gptoss.telemetry.folding import Handler
from gptoss.telemetry.logs import LEVELS, log_line, worst_level
from gptoss.telemetry.request_view import RequestView, StepSums, is_crash_end
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

    def handlers(self, kind: type[Event]) -> Iterator[Handler]:
        """See ``View``."""
        own = _HANDLERS.get(kind)
        if own is not None:
            yield partial(own, self)
        if kind in ev.TERMINAL_EVENTS:
            yield self._ended
        if worst_level(kind) >= LEVELS["warning"]:
            yield self._note_error

    def tokens_per_s(self, end_ns: int) -> float:
        """Tokens produced in the ``RATE_WINDOW_S`` seconds up to ``end_ns``, per second."""
        last = end_ns // NS_PER_S
        return sum(tokens for second, tokens in self.produced if last - RATE_WINDOW_S < second <= last) / RATE_WINDOW_S

    def sample(self, name: str, nanoseconds: int | None) -> None:
        """Add to a window of latencies what is known."""
        if nanoseconds is not None:
            self.windows[name].append(nanoseconds / NS_PER_MS)

    def _ended(self, _: Record, _event: Event, request: RequestView | None) -> None:
        if request is None:
            return
        self.requests[request.state] += 1
        self.tokens["prompt"] += request.prompt_tokens if request.accepted_ns is not None else 0
        self.tokens["cached"] += request.cached_tokens
        if request.state == "completed":
            self.requests["looked_up"] += 1
            self.requests["cache_hits"] += request.cached_tokens > 0
            self.sample("e2e_ms", request.e2e_ns)
            self.sample("queue_ms", request.queued_ns)
            speed = request.tokens_per_s
            if speed is not None:
                self.windows["tokens_per_s"].append(speed)
                self.windows["decode_ms_per_token"].append(MS_PER_S / speed)

    def _note_error(self, record: Record, _: Event, request: RequestView | None) -> None:
        line = log_line(record, request)
        if line is not None and LEVELS[line["level"]] >= LEVELS["warning"]:
            self.errors.append({"mono_ns": record.meta.mono_ns, **line})

    def step(self, mono_ns: int, sums: StepSums) -> None:
        """Take in what a step brought, at ``mono_ns``."""
        self.tokens["generated"] += sums.tokens
        self.tokens["prefilled"] += sums.prefilled
        second, tokens = mono_ns // NS_PER_S, sums.tokens
        if self.produced and self.produced[-1][0] == second:
            tokens += self.produced.pop()[1]
        self.produced.append((second, tokens))


# ---------------------------------------------------------------- one function an event

_Handler: TypeAlias = Callable[[ServerView, Record, Any, RequestView | None], None]


def _started(view: ServerView, record: Record, event: ev.NodeStarted, _: RequestView | None) -> None:
    view.wall_offset_ns = wall_offset_ns(record, view.wall_offset_ns)
    view.node, view.started_ns = event, record.meta.mono_ns
    view.settings = json.loads(event.settings or "{}")


def _anchored(view: ServerView, record: Record, _: Event, _request: RequestView | None) -> None:
    view.wall_offset_ns = wall_offset_ns(record, view.wall_offset_ns)


def _configured(view: ServerView, record: Record, event: ev.ConfigChanged, _: RequestView | None) -> None:
    if record.meta.stream == "system":  # each decider's stream has it too
        view.live = event.settings


def _drains(view: ServerView, _: Record, _event: Event, _request: RequestView | None) -> None:
    view.draining = True


def _escalated(view: ServerView, _: Record, event: ev.SupervisorEscalated, _request: RequestView | None) -> None:
    view.escalated = event.child


def _degraded(view: ServerView, _: Record, event: ev.LogDegraded, _request: RequestView | None) -> None:
    view.log_degraded = event.reason


def _host_observed(view: ServerView, _: Record, event: ev.HostObserved, _request: RequestView | None) -> None:
    view.host = event


def _spans_exported(view: ServerView, _: Record, event: ev.SpansExported, _request: RequestView | None) -> None:
    view.spans["exported"] += event.exported
    view.spans["dropped"] += event.refused + event.overflowed


def _admitted(view: ServerView, _: Record, event: ev.AdmissionDecided, _request: RequestView | None) -> None:
    view.admission[event.action] += 1


def _routed(view: ServerView, _: Record, event: ev.RouteDecided, _request: RequestView | None) -> None:
    view.routes[event.executor or "none"] += 1
    view.route_reasons[event.reason] += 1
    chosen = next((each for each in event.candidates if each.executor == event.executor), None)
    if chosen is not None:
        view.route_kinds["multi_gpu" if chosen.multi_device else "single_gpu"] += 1
        view.route_kinds["affinity"] += bool(chosen.cached_tokens or chosen.session)


def _exited(view: ServerView, _: Record, event: ev.EngineExited, _request: RequestView | None) -> None:
    view.faults["engine_restarts" if event.planned else "engine_exits"] += 1


def _failed(view: ServerView, _: Record, event: ev.RequestFailed, _request: RequestView | None) -> None:
    if is_crash_end(event):
        view.faults["aborted_by_crash"] += 1


def _received(view: ServerView, _: Record, _event: Event, request: RequestView | None) -> None:
    view.requests["total"] += request is not None


def _first_token(view: ServerView, _: Record, _event: Event, request: RequestView | None) -> None:
    if request is not None:
        view.sample("ttft_ms", request.ttft_ns)
        view.sample("prefill_ms", request.prefill_ns)


def _counts(fault: str) -> _Handler:
    def count(view: ServerView, _: Record, _event: Event, _request: RequestView | None) -> None:
        view.faults[fault] += 1

    return count


_HANDLERS: dict[type[Event], _Handler] = {
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
    ev.RequestReceived: _received,
    ev.FirstTokenProduced: _first_token,
}
