"""The embedded journal: append-only segment files, one writer thread, group commit.

Rules:
- ``append`` numbers a record, encodes it, queues the bytes and tells the watchers, all under one lock; it never waits
  for the disk. The writer takes everything queued at once, writes one batch a family, and syncs.
- A record is acknowledged after its batch's ``fdatasync``. Until then readers get it from memory.
- The first error of the disk stops the writer for good: no retry, no further acknowledgement, ``health.ok`` false and
  a ``LogDegraded`` for the watchers. Appends go on in memory, ``DEGRADED_RECORDS_MAX`` a family.
- A long queue is reported in ``health.reason`` and never dropped: admission must shed instead.
- ``fcntl.flock`` on ``lock`` keeps a second server out of the folder; the kernel lets go of it when a process dies.
"""

import contextlib
import errno
import fcntl
import os
import threading
from collections import deque
from collections.abc import Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Self

import msgspec

from gptoss.actors.journal import JournalHealth
from gptoss.clock import Clock
from gptoss.errors import JournalError
from gptoss.messages.codec import decode_event, decode_stored, encode_record
from gptoss.messages.envelope import Family, Origin, Record
from gptoss.messages.events import LogDegraded
from gptoss.telemetry.journal_base import Query, Sequencer, Store
from gptoss.telemetry.segment_file import Segment, list_segments
from gptoss.telemetry.segment_reader import Horizon, SegmentReader
from gptoss.telemetry.segment_recovery import Recovery, recover
from gptoss.telemetry.segment_writer import FamilyLog, Place
from gptoss.telemetry.survey_keeper import SurveyKeeper

__all__ = ["Recovery", "SegmentJournal", "SegmentOptions", "SegmentReader"]

BACKLOG_WARNING_RECORDS = 200_000
DEGRADED_RECORDS_MAX = 200_000
CLOSE_TIMEOUT_S = 10.0
LOCK_NAME = "lock"

_FAMILIES: tuple[Family, ...] = ("control", "content")


class SegmentOptions(msgspec.Struct, frozen=True, kw_only=True):
    """Sizes and pace of the store.

    Attributes:
        segment_bytes: a segment that has grown to this is sealed.
        control_retention_bytes, content_retention_bytes: beyond this the oldest segments are unlinked.
        commit_interval_s: how long the first record of a batch waits for others.
        commit_records: a batch that has grown to this is committed at once.
    """

    segment_bytes: int = 64 * 2**20
    control_retention_bytes: int = 2048 * 2**20
    content_retention_bytes: int = 512 * 2**20
    commit_interval_s: float = 0.050
    commit_records: int = 512


