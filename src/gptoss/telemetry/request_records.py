"""All records that a request's timeline is made of.

A request's own records name it in their correlation; the steps that produced its tokens concern many requests and are
added from the streams of the executors that ran it. Clients may use an id again: the newest boot that received it
counts. When that boot crashed, the request's end stands in a later one.
"""

from collections.abc import Iterator
from typing import Protocol

from gptoss.messages import events as ev
from gptoss.messages.envelope import Record
from gptoss.telemetry.journal_base import Query
from gptoss.telemetry.recording import Recording
from gptoss.telemetry.request_view import is_crash_end


class RecordSource(Protocol):
    """What can be read by request and by stream: a live journal, or the folder of a dead one."""

    def read(
        self,
        *,
        boot: str | None = None,
        stream: str | None = None,
        correlation: str | None = None,
        after: int = -1,
    ) -> Iterator[Record]:
        """See ``gptoss.actors.journal.Journal.read``."""
        ...


class RecordingSource:
    """A recording as a source; each question reads through the boots that it concerns."""

    def __init__(self, recording: Recording) -> None:
        self._recording = recording

    def read(
        self,
        *,
        boot: str | None = None,
        stream: str | None = None,
        correlation: str | None = None,
        after: int = -1,
    ) -> Iterator[Record]:
        """See ``RecordSource``."""
        query = Query(boot=boot, stream=stream, correlation=correlation, after=after)
        return (record for record in self._recording.records(boot=boot, stream=stream) if query.matches(record.meta))


def request_records(source: RecordSource, request_id: str) -> list[Record]:
    """The records of a request and the steps that it had a part in, in order; empty when it is unknown.

    Raises:
        JournalCorrupt: bytes that may concern the request fail their checksum.
    """
    everywhere = list(source.read(correlation=request_id))
    if not everywhere:
        return []
    boots = [record.meta.boot for record in everywhere if isinstance(record.event, ev.RequestReceived)]
    boot = (boots or [everywhere[-1].meta.boot])[-1]
    by_pos = {record.meta.pos: record for record in everywhere if record.meta.boot == boot}
    first, last = min(by_pos), max(by_pos)
    for stream in {record.meta.stream for record in by_pos.values() if isinstance(record.event, ev.ExecutorAccepted)}:
        for record in source.read(boot=boot, stream=stream, after=first):
            if record.meta.pos > last:
                break
            if isinstance(record.event, ev.StepCommitted) and _has_part(request_id, record.event):
                by_pos[record.meta.pos] = record
    return [*(by_pos[pos] for pos in sorted(by_pos)), *_crash_end(everywhere, boot)]


def _crash_end(everywhere: list[Record], boot: str) -> list[Record]:
    """The end of a request that ``boot`` left open, as a later boot recorded it."""
    newest = max(index for index, record in enumerate(everywhere) if record.meta.boot == boot)
    return [record for record in everywhere[newest + 1 :] if is_crash_end(record.event)][:1]


def _has_part(request_id: str, step: ev.StepCommitted) -> bool:
    return any(row.request_id == request_id for row in step.rows)
