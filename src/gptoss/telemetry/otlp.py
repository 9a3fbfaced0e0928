"""Spans go to an OpenTelemetry collector, from a thread of their own.

Rules:
- Whoever has spans never waits: they go into a bounded queue, and what finds it full is counted and dropped.
- The collector may be down, slow or refuse: OpenTelemetry's exporter tries again for its time-out, then the batch is
  counted and dropped. Counts become ``SpansExported`` events, and so metrics and a log line.
- Closing gives the last spans a moment and then leaves them.
- Headers, certificates, compression and time-out are the exporter's own settings: it reads ``OTEL_EXPORTER_OTLP_HEADERS`` and
  its kin itself, so that keys of a collector never enter ours.
"""

import importlib.metadata
import logging
import threading
from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import msgspec

from gptoss.config import Settings
from gptoss.errors import ConfigError
from gptoss.telemetry.spans import Span

if TYPE_CHECKING:
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import ReadableSpan
    from opentelemetry.sdk.trace.export import SpanExporter

QUEUE_MAX = 8192
BATCH_MAX = 512
GATHER_S = 1.0
CLOSE_TIMEOUT_S = 3.0
SCHEMA_URL = "https://opentelemetry.io/schemas/1.37.0"


class SpanCounts(msgspec.Struct, frozen=True):
    """Spans that reached the collector, that did not, and that found the queue full."""

    exported: int = 0
    refused: int = 0
    overflowed: int = 0


class SpanExport:
    """The queue and its thread.

    Args:
        exporter: OpenTelemetry's, for the protocol.
        resource: what the collector knows this server as.
        queue_max: spans that may wait.
        gather_s: how long the first of a batch waits for others.
    """

    def __init__(
        self,
        exporter: "SpanExporter",
        resource: "Resource",
        *,
        queue_max: int = QUEUE_MAX,
        gather_s: float = GATHER_S,
    ) -> None:
        self._exporter = exporter
        self._resource = resource
        self._queue_max = queue_max
        self._gather_s = gather_s
        self._queue: deque[Span] = deque()
        self._news = threading.Condition()
        self._is_closing = False
        self._exported = self._refused = self._overflowed = 0
        self._thread = threading.Thread(target=self._run, name="span-export", daemon=True)
        self._thread.start()

    def put(self, spans: tuple[Span, ...]) -> None:
        """Queue the spans of a request: all of them or, when they do not fit, none."""
        with self._news:
            if len(self._queue) + len(spans) > self._queue_max or self._is_closing:
                self._overflowed += len(spans)
                return
            self._queue.extend(spans)
            self._news.notify()

    def take_counts(self) -> SpanCounts:
        """What became of spans since the last call."""
        with self._news:
            counts = SpanCounts(self._exported, self._refused, self._overflowed)
            self._exported = self._refused = self._overflowed = 0
        return counts

    def close(self, timeout_s: float = CLOSE_TIMEOUT_S) -> None:
        """Send what waits and end; what is not sent in time is dropped. Idempotent; blocks for ``timeout_s`` at most."""
        with self._news:
            self._is_closing = True
            self._news.notify()
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            self._exporter.shutdown()  # wakes it where it waits to try again
            self._thread.join(timeout_s)

    # ---- the thread

    def _run(self) -> None:
        while batch := self._next_batch():
            is_taken = self._export(batch)
            with self._news:
                if is_taken:
                    self._exported += len(batch)
                else:
                    self._refused += len(batch)
        self._exporter.shutdown()

    def _next_batch(self) -> list[Span]:
        """The next spans to send; none once the queue is closed and empty."""
        with self._news:
            self._news.wait_for(lambda: self._queue or self._is_closing)
            self._news.wait_for(lambda: len(self._queue) >= BATCH_MAX or self._is_closing, self._gather_s)
            return [self._queue.popleft() for _ in range(min(BATCH_MAX, len(self._queue)))]

    def _export(self, batch: Sequence[Span]) -> bool:
        from opentelemetry.sdk.trace.export import SpanExportResult  # noqa: PLC0415 - see open_span_export

        try:
            result = self._exporter.export([_readable(span, self._resource) for span in batch])
        except Exception:  # noqa: BLE001 - the edge to a foreign library: a batch is lost, nothing else
            return False
        return result is SpanExportResult.SUCCESS


def open_span_export(settings: Settings) -> SpanExport | None:
    """The export that the settings ask for; None when they name no collector.

    OpenTelemetry is imported here and not before: a server without traces does not load it.

    Raises:
        ConfigError: gRPC is asked for and not installed.
    """
    if not settings.otlp_endpoint:
        return None
    from opentelemetry.sdk.resources import Resource  # noqa: PLC0415

    # Its complaints about each batch would flood the log of a server whose collector is down; the counts say as much.
    logging.getLogger("opentelemetry").setLevel(logging.CRITICAL)
    version = importlib.metadata.version("gptoss")
    resource = Resource.create({"service.name": settings.otlp_service_name, "service.version": version})
    return SpanExport(_exporter(settings), resource)


def _exporter(settings: Settings) -> "SpanExporter":
    endpoint = settings.otlp_endpoint
    if settings.otlp_protocol == "grpc":
        try:
            from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import (  # noqa: PLC0415
                OTLPSpanExporter as GrpcExporter,
            )
        except ImportError:
            raise ConfigError(
                "otlp_protocol is 'grpc', which is not installed; install it with: pip install 'gptoss[otlp-grpc]'"
            ) from None
        return GrpcExporter(endpoint=endpoint, insecure=endpoint.startswith("http://"))
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter  # noqa: PLC0415

    return OTLPSpanExporter(endpoint=f"{endpoint.rstrip('/')}/v1/traces")


def _readable(span: Span, resource: "Resource") -> "ReadableSpan":
    """A span as the library wants it."""
    from opentelemetry import trace  # noqa: PLC0415
    from opentelemetry.sdk.trace import Event, ReadableSpan  # noqa: PLC0415
    from opentelemetry.sdk.util.instrumentation import InstrumentationScope  # noqa: PLC0415

    def context(trace_id: str, span_id: str, *, is_remote: bool = False) -> trace.SpanContext:
        sampled = trace.TraceFlags(trace.TraceFlags.SAMPLED)
        return trace.SpanContext(int(trace_id, 16), int(span_id, 16), is_remote=is_remote, trace_flags=sampled)

    attributes: dict[str, Any] = span.attributes
    if span.links_dropped:
        attributes = {**attributes, "gptoss.links_dropped": span.links_dropped}
    is_error = bool(span.error)
    return ReadableSpan(
        name=span.name,
        context=context(span.trace_id, span.span_id),
        parent=context(span.trace_id, span.parent_id, is_remote=span.is_parent_remote) if span.parent_id else None,
        resource=resource,
        attributes=attributes,
        events=[Event(event.name, event.attributes, event.at_ns) for event in span.events],
        links=[trace.Link(context(*link)) for link in span.links],
        kind=trace.SpanKind.SERVER if span.kind == "server" else trace.SpanKind.INTERNAL,
        status=trace.Status(trace.StatusCode.ERROR if is_error else trace.StatusCode.UNSET, span.error or None),
        start_time=span.start_ns,
        end_time=span.end_ns,
        instrumentation_scope=InstrumentationScope("gptoss", schema_url=SCHEMA_URL),
    )
