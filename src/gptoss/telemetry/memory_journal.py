"""The journal in memory: for tests, embedding, and servers that keep no log.

It obeys the same contract as the store on disk, except that nothing survives the process: a record is acknowledged
as soon as it is appended. Each family keeps its newest ``capacity`` records.
"""

from collections import deque
from collections.abc import Iterator
from itertools import islice

from gptoss.actors.journal import JournalHealth
from gptoss.clock import Clock
from gptoss.messages.envelope import Family, Record
from gptoss.telemetry.journal_base import Query, Sequencer, Store


class MemoryJournal(Store):
    """See ``gptoss.actors.journal.Journal``.

    Args:
        capacity: records kept in each family; older ones are dropped.
    """

    def __init__(self, *, node: str, boot: str, clock: Clock, capacity: int = 200_000) -> None:
        super().__init__(Sequencer(node=node, boot=boot, clock=clock))
        self._records: dict[Family, deque[Record]] = {
            "control": deque(maxlen=capacity),
            "content": deque(maxlen=capacity),
        }

    @property
    def health(self) -> JournalHealth:
        """Always ok; ``stored_bytes`` is 0, for nothing is on disk."""
        last_pos = self._sequencer.next_pos("control") - 1
        return JournalHealth(
            ok=True, reason=self._watchers.failure, last_pos=last_pos, committed_pos=last_pos, stored_bytes=0
        )

    def flush(self, timeout_s: float = 5.0) -> bool:
        """Nothing is ever left to wait for."""
        del timeout_s
        return True

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
            records = list(self._records[family])
        return islice((record for record in records if query.matches(record.meta)), limit)

    def close(self) -> None:
        """Nothing to release."""

    def _keep(self, record: Record) -> None:
        self._records[record.event.FAMILY].append(record)
