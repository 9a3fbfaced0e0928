"""Invariants that are watched with every record, so that a run ends where one breaks.

Both keep books of their own, from events alone, and trust no state of the system.
"""

from typing import Protocol

from gptoss.messages import events as ev
from gptoss.messages.envelope import Record
from gptoss.simulation.observed import BrokenInvariant, ViolationError


class Watcher(Protocol):
    """An invariant with books."""

    @property
    def name(self) -> str:
        """Of the invariant."""
        ...

    def see(self, record: Record) -> None:
        """Take a control record in. Raises ``ViolationError``."""
        ...


class OneTerminalEvent:
    """A request that was received ends exactly once; an id may be used again after that."""

    name = "one_terminal_event"

    def __init__(self) -> None:
        self.open: set[str] = set()

    def see(self, record: Record) -> None:
        """See ``Watcher``."""
        event, request_id = record.event, record.meta.correlation
        if isinstance(event, ev.RequestReceived):
            if request_id in self.open:
                raise ViolationError(f"{request_id} was received again at {record.meta.pos} before it had ended")
            self.open.add(request_id)
        elif isinstance(event, ev.TERMINAL_EVENTS):
            if request_id not in self.open:
                raise ViolationError(f"{request_id} has a second end, {record.meta.type} at {record.meta.pos}")
            self.open.remove(request_id)


class ReservationsWithinBudget:
    """What is granted fits a pool beside all that is granted and kept already, and is given back exactly once."""

    name = "reservations_within_budget"

    def __init__(self) -> None:
        self.budgets: dict[str, int] = {}
        self.grants: dict[str, tuple[str, int]] = {}
        self.sessions: dict[str, tuple[str, int]] = {}

    def see(self, record: Record) -> None:
        """See ``Watcher``."""
        match record.event:
            case ev.MemoryPoolSet(executor=executor, capabilities=capabilities):
                self.budgets[executor] = capabilities.kv_budget_bytes
            case ev.MemoryPoolDropped(executor=executor):
                self.budgets.pop(executor, None)
                lost = [key for key, (pool, _) in self.grants.items() if pool == executor]
                self.grants |= {key: ("", self.grants[key][1]) for key in lost}
            case ev.ReservationGranted(request_id=request_id, kv_bytes=kv_bytes):
                self._grant(request_id, kv_bytes, record.meta.pos)
            case ev.ReservationBound(request_id=request_id, executor=executor):
                self._bind(request_id, executor, record.meta.pos)
            case ev.ReservationReleased(request_id=request_id, kv_bytes=kv_bytes):
                held = self.grants.pop(request_id, None)
                if held is None or held[1] != kv_bytes:
                    raise ViolationError(
                        f"{request_id} gives {kv_bytes} bytes back at {record.meta.pos} but holds {held and held[1]}"
                    )
            case ev.SessionKept(session_id=session_id, executor=executor, kv_bytes=kv_bytes):
                self.sessions[session_id] = (executor, kv_bytes)
            case ev.SessionEvicted(session_id=session_id):
                self.sessions.pop(session_id, None)
            case _:
                pass

    def _grant(self, request_id: str, kv_bytes: int, pos: int) -> None:
        held = self.grants.get(request_id)
        if held is not None:
            if held[1] != kv_bytes:
                raise ViolationError(f"the grant of {request_id} changes from {held[1]} to {kv_bytes} bytes at {pos}")
            return
        self.grants[request_id] = ("", kv_bytes)
        unbound = self._granted("")
        if not any(self._granted(pool) + unbound <= budget for pool, budget in self.budgets.items()):
            raise ViolationError(f"{kv_bytes} bytes for {request_id} at {pos} fit no pool beside what is granted")

    def _bind(self, request_id: str, executor: str, pos: int) -> None:
        if request_id not in self.grants:
            raise ViolationError(f"{request_id} is bound to {executor} at {pos} without a grant")
        self.grants[request_id] = (executor, self.grants[request_id][1])

    def _granted(self, pool: str) -> int:
        held = (*self.grants.values(), *self.sessions.values())
        return sum(kv_bytes for name, kv_bytes in held if name == pool)


class Watch:
    """Shows each record to every watcher, until one says that its invariant is broken."""

    def __init__(self) -> None:
        self.ends = OneTerminalEvent()
        self.reservations = ReservationsWithinBudget()
        self.broken: BrokenInvariant | None = None
        self._watchers: tuple[Watcher, ...] = (self.ends, self.reservations)

    def see(self, record: Record) -> None:
        """Take a control record in."""
        if self.broken is not None:
            return
        for watcher in self._watchers:
            try:
                watcher.see(record)
            except ViolationError as error:
                self.broken = BrokenInvariant(watcher.name, str(error))
                return
