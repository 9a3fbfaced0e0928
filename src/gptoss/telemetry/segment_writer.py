"""Writing one family of segments: append, sync, rotate, forget the oldest.

Rules: one thread writes. A segment is sealed before the next begins. Nothing is retried: the first ``OSError`` goes up
and the caller stops for good, because after a failed fsync the kernel may have dropped the bytes.
"""

import hashlib
import os
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec

from gptoss.messages.envelope import Family
from gptoss.telemetry.segment_file import (
    BATCH_RECORDS_MAX,
    FORMAT_VERSION,
    Ending,
    Footer,
    Header,
    Segment,
    batch_bytes,
    footer_bytes,
    header_bytes,
    segment_name,
)

FRAME_BYTES_MAX = 4 * 2**20
"""A batch grows no further; a single larger record still gets a frame of its own."""


class SegmentWriter:
    """An open segment.

    Raises:
        OSError: the file exists already or cannot be written.
    """

    def __init__(self, folder: Path, header: Header) -> None:
        self.path = folder / segment_name(header.family, header.ordinal, header.number)
        self.header = header
        self.size = 0
        self.next_pos = header.first_pos
        self._sha256 = hashlib.sha256()
        self._fd = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o600)
        try:
            self._write(header_bytes(header))
            sync_folder(folder)
        except OSError:
            self.close()
            raise

    def write(self, records: Sequence[bytes]) -> None:
        """Add encoded records in as few frames as the limits allow; they are not safe before ``sync``."""
        self._write(b"".join(batch_bytes(batch) for batch in _batches(records)))
        self.next_pos += len(records)

    def sync(self) -> None:
        """Make everything written safe."""
        os.fdatasync(self._fd)

    def seal(self, ending: Ending) -> None:
        """Write the footer, sync, close."""
        records = self.next_pos - self.header.first_pos
        self._write(footer_bytes(Footer(ending, records, self.next_pos, self._sha256.digest())))
        self.sync()
        self.close()

    def close(self) -> None:
        """Let go of the file without sealing it; idempotent."""
        fd, self._fd = self._fd, -1
        if fd != -1:
            os.close(fd)

    def _write(self, data: bytes) -> None:
        self._sha256.update(data)
        left = memoryview(data)
        while left:
            left = left[os.write(self._fd, left) :]
        self.size += len(data)


class Place(msgspec.Struct, frozen=True, kw_only=True):
    """Which family of which boot is written where, and how much of it is kept."""

    folder: Path
    family: Family
    node: str
    boot: str
    ordinal: int
    segment_bytes: int
    retention_bytes: int


class FamilyLog:
    """All segments of one family; the newest is open.

    Args:
        kept: segments of earlier boots, oldest first; they count towards retention.
        on_sealed: told of every segment that is sealed while the log goes on; must not wait.
    """

    def __init__(self, place: Place, kept: Sequence[Segment], on_sealed: Callable[[], None] = lambda: None) -> None:
        self._place = place
        self._on_sealed = on_sealed
        self._older = deque((segment.path, segment.path.stat().st_size) for segment in kept)
        self._older_bytes = sum(size for _, size in self._older)
        self._open_requests: tuple[str, ...] = ()
        self._active = self._begin(number=1, first_pos=0)
        self._retain()

    @property
    def stored_bytes(self) -> int:
        """Bytes on disk."""
        return self._older_bytes + self._active.size

    def commit(self, records: Sequence[bytes], open_requests: tuple[str, ...]) -> None:
        """Make records safe.

        Args:
            records: encoded, in order.
            open_requests: requests still running after the last of these records.
        """
        if self._active.size >= self._place.segment_bytes:
            self._rotate()
        self._active.write(records)
        self._active.sync()
        self._open_requests = open_requests

    def seal(self) -> None:
        """End in order."""
        self._active.seal(Ending.CLOSED)

    def abandon(self) -> None:
        """Let go of the file as it is."""
        self._active.close()

    def _begin(self, *, number: int, first_pos: int) -> SegmentWriter:
        place = self._place
        header = Header(
            FORMAT_VERSION,
            place.node,
            place.boot,
            place.family,
            place.ordinal,
            number,
            first_pos,
            self._open_requests,
        )
        return SegmentWriter(place.folder, header)

    def _rotate(self) -> None:
        full = self._active
        full.seal(Ending.ROTATED)
        self._older.append((full.path, full.size))
        self._older_bytes += full.size
        self._active = self._begin(number=full.header.number + 1, first_pos=full.next_pos)
        self._retain()
        self._on_sealed()

    def _retain(self) -> None:
        while self._older and self.stored_bytes > self._place.retention_bytes:
            path, size = self._older.popleft()
            path.unlink(missing_ok=True)
            self._older_bytes -= size


def sync_folder(folder: Path) -> None:
    """Make the names of new files safe."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _batches(records: Sequence[bytes]) -> list[Sequence[bytes]]:
    if len(records) <= BATCH_RECORDS_MAX and sum(map(len, records)) <= FRAME_BYTES_MAX:
        return [records]
    batches: list[Sequence[bytes]] = []
    batch: list[bytes] = []
    size = 0
    for record in records:
        if batch and (size + len(record) > FRAME_BYTES_MAX or len(batch) == BATCH_RECORDS_MAX):
            batches.append(batch)
            batch, size = [], 0
        batch.append(record)
        size += len(record)
    return [*batches, batch]
