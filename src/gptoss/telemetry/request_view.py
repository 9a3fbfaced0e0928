"""What is known of each request, folded from the journal.

``RequestBook`` is the one fold of request lives; the projection, the metrics and the log lines all read its views, so
they cannot disagree. Times are the records' monotonic nanoseconds. Open requests are bounded by what the server admits
(and by ``OPEN_MAX`` when records were lost); finished ones are kept up to ``finished_max``, oldest forgotten first.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, TypeAlias

import msgspec

from gptoss.clock import NS_PER_MS, NS_PER_S
from gptoss.errors import AbortedByCrash
from gptoss.messages import events as ev
from gptoss.messages.envelope import Event, Meta, Record

OPEN_MAX = 20_000

RequestState: TypeAlias = Literal[
    "received", "queued", "admitted", "running", "completed", "failed", "cancelled", "rejected"
]
TERMINAL_STATES: tuple[RequestState, ...] = ("completed", "failed", "cancelled", "rejected")


@dataclass(slots=True)
class RequestView:
    """One request so far; a time is None until its moment has come.

    Attributes:
        queued_ns: time spent in the admission queue.
        token_gap_ns: between the two newest steps that produced tokens for it.
        tokens_seen: output tokens that steps have produced so far; ``completion_tokens`` is the terminal event's count.
        outcome: finish reason, error code or cancel reason of the terminal event.
        status: HTTP status of a rejection, else 0.
    """

    request_id: str
    endpoint: str = ""
    model: str = ""
    stream: bool = False
    priority: int = 0
    session_id: str = ""
    trace_id: str = ""
    state: RequestState = "received"
    received_ns: int = 0
    enqueued_ns: int | None = None
    admitted_ns: int | None = None
    accepted_ns: int | None = None
    first_token_ns: int | None = None
    last_token_ns: int | None = None
    token_gap_ns: int | None = None
    ended_ns: int | None = None
    queued_ns: int = 0
    prompt_tokens: int = 0
    max_tokens: int = 0
    cached_tokens: int = 0
    template: str = ""
    tokens_seen: int = 0
    completion_tokens: int = 0
    action: str = ""
    executor: str = ""
    attempt: int = 0
    retries: int = 0
    outcome: str = ""
    message: str = ""
    status: int = 0

    @property
    def is_over(self) -> bool:
        """Whether its terminal event has come."""
        return self.state in TERMINAL_STATES

    @property
    def ttft_ns(self) -> int | None:
        """From arrival to the first token."""
        return _between(self.received_ns, self.first_token_ns)

    @property
    def e2e_ns(self) -> int | None:
        """From arrival to the terminal event."""
        return _between(self.received_ns, self.ended_ns)

    @property
    def prefill_ns(self) -> int | None:
        """From the executor's acceptance to the first token."""
        return _between(self.accepted_ns, self.first_token_ns)

    @property
    def decode_ns(self) -> int | None:
        """From the first token to the last."""
        return _between(self.first_token_ns, self.last_token_ns)

    @property
    def tokens_per_s(self) -> float | None:
        """Decode speed: tokens after the first over the time they took; None with fewer than two tokens."""
        tokens = self.tokens_seen - 1
        if tokens < 1 or not self.decode_ns:
            return None
        return tokens * 1e9 / self.decode_ns


class RequestRow(msgspec.Struct, frozen=True, kw_only=True):
    """One request for a list: the view's facts in people's units; ``received_unix_s`` is None without a clock anchor."""

    request_id: str
    boot: str
    trace_id: str
    state: RequestState
    outcome: str
    message: str
    endpoint: str
    model: str
    stream: bool
    priority: int
    action: str
    executor: str
    attempt: int
    retries: int
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    max_tokens: int
    received_unix_s: float | None
    queue_ms: float
    ttft_ms: float | None
    e2e_ms: float | None
    tokens_per_s: float | None


def request_row(view: RequestView, *, boot: str, wall_offset_ns: int | None) -> RequestRow:
    """The row of a request.

    Args:
        view: what is known of it.
        boot: whose request it is.
        wall_offset_ns: wall time minus monotonic time of that boot, None when unknown.
    """
    return RequestRow(
        request_id=view.request_id,
        boot=boot,
        trace_id=view.trace_id,
        state=view.state,
        outcome=view.outcome,
        message=view.message,
        endpoint=view.endpoint,
        model=view.model,
        stream=view.stream,
        priority=view.priority,
        action=view.action,
        executor=view.executor,
        attempt=view.attempt,
        retries=view.retries,
        prompt_tokens=view.prompt_tokens,
        cached_tokens=view.cached_tokens,
        completion_tokens=view.completion_tokens if view.is_over else view.tokens_seen,
        max_tokens=view.max_tokens,
        received_unix_s=None if wall_offset_ns is None else round((wall_offset_ns + view.received_ns) / NS_PER_S, 3),
        queue_ms=view.queued_ns / NS_PER_MS,
        ttft_ms=_ms(view.ttft_ns),
        e2e_ms=_ms(view.e2e_ns),
        tokens_per_s=view.tokens_per_s,
    )


