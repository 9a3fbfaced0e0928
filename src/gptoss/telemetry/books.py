"""What every projection reads: the requests, the executors and the sessions, folded once for all of them.

A live server folds one ``Books`` and hands each record, with the request that it changed, to its projections. A
projection that is made alone has books of its own, and comes to the same.
"""

from dataclasses import dataclass, field

from gptoss.messages.envelope import Record
from gptoss.messages.events import CommandConsumed
from gptoss.telemetry.executor_view import ExecutorBook
from gptoss.telemetry.request_view import RequestBook, RequestView
from gptoss.telemetry.session_view import SessionView


@dataclass(slots=True)
class Books:
    """See the module."""

    requests: RequestBook = field(default_factory=RequestBook)
    executors: ExecutorBook = field(default_factory=ExecutorBook)
    sessions: SessionView = field(default_factory=SessionView)

    def fold(self, record: Record) -> RequestView | None:
        """Take one record in; returns what ``RequestBook.fold`` does."""
        if type(record.event) is CommandConsumed and record.meta.boot == self.requests.boot:
            return None  # the most frequent record of all changes nothing
        self.executors.fold(record)
        self.sessions.fold(record)
        return self.requests.fold(record)
