"""What every journal store shares: numbering records, telling watchers, choosing records for a reader.

A store is a ``Store``: it says in ``_keep`` what becomes of a record, and the rest is done here, under its lock. A decision
is one turn of that lock and one reading of the clock: a record is short work, and what surrounds it would be most of it.
"""

import abc
import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Sequence

import msgspec

from gptoss.clock import Clock
from gptoss.errors import JournalError
from gptoss.messages.envelope import Event, Family, Meta, Origin, Record
from gptoss.messages.events import TERMINAL_EVENTS, RequestReceived

FINISHED_STREAMS_MAX = 10_000

_logger = logging.getLogger(__name__)
_TERMINAL = frozenset(TERMINAL_EVENTS)
_TURNING = _TERMINAL | {RequestReceived}

Watcher = Callable[[Record], None]


class _Numbers:
    """Of one family: the next position, and the next ``seq`` of each stream; a stream is in one of the two."""

    __slots__ = ("finished", "live", "next_pos")

    def __init__(self) -> None:
        self.next_pos = 0
        self.live: dict[str, int] = {}
        self.finished: OrderedDict[str, int] = OrderedDict()

    def finish(self, stream: str, next_seq: int) -> None:
        self.finished[stream] = next_seq
        self.finished.move_to_end(stream)
        if len(self.finished) > FINISHED_STREAMS_MAX:
            self.finished.popitem(last=False)


