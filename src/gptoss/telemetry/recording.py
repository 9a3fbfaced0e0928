"""What can be looked at and replayed: the records of a journal, or of a bundle cut from one.

Rules:
- Records come in the order of their boots, and within a boot in the order of their positions. A bundle leaves records
  out, so positions may have gaps.
- Everything is lazy: nobody holds a whole recording in memory to read it.
- Only ``control`` records are needed to replay decisions; ``content`` may be empty.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Protocol

from gptoss.actors.journal import Journal
from gptoss.messages.envelope import Record
from gptoss.telemetry.segment_reader import SegmentReader


class Recording(Protocol):
    """See the module's rules."""

    def boots(self) -> list[str]:
        """Names of the boots, oldest first."""
        ...

    def records(self, *, boot: str | None = None, stream: str | None = None) -> Iterator[Record]:
        """Control records.

        Args:
            boot: only of this boot; None means all.
            stream: only of this stream; None means all.

        Raises:
            JournalError: what is stored cannot be read.
        """
        ...

    def content(self, *, boot: str | None = None) -> Iterator[Record]:
        """Content records; none when content was not recorded, not kept or taken out. Raises as ``records`` does."""
        ...


class JournalRecording:
    """A journal's folder; the server that writes it may be running or gone.

    Raises:
        JournalError: there is no such folder.
    """

    def __init__(self, folder: Path) -> None:
        self._reader = SegmentReader(folder)

    def boots(self) -> list[str]:
        """See ``Recording``."""
        return self._reader.boots()

    def records(self, *, boot: str | None = None, stream: str | None = None) -> Iterator[Record]:
        """See ``Recording``."""
        return self._reader.read(boot=boot, stream=stream)

    def content(self, *, boot: str | None = None) -> Iterator[Record]:
        """See ``Recording``."""
        return self._reader.read(family="content", boot=boot)


class LiveRecording:
    """The journal of this process, with what is not on disk yet. Reading blocks on the disk: do it on a thread."""

    def __init__(self, journal: Journal) -> None:
        self._journal = journal

    def boots(self) -> list[str]:
        """See ``Recording``; a boot is known by its ``system`` stream."""
        return list(dict.fromkeys(record.meta.boot for record in self._journal.read(stream="system")))

    def records(self, *, boot: str | None = None, stream: str | None = None) -> Iterator[Record]:
        """See ``Recording``."""
        return self._journal.read(boot=boot, stream=stream)

    def content(self, *, boot: str | None = None) -> Iterator[Record]:
        """See ``Recording``."""
        return self._journal.read(family="content", boot=boot)


class ListRecording:
    """Records in memory, already in order."""

    def __init__(self, records: Iterable[Record], content: Iterable[Record] = ()) -> None:
        self._records = tuple(records)
        self._content = tuple(content)

    def boots(self) -> list[str]:
        """See ``Recording``."""
        return list(dict.fromkeys(record.meta.boot for record in self._records))

    def records(self, *, boot: str | None = None, stream: str | None = None) -> Iterator[Record]:
        """See ``Recording``."""
        return (
            record
            for record in self._records
            if (boot is None or record.meta.boot == boot) and (stream is None or record.meta.stream == stream)
        )

    def content(self, *, boot: str | None = None) -> Iterator[Record]:
        """See ``Recording``."""
        return (record for record in self._content if boot is None or record.meta.boot == boot)
