"""Reads bundles. A bundle may come from anyone, so nothing in it is believed.

Rules:
- Nothing is ever unpacked to disk, and nothing is unpickled: entries are read into memory, one part at a time.
- Opening reads the directory and the manifest, whose sizes are bounded before they are read. Every name must be one that
  a bundle has, and every entry must be in the manifest: that leaves no room for paths, links or duplicates.
- A part is unpacked to the size that its manifest states and not a byte further, then its sha256 is compared, and only
  then its records are decoded.
- Whatever is wrong becomes a ``BundleError``, or ``UnsupportedSchema`` where a newer program wrote it; nothing else is
  raised, however odd the bytes are.
"""

import hashlib
import stat
import struct
import zipfile
import zlib
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import NoReturn, Self

import msgspec

from gptoss.errors import BundleError, JournalError, UnsupportedSchema
from gptoss.messages.codec import EVENT_TYPES, decode_event
from gptoss.messages.envelope import Event, Family, Meta, Record, Stored
from gptoss.telemetry.bundle_format import (
    BUNDLE_BYTES_MAX,
    FOLDERS,
    FORMAT_VERSION,
    MANIFEST_BYTES_MAX,
    MANIFEST_NAME,
    PART_NAME,
    PARTS_MAX,
    Manifest,
    Part,
    decode_manifest,
    decode_version,
)
from gptoss.telemetry.segment_file import FRAME

_END_OF_DIRECTORY = struct.Struct("<4sHHHHIIH")
_DIRECTORY_BYTES_MAX = PARTS_MAX * 256
_ENCRYPTED = 0x1
_METHODS = {zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED}

_batch_decoder = msgspec.msgpack.Decoder(list[Stored])


