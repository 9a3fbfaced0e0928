"""The list of all metrics: vLLM's names, the older server's, OpenTelemetry's, and our own.

Every label value comes from a bounded set: executors, loaded models, the catalogue of events, codes of the error tree,
templates of the model. What a client may write (a model name, a session) is never a label.

OpenTelemetry's names stand as Prometheus writes them (``gen_ai.server.request.duration`` in seconds is
``gen_ai_server_request_duration_seconds``): dots would need a quoting that most scrapers do not read. They and their buckets
are those of the GenAI conventions, version 1.37, pinned here because the installed constants are all deprecated.
"""

from gptoss.telemetry.metric_families import Counter, Family, Gauge, Histogram, Reading

VLLM = ("model_name", "engine")
OLDER = (
    "model_id",
    "model_size",
    "dtype",
    "route",
    "tp",
    "pp",
    "micro_batches",
    "prompt_version",
    "admission_action",
)
GEN_AI = ("gen_ai_operation_name", "gen_ai_provider_name", "gen_ai_request_model", "gen_ai_response_model")
PROVIDER = "gptoss"
"""``gen_ai.provider.name``, here and in traces."""

SECONDS = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 640)
ITL_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 10)
MILLISECONDS = (5, 10, 25, 50, 100, 250, 500, 1000, 2000, 4000, 7000, 10_000, 20_000, 30_000, 60_000, 120_000)
SPEEDS = (1, 2.5, 5, 10, 20, 30, 40, 60, 80, 100, 150, 200, 400, 800)
TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000)
GEN_AI_DURATION = (0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.24, 20.48, 40.96, 81.92)
GEN_AI_FIRST_TOKEN = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10)
GEN_AI_PER_TOKEN = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5)


def operation_of(endpoint: str) -> str:
    """``gen_ai.operation.name`` of what an endpoint does."""
    return "text_completion" if endpoint == "/v1/completions" else "chat"


class Catalogue:
    """Every family that is exposed, by the name it has in the code."""

    def __init__(self) -> None:
        self._add_vllm()
        self._add_older()
        self._add_gen_ai()
        self._add_own()
        self._add_host()

    def _add_vllm(self) -> None:
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

    def _add_older(self) -> None:
        self.ttft_ms = Histogram("llm_ttft_ms", "Arrival to first token, ms.", OLDER, MILLISECONDS)
        self.e2e_ms = Histogram("llm_e2e_ms", "Arrival to the end, ms.", OLDER, MILLISECONDS)
        self.speed = Histogram("llm_tokens_per_sec", "Decode speed of a request, tokens/s.", OLDER, SPEEDS)
        model = ("model_id",)
        self.prefilled = Counter("llm_prefill_tokens_total", "Prompt tokens computed.", model)
        self.decoded = Counter("llm_decode_tokens_total", "Tokens generated.", model)
        self.prefix_hit = Counter("llm_prefix_cache_hit_total", "Requests served from the prefix cache.", ("reason",))
        self.admission = Counter("llm_admission_total", "Admission decisions.", ("action",))
        self.kv_in_use = Gauge("kv_bytes_in_use", "KV memory in use.", ("executor",))
        self.sessions = Gauge("sessions_active", "Sessions that run, or whose KV is kept.")
        self.gpu_busy = Gauge("gpu_utilization", "Percent of time in which the GPU was busy.", ("gpu",))
        self.gpu_memory = Gauge("gpu_mem_used_bytes", "GPU memory in use.", ("gpu",))

    def _add_gen_ai(self) -> None:
        duration, first, each = "request_duration", "time_to_first_token", "time_per_output_token"
        with_error = (*GEN_AI, "error_type")
        self.gen_ai_duration = Histogram(
            f"gen_ai_server_{duration}_seconds", "Arrival to the end, failures too.", with_error, GEN_AI_DURATION
        )
        self.gen_ai_first = Histogram(
            f"gen_ai_server_{first}_seconds", "Arrival to first token.", GEN_AI, GEN_AI_FIRST_TOKEN
        )
        self.gen_ai_each = Histogram(
            f"gen_ai_server_{each}_seconds", "Decode time of each token after the first.", GEN_AI, GEN_AI_PER_TOKEN
        )

    def _add_own(self) -> None:
        self.prefix_bytes = Gauge("gptoss_prefix_cache_bytes", "KV memory of cached prefixes.", ("executor",))
        self.events = Counter("gptoss_events_total", "Journal records folded.", ("type",))
        self.missed = Counter("gptoss_telemetry_missed_total", "Records that live telemetry missed (overload).")
        self.ends = Counter("gptoss_request_ends_total", "Terminal events.", ("state", "outcome"))
        self.dead_letters = Counter("gptoss_dead_letters_total", "Messages that nobody took.", ("reason",))
        self.exits = Counter("gptoss_engine_exits_total", "Engine processes lost.", ("executor",))
        self.step = Histogram("gptoss_step_seconds", "Duration of an engine step.", ("executor",), ITL_SECONDS)
        self.ready = Gauge("gptoss_executor_ready", "1 while the executor can serve.", ("executor",))
        self.spans_exported = Counter("gptoss_trace_spans_exported_total", "Spans that a collector took.")
        self.spans_dropped = Counter("gptoss_trace_spans_dropped_total", "Spans that no collector got.", ("reason",))

    def _add_host(self) -> None:
        self.process_cpu = Reading("process_cpu_seconds_total", "Processor time of the server process.")
        self.process_memory = Gauge("process_resident_memory_bytes", "Resident memory of the server process.")
        self.process_fds = Gauge("process_open_fds", "Open file descriptors of the server process.")
        self.process_threads = Gauge("process_threads", "Threads of the server process.")
        engine = ("executor",)
        self.engine_cpu = Reading("gptoss_engine_cpu_seconds_total", "Processor time of the engine process.", engine)
        self.engine_memory = Gauge("gptoss_engine_resident_memory_bytes", "Memory of the engine process.", engine)
        self.loop_late = Gauge("gptoss_event_loop_late_seconds", "How late the event loop last woke up.")
        self.host_cpu = Gauge("gptoss_host_cpu_ratio", "Share of the machine's processors in use.")
        self.host_load = Gauge("gptoss_host_load1", "Load average of the last minute.")
        self.host_free = Gauge("gptoss_host_memory_available_bytes", "Memory of the machine that can be had.")
        self.host_memory = Gauge("gptoss_host_memory_bytes", "Memory of the machine.")
        self.disk_free = Gauge("gptoss_data_disk_free_bytes", "Free space where the journal is.")
        self.gpu_total = Gauge("gptoss_gpu_memory_bytes", "Memory of the GPU.", ("gpu",))
        self.gpu_power = Gauge("gptoss_gpu_power_watts", "Power that the GPU draws.", ("gpu",))
        self.gpu_heat = Gauge("gptoss_gpu_temperature_celsius", "Temperature of the GPU.", ("gpu",))

    def all(self) -> list[Family]:
        """Every family, in the order of the list."""
        return list(vars(self).values())

    def counting(self) -> dict[str, Counter | Histogram]:
        """What a restart must not lose, by name."""
        return {
            family.name: family
            for family in self.all()
            if isinstance(family, Counter | Histogram) and not isinstance(family, Reading)
        }
