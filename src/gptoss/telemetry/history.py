"""What the server did in each of the last ``SECONDS_KEPT`` seconds, folded from the journal, for live charts.

Rules:
- A second is a whole second of the monotonic clock. Those without any record have no entry: nothing was counted in
  them, and what has a level (requests that run, memory) stayed as it was.
- Counts and latencies are of the second; levels are as it ended. The newest second may still be going on.
- Memory is bounded: a second keeps numbers, and its samples only until it is over.
"""

from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import msgspec

from gptoss.clock import NS_PER_MS, NS_PER_S
from gptoss.messages import events as ev
from gptoss.messages.envelope import Event, Record
from gptoss.telemetry.folding import Handler
from gptoss.telemetry.percentile import nearest_rank
from gptoss.telemetry.request_view import RequestView, StepSums

SECONDS_KEPT = 300
_MIDDLE = 50


class Levels(msgspec.Struct, frozen=True, kw_only=True):
    """What is so at one moment: requests that run and wait, bytes of KV memory."""

    running: int = 0
    queued: int = 0
    kv_reserved_bytes: int = 0
    kv_in_use_bytes: int = 0
    kv_budget_bytes: int = 0


class Spread(msgspec.Struct, frozen=True):
    """The middle and the largest of some milliseconds."""

    p50: float
    max: float


class Second(msgspec.Struct, frozen=True, kw_only=True):
    """One second.

    Attributes:
        at: which, as whole seconds of the monotonic clock.
        tokens, prefilled: generated, and prompt tokens computed.
        ttft_ms: of requests whose first token came; None when none did.
        token_ms: what a running stream waited for each token, by step; None without steps that made tokens.
        queued_max: the longest that the queue was.
        admission: decisions by action.
        ended: requests by how they ended.
    """

    at: int
    tokens: int
    prefilled: int
    ttft_ms: Spread | None
    token_ms: Spread | None
    queued_max: int
    admission: dict[str, int]
    ended: dict[str, int]
    levels: Levels


@dataclass(slots=True)
class _Open:
    """The second that goes on."""

    at: int
    tokens: int = 0
    prefilled: int = 0
    queued_max: int = 0
    ttft_ms: list[float] = field(default_factory=list[float])
    token_ms: list[float] = field(default_factory=list[float])
    admission: Counter[str] = field(default_factory=Counter[str])
    ended: Counter[str] = field(default_factory=Counter[str])

    def closed(self, levels: Levels) -> Second:
        return Second(
            at=self.at,
            tokens=self.tokens,
            prefilled=self.prefilled,
            ttft_ms=_spread(self.ttft_ms),
            token_ms=_spread(self.token_ms),
            queued_max=max(self.queued_max, levels.queued),
            admission=dict(self.admission),
            ended=dict(self.ended),
            levels=levels,
        )


class History:
    """The last seconds.

    Args:
        levels: asked once for each second that ended, before the first record after it is folded.
    """

    def __init__(self, levels: Callable[[], Levels]) -> None:
        self._levels = levels
        self._over: deque[Second] = deque(maxlen=SECONDS_KEPT)
        self._open: _Open | None = None
        self._ends_ns = 0

    def clear(self) -> None:
        """Forget everything."""
        self._over.clear()
        self._open, self._ends_ns = None, 0

    def turn(self, mono_ns: int) -> None:
        """Close the second that goes on, if it is over at ``mono_ns``; before that moment's record is folded anywhere."""
        if mono_ns < self._ends_ns:
            return
        if self._open is not None:
            self._over.append(self._open.closed(self._levels()))
        at = mono_ns // NS_PER_S
        self._open, self._ends_ns = _Open(at), (at + 1) * NS_PER_S

    def step(self, event: ev.StepCommitted, sums: StepSums) -> None:
        """Take a step in, after ``turn``, with the sums over its rows."""
        second = self._now()
        second.prefilled += sums.prefilled
        second.tokens += sums.tokens
        if sums.tokens:
            # A step may bring a stream several tokens, where they were guessed.
            second.token_ms.append(event.duration_ns / NS_PER_MS * sums.streams / sums.tokens)

    def handlers(self, kind: type[Event]) -> tuple[Handler, ...]:
        """See ``View``; called after ``turn``."""
        if kind in ev.TERMINAL_EVENTS:
            return (self._ended,)
        handlers: dict[type[Event], Handler] = {
            ev.AdmissionDecided: self._admitted,
            ev.Enqueued: self._enqueued,
            ev.FirstTokenProduced: self._first_token,
        }
        return (handlers[kind],) if kind in handlers else ()

    def _now(self) -> _Open:
        assert self._open is not None
        return self._open

    def _admitted(self, _: Record, event: ev.AdmissionDecided, _request: RequestView | None) -> None:
        self._now().admission[event.action] += 1

    def _enqueued(self, _: Record, event: ev.Enqueued, _request: RequestView | None) -> None:
        second = self._now()
        second.queued_max = max(second.queued_max, event.queued)

    def _first_token(self, _: Record, _event: Event, request: RequestView | None) -> None:
        if request is not None and request.ttft_ns is not None:
            self._now().ttft_ms.append(request.ttft_ns / NS_PER_MS)

    def _ended(self, _: Record, _event: Event, request: RequestView | None) -> None:
        if request is not None:
            self._now().ended[request.state] += 1

    def since(self, at: int) -> list[Second]:
        """The seconds from ``at`` on, oldest first, the one that goes on included."""
        found = [second for second in self._over if second.at >= at]
        if self._open is not None and self._open.at >= at:
            found.append(self._open.closed(self._levels()))
        return found


def as_columns(seconds: list[Second]) -> dict[str, list[Any]]:
    """Seconds as one list for each of their numbers, which is the shorter JSON."""
    names = [name for name in Second.__struct_fields__ if name != "levels"]
    columns = {name: [msgspec.to_builtins(getattr(second, name)) for second in seconds] for name in names}
    levels = {name: [getattr(second.levels, name) for second in seconds] for name in Levels.__struct_fields__}
    return columns | levels


def _spread(samples: list[float]) -> Spread | None:
    if not samples:
        return None
    ordered = sorted(samples)
    return Spread(round(nearest_rank(ordered, _MIDDLE), 3), round(ordered[-1], 3))
