"""What a bundle is cut by, noted of one segment: whose lives are in it, where replays may begin, where which stream stands.

Rules:
- A survey follows from its segment's records alone. Surveys of a boot's segments, one behind the other, come to what one
  of the whole boot would; so the survey of a sealed segment is made once and kept (``journal_index``).
- Events are decoded only where a note needs them: most records are known by their meta.
- Frames are noted in blocks of about ``BLOCK_RECORDS``, so that a survey stays small however often the server commits.
"""

from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple, TypeAlias

import msgspec

from gptoss.actors.directory import REQUEST_PREFIX
from gptoss.errors import JournalCorrupt
from gptoss.messages import events as ev
from gptoss.messages.codec import decode_event
from gptoss.messages.envelope import Meta, Record, Stored
from gptoss.telemetry.segment_file import Frame, Segment, SegmentScan, walk
from gptoss.telemetry.wall_clock import wall_offset_ns

SURVEY_VERSION = 1
"""Of what a kept survey holds; one of another version is made again."""
BLOCK_RECORDS = 1024
MARK_EVERY = 256
"""Wall times are known at every so many positions."""
CLIENT_REASONS = frozenset({"client", "disconnect"})
CLIENT_FAULTS_BELOW = 429
"""A refusal with a lower HTTP status is the client's own doing."""

AnyRecord: TypeAlias = Record | Stored
Pace: TypeAlias = Callable[[Iterator[Frame]], Iterator[Frame]]
_ID_AT = len(REQUEST_PREFIX)


class Lifespan(msgspec.Struct, array_like=True, gc=False):
    """First and last record about one request, with their monotonic times."""

    first_pos: int
    last_pos: int
    first_mono_ns: int
    last_mono_ns: int


class Block(NamedTuple):
    """Some frames in a row: the offset of the first, and the position of its first record."""

    offset: int
    first_pos: int


class Layout(msgspec.Struct, array_like=True):
    """Where a segment has what.

    Attributes:
        blocks: ascending. ``end`` is the offset behind the last, ``next_pos`` the position there.
        streams: numbers of the blocks with records of a stream; streams of single requests are left out.
    """

    blocks: list[Block] = []
    streams: dict[str, list[int]] = {}
    end: int = 0
    next_pos: int = 0


class SegmentSurvey(msgspec.Struct, array_like=True):
    """One segment, or any other row of records of one boot.

    Attributes:
        lifespans: by request id, in order of their first record.
        offsets: (position, wall time minus monotonic time from there on).
        snapshots, loads: stream -> positions of its ``SnapshotTaken`` or ``EngineLoaded``.
        anchors: positions of clock anchors.
        always: positions of what belongs into every bundle.
        aborted: (position, boot, request ids) of each ``RunsAborted``.
        accepted: (request id, executor's stream, position) of each acceptance.
        arrived, errors: requests that were received here, and that the server failed, refused or gave up here.
        marks: (position, monotonic time), one for each ``MARK_EVERY`` positions.
        last_pos, last_mono_ns: of the last record.
    """

    boot: str
    last_pos: int = -1
    last_mono_ns: int = 0
    lifespans: dict[str, Lifespan] = {}
    offsets: list[tuple[int, int]] = []
    snapshots: dict[str, list[int]] = {}
    loads: dict[str, list[int]] = {}
    anchors: list[int] = []
    always: list[int] = []
    aborted: list[tuple[int, str, tuple[str, ...]]] = []
    accepted: list[tuple[str, str, int]] = []
    arrived: list[str] = []
    errors: list[str] = []
    marks: list[tuple[int, int]] = []
    layout: Layout = msgspec.field(default_factory=Layout)


class Surveyed(NamedTuple):
    """A segment and its survey."""

    segment: Segment
    survey: SegmentSurvey


class Excerpt(msgspec.Struct, frozen=True):
    """Which records of a boot somebody wants to look at.

    Attributes:
        first, last: all from one position to the other.
        positions: also the records there.
        streams: also those of each stream from a position on, up to ``last``.
    """

    first: int
    last: int
    positions: frozenset[int] = frozenset()
    streams: dict[str, int] = {}


class Surveyor:
    """Folds records of one boot, in order, into ``survey``.

    Attributes:
        streams: of which there were records since this was last cleared, those of single requests left out.
    """

    def __init__(self, boot: str) -> None:
        self.survey = SegmentSurvey(boot)
        self.streams: set[str] = set()
        self._mark = -1

    def fold(self, records: Iterable[AnyRecord]) -> None:
        """Take records in."""
        survey = self.survey
        lifespans, streams = survey.lifespans, self.streams
        for record in records:
            meta = record.meta
            pos, stream, request_id, now_ns = meta.pos, meta.stream, meta.correlation, meta.mono_ns
            if pos // MARK_EVERY > self._mark:
                self._mark = pos // MARK_EVERY
                survey.marks.append((pos, now_ns))
            if stream.startswith(REQUEST_PREFIX):
                request_id = request_id or stream[_ID_AT:]
            else:
                streams.add(stream)
            if request_id:
                span = lifespans.get(request_id)
                if span is None:
                    lifespans[request_id] = Lifespan(pos, pos, now_ns, now_ns)
                else:
                    span.last_pos, span.last_mono_ns = pos, now_ns
            note = _NOTES.get(meta.type)
            if note is not None:
                note(survey, meta, record)
            survey.last_pos, survey.last_mono_ns = pos, now_ns


def event_of(record: AnyRecord) -> Any:
    """The event, decoded if it is not yet. Raises ``JournalError`` as ``decode_event`` does."""
    return record.event if isinstance(record, Record) else decode_event(record)


