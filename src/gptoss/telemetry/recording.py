"""What can be looked at and replayed: the records of a journal, or of a bundle cut from one.

Rules:
- Records come in the order of their boots, and within a boot in the order of their positions. A bundle leaves records
  out, so positions may have gaps.
- Everything is lazy: nobody holds a whole recording in memory to read it.
- Only ``control`` records are needed to replay decisions; ``content`` may be empty.
"""

from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Protocol, runtime_checkable

from gptoss.actors.journal import Journal
from gptoss.messages.envelope import Record, Stored
from gptoss.telemetry.segment_file import Segment
from gptoss.telemetry.segment_reader import SegmentReader
from gptoss.telemetry.segment_survey import Excerpt, Layout, SegmentSurvey, read_excerpt


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


@runtime_checkable
class SurveyedRecording(Recording, Protocol):
    """One that knows where it has what, so that a part of it costs what the part does and not the whole."""

    def surveys(self) -> Iterator[SegmentSurvey]:
        """Surveys of all its records, in order; those of one boot together are of the whole boot. Raises as ``records``."""
        ...

    def excerpt(self, boot: str, excerpt: Excerpt) -> Iterator[Stored]:
        """The control records that an excerpt wants, in order, and maybe others between them. Raises as ``records``."""
        ...

    def content_since(self, boot: str, mono_ns: int, request_ids: frozenset[str]) -> Iterator[Record]:
        """The content records about these requests since a monotonic time, and maybe others. Raises as ``records``."""
        ...


class JournalRecording:
    """A journal's folder; the server that writes it may be running or gone. A ``SurveyedRecording``.

    Raises:
        JournalError: there is no such folder.
    """

    def __init__(self, folder: Path) -> None:
        self._reader = SegmentReader(folder)
        self._layouts: dict[str, list[tuple[Segment, Layout]]] = {}

    def boots(self) -> list[str]:
        """See ``Recording``."""
        return self._reader.boots()

    def records(self, *, boot: str | None = None, stream: str | None = None) -> Iterator[Record]:
        """See ``Recording``."""
        return self._reader.read(boot=boot, stream=stream)

    def content(self, *, boot: str | None = None) -> Iterator[Record]:
        """See ``Recording``."""
        return self._reader.read(family="content", boot=boot)

    def surveys(self) -> Iterator[SegmentSurvey]:
        """See ``SurveyedRecording``. What is recorded later is no part of an excerpt."""
        self._layouts = {}
        for segment, survey in self._reader.surveys():
            self._layouts.setdefault(survey.boot, []).append((segment, survey.layout))
            yield survey

    def excerpt(self, boot: str, excerpt: Excerpt) -> Iterator[Stored]:
        """See ``SurveyedRecording``; of what ``surveys`` has gone through."""
        for segment, layout in self._layouts.get(boot, ()):
            with suppress(FileNotFoundError):
                yield from read_excerpt(segment, layout, excerpt)

    def content_since(self, boot: str, mono_ns: int, request_ids: frozenset[str]) -> Iterator[Record]:
        """See ``SurveyedRecording``."""
        return self._reader.content_since(boot, mono_ns, request_ids)


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
