"""Following a journal's folder from outside: what its control segments have gained since the last look.

No lock and no index: a look reads on where the last one ended, in the segment being written and those after it.
"""

from pathlib import Path

from gptoss.errors import JournalCorrupt
from gptoss.messages.codec import decode_event
from gptoss.messages.envelope import Record
from gptoss.telemetry.segment_file import Segment, SegmentScan, list_segments, walk


class SegmentTail:
    """See the module's text. It begins at the end of what is there.

    Raises:
        JournalCorrupt: what is there is damaged.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._at = (0, 0)
        self._offset: int | None = None
        self._pos: int | None = None
        for segment in self._segments()[-1:]:
            self._read(segment, decode=False)

    def look(self) -> list[Record]:
        """The records that have come since the last look, in order."""
        return [record for segment in self._segments() for record in self._read(segment)]

    def _segments(self) -> list[Segment]:
        """The control segments that may have gained something."""
        return [
            segment
            for segment in list_segments(self._folder)
            if segment.family == "control" and (segment.ordinal, segment.number) >= self._at
        ]

    def _read(self, segment: Segment, *, decode: bool = True) -> list[Record]:
        key = (segment.ordinal, segment.number)
        offset, pos = (self._offset, self._pos) if key == self._at else (None, None)
        records: list[Record] = []
        try:
            scan = SegmentScan(segment.path)
        except FileNotFoundError:
            return []
        except JournalCorrupt:
            if segment.is_last and not segment.quarantined:
                return []  # It is being created at this moment.
            raise
        with scan:
            for frame in walk(segment, scan, offset, pos):
                if decode:
                    records += [Record(stored.meta, decode_event(stored)) for stored in frame.stored()]
            self._at, self._offset, self._pos = key, scan.end, scan.next_pos
        return records
