"""Reading a folder of segments: by the live journal, and by tools that look at a dead or a living one.

Rules:
- A reader needs no lock and changes no segment; a live segment is read up to its last whole frame.
- Without a filter, or by boot alone, segments are read in order and corruption raises where it stands. By stream or
  request the index finds the frames; then everything found is given first, and corruption raises at the end if what
  is wanted may have stood there: in a boot where some of it was found, or when none was found at all.
- Segments that retention unlinks under a reader count as forgotten.
"""

from collections.abc import Iterator
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from gptoss.errors import JournalCorrupt, JournalError
from gptoss.messages.codec import decode_event
from gptoss.messages.envelope import Family, Record, Stored
from gptoss.telemetry.journal_base import Query
from gptoss.telemetry.journal_index import JournalIndex
from gptoss.telemetry.segment_file import Frame, Header, Segment, SegmentScan, list_segments, walk
from gptoss.telemetry.segment_survey import Surveyed

NAMES_TO_LOOK_FOR = 8


class Horizon(NamedTuple):
    """Where the disk ends for a live journal: its memory has the positions from ``pos`` on of this boot."""

    boot: str
    pos: int


class SegmentReader:
    """Read-only access to a journal's folder; the folder may be of a dead server or of one that is running.

    Raises:
        JournalError: there is no such folder.
    """

    def __init__(self, folder: Path) -> None:
        if not folder.is_dir():
            raise JournalError(f"there is no journal in {folder}: no such folder")
        self._folder = folder
        self._index = JournalIndex(folder)

    def boots(self) -> list[str]:
        """Names of the boots that are still kept, oldest first."""
        scope = sorted(self._in_scope(Query()), key=lambda entry: entry[0].ordinal)
        return list(dict.fromkeys(header.boot for _, header in scope if header is not None))

    def read(
        self,
        *,
        family: Family = "control",
        boot: str | None = None,
        stream: str | None = None,
        correlation: str | None = None,
        after: int = -1,
        limit: int | None = None,
    ) -> Iterator[Record]:
        """See ``gptoss.actors.journal.Journal.read``; what a live server has not written yet is not there."""
        query = Query(family=family, boot=boot, stream=stream, correlation=correlation, after=after)
        return islice(self.records(query), limit)

    def records(self, query: Query, horizon: Horizon | None = None) -> Iterator[Record]:
        """The records on disk that a query wants, up to a live journal's horizon.

        Raises:
            JournalCorrupt: bytes inside the log fail their checksum.
        """
        scope = self._in_scope(query)
        if query.stream is None and query.correlation is None:
            frames = _scanned_frames(scope, query)
        else:
            frames = self._indexed_frames(scope, query)
        return _records_of(frames, query, horizon)

    def first_positions(self, boot: str) -> list[int]:
        """Where the control segments of a boot begin, ascending; a read that begins at one skips those before it."""
        return [header.first_pos for _, header in self._in_scope(Query(boot=boot)) if header is not None]

    def surveys(self) -> Iterator[Surveyed]:
        """Every control segment with its survey, in order; sealed ones that were looked at before are not read again.

        Raises:
            JournalCorrupt: bytes inside a segment that had to be read fail their checksum, or positions are missing.
        """
        index = JournalIndex(self._folder)
        expected: tuple[int, int] | None = None
        for segment, _ in self._in_scope(Query()):
            try:
                with SegmentScan(segment.path) as scan:
                    _refuse_gap(segment, scan, expected)
                    survey = index.survey(segment, scan)
            except FileNotFoundError:
                expected = None
                continue
            expected = (segment.ordinal, survey.layout.next_pos)
            yield Surveyed(segment, survey)

    def content_since(self, boot: str, mono_ns: int, request_ids: frozenset[str]) -> Iterator[Record]:
        """Content records of a boot that may be about these requests, from about a monotonic time on.

        Raises:
            JournalCorrupt: bytes inside a segment that had to be read fail their checksum.
        """
        query = Query(family="content", boot=boot)
        scope = self._in_scope(query)
        begin = next((at for at in range(len(scope) - 1, 0, -1) if _begins_before(scope[at][0], mono_ns)), 0)
        # An id stands in a record as its own bytes. With many of them decoding is quicker than looking for each.
        names = [name.encode() for name in request_ids]
        looks = len(names) <= NAMES_TO_LOOK_FOR
        for frame in _scanned_frames(scope[begin:], query):
            if looks and not any(name in frame.body for name in names):
                continue
            for stored in frame.stored():
                if not looks or any(name in bytes(stored.payload) for name in names):
                    yield Record(stored.meta, decode_event(stored))

    def newest(self, boot: str, types: frozenset[str]) -> Record | None:
        """The last control record of one of these types; frames that cannot hold one are not decoded.

        Raises:
            JournalCorrupt: bytes inside a segment that had to be read fail their checksum.
        """
        wanted = [name.encode() for name in types]
        for segment, _ in reversed(self._in_scope(Query(boot=boot))):
            found: Stored | None = None
            with suppress(FileNotFoundError), SegmentScan(segment.path) as scan:
                for frame in walk(segment, scan):
                    if any(name in frame.body for name in wanted):
                        found = next((one for one in reversed(frame.stored()) if one.meta.type in types), found)
            if found is not None:
                return Record(found.meta, decode_event(found))
        return None

    def verify(self) -> list[str]:
        """What is wrong with the segments, one line each: checksums, seals and sha256 are all checked."""
        problems: list[str] = []
        for segment in list_segments(self._folder):
            try:
                with SegmentScan(segment.path) as scan:
                    for frame in walk(segment, scan):
                        frame.stored()
                    if scan.footer is not None and scan.footer.sha256 != scan.digest():
                        problems.append(f"{segment.path}: the sha256 of its seal does not fit")
            except JournalCorrupt as error:
                problems.append(error.message)
            except FileNotFoundError:
                continue
        return problems

    def _in_scope(self, query: Query) -> list[tuple[Segment, Header | None]]:
        scope: list[tuple[Segment, Header | None]] = []
        for segment in list_segments(self._folder):
            if segment.family != query.family:
                continue
            try:
                with SegmentScan(segment.path) as scan:
                    header = scan.header
            except FileNotFoundError:
                continue
            except JournalCorrupt:
                header = None
                if segment.is_last and not segment.quarantined:
                    continue  # Being created at this moment, or torn at that; recovery tells which.
            if query.boot is None or header is None or header.boot == query.boot:
                scope.append((segment, header))
        if query.boot is not None:
            boots = {segment.ordinal for segment, header in scope if header is not None}
            scope = [entry for entry in scope if entry[0].ordinal in boots]
        return scope

    def _indexed_frames(self, scope: list[tuple[Segment, Header | None]], query: Query) -> Iterator[Frame]:
        located = self._index.locate(scope, query)
        found: set[int] = set()
        for segment, _ in scope:
            offsets = located.offsets.get(segment.path.name)
            if not offsets:
                continue
            found.add(segment.ordinal)
            try:
                with SegmentScan(segment.path) as scan:
                    for offset in offsets:
                        yield scan.frame_at(offset)
            except FileNotFoundError:
                continue
        for ordinal, problem in located.problems:
            if not found or ordinal in found:
                raise problem


