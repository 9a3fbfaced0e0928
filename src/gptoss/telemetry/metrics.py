"""Prometheus metrics, folded from the journal: the older server's ``llm_*`` names, vLLM's names and a few of our own.

Every label value comes from a bounded set: executors, loaded models, the catalogue of events, codes of the error tree.
What a client may write (a model name, a session) is never a label. Durations are differences of the records'
monotonic times. Gauges hold what the newest record said.

Output is text 0.0.4, or OpenMetrics 1.0.0 where ``Accept`` prefers it. Names are escaped as ``allow-utf-8``: otherwise
OpenMetrics would rename ``vllm:x`` to ``vllm_x`` and break the dashboards made for vLLM.
"""

import re
from typing import Any

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.openmetrics import exposition as openmetrics

from gptoss.clock import NS_PER_MS, NS_PER_S
from gptoss.errors import AbortedByCrash
from gptoss.messages import events as ev
from gptoss.messages.envelope import Event, Meta, Record
from gptoss.telemetry.executor_view import ExecutorBook, ExecutorView
from gptoss.telemetry.metric_families import Counter, Family, FamilyCollector, Gauge, Histogram, Labels
from gptoss.telemetry.request_view import RequestBook, RequestView, is_crash_end

CONTENT_TYPE_TEXT = "text/plain; version=0.0.4; charset=utf-8"
CONTENT_TYPE_OPENMETRICS = "application/openmetrics-text; version=1.0.0; charset=utf-8; escaping=allow-utf-8"

VLLM = ("model_name", "engine")
OLDER = ("model_id", "model_size", "dtype", "route", "tp", "pp", "micro_batches", "admission_action")

SECONDS = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 640)
ITL_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 10)
MILLISECONDS = (5, 10, 25, 50, 100, 250, 500, 1000, 2000, 4000, 7000, 10_000, 20_000, 30_000, 60_000, 120_000)
SPEEDS = (1, 2.5, 5, 10, 20, 30, 40, 60, 80, 100, 150, 200, 400, 800)
TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000)

_MODEL_SIZE = re.compile(r"(?<![a-z0-9])(\d+(?:\.\d+)?[bm])(?![a-z0-9])", re.IGNORECASE)


class _Families:
    """Every family that is exposed, by the name it has in the code."""

    def __init__(self) -> None:
        # vLLM's names
        self.running = Gauge("vllm:num_requests_running", "Requests in the engine.", VLLM)
        self.waiting = Gauge("vllm:num_requests_waiting", "Requests in the admission queue.", VLLM)
        self.kv_usage = Gauge("vllm:kv_cache_usage_perc", "KV memory in use; 1 is all of the budget.", VLLM)
        self.prompt_tokens = Counter("vllm:prompt_tokens_total", "Prompt tokens of prefilled requests.", VLLM)
        self.generation_tokens = Counter("vllm:generation_tokens_total", "Tokens generated.", VLLM)
        self.prefix_queries = Counter("vllm:prefix_cache_queries_total", "Prompt tokens looked up.", VLLM)
        self.prefix_hits = Counter("vllm:prefix_cache_hits_total", "Prompt tokens found in the cache.", VLLM)
        self.preemptions = Counter("vllm:num_preemptions_total", "Running requests sent back in line.", VLLM)
        self.drafted = Counter("vllm:spec_decode_num_draft_tokens_total", "Tokens guessed.", VLLM)
        self.accepted = Counter("vllm:spec_decode_num_accepted_tokens_total", "Tokens guessed right.", VLLM)
        self.success = Counter("vllm:request_success_total", "Requests that ran to an end.", (*VLLM, "finished_reason"))
        self.ttft = Histogram("vllm:time_to_first_token_seconds", "Arrival to first token.", VLLM, SECONDS)
        self.itl = Histogram("vllm:inter_token_latency_seconds", "Between two tokens.", VLLM, ITL_SECONDS)
        self.e2e = Histogram("vllm:e2e_request_latency_seconds", "Arrival to the end.", VLLM, SECONDS)
        self.queue = Histogram("vllm:request_queue_time_seconds", "Time in the admission queue.", VLLM, SECONDS)
        self.prefill = Histogram("vllm:request_prefill_time_seconds", "Engine to first token.", VLLM, SECONDS)
        self.decode = Histogram("vllm:request_decode_time_seconds", "First token to last.", VLLM, SECONDS)
        self.prompt_size = Histogram("vllm:request_prompt_tokens", "Prompt tokens of a request.", VLLM, TOKENS)
        self.output_size = Histogram("vllm:request_generation_tokens", "Output tokens of a request.", VLLM, TOKENS)
        # the older server's names
        self.ttft_ms = Histogram("llm_ttft_ms", "Arrival to first token, ms.", OLDER, MILLISECONDS)
        self.e2e_ms = Histogram("llm_e2e_ms", "Arrival to the end, ms.", OLDER, MILLISECONDS)
        self.speed = Histogram("llm_tokens_per_sec", "Decode speed of a request, tokens/s.", OLDER, SPEEDS)
        model = ("model_id",)
        self.prefilled = Counter("llm_prefill_tokens_total", "Prompt tokens computed.", model)
        self.decoded = Counter("llm_decode_tokens_total", "Tokens generated.", model)
        self.prefix_hit = Counter("llm_prefix_cache_hit_total", "Requests served from the prefix cache.", ("reason",))
        self.admission = Counter("llm_admission_total", "Admission decisions.", ("action",))
        self.kv_in_use = Gauge("kv_bytes_in_use", "KV memory in use.", ("executor",))
        self.prefix_bytes = Gauge("gptoss_prefix_cache_bytes", "KV memory of cached prefixes.", ("executor",))
        self.gpu_memory = Gauge("gpu_mem_used_bytes", "Device memory in use.", ("gpu",))
        # our own
        self.events = Counter("gptoss_events_total", "Journal records folded.", ("type",))
        self.missed = Counter("gptoss_telemetry_missed_total", "Records that live telemetry missed (overload).")
        self.ends = Counter("gptoss_request_ends_total", "Terminal events.", ("state", "outcome"))
        self.dead_letters = Counter("gptoss_dead_letters_total", "Messages that nobody took.", ("reason",))
        self.exits = Counter("gptoss_engine_exits_total", "Engine processes lost.", ("executor",))
        self.step = Histogram("gptoss_step_seconds", "Duration of an engine step.", ("executor",), ITL_SECONDS)
        self.ready = Gauge("gptoss_executor_ready", "1 while the executor can serve.", ("executor",))

    def all(self) -> list[Family]:
        return list(vars(self).values())


