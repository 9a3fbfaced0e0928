"""Every PromQL expression that is shipped: it parses, asks for metrics and labels that a server has, and computes soundly."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import promql_parser as promql
import pytest
from prometheus_client.parser import text_string_to_metric_families as parse_text

from gptoss import errors
from gptoss.messages.codec import EVENT_TYPES

DEPLOY = Path(__file__).parents[2] / "deploy"
RULES = DEPLOY / "prometheus" / "gptoss.rules.yml"
RULE_TESTS = DEPLOY / "prometheus" / "gptoss.rules.test.yml"
DASHBOARD = DEPLOY / "grafana" / "dashboards" / "gptoss.json"
ADAPTER = DEPLOY / "kubernetes" / "prometheus-adapter.yaml"
DOCUMENT = DEPLOY.parent / "docs" / "deployment.md"

PROMETHEUS_OWN = {"up", "ALERTS"}
"""Series that Prometheus makes by itself."""
TARGET_LABELS = {"job", "instance", "namespace", "pod"}
"""Labels that come with the target, not with the scrape."""
GPU, READING = "needs a GPU", "comes with the first reading of the machine, which is seconds after the start"
NOT_IN_EVERY_RUN = {
    "gpu_mem_used_bytes": GPU,
    "gpu_utilization": GPU,
    "gptoss_gpu_memory_bytes": GPU,
    "gptoss_data_disk_free_bytes": READING,
    "gptoss_engine_cpu_seconds_total": READING,
    "gptoss_engine_resident_memory_bytes": READING,
    "gptoss_event_loop_late_seconds": READING,
    "process_cpu_seconds_total": READING,
    "process_resident_memory_bytes": READING,
    "gptoss_dead_letters_total": "needs an actor that died with letters in its box",
    "gptoss_trace_spans_dropped_total": "needs a collector that is down",
    "llm_prefix_cache_hit_total": "needs an engine with a prefix cache",
    "vllm:num_preemptions_total": "needs a batch that outgrew its memory",
}
"""Declared in every scrape, with samples only where this happened."""
AWAITED = {
    "gpu_utilization",
    "gptoss_data_disk_free_bytes",
    "gptoss_engine_cpu_seconds_total",
    "gptoss_engine_resident_memory_bytes",
    "gptoss_event_loop_late_seconds",
    "gptoss_gpu_memory_bytes",
    "gptoss_trace_spans_dropped_total",
    "process_cpu_seconds_total",
    "process_resident_memory_bytes",
    "sessions_active",
}
"""Names that are fixed, of metrics that no server has yet."""
SUFFIXES = {"counter": ("_total",), "histogram": ("_bucket", "_count", "_sum"), "gauge": ("",)}
COUNTING = ("_total", "_bucket", "_count", "_sum")


class Scrape(NamedTuple):
    """The series that a scrape declares, and for those with samples their labels and the values of these."""

    declared: set[str]
    labels: dict[str, dict[str, set[str]]]


@pytest.fixture(scope="session")
def series(scrape: str) -> Scrape:
    found = Scrape(set(), {})
    for family in parse_text(scrape):
        found.declared.update(family.name + suffix for suffix in SUFFIXES[family.type])
        for sample in family.samples:
            labels = found.labels.setdefault(sample.name, {})
            for name, value in sample.labels.items():
                labels.setdefault(name, set()).add(value)
    return found


# ---------------------------------------------------------------- the expressions


def _rules() -> list[dict[str, Any]]:
    groups = msgspec.yaml.decode(RULES.read_bytes(), type=dict[str, Any])["groups"]
    return [rule for group in groups for rule in group["rules"]]


def _dashboard() -> dict[str, Any]:
    return msgspec.json.decode(DASHBOARD.read_bytes(), type=dict[str, Any])


RECORDED = {rule["record"] for rule in _rules() if "record" in rule}


def _expressions() -> Iterator[tuple[str, str]]:
    for rule in _rules():
        yield rule.get("record") or rule["alert"], rule["expr"]
    board = _dashboard()
    for panel in board["panels"]:
        for target in panel.get("targets", ()):
            yield f"{panel['title']} {target['refId']}", target["expr"].replace("$__rate_interval", "5m")
    for annotation in board["annotations"]["list"]:
        yield annotation["name"], annotation["expr"]
    for variable in board["templating"]["list"]:
        if variable["type"] == "query":
            match = re.fullmatch(r"label_values\((.+), \w+\)", variable["query"]["query"])
            assert match is not None
            yield f"${variable['name']}", match[1]


EXPRESSIONS = dict(_expressions())
every_expression = pytest.mark.parametrize("expr", EXPRESSIONS.values(), ids=EXPRESSIONS.keys())


def _nodes(expr: str) -> list[promql.Expr]:
    found: list[promql.Expr] = []
    promql.walk(promql.parse(expr), found.append)
    return found


def _selectors(expr: str) -> list[promql.VectorSelector]:
    """Each selector once; one with a range is a node of its own, and its inner one may be too."""
    found: dict[str, promql.VectorSelector] = {}
    for node in _nodes(expr):
        inner = node.vector_selector if isinstance(node, promql.MatrixSelector) else node
        if isinstance(inner, promql.VectorSelector):
            found[str(inner)] = inner
    return list(found.values())


def test_there_are_as_many_as_one_would_think() -> None:
    assert len(_rules()) >= 15
    assert len(EXPRESSIONS) >= 60


# ---------------------------------------------------------------- metrics and labels


@every_expression
def test_it_asks_for_what_a_server_has(expr: str, series: Scrape) -> None:
    selectors = _selectors(expr)
    assert selectors
    for selector in selectors:
        name = selector.name or ""
        if name in PROMETHEUS_OWN | RECORDED | (AWAITED - series.declared):
            continue
        assert name in series.declared, f"no server has {name}"
        if name not in NOT_IN_EVERY_RUN:
            assert name in series.labels, f"{name} had no samples"
            known = TARGET_LABELS | series.labels[name].keys()
            assert {matcher.name for matcher in selector.matchers.matchers} <= known


@every_expression
def test_it_groups_by_labels_that_are_there(expr: str, series: Scrape) -> None:
    for node in _nodes(expr):
        if not isinstance(node, promql.AggregateExpr) or node.modifier is None:
            continue
        for selector in _selectors(node.expr.prettify()):
            if (name := selector.name or "") in series.labels:
                assert set(node.modifier.labels) <= TARGET_LABELS | series.labels[name].keys()


@every_expression
def test_the_values_that_it_matches_can_occur(expr: str, series: Scrape) -> None:
    codes = set(_codes(errors.GptossError))
    for selector in _selectors(expr):
        for matcher in selector.matchers.matchers:
            if matcher.name == "state":
                assert matcher.value in series.labels["gptoss_request_ends_total"]["state"]
            elif matcher.name == "type":
                assert matcher.value in EVENT_TYPES
            elif matcher.name == "outcome":
                assert set(matcher.value.split("|")) <= codes


def test_the_scrape_has_every_kind_of_end(series: Scrape) -> None:
    states = series.labels["gptoss_request_ends_total"]["state"]
    assert states == {"completed", "rejected", "cancelled", "failed"}
    outcomes = series.labels["gptoss_request_ends_total"]["outcome"]
    assert {"length", "queue_full", "memory_exhausted", "invalid_request", "client"} <= outcomes


def test_a_refusal_is_every_error_for_want_of_room_and_no_other() -> None:
    rule = next(rule for rule in _rules() if rule.get("record") == "gptoss:request_refusals:ratio5m")
    (matched,) = (
        set(matcher.value.split("|"))
        for selector in _selectors(rule["expr"])
        for matcher in selector.matchers.matchers
        if matcher.name == "outcome"
    )
    wanting = {code for code, kind in _codes(errors.GptossError).items() if kind.status in {429, 503}}
    assert matched - {"actor_dead", "actor_error"} == wanting


def _codes(kind: type[errors.GptossError]) -> dict[str, type[errors.GptossError]]:
    found = {kind.code: kind}
    for child in kind.__subclasses__():
        found |= _codes(child)
    return found


def test_the_autoscaler_follows_a_metric_that_the_adapter_makes_of_one_that_exists(series: Scrape) -> None:
    (rule,) = msgspec.yaml.decode(ADAPTER.read_bytes(), type=dict[str, Any])["rules"]["custom"]
    (selector,) = _selectors(rule["seriesQuery"])
    asked = {matcher.name: matcher.value for matcher in selector.matchers.matchers}
    assert asked["__name__"] in series.labels
    assert re.fullmatch(rule["name"]["matches"], asked["__name__"])
    scaler = (DEPLOY / "helm" / "gptoss" / "templates" / "horizontalpodautoscaler.yaml").read_text()
    assert f"name: {rule['name']['as']}\n" in scaler


# ---------------------------------------------------------------- soundness


def unsound(expr: str) -> list[str]:
    """What is wrong with how an expression computes; the older server's rules had each of these faults."""
    faults: list[str] = []
    for node in _nodes(expr):
        if not isinstance(node, promql.Call):
            continue
        if node.func.name == "histogram_quantile" and not _is_rate_by_le(node.args[1]):
            faults.append("a quantile needs the rate of buckets, summed by le")
        if node.func.name in {"rate", "increase", "irate"}:
            (selector,) = _selectors(node.args[0].prettify())
            if not (selector.name or "").endswith(COUNTING):
                faults.append(f"{selector.name} is no counter and has no rate")
    return faults + _ratios_of_raw_counters(expr)


