"""How records reach the projections: each once through the books, then to every view that its type concerns.

Rules:
- A view says once for each type of event what it does with such records. So a record costs what is done with it: most types
  concern one view or two, and half of all records (``CommandConsumed``) concern none and are only counted.
- The first record of another boot begins everything anew, and the views are asked again.
- The books fold a record before any view, so that a view reads of a request what the record made of it.
"""

import abc
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeAlias

from gptoss.messages.envelope import Event, Record
from gptoss.messages.events import CommandConsumed
from gptoss.telemetry.books import BookFold, Books, RequestFold
from gptoss.telemetry.request_view import RequestView

Handler: TypeAlias = Callable[[Record, Any, RequestView | None], None]
"""Takes a record in: the record, its event, and the request that it changed, as the books say, which have folded it."""
_Plan: TypeAlias = tuple[tuple[BookFold, ...], RequestFold | None, tuple[Handler, ...]]


class View(abc.ABC):
    """Something that is folded from the journal.

    Attributes:
        turn: called with the time of each record, commands excepted, before anybody folds it; None for nothing.

    Args:
        books: those of the ``Folding`` that this view is in; None makes own ones, for ``fold``.
    """

    turn: Callable[[int], None] | None = None

    def __init__(self, books: Books | None = None) -> None:
        self._books = Books() if books is None else books
        self._alone: Folding | None = None

    def fold(self, record: Record) -> None:
        """Take one record in, and fold the own books; of a view that stands alone."""
        if self._alone is None:
            self._alone = Folding(self._books, (self,))
        self._alone.fold(record)

    @abc.abstractmethod
    def begin_boot(self, boot: str) -> None:
        """Begin anew, with the first record of another boot."""

    @abc.abstractmethod
    def handlers(self, kind: type[Event]) -> Iterable[Handler]:
        """What is done with a record of this type, in turn. Asked once a type and boot."""


class Folding:
    """Folds records into books and views.

    Args:
        books: read by the views.
        views: each has what it makes of a record done before the next.
    """

    def __init__(self, books: Books, views: Sequence[View]) -> None:
        self._books = books
        self._views = views
        self._turns = tuple(view.turn for view in views if view.turn is not None)
        self._plans: dict[type[Event], _Plan] = {}

    def fold(self, record: Record) -> None:
        """Take one record in."""
        meta, event, books = record.meta, record.event, self._books
        if meta.boot != books.boot:
            self._begin_boot(meta.boot)
        kind = type(event)
        books.newest = meta
        books.counts[kind] += 1
        if kind is CommandConsumed:
            return
        for turn in self._turns:
            turn(meta.mono_ns)
        plan = self._plans.get(kind)
        if plan is None:
            plan = self._plans[kind] = self._plan(kind)
        book_folds, request_fold, handlers = plan
        for fold in book_folds:
            fold(meta, event)
        request = None if request_fold is None else request_fold(meta, event)
        for handle in handlers:
            handle(record, event, request)

    def _begin_boot(self, boot: str) -> None:
        self._books.begin_boot(boot)
        for view in self._views:
            view.begin_boot(boot)
        self._plans.clear()

    def _plan(self, kind: type[Event]) -> _Plan:
        handlers = tuple(handler for view in self._views for handler in view.handlers(kind))
        return (*self._books.folds(kind), handlers)
