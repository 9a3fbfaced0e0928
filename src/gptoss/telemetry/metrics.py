"""Prometheus metrics, folded from the journal; ``metric_catalogue`` lists them.

Durations are differences of the records' monotonic times. Gauges show what the newest record said. Counters go on over
restarts: a boot's ``CountersCarried`` holds what the boots before it counted, so these too follow from the records.

A trace that is kept becomes the newest example (exemplar) of each bucket that its request fell into, once it has ended.
"""

import json
import re
from collections.abc import Callable, Mapping
from typing import Any, Self

import msgspec
from prometheus_client import CollectorRegistry

from gptoss.clock import NS_PER_MS, NS_PER_S
from gptoss.errors import AbortedByCrash
from gptoss.messages import events as ev
from gptoss.messages.envelope import Event, Record
from gptoss.telemetry.books import Books
from gptoss.telemetry.executor_view import ExecutorBook, model_of
from gptoss.telemetry.exposition import content_type_for, exposition
from gptoss.telemetry.metric_catalogue import PROVIDER, Catalogue, operation_of
from gptoss.telemetry.metric_families import FamilyCollector, Histogram, Labels, SavedFamily
from gptoss.telemetry.metric_gauges import Present, put_gauges
from gptoss.telemetry.request_view import RequestBook, RequestView, is_crash_end
from gptoss.telemetry.tail_sampling import TailSampling
from gptoss.telemetry.wall_clock import wall_offset_ns

PROMPT_VERSION_CHARS = 16

_MODEL_SIZE = re.compile(r"(?<![a-z0-9])(\d+(?:\.\d+)?[bm])(?![a-z0-9])", re.IGNORECASE)

Observed = list[tuple[Histogram, Labels, float]]
"""Values, and where they are counted."""


class SavedMetrics(msgspec.Struct, frozen=True, kw_only=True):
    """All that the metrics of a boot go on from: what was counted, and what was under way."""

    boot: str
    families: dict[str, SavedFamily]
    requests: RequestBook
    executors: ExecutorBook
    queued: set[str]


