"""Real expositions under the tools that read them: Prometheus's own linter, and both parsers of its client."""

import json
import shutil
import subprocess
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import msgspec
import pytest
from prometheus_client.metrics_core import Metric
from prometheus_client.openmetrics import parser as openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text

from gptoss.messages import events as ev
from gptoss.messages.envelope import Event, Record
from gptoss.telemetry.metrics import Metrics

if TYPE_CHECKING:
    from telemetry.conftest import Script

OPENMETRICS = "application/openmetrics-text"
HOST = ev.HostObserved(
    cpu_s=12.5,
    rss_bytes=100 << 20,
    open_fds=40,
    num_threads=9,
    loop_late_ms=1.5,
    children=(ev.ProcessReading(42, 99.5, 2 << 30), ev.ProcessReading(7, 1.0, 1)),
    host_cpu_percent=37.5,
    load_1m=1.25,
    memory_available_bytes=8 << 30,
    memory_total_bytes=16 << 30,
    disk_free_bytes=5 << 30,
    gpus=(ev.GpuReading(0, "H100", 81.0, 60 << 30, 80 << 30, 350.5, 61.0),),
)
EXPECTED = [
    "vllm:num_requests_running",
    "vllm:num_requests_waiting",
    "vllm:kv_cache_usage_perc",
    "vllm:prompt_tokens_total",
    "vllm:generation_tokens_total",
    "vllm:prefix_cache_queries_total",
    "vllm:prefix_cache_hits_total",
    "vllm:num_preemptions_total",
    "vllm:request_success_total",
    "vllm:time_to_first_token_seconds",
    "vllm:inter_token_latency_seconds",
    "vllm:e2e_request_latency_seconds",
    "vllm:request_queue_time_seconds",
    "vllm:request_prefill_time_seconds",
    "vllm:request_decode_time_seconds",
    "vllm:request_prompt_tokens",
    "vllm:request_generation_tokens",
    "llm_ttft_ms",
    "llm_e2e_ms",
    "llm_tokens_per_sec",
    "llm_prefill_tokens_total",
    "llm_decode_tokens_total",
    "llm_prefix_cache_hit_total",
    "llm_admission_total",
    "kv_bytes_in_use",
    "sessions_active",
    "gpu_utilization",
    "gpu_mem_used_bytes",
    "gen_ai_server_request_duration_seconds",
    "gen_ai_server_time_to_first_token_seconds",
    "gen_ai_server_time_per_output_token_seconds",
    "process_cpu_seconds_total",
    "process_resident_memory_bytes",
    "process_open_fds",
]


@pytest.fixture
def metrics(busy: "Script") -> Metrics:
    """Metrics in which every family has something to show, with a collector set and every trace kept."""
    busy.add("system", HOST)
    busy.add("system", ev.SpansExported(exported=7, refused=2, overflowed=1))
    busy.add("executor/cpu", ev.Preempted(request_id="req_open", executor="cpu", attempt=1, step=1, reason="priority"))
    found = Metrics()
    for record in busy.records:
        event = record.event
        if isinstance(event, ev.NodeStarted):
            settings = json.dumps({"otlp_endpoint": "http://collector", "trace_ratio": 1.0})
            event = msgspec.structs.replace(event, settings=settings)
        found.fold(Record(record.meta, event))
    return found


def test_every_name_is_there(metrics: Metrics) -> None:
    shown = {family.name for family in parse_text(metrics.render()[0].decode()) if family.samples}
    assert {name for name in EXPECTED if name not in shown and name.removesuffix("_total") not in shown} == set()


def test_prometheuss_own_linter_reads_it(metrics: Metrics) -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool is not installed (Debian: prometheus); Prometheus's own linter did not run")
    done = subprocess.run([promtool, "check", "metrics"], input=metrics.render()[0], capture_output=True, check=False)
    found = done.stderr.decode().splitlines() + done.stdout.decode().splitlines()
    # Names that others have made keep their faults: a unit in ms, a gauge that ends in _total's opposite.
    complaints = [line for line in found if line and not line.startswith(("vllm:", "llm_", "gpu_", "kv_", "sessions"))]
    assert complaints == [], found
    assert done.returncode in {0, 3}  # 3: it reads, with complaints


