"""Traces, folded from the journal: when a request has ended, its spans, if its trace is kept.

While a request runs nothing is built: its records are remembered, and who was in which step. So a trace that is not kept
costs next to nothing. Span ids are hashes of event ids: the same records give the same spans, and whoever rebuilds a
trace from the log makes no second one of it.
"""

import json
from dataclasses import dataclass, field

from gptoss.messages import events as ev
from gptoss.messages.envelope import Record
from gptoss.messages.trace_context import span_id_of
from gptoss.telemetry.books import Books
from gptoss.telemetry.executor_view import model_of
from gptoss.telemetry.request_view import RequestView, request_id_of
from gptoss.telemetry.spans import SpanSink
from gptoss.telemetry.step_company import Company, Presence
from gptoss.telemetry.tail_sampling import TailSampling
from gptoss.telemetry.trace_phases import TOLD, Life
from gptoss.telemetry.trace_spans import spans_of
from gptoss.telemetry.wall_clock import wall_offset_ns

LIVES_MAX = 20_000
RECORDS_MAX = 256
"""Of one request; more come only of one that is sent back in line again and again."""


@dataclass(slots=True)
class _Running:
    """What is remembered of a request that runs."""

    records: list[Record]
    presences: list[Presence] = field(default_factory=list[Presence])
    choices: int = 1


class Traces:
    """Makes the spans of each request that has ended and whose trace is kept.

    Args:
        sink: takes them.
        books: folded by whoever calls ``take``; None keeps own ones, for ``fold``.
    """

    def __init__(self, sink: SpanSink, books: Books | None = None) -> None:
        self._sink = sink
        self._books = books or Books()
        self._begin_boot("")

    def _begin_boot(self, boot: str) -> None:
        self._boot = boot
        self._sampling = TailSampling()
        self._running: dict[str, _Running] = {}
        self._spans: dict[str, tuple[str, str]] = {}
        self._company = Company()
        self._wall_offset_ns: int | None = None

    def fold(self, record: Record) -> None:
        """Take one record in, and fold the own books."""
        self.take(record, self._books.fold(record))

    def take(self, record: Record, request: RequestView | None) -> None:
        """Take one record in.

        Args:
            record: the record.
            request: the request that it changed, as the books, which have folded it already, say.
        """
        meta, event = record.meta, record.event
        kind = type(event)
        if meta.boot != self._boot:
            self._begin_boot(meta.boot)
        if kind is ev.CommandConsumed:
            return
        if isinstance(event, ev.StepCommitted):
            for presence in self._company.step(meta.mono_ns, event, self._spans):
                self._running[presence.request_id].presences.append(presence)
        elif kind in TOLD:
            self._tell(record, request)
        else:
            self._note(record)

    def _note(self, record: Record) -> None:
        self._wall_offset_ns = wall_offset_ns(record, self._wall_offset_ns)
        if isinstance(record.event, ev.NodeStarted):
            self._sampling = TailSampling.from_recorded(json.loads(record.event.settings or "{}"))

    def _tell(self, record: Record, request: RequestView | None) -> None:
        event, request_id = record.event, request_id_of(record)
        if isinstance(event, ev.RequestReceived) and record.meta.trace_id:  # older versions named no traces
            self._begin(request_id, record, event)
            return
        running = self._running.get(request_id)
        if running is None:
            return
        is_over = isinstance(event, ev.TERMINAL_EVENTS)
        if is_over or len(running.records) < RECORDS_MAX:
            running.records.append(record)
        if is_over:
            self._end(request_id, running, request)
        elif isinstance(event, ev.Preempted | ev.ExecutorFaulted):
            self._company.leave(request_id)

    def _begin(self, request_id: str, record: Record, event: ev.RequestReceived) -> None:
        if len(self._running) >= LIVES_MAX:
            self._forget(next(iter(self._running)))
        self._forget(request_id)
        self._running[request_id] = _Running([record])
        if (first := self._running.get(event.parent_id)) is not None:
            first.choices += 1
        self._spans[request_id] = (record.meta.trace_id, span_id_of(record.meta, "chat"))

    def _forget(self, request_id: str) -> None:
        self._running.pop(request_id, None)
        self._spans.pop(request_id, None)
        self._company.leave(request_id)

    def _end(self, request_id: str, running: _Running, request: RequestView | None) -> None:
        self._forget(request_id)
        if request is None or self._wall_offset_ns is None:
            return
        kept = self._sampling.keeps(request)
        if kept is not None:
            life = Life(
                request=request,
                kept=kept,
                choices=running.choices,
                model=model_of(self._books.executors.views.get(request.executor)),
                records=running.records,
                presences=running.presences,
                company=self._company,
                wall_offset_ns=self._wall_offset_ns,
            )
            self._sink(spans_of(life))
