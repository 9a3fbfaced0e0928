"""Spans over OTLP's gRPC, where the extra is installed."""

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

grpc: Any = pytest.importorskip("grpc")
exporter = pytest.importorskip("opentelemetry.exporter.otlp.proto.grpc.trace_exporter")

from collector import wait_until  # noqa: E402
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc  # noqa: E402

from gptoss.config import Settings  # noqa: E402
from gptoss.telemetry.otlp import SpanCounts, open_span_export  # noqa: E402
from gptoss.telemetry.spans import Span  # noqa: E402

SPAN = Span(trace_id="a" * 32, span_id="b" * 16, parent_id="", name="chat", start_ns=1, end_ns=2)


class Service(trace_service_pb2_grpc.TraceServiceServicer):
    def __init__(self) -> None:
        self.names: list[str] = []

    def Export(self, request: Any, context: Any) -> Any:  # noqa: N802 - gRPC's own name
        del context
        scopes = [scope for resource in request.resource_spans for scope in resource.scope_spans]
        self.names += [span.name for scope in scopes for span in scope.spans]
        return trace_service_pb2.ExportTraceServiceResponse()


def test_spans_arrive() -> None:
    service = Service()
    server = grpc.server(ThreadPoolExecutor(1))
    untyped: Any = trace_service_pb2_grpc
    untyped.add_TraceServiceServicer_to_server(service, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    export = open_span_export(Settings(otlp_endpoint=f"http://127.0.0.1:{port}", otlp_protocol="grpc"))
    assert export is not None
    try:
        export.put((SPAN,))
        assert wait_until(lambda: service.names == ["chat"])
        assert wait_until(lambda: export.take_counts() == SpanCounts(exported=1))
    finally:
        export.close(1.0)
        server.stop(None).wait()
