"""The format of a segment file: records of one family and boot, framed, checksummed, sealed at the end.

    segment = MAGIC | frame(header) | frame(batch) ... | footer
    frame   = length u32 | crc32 u32 | body
    header  = msgpack of ``Header``
    batch   = msgpack array32 of records as ``codec.encode_record`` makes them
    footer  = FOOTER_MAGIC | ending u8 | records u64 | next_pos u64 | sha256 of all before it | crc32 u32

Rules:
- Numbers are big-endian. Bytes once written never change; the only repair is to cut a torn tail.
- Positions run without gaps, so a frame's position follows from the frames before it.
- A file is named ``<family>-<boot ordinal>-<number>.seg``; a quarantined one has ``.corrupt`` behind that.
- Reading goes up to the size that the file has when it is opened, so a live segment can be read.
"""

import enum
import hashlib
import os
import re
import struct
import zlib
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self, cast

import msgspec

from gptoss.errors import JournalCorrupt, JournalError
from gptoss.messages.codec import UNREADABLE
from gptoss.messages.envelope import Family, Stored

MAGIC = b"GPTOSSJ1"
FOOTER_MAGIC = b"GPTOSSJF"
FORMAT_VERSION = 1
QUARANTINE_SUFFIX = ".corrupt"

FRAME = struct.Struct(">II")
_FOOTER_BODY = struct.Struct(">8sBQQ32s")
_CRC = struct.Struct(">I")
FOOTER_BYTES = _FOOTER_BODY.size + _CRC.size

_BATCH_HEAD = struct.Struct(">BI")
_ARRAY32 = 0xDD
BATCH_RECORDS_MAX = 0xFFFF
_BATCH_MARK = bytes((_ARRAY32, 0, 0))
"""How the body of every batch begins, because none has more than ``BATCH_RECORDS_MAX`` records."""

_NAME = re.compile(r"(control|content)-(\d{6,})-(\d{6,})\.seg(\.corrupt)?")
_READ_BUFFER_BYTES = 1 << 18
_HASH_CHUNK_BYTES = 1 << 20

_encoder = msgspec.msgpack.Encoder()
_batch_decoder = msgspec.msgpack.Decoder(list[Stored])


class Header(msgspec.Struct, frozen=True, array_like=True):
    """What a segment holds.

    Attributes:
        ordinal: counts the boots of this folder; ``number`` counts the segments of one family and boot.
        open_requests: requests that were running when the segment began, so that after a crash the unfinished ones
            follow from the last control segment alone.
    """

    version: int
    node: str
    boot: str
    family: Family
    ordinal: int
    number: int
    first_pos: int
    open_requests: tuple[str, ...] = ()


_header_decoder = msgspec.msgpack.Decoder(Header)


class Ending(enum.IntEnum):
    """Why a segment was sealed."""

    ROTATED = 0
    CLOSED = 1
    RECOVERED = 2


class Footer(NamedTuple):
    """The end of a sealed segment."""

    ending: Ending
    records: int
    next_pos: int
    sha256: bytes


class Segment(NamedTuple):
    """A segment file by its name. ``is_last``: no later segment of its family and boot exists."""

    path: Path
    family: Family
    ordinal: int
    number: int
    quarantined: bool
    is_last: bool


class Frame(NamedTuple):
    """One batch of a segment; its first record has position ``first_pos``."""

    path: Path
    offset: int
    first_pos: int
    num_records: int
    body: bytes

    def stored(self) -> list[Stored]:
        """Its records, events still encoded.

        Raises:
            JournalCorrupt: the checksum holds, yet the bytes are not records.
        """
        try:
            return _batch_decoder.decode(self.body)
        except UNREADABLE as error:
            raise JournalCorrupt(f"{self.path}: the frame at offset {self.offset} holds no records: {error}") from None


def segment_name(family: Family, ordinal: int, number: int) -> str:
    """File name of a segment."""
    return f"{family}-{ordinal:06}-{number:06}.seg"


