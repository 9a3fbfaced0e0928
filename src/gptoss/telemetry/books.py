"""What every projection reads: the requests, the executors and the sessions, folded once for all of them.

A live server folds one ``Books`` (``folding`` does) and hands each record, with the request that it changed, to its
projections. A projection that is made alone has books of its own, and comes to the same.
"""

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from gptoss.messages.envelope import Event, Meta
from gptoss.messages.events import StepCommitted
from gptoss.telemetry.executor_view import ExecutorBook
from gptoss.telemetry.request_view import RequestBook, RequestView, StepSums
from gptoss.telemetry.session_view import SessionView

BookFold: TypeAlias = Callable[[Meta, Any], None]
"""What a book does with an event of one type."""
RequestFold: TypeAlias = Callable[[Meta, Any], RequestView | None]
"""The same of the requests' book: see ``RequestBook.fold``."""


@dataclass(slots=True)
class Books:
    """See the module.

    Attributes:
        boot: of all that is in them.
        newest: of the newest record, None before the first.
        counts: records of this boot by type, in the order in which the types came.
        step: sums over the rows of the newest ``StepCommitted``.
    """

    requests: RequestBook = field(default_factory=RequestBook)
    executors: ExecutorBook = field(default_factory=ExecutorBook)
    sessions: SessionView = field(default_factory=SessionView)
    boot: str = ""
    newest: Meta | None = None
    counts: defaultdict[type[Event], int] = field(default_factory=lambda: defaultdict[type[Event], int](int))
    step: StepSums = field(default_factory=StepSums)

    @property
    def newest_pos(self) -> int:
        """Position of the newest record, -1 before the first."""
        return -1 if self.newest is None else self.newest.pos

    @property
    def newest_ns(self) -> int:
        """Monotonic time of the newest record, 0 before the first."""
        return 0 if self.newest is None else self.newest.mono_ns

    def begin_boot(self, boot: str) -> None:
        """Begin anew, with the first record of another boot."""
        self.boot, self.newest = boot, None
        self.counts.clear()
        self.executors.begin_boot(boot)
        self.sessions.begin_boot(boot)
        self.requests.begin_boot(boot)

    def folds(self, kind: type[Event]) -> tuple[tuple[BookFold, ...], RequestFold | None]:
        """What becomes of a record of this type: in executors and sessions, then in the requests."""
        both = (self.executors.fold_of(kind), self.sessions.fold_of(kind))
        in_requests = self._fold_step if kind is StepCommitted else self.requests.fold_of(kind)
        return tuple(each for each in both if each is not None), in_requests

    def _fold_step(self, meta: Meta, event: StepCommitted) -> None:
        self.step = self.requests.fold_step(meta, event)
