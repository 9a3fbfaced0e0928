"""Making a folder of segments whole again before a new boot writes to it.

Rules:
- A torn tail is cut only if nothing valid follows it. Anything else is corruption: the file is moved aside under its
  own name with ``.corrupt`` behind it, bytes untouched, and reported; readers raise when they come to it.
- Only segments without a seal are read through. Sealed ones are believed until they are read.
- A boot whose last control segment was not closed in order was aborted. It is reported at every start until a later
  boot has recorded ``RunsAborted`` for it, oldest boot first.
"""

import os
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import msgspec

from gptoss.errors import JournalCorrupt
from gptoss.messages.codec import decode_event
from gptoss.messages.envelope import Stored
from gptoss.messages.events import TERMINAL_EVENTS, RequestReceived, RunsAborted
from gptoss.telemetry.segment_file import (
    QUARANTINE_SUFFIX,
    Ending,
    Footer,
    Segment,
    SegmentScan,
    footer_bytes,
    has_frame,
    list_segments,
    walk,
)
from gptoss.telemetry.segment_writer import sync_folder

_TERMINAL = frozenset(event.__name__ for event in TERMINAL_EVENTS)


class TornTail(msgspec.Struct, frozen=True, kw_only=True):
    """Bytes at the end of a file that never became a whole frame, and were cut off."""

    path: Path
    offset: int
    num_bytes: int


class Quarantined(msgspec.Struct, frozen=True, kw_only=True):
    """A file that was moved aside to ``path`` because of what ``reason`` says."""

    path: Path
    reason: str


class AbortedBoot(msgspec.Struct, frozen=True, kw_only=True):
    """A boot that did not stop in order, and the requests of it that never ended."""

    boot: str
    request_ids: tuple[str, ...]


class Recovery(msgspec.Struct, frozen=True, kw_only=True):
    """What was found and done at start.

    Attributes:
        aborted: oldest first; record a ``RunsAborted`` for each in this order, those without requests included.
    """

    torn: tuple[TornTail, ...] = ()
    quarantined: tuple[Quarantined, ...] = ()
    aborted: tuple[AbortedBoot, ...] = ()


def recover(folder: Path) -> Recovery:
    """Repair what a crash left behind, and tell of it.

    Raises:
        OSError: the folder cannot be read or written.
    """
    torn: list[TornTail] = []
    quarantined: list[Quarantined] = []
    for segment in list_segments(folder):
        if not segment.quarantined:
            found = _repair(segment)
            if isinstance(found, TornTail):
                torn.append(found)
            elif found is not None:
                quarantined.append(found)
    if torn or quarantined:
        sync_folder(folder)
    return Recovery(torn=tuple(torn), quarantined=tuple(quarantined), aborted=_aborted_boots(list_segments(folder)))


def _repair(segment: Segment) -> TornTail | Quarantined | None:
    try:
        scan = SegmentScan(segment.path)
    except JournalCorrupt as error:
        if has_frame(segment.path) or not segment.is_last:
            return _quarantine(segment, str(error))
        # A crash while the segment was created: nothing was ever in it.
        size = segment.path.stat().st_size
        segment.path.unlink()
        return TornTail(path=segment.path, offset=0, num_bytes=size)
    with scan:
        if scan.read_footer() is not None:
            return None
        try:
            for _ in walk(segment, scan):
                pass
        except JournalCorrupt as error:
            return _quarantine(segment, str(error))
        _seal_recovered(scan)
        if scan.bad_at is None:
            return None
        return TornTail(path=segment.path, offset=scan.end, num_bytes=scan.size - scan.end)


def _quarantine(segment: Segment, reason: str) -> Quarantined:
    aside = segment.path.with_name(segment.path.name + QUARANTINE_SUFFIX)
    segment.path.rename(aside)
    return Quarantined(path=aside, reason=reason)


def _seal_recovered(scan: SegmentScan) -> None:
    records = scan.next_pos - scan.header.first_pos
    footer = footer_bytes(Footer(Ending.RECOVERED, records, scan.next_pos, scan.digest()))
    with scan.path.open("r+b") as file:
        file.truncate(scan.end)
        file.seek(scan.end)
        file.write(footer)
        file.flush()
        os.fsync(file.fileno())


def _aborted_boots(segments: Sequence[Segment]) -> tuple[AbortedBoot, ...]:
    by_boot: dict[int, list[Segment]] = defaultdict(list)
    for segment in segments:
        if segment.family == "control":
            by_boot[segment.ordinal].append(segment)
    aborted: list[AbortedBoot] = []
    settled: set[str] = set()
    for ordinal in sorted(by_boot, reverse=True):
        last = by_boot[ordinal][-1]
        try:
            with SegmentScan(last.path) as scan:
                boot, footer = scan.header.boot, scan.read_footer()
                if boot in settled or (footer is not None and footer.ending is Ending.CLOSED):
                    break
                aborted.append(AbortedBoot(boot=boot, request_ids=_unfinished(last, scan)))
            settled |= _settled_boots(by_boot[ordinal])
        except JournalCorrupt:
            continue  # Quarantined before its first frame: which requests ran in it is not known any more.
    return tuple(reversed(aborted))


def _unfinished(last: Segment, scan: SegmentScan) -> tuple[str, ...]:
    running = dict.fromkeys(scan.header.open_requests)
    for stored in _prefix(last, scan):
        meta = stored.meta
        if meta.type == RequestReceived.__name__:
            running[meta.correlation] = None
        elif meta.type in _TERMINAL:
            running.pop(meta.correlation, None)
    return tuple(running)


def _settled_boots(segments: Sequence[Segment]) -> set[str]:
    """Boots for which this boot recorded ``RunsAborted``; that happens at its start, in its first segment."""
    first = segments[0]
    settled: set[str] = set()
    with SegmentScan(first.path) as scan:
        for stored in _prefix(first, scan):
            if stored.meta.type == RunsAborted.__name__:
                event = decode_event(stored)
                if isinstance(event, RunsAborted):
                    settled.add(event.boot)
    return settled


def _prefix(segment: Segment, scan: SegmentScan) -> list[Stored]:
    """The records before the first bad bytes."""
    records: list[Stored] = []
    try:
        for frame in walk(segment, scan):
            records.extend(frame.stored())
    except JournalCorrupt:
        pass
    return records
