"""The newest requests and events of a recording, and which of them somebody wants to see.

Rules:
- Requests come newest arrival first, events oldest first. A journal is read from its end, in pieces that double until enough is found: the newest
  requests of a large one cost no more than its last segments.
- What an older boot left open ended with that boot: the next start says so, and so does the list.
"""

from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import suppress
from typing import NamedTuple, Self

import msgspec

from gptoss.clock import NS_PER_S
from gptoss.errors import AbortedByCrash, JournalCorrupt
from gptoss.messages.envelope import Record
from gptoss.telemetry.event_tail import EventQuery
from gptoss.telemetry.recording import Recording
from gptoss.telemetry.request_view import TERMINAL_STATES, RequestBook, RequestRow, request_row
from gptoss.telemetry.segment_reader import SegmentReader
from gptoss.telemetry.wall_clock import wall_offset_ns

KEPT_MAX = 100_000
"""Requests of one piece; of a longer one the first to end are left out."""
ANCHOR_WITHIN = 100
"""A boot's first clock anchor stands within its first so many records."""


class RequestFilter(msgspec.Struct, frozen=True, kw_only=True):
    """Which requests are wanted; the default is all.

    Attributes:
        errors: only those that failed or were refused.
        slow_s: only those that took this long, in seconds; open ones have not ended and do not count.
        outcome: only this state, finish reason, error code or cancel reason.
        since_unix_s: only those received since.
    """

    errors: bool = False
    slow_s: float | None = None
    outcome: str = ""
    since_unix_s: float | None = None

    def wants(self, row: RequestRow) -> bool:
        """Whether the request is wanted."""
        return (
            (not self.errors or row.state in {"failed", "rejected"})
            and (self.slow_s is None or (row.e2e_ms or 0.0) >= self.slow_s * 1000)
            and (not self.outcome or self.outcome in {row.state, row.outcome})
            and not self.is_before(row)
        )

    def is_before(self, row: RequestRow) -> bool:
        """Whether it came too early, and with it all that came before it."""
        if self.since_unix_s is None or row.received_unix_s is None:
            return False
        return row.received_unix_s < self.since_unix_s


class _Boot(msgspec.Struct, frozen=True):
    """Ways to read one boot: pieces of its end, ever longer, the last of them the whole; and its beginning."""

    name: str
    pieces: Iterator[Iterable[Record]]
    beginning: Iterable[Record]


class Dated(NamedTuple):
    """A record and its wall time, None without a clock anchor."""

    record: Record
    unix_s: float | None


class Newest:
    """Looks through a recording from its end.

    Args:
        boots: oldest first.
    """

    def __init__(self, boots: list[_Boot]) -> None:
        self._boots = boots

    @classmethod
    def in_journal(cls, reader: SegmentReader) -> Self:
        """Of a journal's folder. What is read raises ``JournalCorrupt`` where it is damaged."""

        def pieces(boot: str) -> Iterator[Iterable[Record]]:
            starts = reader.first_positions(boot)
            segments = 1
            while segments < len(starts):
                yield reader.read(boot=boot, after=starts[-segments] - 1)
                segments *= 2
            yield reader.read(boot=boot)

        return cls([_Boot(name, pieces(name), reader.read(boot=name, limit=ANCHOR_WITHIN)) for name in reader.boots()])

    @classmethod
    def in_recording(cls, recording: Recording) -> Self:
        """Of any recording. What is read raises as the recording does."""
        return cls([_Boot(name, iter([recording.records(boot=name)]), ()) for name in recording.boots()])

    def requests(self, wanted: RequestFilter, limit: int) -> list[RequestRow]:
        """The newest wanted requests, at most ``limit``, newest first."""
        found: list[RequestRow] = []
        for boot in reversed(self._boots):
            rows = _rows_of(boot, wanted, limit - len(found), is_over=boot is not self._boots[-1])
            found += [row for row in rows if wanted.wants(row)]
            if len(found) >= limit or (rows and wanted.is_before(rows[-1])):
                break
        return found[:limit]

    def events(self, query: EventQuery, limit: int) -> list[Dated]:
        """The newest wanted events, at most ``limit``, oldest first."""
        found: list[Dated] = []
        for boot in reversed(self._boots):
            offset_ns = first_offset_ns(boot.beginning)
            newest: deque[Dated] = deque()
            for records in boot.pieces:
                newest = deque(_dated(records, query, offset_ns), maxlen=limit - len(found))
                if len(newest) == newest.maxlen:
                    break
            found = [*newest, *found]
            if len(found) >= limit:
                break
        return found


def first_offset_ns(records: Iterable[Record]) -> int | None:
    """Wall time minus monotonic time, as the first anchor among these records of one boot says; None without one."""
    with suppress(JournalCorrupt):  # Not to know the time of day is no reason to show nothing.
        for record in records:
            if (offset_ns := wall_offset_ns(record, None)) is not None:
                return offset_ns
    return None


def _dated(records: Iterable[Record], query: EventQuery, offset_ns: int | None) -> Iterator[Dated]:
    for record in records:
        offset_ns = wall_offset_ns(record, offset_ns)
        if query.wants(record):
            yield Dated(record, unix_s(record, offset_ns))


def unix_s(record: Record, offset_ns: int | None) -> float | None:
    """When a record was made, in seconds since the Unix epoch."""
    return None if offset_ns is None else (record.meta.mono_ns + offset_ns) / NS_PER_S


def _rows_of(boot: _Boot, wanted: RequestFilter, limit: int, *, is_over: bool) -> list[RequestRow]:
    """The requests of a boot, newest first, as far back as it takes."""
    rows: list[RequestRow] = []
    beginning = first_offset_ns(boot.beginning)
    for records in boot.pieces:
        rows = _rows(records, boot.name, beginning, is_over=is_over)
        if sum(map(wanted.wants, rows)) >= limit or (rows and wanted.is_before(rows[-1])):
            break
    return rows


def _rows(records: Iterable[Record], boot: str, offset_ns: int | None, *, is_over: bool) -> list[RequestRow]:
    """The requests that these records receive, newest first."""
    book = RequestBook(finished_max=KEPT_MAX)
    for record in records:
        offset_ns = wall_offset_ns(record, offset_ns)
        book.fold(record)
    views = sorted([*book.finished.values(), *book.open.values()], key=lambda view: -view.received_ns)
    rows = [request_row(view, boot=boot, wall_offset_ns=offset_ns) for view in views]
    return [_aborted(row) if is_over and not _has_ended(row) else row for row in rows]


def _has_ended(row: RequestRow) -> bool:
    return row.state in TERMINAL_STATES


def _aborted(row: RequestRow) -> RequestRow:
    return msgspec.structs.replace(row, state="failed", outcome=AbortedByCrash.code)