def _ms(nanoseconds: int | None) -> float | None:
    return None if nanoseconds is None else nanoseconds / NS_PER_MS


def _between(start_ns: int | None, end_ns: int | None) -> int | None:
    return None if start_ns is None or end_ns is None else max(0, end_ns - start_ns)


def request_id_of(record: Record) -> str:
    """The request that a record is about, or empty."""
    return record.meta.correlation or getattr(record.event, "request_id", "")


def is_crash_end(event: Event) -> bool:
    """Whether it is the terminal event of a request that an earlier boot left unfinished."""
    return isinstance(event, ev.RequestFailed) and event.code == AbortedByCrash.code


class StepSums(msgspec.Struct, frozen=True, kw_only=True):
    """Sums over the rows of a step.

    Attributes:
        tokens, prefilled, drafted: generated, prompt tokens computed, and tokens guessed.
        streams: rows that brought tokens.
        gaps: (time since the request's tokens before, tokens of the row) -> tokens that came so. Most rows of a step are
            alike.
    """

    tokens: int = 0
    prefilled: int = 0
    drafted: int = 0
    streams: int = 0
    gaps: dict[tuple[int, int], int] = {}


@dataclass(slots=True)
class RequestBook:
    """All requests of this boot, open and recently finished, by id in the order of arrival (finished: of ending)."""

    finished_max: int = 0
    open: dict[str, RequestView] = field(default_factory=dict[str, RequestView])
    finished: dict[str, RequestView] = field(default_factory=dict[str, RequestView])
    boot: str = ""

    def fold(self, record: Record) -> RequestView | None:
        """Take one record in.

        Returns:
            The view of the request that the record changed. None for records of no request, for requests that are
            unknown or over, and for ``StepCommitted``, which concerns many (read them from ``open``).
        """
        meta, event = record.meta, record.event
        if meta.boot != self.boot:
            self.begin_boot(meta.boot)
        if isinstance(event, ev.StepCommitted):
            self.fold_step(meta, event)
            return None
        fold = self.fold_of(type(event))
        return None if fold is None else fold(meta, event)

    def fold_of(self, kind: type[Event]) -> Callable[[Meta, Any], RequestView | None] | None:
        """What becomes of an event of this type, as ``fold`` does it; None for nothing. ``fold_step`` is for steps."""
        handler = _HANDLERS.get(kind)
        if handler is None:
            return None
        if kind is ev.RequestReceived:
            return self._receive
        return partial(self._end if kind in _TERMINAL else self._change, handler)

    def fold_step(self, meta: Meta, event: ev.StepCommitted) -> StepSums:
        """Take a step in; returns what else there is to know of its rows."""
        find, now_ns = self.open.get, meta.mono_ns
        produced = prefilled = drafted = streams = 0
        gaps: dict[tuple[int, int], int] = {}
        alike, alike_tokens = (
            (0, 0),
            0,
        )  # rows that follow each other mostly are: they are put in the dictionary together
        for row in event.rows:  # for each token of each request: nothing here is worth a call
            prefilled += row.prefilled
            drafted += row.num_draft
            tokens = row.tokens
            if not tokens:
                continue
            produced += tokens
            streams += 1
            view = find(row.request_id)
            if view is None:
                continue
            view.tokens_seen += tokens
            last_ns, view.last_token_ns = view.last_token_ns, now_ns
            if last_ns is not None:
                view.token_gap_ns = gap_ns = now_ns - last_ns if now_ns > last_ns else 0
                if gap_ns != alike[0] or tokens != alike[1]:
                    if alike_tokens:
                        gaps[alike] = gaps.get(alike, 0) + alike_tokens
                    alike, alike_tokens = (gap_ns, tokens), 0
                alike_tokens += tokens
        if alike_tokens:
            gaps[alike] = gaps.get(alike, 0) + alike_tokens
        return StepSums(tokens=produced, prefilled=prefilled, drafted=drafted, streams=streams, gaps=gaps)

    def begin_boot(self, boot: str) -> None:
        """Monotonic times of boots do not compare, and what an older boot left open has ended with it."""
        self.boot = boot
        self.open.clear()
        self.finished.clear()

    def _receive(self, meta: Meta, event: ev.RequestReceived) -> RequestView:
        request_id = meta.correlation or event.request_id
        view = self.open.get(request_id)
        if view is None:
            if len(self.open) >= OPEN_MAX:
                self.open.pop(next(iter(self.open)))
            view = RequestView(request_id, received_ns=meta.mono_ns, trace_id=meta.trace_id)
            self.open[request_id] = view
        _received(view, meta, event)
        return view

    def _change(self, handler: "_Handler", meta: Meta, event: Event) -> RequestView | None:
        view = self.open.get(meta.correlation or getattr(event, "request_id", ""))
        if view is not None:
            handler(view, meta, event)
        return view

    def _end(self, handler: "_Handler", meta: Meta, event: Event) -> RequestView | None:
        view = self._change(handler, meta, event)
        if view is None:
            return None
        self.open.pop(view.request_id, None)
        if self.finished_max:
            self.finished.pop(view.request_id, None)
            self.finished[view.request_id] = view
            if len(self.finished) > self.finished_max:
                self.finished.pop(next(iter(self.finished)))
        return view


