"""Prometheus metrics, folded from the journal; ``metric_catalogue`` lists them.

Durations are differences of the records' monotonic times. Gauges show what the newest record said. Counters go on over
restarts: a boot's ``CountersCarried`` holds what the boots before it counted, so these too follow from the records.

A trace that is kept becomes the newest example (exemplar) of each bucket that its request fell into, once it has ended.
"""

import functools
import json
import re
from collections.abc import Mapping
from typing import Self

import msgspec
from prometheus_client import CollectorRegistry

from gptoss.clock import NS_PER_MS, NS_PER_S
from gptoss.errors import AbortedByCrash
from gptoss.messages import events as ev
from gptoss.messages.envelope import Event, Record
from gptoss.telemetry.books import Books
from gptoss.telemetry.executor_view import ExecutorBook, model_of
from gptoss.telemetry.exposition import content_type_for, exposition
from gptoss.telemetry.folding import Handler, View
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


class Metrics(View):
    """The metrics up to the newest record.

    Args:
        books: see ``View``.
    """

    def __init__(self, books: Books | None = None) -> None:
        super().__init__(books)
        self._handlers: dict[type[Event], tuple[Handler, ...]] = {
            ev.NodeStarted: (self._anchor, self._node_started),
            ev.ClockAnchored: (self._anchor,),
            ev.CountersCarried: (self._carried,),
            ev.StepCommitted: (self._step,),
            ev.AdmissionDecided: (self._admitted,),
            ev.DeadLettered: (self._dead_lettered,),
            ev.EngineExited: (self._exited,),
            ev.Preempted: (self._preempted,),
            ev.Enqueued: (self._enqueued,),
            ev.Dequeued: (self._dequeued,),
            ev.FirstTokenProduced: (self._first_token,),
            **dict.fromkeys(ev.TERMINAL_EVENTS, (self._ended,)),
            ev.RequestFailed: (self._failed, self._ended),
            ev.HostObserved: (self._host_observed,),
            ev.SpansExported: (self._spans_exported,),
        }
        self.begin_boot("")

    def begin_boot(self, boot: str) -> None:
        """See ``View``: a boot begins at zero, or where ``CountersCarried`` says."""
        self._boot = boot
        self._families = Catalogue()
        self._queued: set[str] = set()
        self._host: ev.HostObserved | None = None
        self._sampling = TailSampling()
        self._wall_offset_ns = 0
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(FamilyCollector(self._families.all()))
        self._families.missed.add((), 0)
        self._families.spans_exported.add((), 0)
        self._counted: dict[type[Event], int] = {}
        self._rendered: dict[str, bytes] = {}
        self._rendered_at = 0

    # ------------------------------------------------------------ folding

    def handlers(self, kind: type[Event]) -> tuple[Handler, ...]:
        """See ``View``."""
        return self._handlers.get(kind, ())

    def _count_events(self) -> None:
        """Bring the count of events up to date. The books count every record, which is cheaper than a labelled counter."""
        for kind, records in self._books.counts.items():
            before = self._counted.get(kind, 0)
            if records != before:
                self._families.events.add((kind.__name__,), records - before)
                self._counted[kind] = records

    def count_missed(self, records: int) -> None:
        """Say that ``records`` records never came here: the one number that no record holds."""
        self._rendered.clear()
        self._families.missed.add((), records)

    def _anchor(self, record: Record, _: Event, _request: RequestView | None) -> None:
        self._wall_offset_ns = wall_offset_ns(record, self._wall_offset_ns)

    def _node_started(self, _: Record, event: ev.NodeStarted, _request: RequestView | None) -> None:
        self._sampling = TailSampling.from_recorded(json.loads(event.settings or "{}"))

    def _carried(self, _: Record, event: ev.CountersCarried, _request: RequestView | None) -> None:
        self.add(decode_families(event.state))

    def _step(self, _: Record, event: ev.StepCommitted, _request: RequestView | None) -> None:
        families, labels, sums = self._families, self._vllm(event.executor), self._books.step
        for (gap_ns, tokens), times in sums.gaps.items():
            families.itl.observe(labels, gap_ns / NS_PER_S / tokens, times)
        families.generation_tokens.add(labels, sums.tokens)
        families.decoded.add(labels[:1], sums.tokens)
        families.prefilled.add(labels[:1], sums.prefilled)
        families.drafted.add(labels, sums.drafted)
        families.accepted.add(labels, sums.tokens - sums.streams)  # a row's first token was not guessed
        families.step.observe((event.executor,), event.duration_ns / NS_PER_S)

    def _admitted(self, _: Record, event: ev.AdmissionDecided, _request: RequestView | None) -> None:
        self._families.admission.add((event.action,))

    def _dead_lettered(self, _: Record, event: ev.DeadLettered, _request: RequestView | None) -> None:
        self._families.dead_letters.add((event.reason,))

    def _preempted(self, _: Record, event: ev.Preempted, _request: RequestView | None) -> None:
        self._families.preemptions.add(self._vllm(event.executor))

    def _enqueued(self, _: Record, event: ev.Enqueued, _request: RequestView | None) -> None:
        self._queued.add(event.request_id)

    def _dequeued(self, _: Record, event: ev.Dequeued, _request: RequestView | None) -> None:
        self._queued.discard(event.request_id)

    def _exited(self, _: Record, event: ev.EngineExited, _request: RequestView | None) -> None:
        if not event.planned:
            self._families.exits.add((event.executor,))

    def _failed(self, _: Record, event: ev.RequestFailed, _request: RequestView | None) -> None:
        if is_crash_end(event):
            # A request of the boot before this one, which did not live to count its end.
            self._families.ends.add(("failed", AbortedByCrash.code))

    def _host_observed(self, _: Record, event: ev.HostObserved, _request: RequestView | None) -> None:
        self._host = event

    def _spans_exported(self, _: Record, event: ev.SpansExported, _request: RequestView | None) -> None:
        families = self._families
        families.spans_exported.add((), event.exported)
        families.spans_dropped.add(("refused",), event.refused)
        families.spans_dropped.add(("overflow",), event.overflowed)

    def _first_token(self, _: Record, _event: Event, request: RequestView | None) -> None:
        if request is None:
            return
        labels = self._labels(request)
        self._families.prompt_tokens.add(labels.vllm, request.prompt_tokens)
        for histogram, at, value in self._at_first_token(request, labels):
            histogram.observe(at, value)

    def _ended(self, record: Record, _: Event, request: RequestView | None) -> None:
        if request is None:
            return
        self._families.ends.add((request.state, request.outcome))
        if request.accepted_ns is not None:
            self._take_end(request, record.meta.mono_ns)

    def _take_end(self, request: RequestView, now_ns: int) -> None:
        """The end of a request that ran, whatever it was."""
        families, labels = self._families, self._labels(request)
        vllm = labels.vllm
        if request.state != "failed":
            completed = request.state == "completed" and request.outcome != "cancelled"
            families.success.add((*vllm, request.outcome if completed else "abort"))
        observed = self._at_end(request, labels)
        for histogram, at, value in observed:
            histogram.observe(at, value)
        if request.state == "completed":
            families.prompt_size.observe(vllm, request.prompt_tokens)
            families.output_size.observe(vllm, request.completion_tokens)
            families.prefix_queries.add(vllm, request.prompt_tokens)
            families.prefix_hits.add(vllm, request.cached_tokens)
            if request.cached_tokens:
                families.prefix_hit.add(("prefix",))
        if self._sampling.keeps(request) is None:
            return
        if request.first_token_ns is not None and not request.retries:  # else its labels may be others by now
            observed += self._at_first_token(request, labels)
        unix_s = (self._wall_offset_ns + now_ns) / NS_PER_S
        for histogram, at, value in observed:
            histogram.exemplify(at, value, trace_id=request.trace_id, unix_s=round(unix_s, 3))

    def _at_first_token(self, request: RequestView, labels: "_RequestLabels") -> Observed:
        """What the first token of a request says."""
        families, ttft_ns, prefill_ns = self._families, request.ttft_ns or 0, request.prefill_ns
        found: Observed = [
            (families.ttft, labels.vllm, ttft_ns / NS_PER_S),
            (families.ttft_ms, labels.older, ttft_ns / NS_PER_MS),
            (families.gen_ai_first, labels.gen_ai, ttft_ns / NS_PER_S),
        ]
        if prefill_ns is not None:
            found.append((families.prefill, labels.vllm, prefill_ns / NS_PER_S))
        return found

    def _at_end(self, request: RequestView, labels: "_RequestLabels") -> Observed:
        """What the end of a request that ran says: of one that was not served to its end, only how long it took."""
        families, e2e_ns = self._families, request.e2e_ns or 0
        error = "" if request.state == "completed" else request.outcome
        found: Observed = [(families.gen_ai_duration, (*labels.gen_ai, error), e2e_ns / NS_PER_S)]
        if request.state != "completed":
            return found
        found += [
            (families.e2e, labels.vllm, e2e_ns / NS_PER_S),
            (families.e2e_ms, labels.older, e2e_ns / NS_PER_MS),
            (families.queue, labels.vllm, request.queued_ns / NS_PER_S),
        ]
        decode_ns, speed = request.decode_ns, request.tokens_per_s
        if decode_ns is not None:
            found.append((families.decode, labels.vllm, decode_ns / NS_PER_S))
        if speed is not None:
            found.append((families.speed, labels.older, speed))
            found.append((families.gen_ai_each, labels.gen_ai, 1 / speed))
        return found

    # ------------------------------------------------------------ labels

    def _vllm(self, executor: str) -> Labels:
        return (model_of(self._books.executors.views.get(executor)), executor)

    def _labels(self, request: RequestView) -> "_RequestLabels":
        view = self._books.executors.views.get(request.executor)
        can = None if view is None else view.capabilities
        model, dtype = ("", "") if can is None else (can.model_name, can.dtype)
        return _request_labels(request.executor, model, dtype, request.endpoint, request.template, request.action)

    # ------------------------------------------------------------ output

    def render(self, accept: str = "") -> tuple[bytes, str]:
        """The exposition and its content type.

        Args:
            accept: the request's ``Accept`` header.
        """
        content_type = content_type_for(accept)
        records = sum(self._books.counts.values())
        if records != self._rendered_at:
            self._rendered_at = records
            self._rendered.clear()
        body = self._rendered.get(content_type)
        if body is None:
            # Kept until the next record: many scrapes at once cost one rendering.
            self._count_events()
            put_gauges(self._families, self._books, Present(queued=len(self._queued), host=self._host))
            body = self._rendered[content_type] = exposition(self._registry, content_type)
        return body, content_type

    # ------------------------------------------------------------ over restarts

    def saved(self) -> SavedMetrics:
        """All that a later start needs to go on from here."""
        self._count_events()
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
        metrics = cls(Books(requests=saved.requests, executors=saved.executors, boot=saved.boot))
        metrics.begin_boot(saved.boot)
        metrics._queued = saved.queued
        metrics.add(saved.families)
        return metrics

    def add(self, families: Mapping[str, SavedFamily]) -> None:
        """Count further what others counted; families that are not known any more are left out."""
        self._count_events()  # whose types came first stand first
        for name, family in self._families.counting().items():
            if name in families:
                family.add_saved(families[name])


class _RequestLabels(msgspec.Struct, frozen=True, gc=False):
    """What a request is counted under, in the words of each family of names."""

    vllm: Labels
    older: Labels
    gen_ai: Labels


@functools.lru_cache(maxsize=256)  # requests are many, and their labels few
def _request_labels(executor: str, model: str, dtype: str, endpoint: str, template: str, action: str) -> _RequestLabels:
    size = _MODEL_SIZE.search(model)
    route = "multi" if action == "route_multi" else "single"
    older = (
        model,
        size[1].lower() if size else "",
        dtype,
        route,
        "1",
        "1",
        "1",
        template[:PROMPT_VERSION_CHARS],
        action,
    )
    return _RequestLabels((model, executor), older, (operation_of(endpoint), PROVIDER, model, model))


_families_decoder = msgspec.msgpack.Decoder(dict[str, SavedFamily])


def decode_families(state: msgspec.Raw) -> dict[str, SavedFamily]:
    """The families inside a ``CountersCarried``; none where they cannot be read, as of a newer version."""
    try:
        return _families_decoder.decode(state)
    except msgspec.DecodeError:
        return {}