class Sequencer:
    """Gives records their positions and streams their sequence numbers. It does not lock.

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
        self._numbers: dict[Family, _Numbers] = {"control": _Numbers(), "content": _Numbers()}

    def next_pos(self, family: Family) -> int:
        """The position that the next record of this family will have."""
        return self._numbers[family].next_pos

    def number(
        self, event: Event, origin: Origin, cause: int, correlation: str, mono_ns: int, keep: Callable[[Record], None]
    ) -> Record:
        """Make a record of an event.

        Args:
            event: the fact.
            origin: all of it but for its cause and correlation.
            cause: position of the record that led to it.
            correlation: the request concerned.
            mono_ns: when it is recorded.
            keep: takes the record in. The numbers are used up once it returns; if it raises, the next record has them.
        """
        kind, stream = type(event), origin.stream
        numbers = self._numbers[kind.FAMILY]
        seq = numbers.live.get(stream)
        is_live = seq is not None
        if seq is None:
            seq = numbers.finished.get(stream, 0)
        meta = Meta(
            self.node,
            self.boot,
            numbers.next_pos,
            stream,
            seq,
            kind.__name__,
            kind.VERSION,
            cause,
            correlation,
            origin.trace_id,
            origin.span_id,
            origin.actor,
            origin.incarnation,
            mono_ns,
        )
        record = Record(meta, event)
        keep(record)
        numbers.next_pos += 1
        if is_live and kind not in _TURNING:
            numbers.live[stream] = seq + 1
        else:
            self._turn(numbers, meta, kind)
        return record

    def _turn(self, numbers: _Numbers, meta: Meta, kind: type[Event]) -> None:
        """Count a record that begins or ends its stream or its request, or that came after the end."""
        stream, next_seq = meta.stream, meta.seq + 1
        if kind in _TERMINAL:
            numbers.live.pop(stream, None)
            numbers.finish(stream, next_seq)
            self.open_requests.discard(meta.correlation)
            content = self._numbers["content"]
            if stream in content.live:
                content.finish(stream, content.live.pop(stream))
        elif stream in numbers.finished:
            numbers.finish(stream, next_seq)
        else:
            numbers.live[stream] = next_seq
            if kind is RequestReceived:
                self.open_requests.add(meta.correlation)


class Watchers:
    """Who is told of which control records; of content nobody is. A watcher that raises is logged once and never harms the appender.

    It does not lock.
    """

    def __init__(self) -> None:
        self._watchers: tuple[tuple[Watcher, frozenset[type[Event]] | None], ...] = ()
        self._by_type: dict[type[Event], tuple[Watcher, ...]] = {}
        """Who wants records of a type, in the order in which they came; filled as types are seen."""
        self._telling = False
        self.failure = ""

    def add(self, watcher: Watcher, types: Collection[type[Event]] | None = None) -> None:
        """Tell this watcher too, from the next record on; of records of these types only, or of all."""
        self._set((*self._watchers, (watcher, None if types is None else frozenset(types))))

    def remove(self, watcher: Watcher) -> None:
        """Tell it no more; unknown ones are ignored."""
        self._set(tuple(other for other in self._watchers if other[0] is not watcher))

    def _set(self, watchers: tuple[tuple[Watcher, frozenset[type[Event]] | None], ...]) -> None:
        self._watchers, self._by_type = watchers, {}

    def refuse_reentry(self) -> None:
        """Raise if a watcher is running, for its append would reach the others before the record it reacts to.

        Raises:
            JournalError: the append comes from a watcher.
        """
        if self._telling:
            raise JournalError("a journal watcher must not append; send a message to an actor instead")

    def tell(self, records: Iterable[Record]) -> None:
        """Call everyone who wants them with each of these records, in order."""
        self._telling = True
        try:
            for record in records:
                kind = type(record.event)
                watchers = self._by_type.get(kind)
                if watchers is None:
                    watchers = self._by_type[kind] = self._wanting(kind)
                for watcher in watchers:
                    try:
                        watcher(record)
                    except Exception as error:  # noqa: BLE001 - between telemetry and requests: nothing crosses
                        self._note(error, record)
        finally:
            self._telling = False

    def _wanting(self, kind: type[Event]) -> tuple[Watcher, ...]:
        if kind.FAMILY != "control":
            return ()
        return tuple(watcher for watcher, types in self._watchers if types is None or kind in types)

    def _note(self, error: Exception, record: Record) -> None:
        if not self.failure:
            _logger.error("a journal watcher failed on record %d", record.meta.pos, exc_info=error)
        self.failure = f"a journal watcher raised {type(error).__name__}: {error}"


class Store(abc.ABC):
    """See ``gptoss.actors.journal.Journal``: all of it that does not depend on where records are kept."""

    def __init__(self, sequencer: Sequencer) -> None:
        self._sequencer = sequencer
        self._clock = sequencer.clock
        self._watchers = Watchers()
        self._lock = threading.RLock()

    @property
    def node(self) -> str:
        """See ``Journal``."""
        return self._sequencer.node

    @property
    def boot(self) -> str:
        """See ``Journal``."""
        return self._sequencer.boot

    def append(self, event: Event, origin: Origin) -> Record:
        """See ``Journal``."""
        with self._lock:
            self._watchers.refuse_reentry()
            now_ns = self._clock.monotonic_ns()
            record = self._sequencer.number(event, origin, origin.cause, origin.correlation, now_ns, self._keep)
            self._watchers.tell((record,))
        return record

    def append_decision(self, command: Event, origin: Origin, led_to: Sequence[tuple[Event, str]]) -> list[Record]:
        """See ``Journal``."""
        records: list[Record] = []
        with self._lock:
            self._watchers.refuse_reentry()
            number, keep, now_ns = self._sequencer.number, self._keep, self._clock.monotonic_ns()
            try:
                records.append(number(command, origin, origin.cause, origin.correlation, now_ns, keep))
                cause = records[0].meta.pos
                for event, correlation in led_to:
                    records.append(number(event, origin, cause, correlation, now_ns, keep))
            finally:
                self._watchers.tell(records)
        return records

    def subscribe(self, watcher: Watcher, types: Collection[type[Event]] | None = None) -> Callable[[], None]:
        """See ``Journal``."""
        with self._lock:
            self._watchers.add(watcher, types)

        def stop() -> None:
            with self._lock:
                self._watchers.remove(watcher)

        return stop

    @abc.abstractmethod
    def _keep(self, record: Record) -> None:
        """Take a record in, the lock held. What raises has taken nothing in: the numbers are given again."""


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