def list_segments(folder: Path) -> list[Segment]:
    """The segments of a folder by family, boot and number. Raises ``OSError`` if the folder cannot be listed."""
    found: dict[tuple[str, int, int], tuple[Path, bool]] = {}
    for path in folder.iterdir():
        match = _NAME.fullmatch(path.name)
        if match:
            family, ordinal, number, corrupt = match.groups()
            found[family, int(ordinal), int(number)] = (path, corrupt is not None)
    keys = sorted(found)
    followed = {before for before, after in pairwise(keys) if before[:2] == after[:2]}
    return [
        Segment(found[key][0], cast("Family", key[0]), key[1], key[2], found[key][1], key not in followed)
        for key in keys
    ]


def frame_bytes(body: bytes) -> bytes:
    """A body with its length and checksum in front."""
    return FRAME.pack(len(body), zlib.crc32(body)) + body


def header_bytes(header: Header) -> bytes:
    """How a segment begins."""
    return MAGIC + frame_bytes(_encoder.encode(header))


def batch_bytes(records: Sequence[bytes]) -> bytes:
    """The frame of a batch of encoded records, 1 to ``BATCH_RECORDS_MAX`` of them."""
    return frame_bytes(_BATCH_HEAD.pack(_ARRAY32, len(records)) + b"".join(records))


def footer_bytes(footer: Footer) -> bytes:
    """How a sealed segment ends."""
    body = _FOOTER_BODY.pack(FOOTER_MAGIC, footer.ending, footer.records, footer.next_pos, footer.sha256)
    return body + _CRC.pack(zlib.crc32(body))