# ---------------------------------------------------------------- one function an event


def _received(view: RequestView, _meta: Meta, event: ev.RequestReceived) -> None:
    view.endpoint, view.model, view.stream = event.endpoint, event.model, event.stream
    view.priority, view.session_id = event.priority, event.session_id


def _rendered(view: RequestView, _meta: Meta, event: ev.PromptRendered) -> None:
    view.prompt_tokens, view.max_tokens = event.prompt_tokens, event.max_tokens
    view.template = event.template


def _enqueued(view: RequestView, meta: Meta, _event: ev.Enqueued) -> None:
    view.state, view.enqueued_ns = "queued", meta.mono_ns


def _dequeued(view: RequestView, meta: Meta, _event: ev.Dequeued) -> None:
    view.queued_ns += _between(view.enqueued_ns, meta.mono_ns) or 0
    view.enqueued_ns = None
    view.state = "received"


def _admitted(view: RequestView, meta: Meta, event: ev.RequestAdmitted) -> None:
    view.state, view.admitted_ns = "admitted", meta.mono_ns
    view.action, view.max_tokens = event.action, event.max_tokens


def _routed(view: RequestView, _meta: Meta, event: ev.RequestRouted) -> None:
    view.executor, view.attempt = event.executor, event.attempt


def _accepted(view: RequestView, meta: Meta, event: ev.ExecutorAccepted) -> None:
    view.state, view.executor, view.attempt = "running", event.executor, event.attempt
    if view.first_token_ns is None:
        view.accepted_ns = meta.mono_ns


def _first_token(view: RequestView, meta: Meta, _event: ev.FirstTokenProduced) -> None:
    if view.first_token_ns is None:
        view.first_token_ns = meta.mono_ns


def _retried(view: RequestView, _meta: Meta, _event: ev.AttemptRetried) -> None:
    view.state = "admitted"
    view.retries += 1


def _noted(_view: RequestView, _meta: Meta, _event: Event) -> None:
    """Moves nothing in the view; whoever reads it along with the record learns which request it is about."""


def _completed(view: RequestView, meta: Meta, event: ev.RequestCompleted) -> None:
    view.state, view.ended_ns, view.outcome = "completed", meta.mono_ns, event.finish_reason
    view.prompt_tokens, view.cached_tokens = event.prompt_tokens, event.cached_tokens
    view.completion_tokens = event.completion_tokens


def _failed(view: RequestView, meta: Meta, event: ev.RequestFailed) -> None:
    view.state, view.ended_ns, view.outcome = "failed", meta.mono_ns, event.code
    view.completion_tokens, view.message = event.completion_tokens, event.message


def _cancelled(view: RequestView, meta: Meta, event: ev.RequestCancelled) -> None:
    view.state, view.ended_ns, view.outcome = "cancelled", meta.mono_ns, event.reason
    view.completion_tokens = event.completion_tokens


def _rejected(view: RequestView, meta: Meta, event: ev.RequestRejected) -> None:
    view.state, view.ended_ns, view.outcome = "rejected", meta.mono_ns, event.code
    view.status, view.message = event.status, event.message


_Handler: TypeAlias = Callable[[RequestView, Meta, Any], None]
_HANDLERS: dict[type[Event], _Handler] = {
    ev.RequestReceived: _received,
    ev.PromptRendered: _rendered,
    ev.Enqueued: _enqueued,
    ev.Dequeued: _dequeued,
    ev.RequestAdmitted: _admitted,
    ev.RequestRouted: _routed,
    ev.ExecutorAccepted: _accepted,
    ev.FirstTokenProduced: _first_token,
    ev.AttemptRetried: _retried,
    ev.ExecutorFaulted: _noted,
    ev.ClientSlow: _noted,
    ev.RequestCompleted: _completed,
    ev.RequestFailed: _failed,
    ev.RequestCancelled: _cancelled,
    ev.RequestRejected: _rejected,
}
_TERMINAL = frozenset(ev.TERMINAL_EVENTS)