def parsed(metrics: Metrics) -> list[Metric]:
    parse: Callable[[str], Iterator[Metric]] = vars(openmetrics)["text_string_to_metric_families"]
    return list(parse(metrics.render(OPENMETRICS)[0].decode()))


def test_openmetrics_has_an_example_of_kept_traces_in_the_bucket_of_their_value(metrics: Metrics) -> None:
    examples = {
        (family.name, sample.labels["le"]): sample.exemplar
        for family in parsed(metrics)
        for sample in family.samples
        if sample.exemplar is not None
    }
    names = {name for name, _ in examples}
    assert {
        "vllm:time_to_first_token_seconds",
        "vllm:e2e_request_latency_seconds",
        "vllm:request_decode_time_seconds",
        "llm_ttft_ms",
        "gen_ai_server_request_duration_seconds",
    } <= names
    for (_, bound), exemplar in examples.items():
        assert exemplar.value <= float(bound)
        assert len(exemplar.labels["trace_id"]) == 32
        assert sum(len(name) + len(value) for name, value in exemplar.labels.items()) <= 128
        assert exemplar.timestamp is not None
        assert float(exemplar.timestamp) > 1_600_000_000


def test_only_openmetrics_shows_examples(metrics: Metrics) -> None:
    assert b"trace_id" in metrics.render(OPENMETRICS)[0]
    assert b"trace_id" not in metrics.render()[0]


def test_a_trace_that_is_not_kept_is_no_example(busy: "Script") -> None:
    found = Metrics()
    for record in busy.records:
        found.fold(record)
    assert b"trace_id" not in found.render(OPENMETRICS)[0]


def test_readings_of_the_machine(metrics: Metrics) -> None:
    body = metrics.render()[0].decode()
    for line in (
        "process_cpu_seconds_total 12.5",
        'gptoss_engine_cpu_seconds_total{executor="cpu"} 99.5',
        'gpu_utilization{gpu="0"} 81.0',
        'gpu_mem_used_bytes{gpu="0"} 6.442450944e+10',
        "gptoss_event_loop_late_seconds 0.0015",
        "gptoss_host_cpu_ratio 0.375",
        "gptoss_trace_spans_exported_total 7.0",
        'gptoss_trace_spans_dropped_total{reason="overflow"} 1.0',
    ):
        assert line in body


def test_readings_are_not_carried_over_a_restart(metrics: Metrics) -> None:
    assert "process_cpu_seconds_total" not in metrics.saved().families
    assert "gptoss_trace_spans_exported_total" in metrics.saved().families


def test_sessions_are_counted_while_they_are_kept(script: "Script") -> None:
    found = Metrics()

    def shown(event: Event) -> bytes:
        for record in script.records:
            found.fold(record)
        script.records.clear()
        found.fold(script.add("memory", event))
        script.records.clear()
        return next(line for line in found.render()[0].splitlines() if line.startswith(b"sessions_active"))

    granted = ev.ReservationGranted(
        request_id="req_1", kv_bytes=1, kv_bytes_free_max=2, unbound_bytes=1, session_id="s1"
    )
    kept = ev.SessionKept(session_id="s1", executor="cpu", tokens=3, kv_bytes=4, at_ns=5, pressure=0.1)
    released = ev.ReservationReleased(request_id="req_1", kv_bytes=1, executor="cpu", at_ns=6)
    gone = ev.SessionEvicted(session_id="s1", executor="cpu", reason="idle", kv_bytes=4, used_ns=6, pressure=0.1)
    assert [shown(event) for event in (granted, kept, released, gone)] == [
        b"sessions_active 1.0",
        b"sessions_active 1.0",
        b"sessions_active 1.0",
        b"sessions_active 0.0",
    ]