class SegmentScan:
    """A segment file opened for reading; a context manager.

    Attributes:
        header: what the file says it holds.
        end: offset behind the last good frame; meaningful once ``frames`` is exhausted, as are the next three.
        next_pos: position behind the last good frame.
        footer: the seal, None when there is none.
        bad_at: offset of the first bytes that are neither a frame nor a footer, None when all are good.

    Raises:
        JournalCorrupt: the header is not readable.
        JournalError: a newer program wrote it.
        OSError: the file is not.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = path.open("rb", buffering=_READ_BUFFER_BYTES)
        try:
            self.size = os.fstat(self._file.fileno()).st_size
            self.header, self._first_frame = self._read_header()
        except BaseException:
            self._file.close()
            raise
        self.end = self._first_frame
        self.next_pos = self.header.first_pos
        self.footer: Footer | None = None
        self.bad_at: int | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def frames(self, offset: int | None = None, pos: int | None = None) -> Iterator[Frame]:
        """Good frames in order, until the seal, the end, or the first bad bytes.

        Args:
            offset: where to begin, ``end`` of an earlier scan; None is the first frame.
            pos: position there, ``next_pos`` of that scan.
        """
        self.end = self._first_frame if offset is None else offset
        self.next_pos = self.header.first_pos if pos is None else pos
        while self.end < self.size:
            if self.size - self.end == FOOTER_BYTES and (footer := self.read_footer()) is not None:
                if footer.next_pos == self.next_pos:
                    self.footer = footer
                else:
                    self.bad_at = self.end
                return
            frame = self._batch_at(self.end, self.next_pos)
            if frame is None:
                self.bad_at = self.end
                return
            self.end += FRAME.size + len(frame.body)
            self.next_pos += frame.num_records
            yield frame

    def frame_at(self, offset: int) -> Frame:
        """The frame at a known offset; its ``first_pos`` is not known.

        Raises:
            JournalCorrupt: there is no good frame.
        """
        frame = self._batch_at(offset, -1)
        if frame is None:
            raise JournalCorrupt(f"{self.path}: the frame at offset {offset} fails its checksum")
        return frame

    def read_footer(self) -> Footer | None:
        """The seal at the end of the file, None when there is none."""
        if self.size < self._first_frame + FOOTER_BYTES:
            return None
        self._file.seek(self.size - FOOTER_BYTES)
        data = self._file.read(FOOTER_BYTES)
        if len(data) < FOOTER_BYTES or _CRC.unpack_from(data, _FOOTER_BODY.size)[0] != zlib.crc32(data[: -_CRC.size]):
            return None
        magic, ending, records, next_pos, sha256 = _FOOTER_BODY.unpack_from(data)
        if magic != FOOTER_MAGIC or ending not in Ending.__members__.values():
            return None
        return Footer(Ending(ending), records, next_pos, sha256)

    def has_valid_after(self, offset: int) -> bool:
        """Whether a good frame or a seal stands anywhere behind bad bytes: then they are no torn tail."""
        if offset < self.size - FOOTER_BYTES and self.read_footer() is not None:
            return True
        return _has_frame(self._read_from(offset + 1))

    def records_after(self, offset: int) -> int:
        """How many records stand in good frames behind bad bytes."""
        return sum(_BATCH_HEAD.unpack_from(body)[1] for body in _frames(self._read_from(offset + 1)))

    def digest(self) -> bytes:
        """Sha256 of the bytes before ``end``."""
        sha256 = hashlib.sha256()
        self._file.seek(0)
        left = self.end
        while left > 0 and (chunk := self._file.read(min(left, _HASH_CHUNK_BYTES))):
            sha256.update(chunk)
            left -= len(chunk)
        return sha256.digest()

    def _read_from(self, offset: int) -> bytes:
        self._file.seek(offset)
        return self._file.read(max(self.size - offset, 0))

    def _read_header(self) -> tuple[Header, int]:
        if self._file.read(len(MAGIC)) != MAGIC:
            raise JournalCorrupt(f"{self.path}: offset 0 is not the start of a segment")
        body = self._body_at(len(MAGIC))
        if body is None:
            raise JournalCorrupt(f"{self.path}: the header at offset {len(MAGIC)} fails its checksum")
        try:
            header = _header_decoder.decode(body)
        except UNREADABLE as error:
            raise JournalCorrupt(f"{self.path}: the header at offset {len(MAGIC)} is unreadable: {error}") from None
        if header.version != FORMAT_VERSION:
            raise JournalError(
                f"{self.path}: format version {header.version}; this program knows version {FORMAT_VERSION}"
            )
        return header, len(MAGIC) + FRAME.size + len(body)

    def _body_at(self, offset: int) -> bytes | None:
        self._file.seek(offset)
        head = self._file.read(FRAME.size)
        if len(head) < FRAME.size:
            return None
        length, crc = FRAME.unpack(head)
        if length > self.size - offset - FRAME.size:
            return None
        body = self._file.read(length)
        return body if len(body) == length and zlib.crc32(body) == crc else None

    def _batch_at(self, offset: int, pos: int) -> Frame | None:
        body = self._body_at(offset)
        # A run of zeros is a checksummed empty body: only what begins as a batch counts.
        if body is None or len(body) < _BATCH_HEAD.size or not body.startswith(_BATCH_MARK):
            return None
        num_records = _BATCH_HEAD.unpack_from(body)[1]
        return Frame(self.path, offset, pos, num_records, body) if num_records else None


def has_frame(path: Path) -> bool:
    """Whether a good frame stands anywhere in a file, whatever its header."""
    return _has_frame(path.read_bytes())


def _has_frame(data: bytes) -> bool:
    return next(_frames(data), None) is not None


def _frames(data: bytes) -> Iterator[memoryview]:
    """Bodies of good frames anywhere in some bytes, none inside another."""
    view = memoryview(data)
    body_at = data.find(_BATCH_MARK, FRAME.size)
    while body_at != -1:
        length, crc = FRAME.unpack_from(data, body_at - FRAME.size)
        if _BATCH_HEAD.size <= length <= len(data) - body_at and zlib.crc32(view[body_at : body_at + length]) == crc:
            yield view[body_at : body_at + length]
            body_at += length - 1
        body_at = data.find(_BATCH_MARK, body_at + 1)


def walk(segment: Segment, scan: SegmentScan, offset: int | None = None, pos: int | None = None) -> Iterator[Frame]:
    """The frames of a segment; a torn tail of its boot's last segment ends it quietly, other bad bytes do not.

    Raises:
        JournalCorrupt: bad bytes inside the log, or a segment that is not sealed although another follows.
    """
    yield from scan.frames(offset, pos)
    inner = segment.quarantined or not segment.is_last
    if scan.bad_at is not None and (inner or scan.has_valid_after(scan.bad_at)):
        raise JournalCorrupt(f"{segment.path}: the bytes at offset {scan.bad_at} fail their checksum")
    if scan.bad_at is None and scan.footer is None and inner:
        raise JournalCorrupt(f"{segment.path}: ends at offset {scan.end} without a seal, although the log goes on")
