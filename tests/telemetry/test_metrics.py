"""Prometheus metrics from records."""

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import pytest
from prometheus_client.metrics_core import Metric
from prometheus_client.openmetrics import parser as openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text

from gptoss.messages import codec
from gptoss.messages import events as ev
from gptoss.telemetry.exposition import CONTENT_TYPE_OPENMETRICS, CONTENT_TYPE_TEXT
from gptoss.telemetry.metrics import Metrics

if TYPE_CHECKING:
    from telemetry.conftest import Script

PROMETHEUS_ACCEPT = (
    "application/openmetrics-text;version=1.0.0;escaping=allow-utf-8;q=0.5,"
    "application/openmetrics-text;version=0.0.1;q=0.4,text/plain;version=1.0.0;escaping=allow-utf-8;q=0.3,"
    "text/plain;version=0.0.4;q=0.2,/;q=0.1"
)

VLLM_HISTOGRAMS = (
    "time_to_first_token_seconds",
    "inter_token_latency_seconds",
    "e2e_request_latency_seconds",
    "request_queue_time_seconds",
    "request_prefill_time_seconds",
    "request_decode_time_seconds",
    "request_prompt_tokens",
    "request_generation_tokens",
)


def fold(script: "Script") -> Metrics:
    metrics = Metrics()
    for record in script.records:
        metrics.fold(record)
    return metrics


def samples(metrics: Metrics) -> dict[str, float]:
    """Every sample that is no bucket, by name and its labels' values."""
    found: dict[str, float] = {}
    for family in parse_text(metrics.render()[0].decode()):
        for sample in family.samples:
            if "le" not in sample.labels:
                values = "".join(f" {value}" for _, value in sorted(sample.labels.items()))
                found[sample.name + values] = sample.value
    return found


def test_folding_the_same_records_gives_the_same_bytes(busy: "Script") -> None:
    rebuilt = Metrics()
    for record in busy.records:
        rebuilt.fold(codec.decode_record(codec.encode_record(record)))
    for accept in ("", PROMETHEUS_ACCEPT):
        assert rebuilt.render(accept) == fold(busy).render(accept)


def test_each_boot_counts_from_zero(busy: "Script", new_script: Callable[[str], "Script"]) -> None:
    second = new_script("boot2")
    second.start()
    second.completed("req_done")
    both = Metrics()
    for record in (*busy.records, *second.records):
        both.fold(record)
    assert both.render() == fold(second).render()


def test_vllms_dashboards_find_their_names(busy: "Script") -> None:
    body = fold(busy).render()[0].decode()
    for name in VLLM_HISTOGRAMS:
        assert f"# TYPE vllm:{name} histogram" in body
        assert f'vllm:{name}_count{{engine="cpu",model_name="demo-20b"}}' in body
    found = samples(fold(busy))
    assert found["vllm:num_requests_running cpu demo-20b"] == 1
    assert found["vllm:num_requests_waiting all demo-20b"] == 0
    assert found["vllm:kv_cache_usage_perc cpu demo-20b"] == 0.01
    assert found["vllm:request_success_total cpu stop demo-20b"] == 2
    assert found["vllm:request_success_total cpu abort demo-20b"] == 1
    assert found["vllm:generation_tokens_total cpu demo-20b"] == 15
    assert found["vllm:prompt_tokens_total cpu demo-20b"] == 48
    assert found["vllm:prefix_cache_queries_total cpu demo-20b"] == 24
    assert found["vllm:prefix_cache_hits_total cpu demo-20b"] == 4


def test_the_older_servers_names_are_kept(busy: "Script") -> None:
    body = fold(busy).render()[0].decode()
    labels = (
        'admission_action="accept",dtype="bfloat16",micro_batches="1",model_id="demo-20b",model_size="20b",'
        'pp="1",prompt_version="t",route="single",tp="1"'
    )
    assert f"llm_ttft_ms_count{{{labels}}} 4.0" in body
    assert f"llm_e2e_ms_count{{{labels}}} 2.0" in body
    assert f"llm_tokens_per_sec_count{{{labels}}} 2.0" in body
    found = samples(fold(busy))
    assert found["llm_prefill_tokens_total demo-20b"] == 60
    assert found["llm_decode_tokens_total demo-20b"] == 15
    assert found["llm_prefix_cache_hit_total prefix"] == 1
    assert found["llm_admission_total reject"] == 1
    assert found["kv_bytes_in_use cpu"] == 1 << 20
    assert found["gptoss_prefix_cache_bytes cpu"] == 3 << 20


def test_ttft_is_the_time_between_arrival_and_first_token(script: "Script") -> None:
    script.completed("req_1")
    times = {record.meta.type: record.meta.mono_ns for record in script.records}
    found = samples(fold(script))
    ttft_ns = times["FirstTokenProduced"] - times["RequestReceived"]
    assert found["vllm:time_to_first_token_seconds_sum cpu demo-20b"] == pytest.approx(ttft_ns / 1e9)
    assert found["vllm:request_queue_time_seconds_sum cpu demo-20b"] == pytest.approx(0.04)