class SegmentJournal(Store):
    """See ``gptoss.actors.journal.Journal``; made by ``open``.

    Attributes:
        recovery: what was found of earlier boots.
    """

    def __init__(
        self,
        reader: SegmentReader,
        logs: dict[Family, FamilyLog],
        sequencer: Sequencer,
        options: SegmentOptions,
        keeper: SurveyKeeper,
    ) -> None:
        super().__init__(sequencer)
        self.recovery = Recovery()
        self._reader = reader
        self._logs = logs
        self._commit_began_ns: int | None = None
        self._options = options
        self._keeper = keeper
        self._work = threading.Condition(self._lock)
        self._progress = threading.Condition(self._lock)
        self._queued: dict[Family, deque[bytes]] = {family: deque() for family in _FAMILIES}
        self._committing: dict[Family, deque[bytes]] = {family: deque() for family in _FAMILIES}
        self._num_queued = 0
        self._wake_at = frozenset({1, options.commit_records})
        self._open_requests: tuple[str, ...] = ()
        self._committed_pos: dict[Family, int] = {"control": -1, "content": -1}
        self._in_hurry = False
        self._is_closing = False
        self._stop_reason = ""
        self._lock_fd = -1
        self._writer = threading.Thread(target=self._write_loop, name="journal-writer", daemon=True)

    @classmethod
    def open(cls, folder: Path, *, node: str, boot: str, clock: Clock, options: SegmentOptions) -> Self:
        """Lock the folder, recover what is in it, and begin a new boot.

        Args:
            folder: created if it does not exist.
            node: name of this machine.
            boot: name of this run; unlike those of all earlier runs.
            clock: dates the records.
            options: sizes and pace.

        Raises:
            JournalError: another server uses the folder, or it cannot be written.
        """
        with contextlib.ExitStack() as undo:
            try:
                lock_fd = lock_folder(folder)
                undo.callback(os.close, lock_fd)
                recovery = recover(folder)
                logs: dict[Family, FamilyLog] = {}
                keeper = SurveyKeeper(folder)
                for place, kept in _places(folder, node, boot, options):
                    logs[place.family] = FamilyLog(place, kept, keeper.note_sealed)
                    undo.callback(logs[place.family].abandon)
            except OSError as error:
                raise JournalError(
                    f"cannot write the journal in {folder}: {_describe(error)}; "
                    "make it writable or choose another data_dir"
                ) from None
            journal = cls(SegmentReader(folder), logs, Sequencer(node=node, boot=boot, clock=clock), options, keeper)
            journal.recovery = recovery
            journal._lock_fd = lock_fd
            journal._writer.start()
            undo.pop_all()
        return journal

    @property
    def health(self) -> JournalHealth:
        """See ``Journal``."""
        with self._lock:
            reason = self._stop_reason or self._watchers.failure
            if not self._stop_reason and self._num_queued >= BACKLOG_WARNING_RECORDS:
                reason = f"{self._num_queued} records wait for the disk"
            return JournalHealth(
                ok=not self._stop_reason,
                reason=reason,
                last_pos=self._sequencer.next_pos("control") - 1,
                committed_pos=self._committed_pos["control"],
                stored_bytes=sum(log.stored_bytes for log in self._logs.values()),
                commit_ns=0 if self._commit_began_ns is None else self._clock.monotonic_ns() - self._commit_began_ns,
            )

    def flush(self, timeout_s: float = 5.0) -> bool:
        """See ``Journal``."""
        with self._lock:
            targets: list[tuple[Family, int]] = [(name, self._sequencer.next_pos(name) - 1) for name in _FAMILIES]

            def is_committed() -> bool:
                return all(self._committed_pos[family] >= target for family, target in targets)

            if not is_committed():
                self._in_hurry = True
                self._work.notify()
                self._progress.wait_for(lambda: self._stop_reason or is_committed(), timeout_s)
            return is_committed()

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
        """See ``Journal``."""
        query = Query(family=family, boot=boot, stream=stream, correlation=correlation, after=after)
        with self._lock:
            # Memory first: whatever is not in it has been committed and is on disk when the files are listed below.
            tail = [*self._committing[family], *self._queued[family]]
            horizon = Horizon(self.boot, self._sequencer.next_pos(family) - len(tail))
        return islice(chain(self._reader.records(query, horizon), _from_memory(tail, query)), limit)

    def close(self) -> None:
        """See ``Journal``. Records appended later are kept in memory only."""
        with self._lock:
            self._is_closing = True
            self._work.notify()
        self._writer.join(CLOSE_TIMEOUT_S)
        if self._writer.is_alive():
            return  # The disk hangs. The folder stays locked for as long as this process may still write to it.
        self._keeper.stop()
        with self._lock:
            lock_fd, self._lock_fd = self._lock_fd, -1
        if lock_fd != -1:
            os.close(lock_fd)

    def _keep(self, record: Record) -> None:
        self._queued[record.event.FAMILY].append(encode_record(record))
        self._num_queued += 1
        if self._num_queued in self._wake_at:
            self._work.notify()

    # ------------------------------------------------------------ the writer thread

    def _write_loop(self) -> None:
        try:
            while self._take_batch():
                self._commit()
            for log in self._logs.values():
                log.seal()
        except OSError as error:
            self._give_up(f"writing the journal failed: {_describe(error)}; restart once the disk is well again")
        except Exception as error:  # noqa: BLE001 - a dead writer must show in health, whatever killed it
            self._give_up(f"the journal's writer failed: {type(error).__name__}: {error}")

    def _take_batch(self) -> bool:
        """Move everything queued into the batch being committed; False when closed and nothing is left."""
        with self._lock:
            self._work.wait_for(lambda: self._num_queued or self._is_closing)
            self._work.wait_for(self._is_batch_due, self._options.commit_interval_s)
            if not self._num_queued:
                self._stop("the journal is closed")
                return False
            self._committing, self._queued = self._queued, {family: deque() for family in _FAMILIES}
            self._num_queued = 0
            self._commit_began_ns = self._clock.monotonic_ns()
            self._in_hurry = False
            self._open_requests = tuple(self._sequencer.open_requests)
            return True

    def _is_batch_due(self) -> bool:
        return self._num_queued >= self._options.commit_records or self._in_hurry or self._is_closing

    def _commit(self) -> None:
        for family, log in self._logs.items():
            batch = self._committing[family]
            if batch:
                log.commit(batch, self._open_requests if family == "control" else ())
        with self._lock:
            self._commit_began_ns = None
            for family in _FAMILIES:
                self._committed_pos[family] += len(self._committing[family])
                self._committing[family] = deque()
            self._progress.notify_all()

    def _give_up(self, reason: str) -> None:
        with self._lock:
            self._stop(reason)
            self.append(LogDegraded(reason=reason), Origin(stream="journal", actor="journal"))
        for log in self._logs.values():
            log.abandon()

    def _stop(self, reason: str) -> None:
        self._stop_reason = reason
        for family in _FAMILIES:
            unsaved = chain(self._committing[family], self._queued[family])
            self._queued[family] = deque(unsaved, maxlen=DEGRADED_RECORDS_MAX)
            self._committing[family] = deque()
        self._progress.notify_all()