def _is_rate_by_le(node: promql.Expr) -> bool:
    if not isinstance(node, promql.AggregateExpr) or node.modifier is None or "le" not in node.modifier.labels:
        return False
    inner = node.expr
    if not isinstance(inner, promql.Call) or inner.func.name not in {"rate", "increase"}:
        return False
    (selector,) = _selectors(inner.prettify())
    return str(node.op) == "sum" and (selector.name or "").endswith("_bucket")


def _ratios_of_raw_counters(expr: str) -> list[str]:
    """Divisions whose sides are not both aggregated: unlike label sets do not match, and single servers are not weighed."""
    return [
        "both sides of a ratio are sums of rates"
        for node in _nodes(expr)
        if isinstance(node, promql.BinaryExpr)
        and str(node.op) == "/"
        and not (_is_summed(node.lhs) and _is_summed(node.rhs))
    ]


def _is_summed(node: promql.Expr) -> bool:
    if isinstance(node, promql.ParenExpr):
        return _is_summed(node.expr)
    if isinstance(node, promql.BinaryExpr):
        return all(_is_summed(side) or isinstance(side, promql.NumberLiteral) for side in (node.lhs, node.rhs))
    return isinstance(node, promql.AggregateExpr) or (isinstance(node, promql.VectorSelector) and node.name in RECORDED)


