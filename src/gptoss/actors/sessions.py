"""The sessions' book: whose KV the engines keep between two turns. An immutable value; every step is O(log n).

A session is named within its tenant. It is in use while a request of it holds a reservation, else idle; only idle ones
can be given up, the least recently used first.
"""

import msgspec
from immutables import Map

from gptoss.actors.ordered import Ordered


class Session(msgspec.Struct, frozen=True, kw_only=True):
    """What an engine keeps of a conversation.

    Attributes:
        executor: where it is; empty if nothing is kept yet.
        used_ns: when its last turn ended.
        number: counts the sessions, so that two with the same ``used_ns`` have an order.
        in_use: reservations of it.
    """

    executor: str = ""
    tokens: int = 0
    kv_bytes: int = 0
    used_ns: int = 0
    number: int = 0
    in_use: int = 0


class SessionBook(msgspec.Struct, frozen=True, kw_only=True):
    """All sessions.

    Attributes:
        idle: those that can be given up, least recently used first.
        kept: bytes by executor, and ``idle_bytes`` those of idle ones.
        opened: how many there have ever been.
    """

    sessions: Map[str, Session] = Map()
    idle: Ordered[str] = Ordered()
    kept: Map[str, int] = Map()
    idle_bytes: Map[str, int] = Map()
    opened: int = 0

    @property
    def total_bytes(self) -> int:
        """Kept on all executors."""
        return sum(self.kept.values())

    def kept_on(self, executor: str) -> int:
        """Bytes kept on one executor."""
        return self.kept.get(executor, 0)

    def idle_on(self, executor: str) -> int:
        """Bytes of idle sessions on one executor."""
        return self.idle_bytes.get(executor, 0)

    def enter(self, name: str) -> "SessionBook":
        """A turn of a session has begun."""
        before = self.sessions.get(name)
        if before is None:
            fresh = Session(number=self.opened, in_use=1)
            return msgspec.structs.replace(self, sessions=self.sessions.set(name, fresh), opened=self.opened + 1)
        return _with_session(self, name, before, msgspec.structs.replace(before, in_use=before.in_use + 1))

    def exit(self, name: str, now_ns: int) -> "SessionBook":
        """A turn has ended; a session of which nothing is kept is forgotten with its last turn."""
        before = self.sessions.get(name)
        if before is None or not before.in_use:
            return self
        after = msgspec.structs.replace(before, in_use=before.in_use - 1, used_ns=now_ns)
        return _with_session(self, name, before, after if after.in_use or after.kv_bytes else None)

    def keep(self, name: str, executor: str, tokens: int, kv_bytes: int, now_ns: int) -> "SessionBook":
        """An engine keeps a session's last turn instead of what was kept before."""
        before = self.sessions.get(name)
        book = self if before else msgspec.structs.replace(self, opened=self.opened + 1)
        base = before or Session(number=self.opened)
        after = msgspec.structs.replace(base, executor=executor, tokens=tokens, kv_bytes=kv_bytes, used_ns=now_ns)
        return _with_session(book, name, before, after if after.in_use or kv_bytes else None)

    def drop(self, name: str) -> "SessionBook":
        """Nothing is kept of a session any more; while it is in use its turns still count."""
        before = self.sessions.get(name)
        if before is None:
            return self
        emptied = msgspec.structs.replace(before, executor="", tokens=0, kv_bytes=0)
        return _with_session(self, name, before, emptied if before.in_use else None)


def restored_book(sessions: dict[str, Session], opened: int) -> SessionBook:
    """The book of a snapshot."""
    book = SessionBook(opened=opened)
    for name, session in sessions.items():
        book = _with_session(book, name, None, session)
    return book


def _with_session(book: SessionBook, name: str, before: Session | None, after: Session | None) -> SessionBook:
    idle, kept, idle_bytes = book.idle, book.kept, book.idle_bytes
    for session, sign in ((before, -1), (after, 1)):
        if session is None or not session.kv_bytes:
            continue
        kept = added(kept, session.executor, sign * session.kv_bytes)
        if not session.in_use:
            idle_bytes = added(idle_bytes, session.executor, sign * session.kv_bytes)
            key = (session.used_ns, session.number)
            idle = idle.put(key, name) if sign > 0 else idle.take(key)
    if after is not None:
        sessions = book.sessions.set(name, after)
    else:
        sessions = book.sessions.delete(name) if before is not None else book.sessions
    return msgspec.structs.replace(book, sessions=sessions, idle=idle, kept=kept, idle_bytes=idle_bytes)


def added(amounts: Map[str, int], key: str, amount: int) -> Map[str, int]:
    """The amounts with more for one key; a key with nothing left is not there."""
    total = amounts.get(key, 0) + amount
    return amounts.set(key, total) if total else amounts.delete(key)
