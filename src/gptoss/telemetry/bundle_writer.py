"""Writes any recording as a bundle.

Rules:
- The manifest comes first and holds the checksums of all that follows, so the parts wait in a temporary file until they
  are complete. Memory holds one part's records at most.
- A recording larger than the limit is refused while it is being read, not cut: half a bundle replays nothing.
- The same recording gives the same bytes: the ZIP's own dates are fixed, whatever the clock says.
"""

import hashlib
import tempfile
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO

import msgspec

from gptoss.errors import BundleTooLarge
from gptoss.messages.codec import encode_record
from gptoss.messages.envelope import Family, Record
from gptoss.telemetry.bundle_facts import BundleFacts
from gptoss.telemetry.bundle_format import (
    BUNDLE_BYTES_MAX,
    FOLDERS,
    FORMAT,
    FORMAT_VERSION,
    MANIFEST_NAME,
    PART_BYTES,
    PART_BYTES_MAX,
    PARTS_MAX,
    Manifest,
    Part,
    Redaction,
)
from gptoss.telemetry.recording import Recording
from gptoss.telemetry.segment_file import batch_bytes

FRAME_RECORDS = 512
FRAME_BYTES = 2**18
COPY_BYTES = 2**20
COMPRESSION = 3
"""Zlib's level: of a journal it takes a tenth more space than level 6, in a third of the time."""


class Purpose(msgspec.Struct, frozen=True, kw_only=True):
    """What the recording itself cannot say of a bundle; the fields are those of ``Manifest``."""

    created_ns: int
    created_by: str
    reason: str
    requests: tuple[str, ...] = ()
    redaction: Redaction = Redaction(content="tokens")


def write_bundle(
    file: IO[bytes],
    recording: Recording,
    purpose: Purpose,
    *,
    limit_bytes: int = BUNDLE_BYTES_MAX,
    spool_folder: Path | None = None,
) -> Manifest:
    """Write ``recording`` into ``file`` and return its manifest.

    Args:
        file: open for writing, seekable, empty.
        recording: read once, control first.
        purpose: goes into the manifest.
        limit_bytes: the most that its records may take, unpacked.
        spool_folder: where the temporary file is made; None is the system's own place.

    Raises:
        BundleTooLarge: the recording is larger than the limit.
        JournalError: the recording cannot be read.
        OSError: the disk is full, say.
    """
    facts = BundleFacts()
    with tempfile.TemporaryFile(dir=spool_folder) as spool:
        parts = _Spool(spool, min(limit_bytes, BUNDLE_BYTES_MAX))
        parts.write("control", _noted(recording.records(), facts))
        parts.write("content", _noted(recording.content(), facts))
        manifest = Manifest(
            format=FORMAT,
            format_version=FORMAT_VERSION,
            created_ns=purpose.created_ns,
            created_by=purpose.created_by,
            reason=purpose.reason,
            requests=purpose.requests,
            num_requests=facts.num_requests,
            boots=facts.boots(),
            events=dict(sorted(facts.events.items())),
            redaction=purpose.redaction,
            missing=facts.gaps(with_content=purpose.redaction.content != "none"),
            parts=tuple(parts.done),
        )
        _assemble(file, manifest, spool)
    return manifest


def _noted(records: Iterable[Record], facts: BundleFacts) -> Iterator[Record]:
    for record in records:
        facts.fold(record)
        yield record


class _Spool:
    """Parts, one behind the other in a file.

    Attributes:
        done: complete parts.
    """

    def __init__(self, file: IO[bytes], limit_bytes: int) -> None:
        self.done: list[Part] = []
        self._file = file
        self._limit_bytes = limit_bytes
        self._bytes = 0
        self._batch: list[bytes] = []
        self._batch_bytes = 0
        self._reset()

    def write(self, family: Family, records: Iterable[Record]) -> None:
        """Write a family; a part never holds records of two boots."""
        number = 0
        for record in records:
            if self._records and (record.meta.boot != self._boot or self._size + self._batch_bytes >= PART_BYTES):
                number += 1
                self._end_part(family, number)
            self._add(record)
        if self._records:
            self._end_part(family, number + 1)

    def _add(self, record: Record) -> None:
        data = encode_record(record)
        if not self._records:
            self._boot, self._first_pos = record.meta.boot, record.meta.pos
        self._last_pos = record.meta.pos
        self._records += 1
        self._batch.append(data)
        self._batch_bytes += len(data)
        if len(self._batch) >= FRAME_RECORDS or self._batch_bytes >= FRAME_BYTES:
            self._end_frame()

    def _end_frame(self) -> None:
        frame = batch_bytes(self._batch)
        self._batch, self._batch_bytes = [], 0
        self._bytes += len(frame)
        if self._bytes > self._limit_bytes:
            raise BundleTooLarge(
                f"the bundle would hold more than {self._limit_bytes / 2**20:g} MiB of records; "
                "choose fewer requests, a shorter window or a larger limit",
                param="limit_mb",
            )
        self._file.write(frame)
        self._sha256.update(frame)
        self._size += len(frame)

    def _end_part(self, family: Family, number: int) -> None:
        if self._batch:
            self._end_frame()
        if len(self.done) >= PARTS_MAX or self._size > PART_BYTES_MAX:
            raise BundleTooLarge(
                f"the bundle would have more than {PARTS_MAX} parts or one above {PART_BYTES_MAX >> 20} MiB; "
                "choose a shorter window"
            )
        self.done.append(
            Part(
                name=f"{FOLDERS[family]}/{number:06}.records",
                family=family,
                boot=self._boot,
                records=self._records,
                first_pos=self._first_pos,
                last_pos=self._last_pos,
                size=self._size,
                sha256=self._sha256.hexdigest(),
            )
        )
        self._reset()

    def _reset(self) -> None:
        self._boot = ""
        self._records = self._size = self._first_pos = self._last_pos = 0
        self._sha256 = hashlib.sha256()


def _assemble(file: IO[bytes], manifest: Manifest, spool: IO[bytes]) -> None:
    spool.seek(0)
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED, allowZip64=False, compresslevel=COMPRESSION) as archive:
        # Opened by name, an entry is dated 1980, not today.
        with archive.open(MANIFEST_NAME, "w") as target:
            target.write(msgspec.json.format(msgspec.json.encode(manifest), indent=1))
        for part in manifest.parts:
            with archive.open(part.name, "w") as target:
                left = part.size
                while left:
                    chunk = spool.read(min(left, COPY_BYTES))
                    target.write(chunk)
                    left -= len(chunk)
