"""The newest records of a live journal, page by page, for those who follow it.

Rules:
- From the first page on the newest ``TAIL_RECORDS`` are kept here, so that following costs no reading of files.
- A page looks at ``SCAN_MAX`` records at most, however few of them fit; the reader goes on at ``next``.
- What moves all the time (commands, steps, snapshots, memory readings) is left out unless it is asked for.
"""

from collections import deque
from collections.abc import Iterator

import msgspec

from gptoss.actors.journal import Journal
from gptoss.messages import events as ev
from gptoss.messages.envelope import Record

TAIL_RECORDS = 4096
SCAN_MAX = 50_000

CHATTER: frozenset[str] = frozenset(
    kind.__name__
    for kind in (
        ev.CommandConsumed,
        ev.StepCommitted,
        ev.SnapshotTaken,
        ev.MemoryObserved,
        ev.HostObserved,
        ev.CountersSaved,
        ev.ClockAnchored,
    )
)


class EventQuery(msgspec.Struct, frozen=True, kw_only=True):
    """Which events are wanted.

    Attributes:
        types: only of these types; empty means all but ``CHATTER``.
        stream: only of this stream, chatter included; empty means all.
    """

    types: frozenset[str] = frozenset()
    stream: str = ""

    def wants(self, record: Record) -> bool:
        """Whether the record is wanted."""
        meta = record.meta
        if self.stream and meta.stream != self.stream:
            return False
        if self.types:
            return meta.type in self.types
        return bool(self.stream) or meta.type not in CHATTER


class EventPage(msgspec.Struct, frozen=True, kw_only=True):
    """Some events, oldest first.

    Attributes:
        next: position of the last record that was looked at: ask for what comes after it.
        newest: position of the newest record of the journal.
    """

    boot: str
    next: int
    newest: int
    records: tuple[Record, ...]


class EventTail:
    """Pages of a live journal's current boot. Any thread may ask; reading may block on the disk."""

    def __init__(self, journal: Journal) -> None:
        self._journal = journal
        self._tail: deque[Record] = deque(maxlen=TAIL_RECORDS)
        self._is_following = False

    @property
    def newest(self) -> int:
        """Position of the newest record."""
        return self._journal.health.last_pos

    def page(self, query: EventQuery, *, after: int, limit: int) -> EventPage:
        """The wanted events after a position, at most ``limit``."""
        if not self._is_following:
            self._is_following = True
            self._journal.subscribe(self._tail.append)
        newest = self.newest
        found: list[Record] = []
        position = after
        for record in self._after(after):
            position = record.meta.pos
            if query.wants(record):
                found.append(record)
            if len(found) == limit or position - after >= SCAN_MAX:
                break
        return EventPage(boot=self._journal.boot, next=position, newest=max(newest, position), records=tuple(found))

    def _after(self, after: int) -> Iterator[Record]:
        kept = self._tail.copy()  # One call under the interpreter's lock: appends do not come between.
        if kept and kept[0].meta.pos <= after + 1:
            return (record for record in kept if record.meta.pos > after)
        return self._journal.read(boot=self._journal.boot, after=after)
