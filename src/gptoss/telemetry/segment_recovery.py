"""Making a folder of segments whole again before a new boot writes to it.

Rules:
- A torn tail is cut only if nothing valid follows it. Anything else is corruption: the file is moved aside under its
  own name with ``.corrupt`` behind it, bytes untouched, and reported; readers raise when they come to it.
- Only segments without a seal are read through. Sealed ones are believed until they are read.
- A boot whose last control segment was not closed in order was aborted. It is reported at every start, oldest boot
  first, until a later boot has recorded ``RunsAborted`` for it and, because of that, the end of each of its requests.
"""

import os
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

import msgspec

from gptoss.actors.directory import request_name
from gptoss.actors.journal import Journal
from gptoss.errors import AbortedByCrash, JournalCorrupt
from gptoss.messages import events as ev
from gptoss.messages.codec import decode_event
from gptoss.messages.envelope import Origin, Stored
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

CRASH_MESSAGE = "the server process ended before the request did"

_TERMINAL = frozenset(event.__name__ for event in ev.TERMINAL_EVENTS)


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
    """A boot that did not stop in order, and the requests of it whose end is not recorded yet."""

    boot: str
    request_ids: tuple[str, ...]


class Recovery(msgspec.Struct, frozen=True, kw_only=True):
    """What was found and done at start.

    Attributes:
        aborted: oldest first, those without requests included; see ``record_aborted``.
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
            return quarantine(segment, str(error))
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
            return quarantine(segment, str(error))
        _seal_recovered(scan)
        if scan.bad_at is None:
            return None
        return TornTail(path=segment.path, offset=scan.end, num_bytes=scan.size - scan.end)


def quarantine(segment: Segment, reason: str) -> Quarantined:
    """Move a file aside, its bytes untouched."""
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


def record_aborted(journal: Journal, aborted: Iterable[AbortedBoot]) -> None:
    """Give every request that a crash cut off its one terminal event, and tell of the boots that crashed.

    The order makes a crash in the middle of it harmless: what is not told yet is found again at the next start.

    Args:
        journal: of the new boot, before its first request.
        aborted: oldest first, as ``recover`` found them.
    """
    for boot in aborted:
        told = ev.RunsAborted(boot=boot.boot, request_ids=boot.request_ids)
        cause = journal.append(told, Origin(stream="system", actor="app")).meta.pos
        for request_id in boot.request_ids:
            origin = Origin(stream=request_name(request_id), cause=cause, correlation=request_id, actor="app")
            journal.append(ev.RequestFailed(code=AbortedByCrash.code, message=CRASH_MESSAGE), origin)


def _aborted_boots(segments: Sequence[Segment]) -> tuple[AbortedBoot, ...]:
    by_boot: dict[int, list[Segment]] = defaultdict(list)
    for segment in segments:
        if segment.family == "control":
            by_boot[segment.ordinal].append(segment)
    aborted: list[AbortedBoot] = []
    untold: dict[str, tuple[str, ...]] = {}
    for ordinal in sorted(by_boot, reverse=True):
        last = by_boot[ordinal][-1]
        try:
            with SegmentScan(last.path) as scan:
                boot, footer = scan.header.boot, scan.read_footer()
                if untold.get(boot) == () or (footer is not None and footer.ending is Ending.CLOSED):
                    break
                request_ids = untold.get(boot)
                aborted.append(AbortedBoot(boot=boot, request_ids=request_ids or _unfinished(last, scan)))
            untold = _untold_ends(by_boot[ordinal]) | untold  # What a newer boot says counts.
        except JournalCorrupt:
            continue  # Quarantined before its first frame: which requests ran in it is not known any more.
    return tuple(reversed(aborted))


def _unfinished(last: Segment, scan: SegmentScan) -> tuple[str, ...]:
    running = dict.fromkeys(scan.header.open_requests)
    for stored in _prefix(last, scan):
        meta = stored.meta
        if meta.type == ev.RequestReceived.__name__:
            running[meta.correlation] = None
        elif meta.type in _TERMINAL:
            running.pop(meta.correlation, None)
    return tuple(running)


def _untold_ends(segments: Sequence[Segment]) -> dict[str, tuple[str, ...]]:
    """For each boot that this boot recorded ``RunsAborted`` of: its requests whose end it did not come to record.

    That happens at its start, so the first segment is enough unless the telling went on in the next.
    """
    boots: dict[int, tuple[str, dict[str, None]]] = {}
    for segment in segments:
        with SegmentScan(segment.path) as scan:
            for stored in _prefix(segment, scan):
                meta = stored.meta
                if meta.type == ev.RunsAborted.__name__:
                    event = decode_event(stored)
                    assert isinstance(event, ev.RunsAborted)
                    boots[meta.pos] = (event.boot, dict.fromkeys(event.request_ids))
                elif meta.cause in boots and meta.type == ev.RequestFailed.__name__:
                    boots[meta.cause][1].pop(meta.correlation, None)
        if not any(untold for _, untold in boots.values()):
            break
    return {boot: tuple(untold) for boot, untold in boots.values()}


def _prefix(segment: Segment, scan: SegmentScan) -> list[Stored]:
    """The records before the first bad bytes."""
    records: list[Stored] = []
    try:
        for frame in walk(segment, scan):
            records.extend(frame.stored())
    except JournalCorrupt:
        pass
    return records
