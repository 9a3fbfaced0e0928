"""Traces, folded from the journal: when a request has ended, its spans, if its trace is kept.

While a request runs nothing is built: its records are remembered, and who was in which step. So a trace that is not kept
costs next to nothing. Span ids are hashes of event ids: the same records give the same spans, and whoever rebuilds a
trace from the log makes no second one of it.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field

from gptoss.messages import events as ev
from gptoss.messages.envelope import Event, Record
from gptoss.messages.trace_context import span_id_of
from gptoss.telemetry.books import Books
from gptoss.telemetry.executor_view import model_of
from gptoss.telemetry.folding import Handler, View
from gptoss.telemetry.request_view import RequestView, request_id_of
from gptoss.telemetry.spans import SpanSink
from gptoss.telemetry.step_company import Company, Presence
from gptoss.telemetry.tail_sampling import TailSampling
from gptoss.telemetry.trace_phases import TOLD, Life
from gptoss.telemetry.trace_spans import spans_of
from gptoss.telemetry.wall_clock import ANCHORS, wall_offset_ns

LIVES_MAX = 20_000
RECORDS_MAX = 256
"""Of one request; more come only of one that is sent back in line again and again."""


@dataclass(slots=True)
class _Running:
    """What is remembered of a request that runs."""

    records: list[Record]
    presences: list[Presence] = field(default_factory=list[Presence])
    choices: int = 1


class Traces(View):
    """Makes the spans of each request that has ended and whose trace is kept.

    Args:
        sink: takes them.
        books: see ``View``.
    """

    def __init__(self, sink: SpanSink, books: Books | None = None) -> None:
        super().__init__(books)
        self._sink = sink
        self.begin_boot("")

    def begin_boot(self, boot: str) -> None:
        """See ``View``."""
        del boot
        self._sampling = TailSampling()
        self._running: dict[str, _Running] = {}
        self._spans: dict[str, tuple[str, str]] = {}
        self._company = Company()
        self._wall_offset_ns: int | None = None

    def handlers(self, kind: type[Event]) -> Iterator[Handler]:
        """See ``View``."""
        if kind in ANCHORS:
            yield self._anchor
        if kind is ev.NodeStarted:
            yield self._node_started
        elif kind is ev.StepCommitted:
            yield self._step
        elif kind is ev.RequestReceived:
            yield self._received
        elif kind in ev.TERMINAL_EVENTS:
            yield self._ended
        elif kind in TOLD:
            yield self._told
            if kind in {ev.Preempted, ev.ExecutorFaulted}:
                yield self._left

    def _anchor(self, record: Record, _: Event, _request: RequestView | None) -> None:
        self._wall_offset_ns = wall_offset_ns(record, self._wall_offset_ns)

    def _node_started(self, _: Record, event: ev.NodeStarted, _request: RequestView | None) -> None:
        self._sampling = TailSampling.from_recorded(json.loads(event.settings or "{}"))

    def _step(self, record: Record, event: ev.StepCommitted, _: RequestView | None) -> None:
        for presence in self._company.step(record.meta.mono_ns, event, self._spans):
            self._running[presence.request_id].presences.append(presence)

    def _received(self, record: Record, event: ev.RequestReceived, request: RequestView | None) -> None:
        if record.meta.trace_id:
            self._begin(request_id_of(record), record, event)
        else:  # older versions named no traces
            self._told(record, event, request)

    def _told(self, record: Record, _: Event, _request: RequestView | None) -> None:
        running = self._running.get(request_id_of(record))
        if running is not None and len(running.records) < RECORDS_MAX:
            running.records.append(record)

    def _left(self, record: Record, _: Event, _request: RequestView | None) -> None:
        request_id = request_id_of(record)
        if request_id in self._running:
            self._company.leave(request_id)

    def _ended(self, record: Record, _: Event, request: RequestView | None) -> None:
        request_id = request_id_of(record)
        running = self._running.get(request_id)
        if running is not None:
            running.records.append(record)
            self._end(request_id, running, request)

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
