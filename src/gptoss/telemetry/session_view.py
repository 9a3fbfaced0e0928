"""The sessions of the server, folded from the journal with the memory guard's own book-keeping."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import msgspec

from gptoss.actors.sessions import SessionBook
from gptoss.clock import NS_PER_S
from gptoss.messages import events as ev
from gptoss.messages.envelope import Event, Meta

SHOWN_MAX = 100


@dataclass(slots=True)
class SessionView:
    """All sessions of this boot.

    Attributes:
        turns: requests with a reservation -> their session.
        kept_turns: turns after which something was kept.
        evicted: how many were given up, by reason.
    """

    boot: str = ""
    book: SessionBook = field(default_factory=SessionBook)
    turns: dict[str, str] = field(default_factory=dict[str, str])
    kept_turns: int = 0
    evicted: Counter[str] = field(default_factory=Counter[str])

    def begin_boot(self, boot: str) -> None:
        """Begin anew, with the first record of another boot."""
        self.boot, self.book, self.kept_turns = boot, SessionBook(), 0
        self.turns.clear()
        self.evicted.clear()

    def fold_of(self, kind: type[Event]) -> Callable[[Meta, Any], None] | None:
        """What becomes of an event of this type, None for nothing."""
        handler = _HANDLERS.get(kind)
        return None if handler is None else partial(handler, self)

    def counts(self) -> dict[str, Any]:
        """For ``/stats``."""
        return {
            "active": len(self.book.sessions),
            "in_use": len(set(self.turns.values())),
            "kept_turns": self.kept_turns,
            "evicted": dict(sorted(self.evicted.items())),
        }

    def memory(self) -> dict[str, Any]:
        """For ``/memory_stats``: totals, and the newest sessions. Their names are the clients' own and are not shown."""
        newest = sorted(self.book.sessions.values(), key=lambda each: (each.used_ns, each.number), reverse=True)
        shown = [
            {
                "executor": each.executor,
                "tokens": each.tokens,
                "kv_bytes": each.kv_bytes,
                "in_use": each.in_use > 0,
                "used_s": round(each.used_ns / NS_PER_S, 3),
            }
            for each in newest[:SHOWN_MAX]
        ]
        return {
            "active": len(self.book.sessions),
            "kv_bytes": self.book.total_bytes,
            "newest": msgspec.to_builtins(shown),
        }


# ---------------------------------------------------------------- one function an event


def _granted(view: SessionView, _: Meta, event: ev.ReservationGranted) -> None:
    if event.session_id and event.request_id not in view.turns:
        view.turns[event.request_id] = event.session_id
        view.book = view.book.enter(event.session_id)


def _released(view: SessionView, _: Meta, event: ev.ReservationReleased) -> None:
    if event.request_id in view.turns:
        view.book = view.book.exit(view.turns.pop(event.request_id), event.at_ns)


def _kept(view: SessionView, _: Meta, event: ev.SessionKept) -> None:
    view.book = view.book.keep(event.session_id, event.executor, event.tokens, event.kv_bytes, event.at_ns)
    view.kept_turns += 1


def _evicted(view: SessionView, _: Meta, event: ev.SessionEvicted) -> None:
    view.book = view.book.drop(event.session_id)
    view.evicted[event.reason] += 1


_HANDLERS: dict[type[Event], Callable[[SessionView, Meta, Any], None]] = {
    ev.ReservationGranted: _granted,
    ev.ReservationReleased: _released,
    ev.SessionKept: _kept,
    ev.SessionEvicted: _evicted,
}