def test_inter_token_latency_is_the_spacing_of_a_requests_own_steps(script: "Script") -> None:
    script.receive("req_1")
    script.admit("req_1")
    script.route("req_1")
    script.step({"req_1": (1, 12)})
    script.step({"req_1": (1, 0)}, after_ms=30)
    script.step({"req_2": (1, 0)}, after_ms=50)
    script.step({"req_1": (2, 0)}, after_ms=50)
    found = samples(fold(script))
    assert found["vllm:inter_token_latency_seconds_count cpu demo-20b"] == 3
    assert found["vllm:inter_token_latency_seconds_sum cpu demo-20b"] == pytest.approx(0.03 + 2 * 0.05)


def test_a_waiting_request_moves_the_waiting_gauge(script: "Script") -> None:
    script.receive("req_1")
    script.enqueue("req_1")
    assert samples(fold(script))["vllm:num_requests_waiting all demo-20b"] == 1


def test_guesses_are_counted(script: "Script") -> None:
    rows = (ev.CommittedRow("a", 1, 3, 0, 9, 5, 5, 4), ev.CommittedRow("b", 1, 1, 0, 9, 1, 1))
    committed = ev.StepCommitted(
        executor="cpu", step=1, started_ns=0, duration_ns=1, rows=rows, waiting=0, running=2, kv_bytes_in_use=0
    )
    script.add("executor/cpu", committed)
    found = samples(fold(script))
    assert found["vllm:spec_decode_num_draft_tokens_total cpu demo-20b"] == 4
    assert found["vllm:spec_decode_num_accepted_tokens_total cpu demo-20b"] == 2


def test_preemptions_are_counted(script: "Script") -> None:
    script.receive("req_1")
    script.admit("req_1")
    script.route("req_1")
    for step in (3, 9):
        lost = ev.Preempted(request_id="req_1", executor="cpu", attempt=1, step=step, reason="priority")
        script.add("executor/cpu", lost, correlation="req_1")
    assert samples(fold(script))["vllm:num_preemptions_total cpu demo-20b"] == 2


def test_nothing_that_a_client_writes_becomes_a_label(script: "Script") -> None:
    script.rejected("req_canary", model="canary-model")
    script.completed("req_canary2")
    assert b"canary" not in fold(script).render()[0]


def test_labels_do_not_grow_with_requests(script: "Script") -> None:
    script.completed("req_0")
    before = len(samples(fold(script)))
    for index in range(1, 20):
        script.completed(f"req_{index}")
    assert len(samples(fold(script))) == before


def test_accumulators_are_dropped_at_the_end(busy: "Script") -> None:
    metrics = fold(busy)
    assert set(metrics._books.requests.open) == {"req_open"}
    assert not metrics._books.requests.finished


def test_every_record_is_counted_by_its_type(busy: "Script") -> None:
    found = samples(fold(busy))
    counted = sum(value for name, value in found.items() if name.startswith("gptoss_events_total"))
    assert counted == len(busy.records)


def test_missed_records_are_counted(script: "Script") -> None:
    metrics = fold(script)
    assert samples(metrics)["gptoss_telemetry_missed_total"] == 0
    metrics.count_missed(7)
    assert samples(metrics)["gptoss_telemetry_missed_total"] == 7


@pytest.mark.parametrize(
    ("accept", "content_type"),
    [
        ("", CONTENT_TYPE_TEXT),
        ("*/*", CONTENT_TYPE_TEXT),
        ("text/plain;version=0.0.4", CONTENT_TYPE_TEXT),
        ("application/openmetrics-text;q=0", CONTENT_TYPE_TEXT),
        ("application/openmetrics-text;q=0.1,text/plain;q=0.9", CONTENT_TYPE_TEXT),
        ("application/openmetrics-text;q=x", CONTENT_TYPE_TEXT),
        ("application/openmetrics-text; version=1.0.0", CONTENT_TYPE_OPENMETRICS),
        (PROMETHEUS_ACCEPT, CONTENT_TYPE_OPENMETRICS),
    ],
)
def test_the_accept_header_chooses_the_format(script: "Script", accept: str, content_type: str) -> None:
    assert fold(script).render(accept)[1] == content_type


def test_openmetrics_parses_and_keeps_vllms_colon(busy: "Script") -> None:
    body = fold(busy).render(PROMETHEUS_ACCEPT)[0].decode()
    assert body.endswith("# EOF\n")
    parse: Callable[[str], Iterator[Metric]] = vars(openmetrics)["text_string_to_metric_families"]
    names = {family.name for family in parse(body)}
    assert {f"vllm:{name}" for name in VLLM_HISTOGRAMS} <= names
    assert "vllm_" not in body


def test_a_new_record_shows_in_the_next_scrape(script: "Script") -> None:
    metrics = fold(script)
    before = metrics.render()[0]
    assert metrics.render()[0] is before
    metrics.fold(script.add("node", ev.DeadLettered(to="a", message_type="m", reason="full")))
    assert b'gptoss_dead_letters_total{reason="full"} 1.0' in metrics.render()[0]
