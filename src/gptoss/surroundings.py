"""What a serving system takes from the world around it: a server has the machine's, a simulation its own."""

import platform
from collections.abc import Callable

import msgspec

from gptoss.actors.dispatcher import Dispatcher, LiveDispatcher
from gptoss.actors.journal import Journal
from gptoss.clock import Clock, IdSource, Rng, SystemClock, SystemIds, SystemRng
from gptoss.config import BYTES_PER_MB, Settings
from gptoss.telemetry.host import HostReader
from gptoss.telemetry.memory_journal import MemoryJournal
from gptoss.telemetry.otlp import SpanExport, open_span_export
from gptoss.telemetry.segments import SegmentJournal, SegmentOptions


class Surroundings(msgspec.Struct, frozen=True, kw_only=True):
    """See the module.

    Attributes:
        open_journal: opens the journal that the settings ask for, for a boot of this name.
        dispatcher: chooses which actor goes next, and says whether threaded actors have threads.
        renders_on_loop: whether short prompts may be rendered on the event loop, see ``rendering``.
        open_span_export: the way out for traces that the settings ask for, None for none.
        open_host: reads the machine; None where there is none to read.
    """

    clock: Clock
    ids: IdSource
    rng: Rng
    dispatcher: Dispatcher
    open_journal: Callable[[Settings, str, Clock], Journal]
    renders_on_loop: bool = True
    open_span_export: Callable[[Settings], SpanExport | None] = lambda _: None
    open_host: Callable[[Settings], HostReader | None] = lambda _: None


def live_surroundings() -> Surroundings:
    """The machine's clocks and chance, threads, and the journal on its disk."""
    return Surroundings(
        clock=SystemClock(),
        ids=SystemIds(),
        rng=SystemRng(),
        dispatcher=LiveDispatcher(),
        open_journal=_open_journal,
        open_span_export=open_span_export,
        open_host=lambda settings: HostReader(settings.data_path),
    )


def _open_journal(settings: Settings, boot: str, clock: Clock) -> Journal:
    node = platform.node() or "node"
    if settings.journal == "memory":
        return MemoryJournal(node=node, boot=boot, clock=clock)
    options = SegmentOptions(
        segment_bytes=settings.journal_segment_mb * BYTES_PER_MB,
        control_retention_bytes=settings.journal_retention_mb * BYTES_PER_MB,
        content_retention_bytes=settings.content_retention_mb * BYTES_PER_MB,
    )
    return SegmentJournal.open(settings.journal_path, node=node, boot=boot, clock=clock, options=options)
