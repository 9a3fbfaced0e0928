"""What a request goes through between its arrival and its end, as the spans and moments of its ``chat`` span. Pure.

``trace_spans`` shows the tree. A phase ends where the next begins, or with the request.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import msgspec

from gptoss.messages import events as ev
from gptoss.messages.envelope import Event, Meta, Record
from gptoss.messages.trace_context import span_id_of
from gptoss.telemetry.request_view import RequestView
from gptoss.telemetry.spans import LINKS_MAX, Attributes, Span, SpanEvent, Value
from gptoss.telemetry.step_company import Company, Presence
from gptoss.telemetry.tail_sampling import Kept

NEVER = 2**63

MOMENTS: dict[type[Event], tuple[str, Callable[[Any], Attributes]]] = {
    ev.Preempted: ("preempted", lambda e: {"gptoss.reason": e.reason, "gptoss.step": e.step}),
    ev.FirstTokenProduced: ("first_token", lambda e: {"gptoss.attempt": e.attempt}),
    ev.FirstByteSent: ("first_byte_sent", lambda _: {}),
    ev.ClientSlow: ("client_slow", lambda e: {"gptoss.stalled_ms": e.stalled_ms}),
    ev.ClientDisconnected: ("client_disconnected", lambda _: {}),
    ev.CancelRequested: ("cancel_requested", lambda e: {"gptoss.reason": e.reason}),
    ev.ExecutorFaulted: ("executor_faulted", lambda e: {"error.type": e.code, "gptoss.executor": e.executor}),
    ev.AttemptRetried: ("attempt_retried", lambda e: {"gptoss.attempt": e.attempt, "gptoss.tokens_out": e.tokens_out}),
}

TOLD: frozenset[type[Event]] = frozenset(
    {
        ev.RequestReceived,
        ev.RequestValidated,
        ev.PromptRendered,
        ev.RequestEstimated,
        ev.Enqueued,
        ev.Dequeued,
        ev.RequestAdmitted,
        ev.RouteDecided,
        ev.ExecutorAccepted,
        *MOMENTS,
        *ev.TERMINAL_EVENTS,
    }
)
"""Types of the records that a trace is told from."""


class Life(msgspec.Struct, frozen=True, kw_only=True):
    """A request that has ended.

    Attributes:
        kept: why its trace is kept.
        choices: how many its call had, when it is the first of them.
        model: that it ran on; empty when it did not.
        records: those of the types in ``TOLD`` that are about it, from its arrival to its end.
        presences: where it was in the steps of engines.
        company: who else was.
        wall_offset_ns: wall time minus the records' time.
    """

    request: RequestView
    kept: Kept
    choices: int
    model: str
    records: Sequence[Record]
    presences: Sequence[Presence]
    company: Company
    wall_offset_ns: int


def moments(life: Life) -> tuple[SpanEvent, ...]:
    """What happened to a request at some moment."""
    found = [(record, MOMENTS.get(type(record.event))) for record in life.records]
    return tuple(
        SpanEvent(entry[0], life.wall_offset_ns + record.meta.mono_ns, entry[1](record.event))
        for record, entry in found
        if entry is not None
    )


def phases(life: Life, chat: Span) -> list[Span]:
    """The spans below ``chat``, in the order in which they began."""
    return _Phases(life, chat).spans()


class _Phases:
    def __init__(self, life: Life, chat: Span) -> None:
        self._life = life
        self._chat = chat
        self._spans: list[Span] = []
        self._name = ""
        self._id = ""
        self._start_ns = 0
        self._attributes: Attributes = {}
        self._links: list[tuple[str, str]] = []
        self._waited_since: int | None = None

    def spans(self) -> list[Span]:
        for record in self._life.records:
            self._take(record.meta, record.event)
        self._close(self._life.records[-1].meta.mono_ns)
        return self._spans

    def _take(self, meta: Meta, event: Event) -> None:  # noqa: C901 - a table: what each record begins and ends
        at_ns = meta.mono_ns
        match event:
            case ev.RequestValidated():
                self._begin("render", meta)
            case ev.PromptRendered():
                self._close(at_ns, prompt_tokens=event.prompt_tokens)
            case ev.RequestEstimated():
                self._begin("queue", meta, kv_bytes=event.kv_bytes)
            case ev.Enqueued():
                self._waited_since = self._waited_since or at_ns
                self._put(position=event.position, reason=event.reason)
            case ev.Dequeued() if self._waited_since is not None:
                self._link(self._life.company.between(self._waited_since, at_ns))
            case ev.RequestAdmitted():
                self._close(at_ns, action=event.action, max_tokens=event.max_tokens)
                self._begin("route", meta)
            case ev.RouteDecided():
                self._put(reason=event.reason, candidates=len(event.candidates))
            case ev.ExecutorAccepted():
                self._close(at_ns, executor=event.executor, attempt=event.attempt)
                self._run(meta, event)
            case ev.ExecutorFaulted():
                self._close(at_ns, fault=event.code)
            case ev.AttemptRetried():
                self._begin("route", meta)
            case _:
                pass  # a moment, or the end

    def _run(self, accepted: Meta, event: ev.ExecutorAccepted) -> None:
        """Prefill and decode of an attempt. Without a token the prefill lasts until something ends it."""
        own = [one for one in self._life.presences if (one.attempt, one.executor) == (event.attempt, event.executor)]
        with_tokens = [one for one in own if one.first_token_step is not None]
        self._begin("prefill", accepted, executor=event.executor, attempt=event.attempt)
        self._put(steps=sum(one.steps for one in own), prefilled=sum(one.prefilled for one in own))
        if not with_tokens:
            self._link_steps(own, 0, NEVER)
            return
        first_step, first_ns = with_tokens[0].first_token_step or 0, with_tokens[0].first_token_ns
        self._link_steps(own, 0, first_step)
        self._close(first_ns)
        self._begin("decode", accepted, executor=event.executor, attempt=event.attempt)
        self._start_ns = first_ns
        self._put(tokens=sum(one.tokens for one in own))
        self._link_steps(own, first_step + 1, NEVER)
        self._close(with_tokens[-1].last_token_ns)

    # ---- one phase

    def _begin(self, name: str, meta: Meta, **attributes: Value) -> None:
        self._name, self._id, self._start_ns = name, span_id_of(meta, name), meta.mono_ns
        self._attributes, self._links = {}, []
        self._put(**attributes)

    def _put(self, **attributes: Value) -> None:
        self._attributes |= {f"gptoss.{self._name}.{name}": value for name, value in attributes.items()}

    def _link_steps(self, own: Iterable[Presence], first: int, last: int) -> None:
        """Link to everyone who was in the request's own steps between two of them."""
        for one in own:
            begin, end = max(first, one.first_step), min(last, one.last_step)
            if begin <= end:
                self._link(self._life.company.in_steps(one.executor, begin, end))

    def _link(self, company: Iterable[Presence]) -> None:
        others = (one.span for one in company if one.request_id != self._life.request.request_id)
        self._links = list(dict.fromkeys([*self._links, *others]))

    def _close(self, at_ns: int, **attributes: Value) -> None:
        if not self._name:
            return
        self._put(**attributes)
        if self._links:
            self._put(company=len(self._links))
        offset_ns = self._life.wall_offset_ns
        span = Span(
            trace_id=self._chat.trace_id,
            span_id=self._id,
            parent_id=self._chat.span_id,
            name=self._name,
            start_ns=offset_ns + self._start_ns,
            end_ns=offset_ns + max(at_ns, self._start_ns),
            attributes=self._attributes,
            links=tuple(self._links[:LINKS_MAX]),
            links_dropped=max(0, len(self._links) - LINKS_MAX),
        )
        self._spans.append(span)
        self._name = ""
