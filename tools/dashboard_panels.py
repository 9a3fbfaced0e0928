"""What the Grafana dashboard shows: rows of panels, each with its queries. ``tools/dashboard.py`` makes the JSON of it."""

from typing import NamedTuple

SELECT = 'job="$job", instance=~"$instance"'


class Query(NamedTuple):
    """One expression and the legend of its lines; ``exemplars`` also asks for the traces behind them."""

    expr: str
    legend: str
    exemplars: bool = False


class Panel(NamedTuple):
    """One panel.

    Attributes:
        kind: ``timeseries``, ``stat`` or ``heatmap``.
        limit: an objective, drawn as a line or as the value from which a stat turns red.
        is_floor: the objective is a least value, not a most.
    """

    title: str
    unit: str
    queries: tuple[Query, ...]
    text: str = ""
    kind: str = "timeseries"
    limit: float | None = None
    is_floor: bool = False
    stacked: bool = False


def _rate(metric: str, *matchers: str) -> str:
    return f"rate({metric}{{{', '.join((SELECT, *matchers))}}}[$__rate_interval])"


def _now(metric: str) -> str:
    return f"{metric}{{{SELECT}}}"


def _quantiles(buckets: str, *quantiles: float) -> tuple[Query, ...]:
    """Over all servers that are selected; exemplars once, since every line would show the same ones."""
    return tuple(
        Query(f"histogram_quantile({q}, sum by (le) ({_rate(buckets)}))", f"p{q * 100:g}", exemplars=index == 0)
        for index, q in enumerate(quantiles)
    )


def _p95(buckets: str, legend: str) -> Query:
    return Query(f"histogram_quantile(0.95, sum by (le) ({_rate(buckets)}))", legend)


def _objective(title: str, unit: str, record: str, limit: float, *, is_floor: bool = False) -> Panel:
    return Panel(
        title,
        unit,
        (Query(f'max({record}{{job="$job"}})', title),),
        f"{record}, all servers of the job together; the line is the objective of the alerts.",
        kind="stat",
        limit=limit,
        is_floor=is_floor,
    )


