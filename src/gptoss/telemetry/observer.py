"""Records now and then what no other record tells: how the machine does, and what became of exported spans."""

import asyncio

from gptoss.actors.journal import Journal
from gptoss.clock import NS_PER_MS, NS_PER_S, Clock
from gptoss.messages.envelope import Origin
from gptoss.messages.events import SpansExported
from gptoss.telemetry.host import HostReader
from gptoss.telemetry.otlp import SpanCounts, SpanExport
from gptoss.telemetry.spans import Span

PERIOD_S = 10.0
_ORIGIN = Origin(stream="system", actor="observer")


class Observer:
    """Watches the machine, and the way out for spans, of one server. Before ``open`` there is neither.

    Attributes:
        spans: where spans go; None drops them.
    """

    def __init__(self) -> None:
        self.spans: SpanExport | None = None
        self._host: HostReader | None = None

    def open(self, spans: SpanExport | None, host: HostReader | None) -> None:
        """Begin to send spans there, and to read this machine."""
        self.spans, self._host = spans, host

    def put(self, spans: tuple[Span, ...]) -> None:
        """Send the spans of a request; see ``SpanExport.put``."""
        if self.spans is not None:
            self.spans.put(spans)

    async def run(self, journal: Journal, clock: Clock) -> None:
        """Record until cancelled. The machine is read on a thread; how late this wakes up is how late the loop is."""
        while self.spans is not None or self._host is not None:
            due_ns = clock.monotonic_ns() + int(PERIOD_S * NS_PER_S)
            await asyncio.sleep(PERIOD_S)
            late_ms = max(0, clock.monotonic_ns() - due_ns) / NS_PER_MS
            if self._host is not None:
                journal.append(await asyncio.to_thread(self._host.read, late_ms), _ORIGIN)
            self._record_spans(journal)

    async def close(self, journal: Journal) -> None:
        """Send what waits, and record what became of it. Idempotent."""
        if self.spans is not None:
            await asyncio.to_thread(self.spans.close)
            self._record_spans(journal)

    def _record_spans(self, journal: Journal) -> None:
        counts = SpanCounts() if self.spans is None else self.spans.take_counts()
        if counts != SpanCounts():
            event = SpansExported(exported=counts.exported, refused=counts.refused, overflowed=counts.overflowed)
            journal.append(event, _ORIGIN)
