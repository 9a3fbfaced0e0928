"""A journal on a disk that commits late, fails, and can be looked at as a crash would leave it.

It obeys the journal's contract as the store on disk does: a record is acknowledged by a commit, the first failed fsync
stops the writer for good, and what was written but not synced may be lost in part. The bytes are those of real
segments, so the real recovery reads them.
"""

import asyncio
from pathlib import Path

import msgspec

from gptoss.actors.journal import JournalHealth
from gptoss.clock import Clock, SeededRng
from gptoss.messages.codec import encode_record
from gptoss.messages.envelope import Family, Origin, Record
from gptoss.messages.events import LogDegraded
from gptoss.telemetry.journal_base import Watchers
from gptoss.telemetry.memory_journal import MemoryJournal
from gptoss.telemetry.segment_file import (
    FORMAT_VERSION,
    Header,
    batch_bytes,
    header_bytes,
    segment_name,
)
from gptoss.telemetry.segment_writer import FamilyLog, Place

NODE = "simulated"
COMMIT_S = 0.010
SYNC_S_MAX = 0.004
KEPT_BYTES = 2**40
BATCH_RECORDS = 64


class Disk(msgspec.Struct):
    """How the disk behaves now; faults change it."""

    fails: bool = False
    extra_s: float = 0.0


class SimulatedJournal(MemoryJournal):
    """See the module's rules.

    Args:
        loop: where commits take their time.
        disk: how it behaves.
        rng: draws how long a sync takes.
    """

    def __init__(self, *, boot: str, clock: Clock, loop: asyncio.AbstractEventLoop, disk: Disk, rng: SeededRng) -> None:
        super().__init__(node=NODE, boot=boot, clock=clock, capacity=10_000_000)
        self._loop = loop
        self._disk = disk
        self._rng = rng
        self._written: list[bytes] = []
        self._num_written = 0
        self._num_synced = 0
        self._is_committing = False
        self._stop_reason = ""
        self._sealed_at: int | None = None

    @property
    def committed_pos(self) -> int:
        """Position of the newest acknowledged control record."""
        return self._num_synced - 1

    @property
    def health(self) -> JournalHealth:
        """See ``Journal``."""
        health = super().health
        return msgspec.structs.replace(
            health,
            last_pos=health.last_pos if self._sealed_at is None else self._sealed_at,
            ok=not self._stop_reason,
            reason=self._stop_reason or health.reason,
            committed_pos=self.committed_pos,
        )

    def flush(self, timeout_s: float = 5.0) -> bool:
        """Whether everything is acknowledged; nobody may wait here, for that would stop the world."""
        del timeout_s
        return self._num_synced == len(self._written)

    def close(self) -> None:
        """See ``Journal``."""
        self._num_written = len(self._written)
        self._sync()
        self._stop_reason = self._stop_reason or "the journal is closed"

    def seal(self) -> None:
        """The run is over: what its remains still append while they are cleared away is not kept."""
        self._sealed_at = self.health.last_pos
        self._watchers = Watchers()

    def _keep(self, record: Record) -> None:
        if self._sealed_at is not None:
            return
        super()._keep(record)
        if record.event.FAMILY == "control" and not self._stop_reason:
            self._written.append(encode_record(record))
            if not self._is_committing:
                self._is_committing = True
                self._loop.call_later(COMMIT_S, self._write)

    # ---- the disk

    def _write(self) -> None:
        self._num_written = len(self._written)
        sync_s = self._disk.extra_s + self._rng.uniform() * SYNC_S_MAX
        self._loop.call_later(sync_s, self._synced)

    def _synced(self) -> None:
        self._sync()
        self._is_committing = False
        if self._num_synced < len(self._written) and not self._stop_reason:
            self._is_committing = True
            self._loop.call_later(COMMIT_S, self._write)

    def _sync(self) -> None:
        if self._stop_reason:
            return
        if self._disk.fails:
            self._stop_reason = "writing the journal failed: Input/output error (EIO)"
            self.append(LogDegraded(reason=self._stop_reason), Origin(stream="journal", actor="journal"))
        else:
            self._num_synced = self._num_written

    # ---- what is left of it

    def write_crashed(self, folder: Path, rng: SeededRng) -> None:
        """Write the control log as a crash at this moment would leave it.

        All that was synced is there, and perhaps a part of what was written after that.
        """
        header = Header(FORMAT_VERSION, NODE, self.boot, "control", 1, 1, 0, ())
        synced, unsynced = self._written[: self._num_synced], self._written[self._num_synced : self._num_written]
        torn = _batches(unsynced)
        data = header_bytes(header) + _batches(synced) + torn[: rng.below(len(torn) + 1)]
        (folder / segment_name("control", 1, 1)).write_bytes(data)

    def write_recording(self, folder: Path) -> None:
        """Write everything that was appended as a folder of segments, which ``gptoss events`` and replay can read."""
        families: tuple[Family, ...] = ("control", "content")
        for family in families:
            place = Place(
                folder=folder,
                family=family,
                node=NODE,
                boot=self.boot,
                ordinal=1,
                segment_bytes=KEPT_BYTES,
                retention_bytes=KEPT_BYTES,
            )
            log = FamilyLog(place, [])
            log.commit([encode_record(record) for record in self.read(family=family)], ())
            log.seal()


def _batches(records: list[bytes]) -> bytes:
    return b"".join(
        batch_bytes(records[start : start + BATCH_RECORDS]) for start in range(0, len(records), BATCH_RECORDS)
    )
