"""What every journal store shares: numbering records, telling watchers, choosing records for a reader.

Nothing here locks: a store calls these with its own lock held.
"""

import logging
from collections import OrderedDict
from collections.abc import Callable

import msgspec

from gptoss.clock import Clock
from gptoss.errors import JournalError
from gptoss.messages.envelope import Event, Family, Meta, Origin, Record
from gptoss.messages.events import TERMINAL_EVENTS, RequestReceived

FINISHED_STREAMS_MAX = 10_000

_logger = logging.getLogger(__name__)
_TERMINAL = frozenset(TERMINAL_EVENTS)

Watcher = Callable[[Record], None]


class Sequencer:
    """Gives records their positions and streams their sequence numbers.

    ``seq`` counts within a stream and family, so the control log is the same whether or not content is kept. The
    counter of a stream that saw a terminal event is forgotten once ``FINISHED_STREAMS_MAX`` other finished streams
    were used after it; until then late events of a request go on counting.
    """

    def __init__(self, *, node: str, boot: str, clock: Clock) -> None:
        self.node = node
        self.boot = boot
        self.open_requests: set[str] = set()
        """Requests that were received and have no terminal event yet."""
        self.clock = clock
        self._next_pos: dict[Family, int] = {"control": 0, "content": 0}
        self._live: dict[tuple[Family, str], int] = {}
        self._finished: OrderedDict[tuple[Family, str], int] = OrderedDict()

    def next_pos(self, family: Family) -> int:
        """The position that the next record of this family will have."""
        return self._next_pos[family]

    def draft(self, event: Event, origin: Origin) -> Record:
        """The record that this event would become; numbers are used up only by ``advance``."""
        kind, stream = type(event), origin.stream
        family = kind.FAMILY
        key = (family, stream)
        seq = self._live.get(key)
        if seq is None:
            seq = self._finished.get(key, 0)
        meta = Meta(
            self.node,
            self.boot,
            self._next_pos[family],
            stream,
            seq,
            kind.__name__,
            kind.VERSION,
            origin.cause,
            origin.correlation,
            origin.trace_id,
            origin.span_id,
            origin.actor,
            origin.incarnation,
            self.clock.monotonic_ns(),
        )
        return Record(meta, event)

    def advance(self, record: Record) -> None:
        """Use up the numbers of a drafted record."""
        meta, kind = record.meta, type(record.event)
        family = kind.FAMILY
        key = (family, meta.stream)
        self._next_pos[family] = meta.pos + 1
        if kind in _TERMINAL:
            self._live.pop(key, None)
            self._finish(key, meta.seq + 1)
            self.open_requests.discard(meta.correlation)
            content = ("content", meta.stream)
            if content in self._live:
                self._finish(content, self._live.pop(content))
        elif key in self._finished:
            self._finish(key, meta.seq + 1)
        else:
            self._live[key] = meta.seq + 1
            if kind is RequestReceived:
                self.open_requests.add(meta.correlation)

    def _finish(self, key: tuple[Family, str], next_seq: int) -> None:
        self._finished[key] = next_seq
        self._finished.move_to_end(key)
        if len(self._finished) > FINISHED_STREAMS_MAX:
            self._finished.popitem(last=False)


class Watchers:
    """Who is told of every control record. A watcher that raises is logged once and never harms the appender."""

    def __init__(self) -> None:
        self._watchers: tuple[Watcher, ...] = ()
        self._telling = False
        self.failure = ""

    def add(self, watcher: Watcher) -> None:
        """Tell this watcher too, from the next record on."""
        self._watchers = (*self._watchers, watcher)

    def remove(self, watcher: Watcher) -> None:
        """Tell it no more; unknown ones are ignored."""
        self._watchers = tuple(other for other in self._watchers if other is not watcher)

    def refuse_reentry(self) -> None:
        """Raise if a watcher is running, for its append would reach the others before the record it reacts to.

        Raises:
            JournalError: the append comes from a watcher.
        """
        if self._telling:
            raise JournalError("a journal watcher must not append; send a message to an actor instead")

    def tell(self, record: Record) -> None:
        """Call every watcher with a record."""
        self._telling = True
        try:
            for watcher in self._watchers:
                try:
                    watcher(record)
                except Exception as error:  # noqa: BLE001 - between telemetry and requests: nothing crosses
                    self._note(error, record)
        finally:
            self._telling = False

    def _note(self, error: Exception, record: Record) -> None:
        if not self.failure:
            _logger.error("a journal watcher failed on record %d", record.meta.pos, exc_info=error)
        self.failure = f"a journal watcher raised {type(error).__name__}: {error}"


class Query(msgspec.Struct, frozen=True, kw_only=True):
    """Which records a reader wants; the fields are those of ``Journal.read``."""

    family: Family = "control"
    boot: str | None = None
    stream: str | None = None
    correlation: str | None = None
    after: int = -1

    def matches(self, meta: Meta) -> bool:
        """Whether a record of the right family is wanted."""
        return (
            meta.pos > self.after
            and (self.correlation is None or meta.correlation == self.correlation)
            and (self.stream is None or meta.stream == self.stream)
            and (self.boot is None or meta.boot == self.boot)
        )