ROWS: dict[str, tuple[Panel, ...]] = {
    "Objectives": (
        _objective("TTFT p95", "ms", "gptoss:ttft_ms:p95_5m", 7000),
        _objective("End to end p95", "ms", "gptoss:e2e_ms:p95_5m", 20000),
        _objective("Failed", "percentunit", "gptoss:request_errors:ratio5m", 0.005),
        _objective("Refused", "percentunit", "gptoss:request_refusals:ratio5m", 0.01),
        _objective("Cache hits", "percentunit", "gptoss:prefix_cache_hits:ratio30m", 0.3, is_floor=True),
        Panel("Executors ready", "none", (Query(f"sum({_now('gptoss_executor_ready')})", "ready"),), kind="stat"),
    ),
    "Latency": (
        Panel(
            "Time to first token",
            "s",
            _quantiles("vllm:time_to_first_token_seconds_bucket", 0.5, 0.95, 0.99),
            "From arrival, queue included. Diamonds are requests whose trace was kept.",
        ),
        Panel(
            "Time per token",
            "s",
            _quantiles("vllm:inter_token_latency_seconds_bucket", 0.5, 0.95, 0.99),
            "Between two tokens of one request.",
        ),
        Panel(
            "End to end", "s", _quantiles("vllm:e2e_request_latency_seconds_bucket", 0.5, 0.95, 0.99), "Arrival to end."
        ),
        Panel(
            "First tokens by time",
            "s",
            (
                Query(
                    f"sum by (le) (increase(vllm:time_to_first_token_seconds_bucket{{{SELECT}}}[$__rate_interval]))",
                    "{{le}}",
                    exemplars=True,
                ),
            ),
            kind="heatmap",
        ),
        Panel(
            "Where the time goes, p95",
            "s",
            (
                _p95("vllm:request_queue_time_seconds_bucket", "queue"),
                _p95("vllm:request_prefill_time_seconds_bucket", "prefill"),
                _p95("vllm:request_decode_time_seconds_bucket", "decode"),
            ),
            "Each phase's own p95; they do not add up to that of the whole.",
        ),
    ),
    "Throughput": (
        Panel(
            "Tokens",
            "short",
            (
                Query(f"sum({_rate('vllm:generation_tokens_total')})", "generated/s"),
                Query(f"sum({_rate('llm_prefill_tokens_total')})", "prefilled/s"),
            ),
            "Prefilled: prompt tokens computed, without those that the cache had.",
        ),
        Panel(
            "Requests by end",
            "reqps",
            (Query(f"sum by (state) ({_rate('gptoss_request_ends_total')})", "{{state}}"),),
            stacked=True,
        ),
        Panel(
            "Decode speed of a request",
            "short",
            _quantiles("llm_tokens_per_sec_bucket", 0.5, 0.05),
            "Tokens per second; p5 is what the slowest one in twenty sees.",
        ),
        Panel(
            "Request size, p95",
            "short",
            (
                _p95("vllm:request_prompt_tokens_bucket", "prompt tokens"),
                _p95("vllm:request_generation_tokens_bucket", "output tokens"),
            ),
        ),
        Panel(
            "Guesses that were right",
            "percentunit",
            (
                Query(
                    f"sum({_rate('vllm:spec_decode_num_accepted_tokens_total')})"
                    f" / (sum({_rate('vllm:spec_decode_num_draft_tokens_total')}) > 0)",
                    "accepted",
                ),
            ),
            "With speculation only.",
        ),
    ),
    "Queue and admission": (
        Panel(
            "Requests in the house",
            "short",
            (
                Query(f"sum({_now('vllm:num_requests_running')})", "running"),
                Query(f"sum({_now('vllm:num_requests_waiting')})", "waiting"),
            ),
            stacked=True,
        ),
        Panel("Sessions", "short", (Query(f"sum({_now('sessions_active')})", "active"),), "Used within three minutes."),
        Panel("Time in the queue", "s", _quantiles("vllm:request_queue_time_seconds_bucket", 0.5, 0.95)),
        Panel(
            "Admission",
            "reqps",
            (Query(f"sum by (action) ({_rate('llm_admission_total')})", "{{action}}"),),
            "A request that is queued is decided on again when its turn comes.",
            stacked=True,
        ),
        Panel(
            "Refusals by reason",
            "reqps",
            (
                Query(
                    "sum by (outcome) (" + _rate("gptoss_request_ends_total", 'state="rejected"') + ")", "{{outcome}}"
                ),
            ),
            stacked=True,
        ),
    ),
    "Prefix cache": (
        Panel(
            "Prompt tokens from the cache",
            "percentunit",
            (
                Query(
                    f"sum({_rate('vllm:prefix_cache_hits_total')}) / (sum({_rate('vllm:prefix_cache_queries_total')}) > 0)",
                    "hit rate",
                ),
            ),
            limit=0.3,
            is_floor=True,
        ),
        Panel(
            "Requests served from it", "reqps", (Query(f"sum({_rate('llm_prefix_cache_hit_total')})", "with a hit"),)
        ),
        Panel(
            "Size",
            "bytes",
            (Query(f"sum by (executor) ({_now('gptoss_prefix_cache_bytes')})", "{{executor}}"),),
            stacked=True,
        ),
    ),
    "Memory": (
        Panel(
            "KV memory in use",
            "percentunit",
            (Query(f"max by (instance, engine) ({_now('vllm:kv_cache_usage_perc')})", "{{instance}} {{engine}}"),),
            "By running requests, of the budget; cached prefixes come on top and give way.",
            limit=0.9,
        ),
        Panel(
            "KV bytes",
            "bytes",
            (Query(f"sum by (instance, executor) ({_now('kv_bytes_in_use')})", "{{instance}} {{executor}}"),),
        ),
        Panel(
            "Device memory",
            "bytes",
            (
                Query(f"sum by (instance, gpu) ({_now('gpu_mem_used_bytes')})", "{{instance}} GPU {{gpu}}"),
                Query(f"sum by (instance, gpu) ({_now('gptoss_gpu_memory_bytes')})", "{{instance}} GPU {{gpu}} has"),
            ),
            "GPUs only.",
        ),
        Panel(
            "Devices busy",
            "percent",
            (Query(f"max by (instance, gpu) ({_now('gpu_utilization')})", "{{instance}} GPU {{gpu}}"),),
            "GPUs only.",
        ),
        Panel(
            "Preemptions",
            "short",
            (Query(f"sum by (engine) ({_rate('vllm:num_preemptions_total')})", "{{engine}} per s"),),
            "Running requests that gave their memory back and wait again.",
        ),
    ),
    "Routing": (
        Panel(
            "First tokens by executor",
            "reqps",
            (
                Query(
                    f"sum by (instance, engine) ({_rate('vllm:time_to_first_token_seconds_count')})",
                    "{{instance}} {{engine}}",
                ),
            ),
            stacked=True,
        ),
        Panel(
            "First tokens by route",
            "reqps",
            (
                Query(
                    f"sum by (route, admission_action) ({_rate('llm_ttft_ms_count')})",
                    "{{route}}, {{admission_action}}",
                ),
            ),
            "Single or multi: one executor's devices, or several.",
            stacked=True,
        ),
        Panel(
            "Running by executor",
            "short",
            (Query(f"sum by (instance, engine) ({_now('vllm:num_requests_running')})", "{{instance}} {{engine}}"),),
            stacked=True,
        ),
    ),
    "Errors and engine": (
        Panel(
            "Failures by code",
            "reqps",
            (Query("sum by (outcome) (" + _rate("gptoss_request_ends_total", 'state="failed"') + ")", "{{outcome}}"),),
            stacked=True,
        ),
        Panel(
            "Engines lost",
            "short",
            (Query(f"sum by (instance, executor) ({_now('gptoss_engine_exits_total')})", "{{instance}} {{executor}}"),),
            "Since the server's start.",
        ),
        Panel("Step", "s", _quantiles("gptoss_step_seconds_bucket", 0.5, 0.95, 0.99), "Duration of an engine's step."),
        Panel(
            "Journal records",
            "short",
            (Query(f"sum({_rate('gptoss_events_total')})", "records/s"),),
            "Every decision and event of the servers.",
        ),
        Panel(
            "Lost on the way",
            "short",
            (
                Query(f"sum({_rate('gptoss_telemetry_missed_total')})", "records that metrics missed/s"),
                Query(f"sum by (reason) ({_rate('gptoss_dead_letters_total')})", "dead letters/s: {{reason}}"),
                Query(f"sum by (reason) ({_rate('gptoss_trace_spans_dropped_total')})", "spans/s: {{reason}}"),
            ),
        ),
    ),
    "Machine": (
        Panel(
            "Memory of the processes",
            "bytes",
            (
                Query(f"sum by (instance) ({_now('process_resident_memory_bytes')})", "{{instance}} server"),
                Query(
                    f"sum by (instance, executor) ({_now('gptoss_engine_resident_memory_bytes')})",
                    "{{instance}} {{executor}}",
                ),
            ),
            stacked=True,
        ),
        Panel(
            "Processors in use",
            "short",
            (
                Query(f"sum by (instance) ({_rate('process_cpu_seconds_total')})", "{{instance}} server"),
                Query(
                    f"sum by (instance, executor) ({_rate('gptoss_engine_cpu_seconds_total')})",
                    "{{instance}} {{executor}}",
                ),
            ),
        ),
        Panel(
            "Event loop late by",
            "s",
            (Query(f"max by (instance) ({_now('gptoss_event_loop_late_seconds')})", "{{instance}}"),),
            limit=0.05,
        ),
        Panel(
            "Disk left for the journal",
            "bytes",
            (Query(f"min by (instance) ({_now('gptoss_data_disk_free_bytes')})", "{{instance}}"),),
            limit=2 * 1024**3,
            is_floor=True,
        ),
    ),
}