def _scanned_frames(scope: list[tuple[Segment, Header | None]], query: Query) -> Iterator[Frame]:
    expected: tuple[int, int] | None = None
    for at, (segment, _) in enumerate(scope):
        following = scope[at + 1] if at + 1 < len(scope) else None
        if _is_before(segment, following, query.after):
            expected = None
            continue
        try:
            with SegmentScan(segment.path) as scan:
                _refuse_gap(segment, scan, expected)
                yield from walk(segment, scan)
                expected = (segment.ordinal, scan.next_pos)
        except FileNotFoundError:
            expected = None


def _refuse_gap(segment: Segment, scan: SegmentScan, expected: tuple[int, int] | None) -> None:
    """Raise unless a segment begins where the one before it ended: at this position, if it is of this boot."""
    if expected is not None and expected[0] == segment.ordinal and expected[1] != scan.header.first_pos:
        raise JournalCorrupt(
            f"{segment.path}: begins at position {scan.header.first_pos}; positions from {expected[1]} on are missing"
        )


def _begins_before(segment: Segment, mono_ns: int) -> bool:
    """Whether the first record of a segment is older than a monotonic time of its boot."""
    with suppress(FileNotFoundError), SegmentScan(segment.path) as scan:
        frame = next(scan.frames(), None)
        return frame is not None and frame.stored()[0].meta.mono_ns < mono_ns
    return False


def _is_before(segment: Segment, following: tuple[Segment, Header | None] | None, after: int) -> bool:
    """Whether all positions of a segment are at most ``after``, as the segment behind it tells."""
    if following is None or following[1] is None or following[0].ordinal != segment.ordinal:
        return False
    return following[1].first_pos <= after + 1


def _records_of(frames: Iterator[Frame], query: Query, horizon: Horizon | None) -> Iterator[Record]:
    for frame in frames:
        if frame.first_pos >= 0 and frame.first_pos + frame.num_records <= query.after + 1:
            continue
        for stored in frame.stored():
            meta = stored.meta
            beyond = horizon is not None and meta.boot == horizon.boot and meta.pos >= horizon.pos
            if not beyond and query.matches(meta):
                yield Record(meta, decode_event(stored))
