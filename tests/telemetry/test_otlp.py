"""Spans over real OTLP to a collector on loopback: what arrives, and what happens when it does not."""

import sys
import threading
import time
from collections.abc import Generator
from contextlib import contextmanager

import msgspec
import pytest
from collector import Collector, unused_url, wait_until

from gptoss.config import Settings
from gptoss.errors import ConfigError
from gptoss.telemetry.otlp import SpanCounts, SpanExport, open_span_export
from gptoss.telemetry.spans import Span, SpanEvent

SPAN = Span(
    trace_id="0af7651916cd43dd8448eb211c80319c",
    span_id="00f067aa0ba902b7",
    parent_id="b7ad6b7169203331",
    is_parent_remote=True,
    name="POST /v1/chat/completions",
    kind="server",
    start_ns=1_700_000_000_000_000_000,
    end_ns=1_700_000_001_500_000_000,
    attributes={"gen_ai.usage.input_tokens": 12, "gen_ai.response.finish_reasons": ("stop",), "ok": True, "t": 0.5},
    events=(SpanEvent("first_token", 1_700_000_000_900_000_000, {"gptoss.attempt": 1}),),
    links=(("1" * 32, "2" * 16),),
    links_dropped=3,
    error="engine_error",
)
PUT_MAX_S = 0.05


@contextmanager
def exporting(url: str, **options: float) -> Generator[SpanExport]:
    export = open_span_export(Settings(otlp_endpoint=url, otlp_service_name="mine"))
    assert export is not None
    export._gather_s = options.get("gather_s", 0.02)
    export._queue_max = int(options.get("queue_max", 8192))
    try:
        yield export
    finally:
        export.close(0.5)


def put_quickly(export: SpanExport, spans: tuple[Span, ...] = (SPAN,)) -> None:
    """Putting costs no more for a bad collector."""
    began = time.thread_time()
    wall = time.monotonic()
    export.put(spans)
    assert time.thread_time() - began < PUT_MAX_S
    assert time.monotonic() - wall < 2.0


def test_a_span_arrives_as_it_was_meant() -> None:
    with Collector() as collector, exporting(collector.url) as export:
        put_quickly(export)
        assert wait_until(lambda: bool(collector.spans))
        assert collector.paths == ["/v1/traces"]
        resource = {
            one.key: one.value.string_value for one in collector.requests[0].resource_spans[0].resource.attributes
        }
        assert resource["service.name"] == "mine"
        assert resource["service.version"]
        (span,) = collector.spans
        assert (span.trace_id.hex(), span.span_id.hex()) == (SPAN.trace_id, SPAN.span_id)
        assert span.parent_span_id.hex() == SPAN.parent_id
        assert (span.name, span.kind) == (SPAN.name, span.SPAN_KIND_SERVER)
        assert (span.start_time_unix_nano, span.end_time_unix_nano) == (SPAN.start_ns, SPAN.end_ns)
        assert (span.status.code, span.status.message) == (2, "engine_error")
        values = {one.key: one.value for one in span.attributes}
        assert values["gen_ai.usage.input_tokens"].int_value == 12
        assert [one.string_value for one in values["gen_ai.response.finish_reasons"].array_value.values] == ["stop"]
        assert values["ok"].bool_value is True
        assert values["t"].double_value == 0.5
        assert values["gptoss.links_dropped"].int_value == 3
        assert [(event.name, event.time_unix_nano) for event in span.events] == [("first_token", SPAN.events[0].at_ns)]
        assert [(link.trace_id.hex(), link.span_id.hex()) for link in span.links] == [("1" * 32, "2" * 16)]
        assert wait_until(lambda: export.take_counts() == SpanCounts(exported=1))


def test_what_waits_is_sent_at_the_end() -> None:
    with Collector() as collector:
        with exporting(collector.url, gather_s=30) as export:
            put_quickly(export, (SPAN, SPAN))
        assert len(collector.spans) == 2
        assert export.take_counts() == SpanCounts(exported=2)


@pytest.mark.parametrize("status", [400, 403, 500])
def test_a_collector_that_refuses_costs_spans_and_nothing_else(status: int) -> None:
    with Collector(status=status) as collector, exporting(collector.url) as export:
        put_quickly(export)
        assert wait_until(lambda: export.take_counts() == SpanCounts(refused=1))


def test_a_collector_that_is_down_costs_spans_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "0.3")
    with exporting(unused_url()) as export:
        put_quickly(export)
        assert wait_until(lambda: export.take_counts() == SpanCounts(refused=1))


def test_a_collector_that_is_slow_fills_the_queue_and_the_rest_is_counted() -> None:
    hold = threading.Event()
    with Collector(hold=hold) as collector, exporting(collector.url, queue_max=4) as export:
        put_quickly(export)
        assert wait_until(lambda: bool(collector.requests))
        for _ in range(7):
            put_quickly(export)
        assert export.take_counts() == SpanCounts(overflowed=3)
        hold.set()
        assert wait_until(lambda: len(collector.spans) == 5)


def test_spans_of_a_request_are_queued_together_or_not_at_all() -> None:
    hold = threading.Event()
    with Collector(hold=hold) as collector, exporting(collector.url, queue_max=4) as export:
        put_quickly(export)
        assert wait_until(lambda: bool(collector.requests))
        put_quickly(export, (SPAN,) * 3)
        put_quickly(export, (SPAN,) * 2)
        assert export.take_counts() == SpanCounts(overflowed=2)
        hold.set()


def test_closing_waits_for_no_collector_for_long() -> None:
    hold = threading.Event()
    with Collector(hold=hold) as collector:
        export = open_span_export(Settings(otlp_endpoint=collector.url))
        assert export is not None
        export.put((SPAN,))
        began = time.monotonic()
        export.close(0.2)
        assert time.monotonic() - began < 5
        hold.set()
        put_quickly(export)
        assert export.take_counts().overflowed == 1


def test_without_an_endpoint_there_is_no_export() -> None:
    assert open_span_export(Settings()) is None


def test_an_exporter_that_raises_costs_its_batch_only() -> None:
    with Collector() as collector, exporting(collector.url) as export:
        broken = msgspec.structs.replace(SPAN, trace_id="no hex")
        put_quickly(export, (broken,))
        assert wait_until(lambda: export.take_counts() == SpanCounts(refused=1))
        put_quickly(export)
        assert wait_until(lambda: export.take_counts() == SpanCounts(exported=1))


def test_grpc_that_is_not_installed_is_refused_with_the_command_that_installs_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.grpc.trace_exporter", None)
    with pytest.raises(ConfigError, match=r"pip install 'gptoss\[otlp-grpc\]'"):
        open_span_export(Settings(otlp_endpoint="http://127.0.0.1:4317", otlp_protocol="grpc"))