class Metrics:
    """The metrics of the newest boot's records."""

    def __init__(self) -> None:
        self._begin_boot("")

    def _begin_boot(self, boot: str) -> None:
        """Counters start at zero with each boot, as a restarted process's do."""
        self._boot = boot
        self._requests = RequestBook()
        self._executors = ExecutorBook()
        self._families = _Families()
        self._queued: set[str] = set()
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(FamilyCollector(self._families.all()))
        self._families.missed.add((), 0)
        self._rendered: dict[str, bytes] = {}

    # ------------------------------------------------------------ folding

    def fold(self, record: Record) -> None:
        """Take one record in."""
        if record.meta.boot != self._boot:
            self._begin_boot(record.meta.boot)
        self._rendered.clear()
        event, meta = record.event, record.meta
        self._families.events.add((meta.type,))
        if isinstance(event, ev.CommandConsumed):
            return
        if isinstance(event, ev.StepCommitted):
            self._fold_step(meta, event)  # before the books: it reads when each row's last token came
        request = self._requests.fold(record)
        self._executors.fold(record)
        self._fold_counters(event)
        self._fold_gauges(event)
        if request is not None:
            self._fold_request(event, request)

    def count_missed(self, records: int) -> None:
        """Say that ``records`` records never came here: the one number that no record holds."""
        self._rendered.clear()
        self._families.missed.add((), records)

    def _fold_step(self, meta: Meta, event: ev.StepCommitted) -> None:
        families, labels = self._families, self._vllm(event.executor)
        model = labels[:1]
        for row in event.rows:
            if not row.tokens:
                continue
            view = self._requests.open.get(row.request_id)
            if view is not None and view.last_token_ns is not None:
                gap_s = max(0, meta.mono_ns - view.last_token_ns) / NS_PER_S
                families.itl.observe(labels, gap_s / row.tokens, row.tokens)
        produced = sum(row.tokens for row in event.rows)
        families.generation_tokens.add(labels, produced)
        families.decoded.add(model, produced)
        families.prefilled.add(model, sum(row.prefilled for row in event.rows))
        families.drafted.add(labels, sum(row.num_draft for row in event.rows))
        families.accepted.add(labels, sum(max(0, row.tokens - 1) for row in event.rows))
        families.step.observe((event.executor,), event.duration_ns / NS_PER_S)

    def _fold_counters(self, event: Event) -> None:
        families = self._families
        if isinstance(event, ev.AdmissionDecided):
            families.admission.add((event.action,))
        elif isinstance(event, ev.DeadLettered):
            families.dead_letters.add((event.reason,))
        elif isinstance(event, ev.EngineExited) and not event.planned:
            families.exits.add((event.executor,))
        elif isinstance(event, ev.Preempted):
            families.preemptions.add(self._vllm(event.executor))
        elif is_crash_end(event):
            # A request of the boot before this one, whose counters died with it: its end is counted here or nowhere.
            families.ends.add(("failed", AbortedByCrash.code))

    def _fold_gauges(self, event: Event) -> None:
        """Bring up to date what the record may have moved; most records move nothing."""
        if isinstance(event, ev.Enqueued):
            self._queued.add(event.request_id)
        elif isinstance(event, ev.Dequeued):
            self._queued.discard(event.request_id)
        elif not isinstance(event, _MOVES_GAUGES):
            return
        families, model_name = self._families, self._model_name
        if model_name:
            families.waiting.put((model_name, "all"), len(self._queued))
        for view in self._executors.views.values():
            families.ready.put((view.name,), view.state == "ready")
            if view.capabilities is None:
                continue  # nothing has ever been loaded there
            labels = self._vllm(view.name)
            families.running.put(labels, len(view.running))
            families.kv_usage.put(labels, view.kv_bytes_in_use / view.kv_budget_bytes if view.kv_budget_bytes else 0)
            families.kv_in_use.put((view.name,), view.kv_bytes_in_use)
            families.prefix_bytes.put((view.name,), view.prefix_cache_bytes)
            if view.memory_used_bytes and not view.device.startswith("cpu"):
                families.gpu_memory.put((view.device,), view.memory_used_bytes)

    def _fold_request(self, event: Event, request: RequestView) -> None:
        families, labels = self._families, self._vllm(request.executor)
        if isinstance(event, ev.FirstTokenProduced):
            families.prompt_tokens.add(labels, request.prompt_tokens)
            _observe_s(families.ttft, labels, request.ttft_ns)
            _observe_s(families.prefill, labels, request.prefill_ns)
            families.ttft_ms.observe(self._older(request), (request.ttft_ns or 0) / NS_PER_MS)
        if not request.is_over:
            return
        families.ends.add((request.state, request.outcome))
        if request.accepted_ns is None:
            return
        reason = request.outcome if request.state == "completed" and request.outcome != "cancelled" else "abort"
        if request.state != "failed":
            families.success.add((*labels, reason))
        if request.state == "completed":
            self._fold_completed(labels, request)

    def _fold_completed(self, labels: Labels, request: RequestView) -> None:
        families, older = self._families, self._older(request)
        _observe_s(families.e2e, labels, request.e2e_ns)
        _observe_s(families.queue, labels, request.queued_ns)
        _observe_s(families.decode, labels, request.decode_ns)
        families.prompt_size.observe(labels, request.prompt_tokens)
        families.output_size.observe(labels, request.completion_tokens)
        families.prefix_queries.add(labels, request.prompt_tokens)
        families.prefix_hits.add(labels, request.cached_tokens)
        families.e2e_ms.observe(older, (request.e2e_ns or 0) / NS_PER_MS)
        if request.tokens_per_s is not None:
            families.speed.observe(older, request.tokens_per_s)
        if request.cached_tokens:
            families.prefix_hit.add(("prefix",))

    # ------------------------------------------------------------ labels

    @property
    def _model_name(self) -> str:
        return next((name for view in self._executors.views.values() if (name := _model_of(view))), "")

    def _vllm(self, executor: str) -> Labels:
        return (_model_of(self._executors.views.get(executor)), executor)

    def _older(self, request: RequestView) -> Labels:
        view = self._executors.views.get(request.executor)
        model = _model_of(view)
        size = _MODEL_SIZE.search(model)
        dtype = view.capabilities.dtype if view is not None and view.capabilities is not None else ""
        route = "multi" if request.action == "route_multi" else "single"
        return (model, size[1].lower() if size else "", dtype, route, "1", "1", "1", request.action)

    # ------------------------------------------------------------ output

    def render(self, accept: str = "") -> tuple[bytes, str]:
        """The exposition and its content type.

        Args:
            accept: the request's ``Accept`` header.
        """
        content_type = CONTENT_TYPE_OPENMETRICS if _prefers_openmetrics(accept) else CONTENT_TYPE_TEXT
        body = self._rendered.get(content_type)
        if body is None:
            # Kept until the next record: many scrapes at once cost one rendering.
            if content_type == CONTENT_TYPE_OPENMETRICS:
                untyped: Any = openmetrics
                body = bytes(untyped.generate_latest(self._registry, escaping=openmetrics.ALLOWUTF8))
            else:
                body = generate_latest(self._registry, escaping=openmetrics.ALLOWUTF8)
            self._rendered[content_type] = body
        return body, content_type