def survey_segment(segment: Segment, scan: SegmentScan, pace: Pace = iter) -> SegmentSurvey:
    """Look at a whole segment.

    Args:
        segment: which one.
        scan: it, opened.
        pace: its frames pass through this.

    Raises:
        JournalCorrupt: as ``walk`` does.
    """
    surveyor = Surveyor(scan.header.boot)
    layout = surveyor.survey.layout
    for frame in pace(walk(segment, scan)):
        if not layout.blocks or frame.first_pos - layout.blocks[-1].first_pos >= BLOCK_RECORDS:
            _note_streams(layout, surveyor.streams)
            layout.blocks.append(Block(frame.offset, frame.first_pos))
        surveyor.fold(frame.stored())
    _note_streams(layout, surveyor.streams)
    layout.end, layout.next_pos = scan.end, scan.next_pos
    return surveyor.survey


def _note_streams(layout: Layout, streams: set[str]) -> None:
    """What was seen belongs to the newest block."""
    for stream in streams:
        layout.streams.setdefault(stream, []).append(len(layout.blocks) - 1)
    streams.clear()


def read_excerpt(segment: Segment, layout: Layout, excerpt: Excerpt) -> Iterator[Stored]:
    """The records of the blocks that an excerpt needs, in order: all that it wants of this segment, and their neighbours.

    Raises:
        JournalCorrupt: what has to be read fails its checksum.
        FileNotFoundError: retention was quicker.
    """
    numbers = _needed(layout, excerpt)
    if not numbers:
        return
    with SegmentScan(segment.path) as scan:
        for number in numbers:
            end = layout.blocks[number + 1].offset if number + 1 < len(layout.blocks) else layout.end
            for frame in scan.frames(*layout.blocks[number]):
                yield from frame.stored()
                if scan.end >= end:
                    break
            if scan.end < end:
                raise JournalCorrupt(f"{segment.path}: the bytes at offset {scan.end} fail their checksum")


def _needed(layout: Layout, excerpt: Excerpt) -> list[int]:
    """Numbers of the blocks, ascending."""
    starts = [block.first_pos for block in layout.blocks]
    if not starts:
        return []
    needed = {bisect_right(starts, pos) - 1 for pos in excerpt.positions if starts[0] <= pos < layout.next_pos}
    for stream, begin in excerpt.streams.items():
        for number in layout.streams.get(stream, ()):
            following = starts[number + 1] if number + 1 < len(starts) else layout.next_pos
            if following > begin and starts[number] <= excerpt.last:
                needed.add(number)
    if excerpt.first < layout.next_pos and excerpt.last >= starts[0]:
        needed.update(range(max(0, bisect_right(starts, excerpt.first) - 1), bisect_right(starts, excerpt.last)))
    return sorted(needed)


# ---------------------------------------------------------------- notes on single events


def _note_started(survey: SegmentSurvey, meta: Meta, record: AnyRecord) -> None:
    survey.always.append(meta.pos)
    _note_offset(survey, meta, record)


def _note_anchored(survey: SegmentSurvey, meta: Meta, record: AnyRecord) -> None:
    survey.anchors.append(meta.pos)
    _note_offset(survey, meta, record)


def _note_offset(survey: SegmentSurvey, meta: Meta, record: AnyRecord) -> None:
    survey.offsets.append((meta.pos, wall_offset_ns(Record(meta, event_of(record)), 0)))


def _note_aborted(survey: SegmentSurvey, meta: Meta, record: AnyRecord) -> None:
    event: ev.RunsAborted = event_of(record)
    survey.always.append(meta.pos)
    survey.aborted.append((meta.pos, event.boot, event.request_ids))


def _note_snapshot(survey: SegmentSurvey, meta: Meta, _: AnyRecord) -> None:
    survey.snapshots.setdefault(meta.stream, []).append(meta.pos)


def _note_loaded(survey: SegmentSurvey, meta: Meta, _: AnyRecord) -> None:
    survey.loads.setdefault(meta.stream, []).append(meta.pos)


def _note_accepted(survey: SegmentSurvey, meta: Meta, record: AnyRecord) -> None:
    survey.accepted.append((event_of(record).request_id, meta.stream, meta.pos))


def _note_arrival(survey: SegmentSurvey, meta: Meta, _: AnyRecord) -> None:
    survey.arrived.append(meta.stream.removeprefix(REQUEST_PREFIX))


def _note_failed(survey: SegmentSurvey, meta: Meta, _: AnyRecord) -> None:
    survey.errors.append(meta.stream.removeprefix(REQUEST_PREFIX))


def _note_rejected(survey: SegmentSurvey, meta: Meta, record: AnyRecord) -> None:
    if event_of(record).status >= CLIENT_FAULTS_BELOW:
        _note_failed(survey, meta, record)


def _note_cancelled(survey: SegmentSurvey, meta: Meta, record: AnyRecord) -> None:
    if event_of(record).reason not in CLIENT_REASONS:
        _note_failed(survey, meta, record)


_NOTES: dict[str, Callable[[SegmentSurvey, Meta, AnyRecord], None]] = {
    "NodeStarted": _note_started,
    "ClockAnchored": _note_anchored,
    "RunsAborted": _note_aborted,
    "SnapshotTaken": _note_snapshot,
    "EngineLoaded": _note_loaded,
    "ExecutorAccepted": _note_accepted,
    "RequestReceived": _note_arrival,
    "RequestFailed": _note_failed,
    "RequestRejected": _note_rejected,
    "RequestCancelled": _note_cancelled,
}