def _from_memory(tail: list[bytes], query: Query) -> Iterator[Record]:
    for data in tail:
        stored = decode_stored(data)
        if query.matches(stored.meta):
            yield Record(stored.meta, decode_event(stored))


def _places(folder: Path, node: str, boot: str, options: SegmentOptions) -> Iterator[tuple[Place, list[Segment]]]:
    """Where each family goes, and what is kept of its earlier boots."""
    segments = list_segments(folder)
    ordinal = max((segment.ordinal for segment in segments), default=0) + 1
    retention: dict[Family, int] = {
        "control": options.control_retention_bytes,
        "content": options.content_retention_bytes,
    }
    for family in _FAMILIES:
        place = Place(
            folder=folder,
            family=family,
            node=node,
            boot=boot,
            ordinal=ordinal,
            segment_bytes=options.segment_bytes,
            retention_bytes=retention[family],
        )
        yield place, [segment for segment in segments if segment.family == family]


def lock_folder(folder: Path) -> int:
    """Take the folder's lock, until the returned descriptor is closed.

    Raises:
        OSError: the folder cannot be written.
        JournalError: another process has it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    fd = os.open(folder / LOCK_NAME, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.ftruncate(fd, 0)
        os.pwrite(fd, str(os.getpid()).encode(), 0)
    except BlockingIOError:
        owner = os.pread(fd, 32, 0).decode(errors="replace")
        os.close(fd)
        raise JournalError(
            f"the journal in {folder} is in use by another server (process {owner}); stop it or choose another data_dir"
        ) from None
    except OSError:
        os.close(fd)
        raise
    return fd


def _describe(error: OSError) -> str:
    name = errno.errorcode.get(error.errno or 0, "OSError")
    return f"{error.strerror or error} ({name})"
