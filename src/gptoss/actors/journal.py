"""The journal port: append facts, read them back, watch them pass.

Contract, shared by every store and tested once for all of them (``tests/telemetry/test_journal_contract.py``):
- ``append`` never blocks on the disk and never raises because of it. It assigns ``pos`` (gapless per family) and
  ``seq`` (gapless per stream), hands the record to the subscribers in that order, and returns the record.
- A record is *acknowledged* once ``committed_pos`` has reached it; an acknowledged record survives ``kill -9``.
- A failed write or fsync stops the writer for good: ``health.ok`` turns false, nothing more is acknowledged, appends
  and subscriptions go on in memory.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Protocol

import msgspec

from gptoss.messages.envelope import Event, Family, Origin, Record


class JournalHealth(msgspec.Struct, frozen=True, kw_only=True):
    """State of a journal.

    Attributes:
        ok: false after a write or fsync error.
        last_pos: ``pos`` of the newest control record, -1 when empty.
        committed_pos: ``pos`` of the newest acknowledged control record, -1 when none is.
        stored_bytes: bytes on disk, both families.
        commit_ns: how long the disk has been at the batch that it is writing now; 0 when it is at none.
    """

    ok: bool
    reason: str
    last_pos: int
    committed_pos: int
    stored_bytes: int
    commit_ns: int = 0


class Journal(Protocol):
    """Append-only store of records. All methods may be called from any thread."""

    @property
    def node(self) -> str:
        """Name of this machine in every record."""
        ...

    @property
    def boot(self) -> str:
        """Name of this process's run in every record."""
        ...

    @property
    def health(self) -> JournalHealth:
        """Whether the journal keeps its promises, and how far it is."""
        ...

    def append(self, event: Event, origin: Origin) -> Record:
        """Record a fact; see the module's contract."""
        ...

    def append_decision(self, command: Event, origin: Origin, led_to: Sequence[tuple[Event, str]]) -> list[Record]:
        """Record a command and the events that it led to, with nobody's record between them and all at one moment.

        Args:
            command: the fact that a command was consumed.
            origin: of the command, and but for cause and correlation of the events.
            led_to: each event with the request that it concerns, or with none. Their cause is the command's record.

        Returns:
            The command's record, then those of the events.
        """
        ...

    def flush(self, timeout_s: float = 5.0) -> bool:
        """Wait until everything appended so far is acknowledged; False on time-out or a stopped writer."""
        ...

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
        """Records in the order of their positions, oldest boot first.

        Includes records that are appended but not yet acknowledged. Blocks on the disk: call it from a thread.

        Args:
            family: which family to read.
            boot: only this boot; None means every boot that is still kept.
            stream: only this stream.
            correlation: only this request.
            after: only positions above this one (meaningful within one boot).
            limit: stop after so many records.

        Raises:
            JournalCorrupt: bytes inside the log fail their checksum.
        """
        ...

    def subscribe(
        self, watcher: Callable[[Record], None], types: Collection[type[Event]] | None = None
    ) -> Callable[[], None]:
        """Call ``watcher`` with every control record from now on, in order; returns the way to stop it.

        ``watcher`` runs on the appending thread with the journal locked: it must be quick and must not append.

        Args:
            watcher: who is told.
            types: only records of these types; None means all. Others then cost nothing.
        """
        ...

    def close(self) -> None:
        """Commit what is left and release the files; idempotent."""
        ...
