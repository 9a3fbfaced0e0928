"""Records now and then what no other record tells: how the machine does, and what became of exported spans."""

import asyncio

from gptoss.actors.journal import Journal
from gptoss.clock import NS_PER_MS, NS_PER_S, Clock
from gptoss.messages.envelope import Origin
from gptoss.messages.events import SpansExported
from gptoss.telemetry.host import HostReader
from gptoss.telemetry.otlp import SpanCounts, SpanExport

PERIOD_S = 10.0
_ORIGIN = Origin(stream="system", actor="observer")


async def observe(journal: Journal, clock: Clock, host: HostReader | None, spans: SpanExport | None) -> None:
    """Go on until cancelled. The machine is read on a thread; how late this wakes up is how late the loop is."""
    while True:
        due_ns = clock.monotonic_ns() + int(PERIOD_S * NS_PER_S)
        await asyncio.sleep(PERIOD_S)
        late_ms = max(0, clock.monotonic_ns() - due_ns) / NS_PER_MS
        if host is not None:
            journal.append(await asyncio.to_thread(host.read, late_ms), _ORIGIN)
        if spans is not None:
            record_spans(journal, spans)


def record_spans(journal: Journal, spans: SpanExport) -> None:
    """Record what became of the spans since the last time, if there were any."""
    counts = spans.take_counts()
    if counts != SpanCounts():
        event = SpansExported(exported=counts.exported, refused=counts.refused, overflowed=counts.overflowed)
        journal.append(event, _ORIGIN)
