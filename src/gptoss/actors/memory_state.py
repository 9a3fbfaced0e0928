"""What the memory guard knows: pools, grants, sessions, and what the devices lack. A value; every step is O(log n)."""

import msgspec
from immutables import Map

from gptoss.actors.sessions import Session, SessionBook, added, restored_book
from gptoss.messages.model import EngineCapabilities, KvLayout


class Grant(msgspec.Struct, frozen=True):
    """Memory set aside for one request; ``executor`` is empty while unbound; ``session_id`` is in use with it."""

    kv_bytes: int
    executor: str = ""
    session_id: str = ""


class GuardState(msgspec.Struct, frozen=True, kw_only=True):
    """Pools by executor and grants by request.

    Attributes:
        reserved: bytes granted by executor; under ``""`` the unbound ones.
        book: of the sessions.
        lacking: of each pool's budget, what its device turned out not to have.
        kv_layout: of the newest pool that there ever was; None before the first.
    """

    pools: dict[str, EngineCapabilities] = {}
    grants: Map[str, Grant] = Map()
    reserved: Map[str, int] = Map()
    book: SessionBook = SessionBook()
    lacking: dict[str, int] = {}
    kv_layout: KvLayout | None = None

    def reserved_bytes(self, executor: str) -> int:
        """Bytes granted on one executor; ``""`` counts the unbound ones."""
        return self.reserved.get(executor, 0)

    def budget_bytes(self, executor: str) -> int:
        """What one executor can really give."""
        return max(0, self.pools[executor].kv_budget_bytes - self.lacking.get(executor, 0))

    def free_bytes(self, executor: str) -> int:
        """What is left on one executor if every unbound grant went there; negative if it has too much."""
        taken = self.reserved_bytes(executor) + self.reserved_bytes("") + self.book.kept_on(executor)
        return self.budget_bytes(executor) - taken

    def free_bytes_max(self) -> int:
        """The largest request that can be granted now, in bytes."""
        return max(0, max((self.free_bytes(name) for name in self.pools), default=0))

    def free_bytes_max_without_idle(self) -> int:
        """The largest request that could be granted once every idle session was given up, in bytes."""
        free = (self.free_bytes(name) + self.book.idle_on(name) for name in self.pools)
        return max(0, max(free, default=0))

    def pressure(self) -> float:
        """Share of the KV memory that is spoken for: what is granted and kept, of what the executors can give.

        0 while there are no executors; above 1 once memory was lost under what is granted.
        """
        budget = sum(self.budget_bytes(name) for name in self.pools)
        return (sum(self.reserved.values()) + self.book.total_bytes) / budget if budget else 0.0

    # ---- changes

    def with_grant(self, request_id: str, grant: Grant | None) -> "GuardState":
        """With this grant in place of what the request holds."""
        reserved = self.reserved
        held = self.grants.get(request_id)
        for each, sign in ((held, -1), (grant, 1)):
            if each is not None:
                reserved = added(reserved, each.executor, sign * each.kv_bytes)
        if grant is not None:
            grants = self.grants.set(request_id, grant)
        else:
            grants = self.grants.delete(request_id) if held else self.grants
        return msgspec.structs.replace(self, grants=grants, reserved=reserved)

    def without_pool(self, executor: str) -> "GuardState":
        """Without an executor's memory; what was bound to it is unbound, and its sessions are gone."""
        state = msgspec.structs.replace(
            self,
            pools={name: pool for name, pool in self.pools.items() if name != executor},
            lacking={name: lacking for name, lacking in self.lacking.items() if name != executor},
        )
        for request_id, grant in self.grants.items():
            if grant.executor == executor:
                state = state.with_grant(request_id, msgspec.structs.replace(grant, executor=""))
        return state


class GuardRecord(msgspec.Struct, frozen=True, kw_only=True):
    """``GuardState`` as a snapshot holds it."""

    pools: dict[str, EngineCapabilities] = {}
    grants: dict[str, Grant] = {}
    kv_layout: KvLayout | None = None
    sessions: dict[str, Session] = {}
    sessions_opened: int = 0
    lacking: dict[str, int] = {}


def recorded(state: GuardState) -> GuardRecord:
    """What a snapshot holds of a state: the same state always gives the same bytes."""
    sessions = state.book.sessions
    return GuardRecord(
        pools=state.pools,
        grants={name: state.grants[name] for name in sorted(state.grants)},
        kv_layout=state.kv_layout,
        sessions={name: sessions[name] for name in sorted(sessions)},
        sessions_opened=state.book.opened,
        lacking=state.lacking,
    )


def restored(record: GuardRecord) -> GuardState:
    """The state that a snapshot holds."""
    state = GuardState(
        pools=record.pools,
        kv_layout=record.kv_layout,
        lacking=record.lacking,
        book=restored_book(record.sessions, record.sessions_opened),
    )
    for request_id, grant in record.grants.items():
        state = state.with_grant(request_id, grant)
    return state