@every_expression
def test_it_computes_soundly(expr: str) -> None:
    assert not unsound(expr)


@pytest.mark.parametrize(
    "expr",
    [
        "histogram_quantile(0.95, llm_ttft_ms)",
        "histogram_quantile(0.95, llm_ttft_ms_bucket)",
        "histogram_quantile(0.95, rate(llm_ttft_ms_bucket[5m]))",
        "histogram_quantile(0.95, sum by (job) (rate(llm_ttft_ms_bucket[5m])))",
        "rate(llm_prefix_cache_hit_total[5m]) / rate(llm_prefill_tokens_total[5m]) < 0.3",
        'rate(llm_admission_total{action="reject"}[5m]) / rate(llm_admission_total[5m]) > 0.01',
        "rate(vllm:kv_cache_usage_perc[5m])",
    ],
)
def test_the_faults_of_older_rules_are_recognised(expr: str) -> None:
    assert unsound(expr)


# ---------------------------------------------------------------- completeness


def test_every_alert_is_seen_silent_and_firing_and_says_what_to_do() -> None:
    tests = msgspec.yaml.decode(RULE_TESTS.read_bytes(), type=dict[str, Any])["tests"]
    seen: dict[str, set[bool]] = {}
    for case in tests:
        for check in case.get("alert_rule_test", ()):
            seen.setdefault(check["alertname"], set()).add(bool(check["exp_alerts"]))
    text = DOCUMENT.read_text(encoding="utf-8")
    alerts = [rule for rule in _rules() if "alert" in rule]
    for rule in alerts:
        assert seen[rule["alert"]] == {True, False}
        assert rule["labels"]["severity"] in {"critical", "warning", "info"}
        assert {"summary", "description"} <= rule["annotations"].keys()
        assert f"| `{rule['alert']}` |" in text
    assert len(seen) == len(alerts)


def test_every_recorded_series_is_used() -> None:
    used = {selector.name for expr in EXPRESSIONS.values() for selector in _selectors(expr)}
    assert used >= RECORDED


def test_panels_do_not_overlap_and_fill_the_width() -> None:
    taken: set[tuple[int, int]] = set()
    panels = _dashboard()["panels"]
    for panel in panels:
        at = panel["gridPos"]
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert not cells & taken
        taken |= cells
    assert max(x for x, _ in taken) == 23
    assert len({panel["id"] for panel in panels}) == len(panels)
    assert len({panel["title"] for panel in panels}) == len(panels)


def test_latencies_lead_to_their_traces() -> None:
    sources = msgspec.yaml.decode(
        (DEPLOY / "grafana" / "provisioning" / "datasources" / "gptoss.yml").read_bytes(), type=dict[str, Any]
    )["datasources"]
    by_type = {source["type"]: source for source in sources}
    (link,) = by_type["prometheus"]["jsonData"]["exemplarTraceIdDestinations"]
    assert link["name"] == "trace_id"
    assert link["datasourceUid"] == by_type["jaeger"]["uid"]
    with_exemplars = [p["title"] for p in _dashboard()["panels"] if any(t["exemplar"] for t in p.get("targets", ()))]
    assert {"Time to first token", "End to end"} <= set(with_exemplars)