class BundleReader:
    """A bundle opened for reading: a ``Recording`` and a context manager.

    Attributes:
        path: the file.
        manifest: checked for its form and against the ZIP's entries; not yet against the parts' bytes.

    Raises:
        BundleError: there is no such file, or it is not a bundle.
        UnsupportedSchema: a newer program wrote it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with self._translated():
            self._file = path.open("rb")
        try:
            with self._translated():
                self._check_directory()
                self._archive = zipfile.ZipFile(self._file)
                self.manifest = self._read_manifest()
                self._entries = self._check_entries()
                self._check_order()
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Release the file; idempotent."""
        self._archive.close()
        self._file.close()

    # ---- Recording

    def boots(self) -> list[str]:
        """See ``Recording``."""
        return list(dict.fromkeys(part.boot for part in self._parts("control")))

    def records(self, *, boot: str | None = None, stream: str | None = None) -> Iterator[Record]:
        """See ``Recording``. Raises ``BundleError`` or ``UnsupportedSchema`` where the bytes are bad."""
        return self._records("control", boot, stream)

    def content(self, *, boot: str | None = None) -> Iterator[Record]:
        """See ``Recording``. Raises as ``records`` does."""
        return self._records("content", boot, None)

    # ---- parts

    def part_bytes(self, part: Part) -> bytes:
        """A part of the manifest, unpacked; size and sha256 are as the manifest states.

        Raises:
            BundleError: they are not.
        """
        with self._translated():
            with self._archive.open(self._entries[part.name]) as source:
                data = source.read(part.size + 1)
            if len(data) != part.size:
                self._refuse(f"{part.name} has {len(data)} bytes or more; its manifest says {part.size}")
            if hashlib.sha256(data).hexdigest() != part.sha256:
                self._refuse(f"{part.name} fails its checksum: it was changed after it was written")
        return data

    def _parts(self, family: Family) -> list[Part]:
        return [part for part in self.manifest.parts if part.family == family]

    def _records(self, family: Family, boot: str | None, stream: str | None) -> Iterator[Record]:
        for part in self._parts(family):
            if boot is None or part.boot == boot:
                for stored in self._stored(part):
                    if stream is None or stored.meta.stream == stream:
                        yield Record(stored.meta, self._event(part, stored))

    def _event(self, part: Part, stored: Stored) -> Event:
        try:
            return decode_event(stored)
        except (JournalError, RecursionError, UnicodeDecodeError) as error:
            raise BundleError(f"{self.path}: {part.name}: {error}") from None

    def _stored(self, part: Part) -> Iterator[Stored]:
        """The records of a part, events still encoded; checked for order."""
        data = memoryview(self.part_bytes(part))
        at, count, before = 0, 0, -1
        while at < len(data):
            body = self._frame(part, data, at)
            at += FRAME.size + len(body)
            with self._translated():
                batch = _batch_decoder.decode(body)
            for stored in batch:
                self._check_meta(part, stored.meta, before)
                before = stored.meta.pos
                yield stored
            count += len(batch)
        if count != part.records:
            self._refuse(f"{part.name} holds {count} records; its manifest says {part.records}")

    def _frame(self, part: Part, data: memoryview, at: int) -> memoryview:
        if len(data) - at < FRAME.size:
            self._refuse(f"{part.name} ends inside a frame at offset {at}")
        length, crc = FRAME.unpack_from(data, at)
        body = data[at + FRAME.size : at + FRAME.size + length]
        if length == 0 or len(body) != length or zlib.crc32(body) != crc:
            self._refuse(f"{part.name}: the frame at offset {at} fails its checksum")
        return body

    def _check_meta(self, part: Part, meta: Meta, before: int) -> None:
        if meta.boot != part.boot or not max(before + 1, part.first_pos) <= meta.pos <= part.last_pos:
            self._refuse(f"{part.name}: record {meta.pos} is out of order or of another boot")
        known = EVENT_TYPES.get(meta.type)
        if known is None or meta.version > known.VERSION:
            raise UnsupportedSchema(
                f"{self.path}: {part.name} holds {meta.type[:64]} version {meta.version}, which this program does not know"
            )
        if part.family != known.FAMILY or meta.version < 1:
            self._refuse(f"{part.name}: {meta.type} version {meta.version} has no place there")

    # ---- opening

    def _check_directory(self) -> None:
        """Refuse what is no ZIP, and a directory that would not fit into memory, before anything reads it."""
        size = self._file.seek(0, 2)
        if size > BUNDLE_BYTES_MAX:
            self._refuse(f"it has {size} bytes; a bundle has at most {BUNDLE_BYTES_MAX}")
        if size < _END_OF_DIRECTORY.size:
            self._refuse("it is empty" if size == 0 else "it is not a ZIP file")
        self._file.seek(size - _END_OF_DIRECTORY.size)
        mark, disk, _, here, entries, directory_bytes, offset, comment = _END_OF_DIRECTORY.unpack(
            self._file.read(_END_OF_DIRECTORY.size)
        )
        if mark != b"PK\x05\x06" or comment:
            self._refuse("it is not a ZIP file, or it is cut off")
        if disk or here != entries or not 1 <= entries <= PARTS_MAX + 1 or directory_bytes > _DIRECTORY_BYTES_MAX:
            self._refuse(f"its directory states {entries} entries in {directory_bytes} bytes; a bundle has fewer")
        if offset + directory_bytes + _END_OF_DIRECTORY.size != size:
            self._refuse("there is something before or behind its ZIP file")
        self._file.seek(0)

    def _read_manifest(self) -> Manifest:
        first = self._archive.infolist()[0]
        if first.filename != MANIFEST_NAME:
            self._refuse(f"it is not a bundle: its first entry is {first.filename[:64]!a}, not {MANIFEST_NAME}")
        self._check_entry(first)
        with self._archive.open(first) as source:
            data = source.read(MANIFEST_BYTES_MAX + 1)
        if len(data) > MANIFEST_BYTES_MAX:
            self._refuse(f"its manifest has more than {MANIFEST_BYTES_MAX >> 20} MiB")
        version = decode_version(data)
        if version is None:
            self._refuse("it is not a bundle of gptoss: its manifest does not say so")
        if version > FORMAT_VERSION:
            raise UnsupportedSchema(f"{self.path}: format version {version}; this program knows up to {FORMAT_VERSION}")
        manifest = decode_manifest(data)
        for name, number in manifest.events.items():
            if name not in EVENT_TYPES or number > EVENT_TYPES[name].VERSION:
                raise UnsupportedSchema(
                    f"{self.path}: it holds {name[:64]} version {number}, which this program does not know"
                )
        return manifest

    def _check_entries(self) -> dict[str, zipfile.ZipInfo]:
        manifest = self.manifest
        found = {entry.filename: entry for entry in self._archive.infolist()[1:]}
        if len(found) != len(self._archive.infolist()) - 1:
            self._refuse("it has two entries of one name")
        listed = {part.name: part for part in manifest.parts}
        if len(listed) != len(manifest.parts) or listed.keys() != found.keys():
            odd = min(listed.keys() ^ found.keys(), default="")
            self._refuse(f"its manifest and its entries differ: {odd[:64]!a}")
        if sum(part.size for part in manifest.parts) > BUNDLE_BYTES_MAX:
            self._refuse(f"it would unpack to more than {BUNDLE_BYTES_MAX} bytes")
        for part in manifest.parts:
            self._check_entry(found[part.name])
            if not PART_NAME.fullmatch(part.name) or not part.name.startswith(FOLDERS[part.family]):
                self._refuse(f"an entry is called {part.name[:64]!a}; a bundle has none of that name")
            if found[part.name].file_size != part.size:
                self._refuse(f"{part.name} has {found[part.name].file_size} bytes; its manifest says {part.size}")
        return found

    def _check_order(self) -> None:
        """Parts stand in the order of their records, a boot's parts together."""
        reached: dict[tuple[str, str], int] = {}
        for part in self.manifest.parts:
            key = (part.family, part.boot)
            is_next = not reached or next(reversed(reached)) == key if key in reached else True
            if not is_next or part.first_pos <= reached.get(key, -1) or part.last_pos < part.first_pos:
                self._refuse(f"{part.name} is out of order")
            reached[key] = part.last_pos

    def _check_entry(self, entry: zipfile.ZipInfo) -> None:
        kind = stat.S_IFMT(entry.external_attr >> 16)
        if kind not in {0, stat.S_IFREG} or entry.flag_bits & _ENCRYPTED or entry.compress_type not in _METHODS:
            self._refuse(f"its entry {entry.filename[:64]!a} is a link, encrypted, or packed in an unknown way")

    # ---- refusing

    def _refuse(self, why: str) -> NoReturn:
        raise BundleError(f"{self.path}: {why}")

    @contextmanager
    def _translated(self) -> Generator[None]:
        """Turn what zipfile, zlib, msgspec and the disk raise on bad bytes into a ``BundleError``."""
        try:
            yield
        except (BundleError, UnsupportedSchema):
            raise
        except OSError as error:
            raise BundleError(f"{self.path}: {error.strerror or error}") from None
        except _FOREIGN as error:
            raise BundleError(f"{self.path}: it is damaged: {error}") from None


_FOREIGN: tuple[type[Exception], ...] = (
    zipfile.BadZipFile,
    zipfile.LargeZipFile,
    zlib.error,
    msgspec.DecodeError,
    struct.error,
    EOFError,
    NotImplementedError,
    RecursionError,
    RuntimeError,
    ValueError,
    OverflowError,
    IndexError,
    KeyError,
)
"""Everything that ``zipfile`` was seen to raise on bytes that are no ZIP."""
