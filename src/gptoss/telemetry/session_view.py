"""The sessions of the server, folded from the journal with the memory guard's own book-keeping."""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import msgspec

from gptoss.actors.sessions import SessionBook
from gptoss.clock import NS_PER_S
from gptoss.messages import events as ev
from gptoss.messages.envelope import Record

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

    def fold(self, record: Record) -> None:
        """Take one record in."""
        if record.meta.boot != self.boot:
            self.boot, self.book, self.kept_turns = record.meta.boot, SessionBook(), 0
            self.turns.clear()
            self.evicted.clear()
        match record.event:
            case ev.ReservationGranted(request_id=request_id, session_id=session_id) if session_id:
                if request_id not in self.turns:
                    self.turns[request_id] = session_id
                    self.book = self.book.enter(session_id)
            case ev.ReservationReleased(request_id=request_id, at_ns=at_ns) if request_id in self.turns:
                self.book = self.book.exit(self.turns.pop(request_id), at_ns)
            case ev.SessionKept() as kept:
                self.book = self.book.keep(kept.session_id, kept.executor, kept.tokens, kept.kv_bytes, kept.at_ns)
                self.kept_turns += 1
            case ev.SessionEvicted(session_id=session_id, reason=reason):
                self.book = self.book.drop(session_id)
                self.evicted[reason] += 1
            case _:
                pass

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