_MOVES_GAUGES = (
    ev.EngineStarted,
    ev.EngineLoaded,
    ev.EngineLoadFailed,
    ev.EngineExited,
    ev.EngineStalled,
    ev.ExecutorAccepted,
    ev.StepCommitted,
    ev.CancelApplied,
    ev.ExecutorFaulted,
    ev.RouteForgotten,
    ev.MemoryPoolSet,
    ev.MemoryPoolDropped,
    ev.MemoryObserved,
    *ev.TERMINAL_EVENTS,
)


def _model_of(view: ExecutorView | None) -> str:
    return view.capabilities.model_name if view is not None and view.capabilities is not None else ""


def _observe_s(histogram: Histogram, labels: Labels, nanoseconds: int | None) -> None:
    if nanoseconds is not None:
        histogram.observe(labels, nanoseconds / NS_PER_S)


def _prefers_openmetrics(accept: str) -> bool:
    """Whether ``accept`` ranks OpenMetrics at least as high as plain text."""
    quality = {"application/openmetrics-text": 0.0, "text/plain": 0.0}
    for part in accept.split(","):
        media, *parameters = (piece.strip() for piece in part.split(";"))
        given = next((piece[2:] for piece in parameters if piece.startswith("q=")), "1")
        if media in quality and re.fullmatch(r"[01](\.\d{0,3})?", given):
            quality[media] = max(quality[media], float(given))
    return 0 < quality["application/openmetrics-text"] >= quality["text/plain"]