class Metrics:
    """The metrics up to the newest record.

    Args:
        books: folded by whoever calls ``take``; None keeps own ones, for ``fold``.
    """

    def __init__(self, books: Books | None = None) -> None:
        self._books = books or Books()
        self._handlers: dict[type[Event], Callable[[Any], None]] = {
            ev.NodeStarted: self._node_started,
            ev.CountersCarried: self._carried,
            ev.StepCommitted: self._step,
            ev.AdmissionDecided: lambda event: self._families.admission.add((event.action,)),
            ev.DeadLettered: lambda event: self._families.dead_letters.add((event.reason,)),
            ev.EngineExited: lambda event: self._families.exits.add((event.executor,)),
            ev.Preempted: lambda event: self._families.preemptions.add(self._vllm(event.executor)),
            ev.Enqueued: lambda event: self._queued.add(event.request_id),
            ev.Dequeued: lambda event: self._queued.discard(event.request_id),
            ev.RequestFailed: self._failed,
            ev.HostObserved: self._host_observed,
            ev.SpansExported: self._spans_exported,
        }
        self._begin_boot("")

    def _begin_boot(self, boot: str) -> None:
        """A boot begins at zero, or where ``CountersCarried`` says."""
        self._boot = boot
        self._families = Catalogue()
        self._queued: set[str] = set()
        self._newest_ns = 0
        self._host: ev.HostObserved | None = None
        self._sampling = TailSampling()
        self._wall_offset_ns = 0
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(FamilyCollector(self._families.all()))
        self._families.missed.add((), 0)
        self._families.spans_exported.add((), 0)
        self._rendered: dict[str, bytes] = {}

    # ------------------------------------------------------------ folding

    def fold(self, record: Record) -> None:
        """Take one record in, and fold the own books."""
        self.take(record, self._books.fold(record))

    def take(self, record: Record, request: RequestView | None) -> None:
        """Take one record in.

        Args:
            record: the record.
            request: the request that it changed, as the books, which have folded it already, say.
        """
        meta = record.meta
        if meta.boot != self._boot:
            self._begin_boot(meta.boot)
        if self._rendered:
            self._rendered.clear()
        self._newest_ns = meta.mono_ns
        self._families.events.add((meta.type,))
        if type(record.event) is ev.CommandConsumed:
            return
        self._wall_offset_ns = wall_offset_ns(record, self._wall_offset_ns)
        handler = self._handlers.get(type(record.event))
        if handler is not None:
            handler(record.event)
        if request is not None:
            self._take_request(record.event, request)

    def count_missed(self, records: int) -> None:
        """Say that ``records`` records never came here: the one number that no record holds."""
        self._rendered.clear()
        self._families.missed.add((), records)

    def _node_started(self, event: ev.NodeStarted) -> None:
        self._sampling = TailSampling.from_recorded(json.loads(event.settings or "{}"))

    def _carried(self, event: ev.CountersCarried) -> None:
        self.add(decode_families(event.state))

    def _step(self, event: ev.StepCommitted) -> None:
        families, labels = self._families, self._vllm(event.executor)
        open_requests = self._books.requests.open
        produced = prefilled = drafted = accepted = 0
        alike: dict[tuple[int, int], int] = {}  # most rows of a step have the same gap: they are counted at once
        for row in event.rows:
            prefilled += row.prefilled
            drafted += row.num_draft
            if not row.tokens:
                continue
            produced += row.tokens
            accepted += row.tokens - 1
            view = open_requests.get(row.request_id)
            if view is not None and view.token_gap_ns is not None:
                gap = (view.token_gap_ns, row.tokens)
                alike[gap] = alike.get(gap, 0) + row.tokens
        for (gap_ns, tokens), times in alike.items():
            families.itl.observe(labels, gap_ns / NS_PER_S / tokens, times)
        families.generation_tokens.add(labels, produced)
        families.decoded.add(labels[:1], produced)
        families.prefilled.add(labels[:1], prefilled)
        families.drafted.add(labels, drafted)
        families.accepted.add(labels, accepted)
        families.step.observe((event.executor,), event.duration_ns / NS_PER_S)

    def _failed(self, event: ev.RequestFailed) -> None:
        if is_crash_end(event):
            # A request of the boot before this one, which did not live to count its end.
            self._families.ends.add(("failed", AbortedByCrash.code))

    def _host_observed(self, event: ev.HostObserved) -> None:
        self._host = event

    def _spans_exported(self, event: ev.SpansExported) -> None:
        families = self._families
        families.spans_exported.add((), event.exported)
        families.spans_dropped.add(("refused",), event.refused)
        families.spans_dropped.add(("overflow",), event.overflowed)

    def _take_request(self, event: Event, request: RequestView) -> None:
        families = self._families
        if isinstance(event, ev.FirstTokenProduced):
            families.prompt_tokens.add(self._vllm(request.executor), request.prompt_tokens)
            for histogram, labels, value in self._at_first_token(request):
                histogram.observe(labels, value)
        if not request.is_over:
            return
        families.ends.add((request.state, request.outcome))
        if request.accepted_ns is not None:
            self._take_end(request)

    def _take_end(self, request: RequestView) -> None:
        """The end of a request that ran, whatever it was."""
        families, labels = self._families, self._vllm(request.executor)
        if request.state != "failed":
            completed = request.state == "completed" and request.outcome != "cancelled"
            families.success.add((*labels, request.outcome if completed else "abort"))
        observed = self._at_end(request)
        for histogram, at, value in observed:
            histogram.observe(at, value)
        if request.state == "completed":
            families.prompt_size.observe(labels, request.prompt_tokens)
            families.output_size.observe(labels, request.completion_tokens)
            families.prefix_queries.add(labels, request.prompt_tokens)
            families.prefix_hits.add(labels, request.cached_tokens)
            if request.cached_tokens:
                families.prefix_hit.add(("prefix",))
        if self._sampling.keeps(request) is None:
            return
        if request.first_token_ns is not None and not request.retries:  # else its labels may be others by now
            observed += self._at_first_token(request)
        unix_s = (self._wall_offset_ns + self._newest_ns) / NS_PER_S
        for histogram, at, value in observed:
            histogram.exemplify(at, value, trace_id=request.trace_id, unix_s=round(unix_s, 3))

    def _at_first_token(self, request: RequestView) -> Observed:
        """What the first token of a request says."""
        families, labels = self._families, self._vllm(request.executor)
        ttft_ns = request.ttft_ns or 0
        found: Observed = [
            (families.ttft, labels, ttft_ns / NS_PER_S),
            (families.ttft_ms, self._older(request), ttft_ns / NS_PER_MS),
            (families.gen_ai_first, self._gen_ai(request), ttft_ns / NS_PER_S),
        ]
        if request.prefill_ns is not None:
            found.append((families.prefill, labels, request.prefill_ns / NS_PER_S))
        return found

    def _at_end(self, request: RequestView) -> Observed:
        """What the end of a request that ran says: of one that was not served to its end, only how long it took."""
        families, labels, gen_ai = self._families, self._vllm(request.executor), self._gen_ai(request)
        e2e_s = (request.e2e_ns or 0) / NS_PER_S
        error = "" if request.state == "completed" else request.outcome
        found: Observed = [(families.gen_ai_duration, (*gen_ai, error), e2e_s)]
        if request.state != "completed":
            return found
        found += [
            (families.e2e, labels, e2e_s),
            (families.e2e_ms, self._older(request), (request.e2e_ns or 0) / NS_PER_MS),
            (families.queue, labels, request.queued_ns / NS_PER_S),
        ]
        if request.decode_ns is not None:
            found.append((families.decode, labels, request.decode_ns / NS_PER_S))
        if request.tokens_per_s is not None:
            found.append((families.speed, self._older(request), request.tokens_per_s))
            found.append((families.gen_ai_each, gen_ai, 1 / request.tokens_per_s))
        return found

    # ------------------------------------------------------------ labels

    def _vllm(self, executor: str) -> Labels:
        return (model_of(self._books.executors.views.get(executor)), executor)

    def _older(self, request: RequestView) -> Labels:
        view = self._books.executors.views.get(request.executor)
        model = model_of(view)
        size = _MODEL_SIZE.search(model)
        dtype = view.capabilities.dtype if view is not None and view.capabilities is not None else ""
        route = "multi" if request.action == "route_multi" else "single"
        prompt_version = request.template[:PROMPT_VERSION_CHARS]
        return (model, size[1].lower() if size else "", dtype, route, "1", "1", "1", prompt_version, request.action)

    def _gen_ai(self, request: RequestView) -> Labels:
        model = model_of(self._books.executors.views.get(request.executor))
        return (operation_of(request.endpoint), PROVIDER, model, model)

    # ------------------------------------------------------------ output

    def render(self, accept: str = "") -> tuple[bytes, str]:
        """The exposition and its content type.

        Args:
            accept: the request's ``Accept`` header.
        """
        content_type = content_type_for(accept)
        body = self._rendered.get(content_type)
        if body is None:
            # Kept until the next record: many scrapes at once cost one rendering.
            put_gauges(self._families, self._books, Present(queued=len(self._queued), host=self._host))
            body = self._rendered[content_type] = exposition(self._registry, content_type)
        return body, content_type

    # ------------------------------------------------------------ over restarts

    def saved(self) -> SavedMetrics:
        """All that a later start needs to go on from here."""
        counted = {name: family.saved() for name, family in self._families.counting().items()}
        return SavedMetrics(
            boot=self._boot,
            families=counted,
            requests=RequestBook(open=self._books.requests.open, boot=self._boot),
            executors=self._books.executors,
            queued=self._queued,
        )

    @classmethod
    def restored(cls, saved: SavedMetrics) -> Self:
        """Metrics as they were when they were saved; what no counter needs is not there."""
        metrics = cls(Books(requests=saved.requests, executors=saved.executors))
        metrics._begin_boot(saved.boot)
        metrics._queued = saved.queued
        metrics.add(saved.families)
        return metrics

    def add(self, families: Mapping[str, SavedFamily]) -> None:
        """Count further what others counted; families that are not known any more are left out."""
        for name, family in self._families.counting().items():
            if name in families:
                family.add_saved(families[name])


_families_decoder = msgspec.msgpack.Decoder(dict[str, SavedFamily])


def decode_families(state: msgspec.Raw) -> dict[str, SavedFamily]:
    """The families inside a ``CountersCarried``; none where they cannot be read, as of a newer version."""
    try:
        return _families_decoder.decode(state)
    except msgspec.DecodeError:
        return {}
