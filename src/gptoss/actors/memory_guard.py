"""The memory guard: who may use how much KV memory. It estimates, grants, binds and takes back.

Rules:
- A pool is one executor's KV budget, less what its device turns out not to have. What is granted and kept never exceeds
  it, except where memory was lost under it.
- A grant is first unbound: it counts against every pool until the router has chosen one, so that no choice can
  over-commit. Binding moves it to that pool; when a pool is lost, its grants are unbound again.
- Who asks again keeps the grant as it is, its pool included; a grant never grows.
- Every grant is released exactly once; a second release does nothing.
- What an engine keeps for a session counts against its pool, on top of what the session's next turn reserves: in both KV
  layouts that turn takes its memory whole. Requests come first: idle sessions are given up, the least recently used
  first, as soon as a request needs their memory, and from the pressure level ``evict`` on in any case.
- A session is idle while no reservation of it is held. One that is in use is never given up.
"""

from collections.abc import Callable
from typing import cast

import msgspec

from gptoss.actors import memory_state as states
from gptoss.actors.decider import DeciderActor, Told
from gptoss.actors.directory import executor_name, request_name
from gptoss.actors.memory_state import Grant, GuardRecord, GuardState
from gptoss.actors.pressure import PressureLevels, is_reached
from gptoss.engine.memory_model import kv_bytes, tokens_within
from gptoss.messages import commands as cmd
from gptoss.messages.commands import Command, MemoryAdvice
from gptoss.messages.envelope import Event
from gptoss.messages.events import (
    MemoryEstimated,
    MemoryObserved,
    MemoryPoolDropped,
    MemoryPoolSet,
    ReservationBound,
    ReservationGranted,
    ReservationRefused,
    ReservationReleased,
    SessionEvicted,
    SessionKept,
)
from gptoss.messages.model import KvLayout

SESSIONS_SHARE = 0.5
"""Of the engines' prefix caches, what sessions may pin; the rest is for beginnings that many requests share."""
SESSION_PERIOD_S = 1.0
"""How often the guard looks for sessions that nobody uses any more."""


class GuardPolicy(msgspec.Struct, frozen=True, kw_only=True):
    """Settings that the guard decides by.

    Attributes:
        version: of the rules. 1, which recordings of older servers need, gives no advice and sees no lack of memory.
        levels: of pressure.
        session_bytes_max: of one session; 0 keeps none. ``sessions_bytes_max``: of all, at most what the caches hold.
        session_idle_ns: after which an idle session is given up.
    """

    version: int = 1
    levels: PressureLevels = PressureLevels()
    session_bytes_max: int = 0
    sessions_bytes_max: int = 0
    session_idle_ns: int = 0


class MemoryGuard:
    """The guard's decisions."""

    name = "memory"
    record_type = GuardRecord

    def __init__(self, policy: GuardPolicy | None = None) -> None:
        self.policy = policy or GuardPolicy()
        self._is_current = self.policy.version > 1

    def initial(self) -> GuardState:
        """No pools, no grants."""
        return GuardState()

    def recorded(self, state: GuardState) -> GuardRecord:
        """See ``decider.KeepsRecord``."""
        return states.recorded(state)

    def restored(self, record: GuardRecord) -> GuardState:
        """See ``decider.KeepsRecord``."""
        return states.restored(record)

    def has_overdue(self, state: GuardState, now_ns: int) -> bool:
        """Whether a session is idle for too long."""
        return bool(state.book.idle) and state.book.idle.first()[0][0] + self.policy.session_idle_ns <= now_ns

    def decide(self, state: GuardState, command: Command) -> list[Event]:
        """See the module's rules."""
        match command:
            case cmd.SetMemoryPool():
                return [MemoryPoolSet(executor=command.executor, capabilities=command.capabilities)]
            case cmd.DropMemoryPool(executor=executor) if executor in state.pools:
                return self._drop_pool(state, executor)
            case cmd.EstimateMemory():
                return [self._estimate(state, command)]
            case cmd.ReserveMemory():
                return self._reserve(state, command)
            case cmd.BindMemory() if command.request_id in state.grants:
                return [ReservationBound(request_id=command.request_id, executor=command.executor)]
            case cmd.ReleaseMemory() if command.request_id in state.grants:
                return self._release(state, command)
            case cmd.ObserveMemory():
                return self._observe(state, command)
            case cmd.KeepSession() if command.executor in state.pools:
                return self._keep(state, command)
            case cmd.CheckSessions():
                return self._evict(state, "idle", lambda left: self.has_overdue(left, command.now_ns))
            case _:
                return []

    def evolve(self, state: GuardState, event: Event) -> GuardState:
        """Keep the ledger."""
        replace = msgspec.structs.replace
        match event:
            case MemoryPoolSet():
                pools = {**state.pools, event.executor: event.capabilities}
                lacking = {name: lack for name, lack in state.lacking.items() if name != event.executor}
                return replace(state, pools=pools, lacking=lacking, kv_layout=event.capabilities.kv_layout)
            case MemoryPoolDropped():
                return state.without_pool(event.executor)
            case ReservationGranted() if event.request_id not in state.grants:
                granted = state.with_grant(event.request_id, Grant(event.kv_bytes, session_id=event.session_id))
                return replace(granted, book=state.book.enter(event.session_id)) if event.session_id else granted
            case ReservationBound():
                return state.with_grant(
                    event.request_id, replace(state.grants[event.request_id], executor=event.executor)
                )
            case ReservationReleased():
                session_id = state.grants[event.request_id].session_id
                released = state.with_grant(event.request_id, None)
                return replace(released, book=state.book.exit(session_id, event.at_ns)) if session_id else released
            case MemoryObserved() if event.executor in state.pools:
                lacking = {**state.lacking, event.executor: event.lacking_bytes}
                return replace(state, lacking={name: lack for name, lack in lacking.items() if lack})
            case SessionKept():
                book = state.book.keep(event.session_id, event.executor, event.tokens, event.kv_bytes, event.at_ns)
                return replace(state, book=book)
            case SessionEvicted():
                return replace(state, book=state.book.drop(event.session_id))
            case _:
                return state

    def tells(self, state: GuardState, event: Event, now_ns: int) -> list[Told]:
        """Answer requests with estimates, and admission with grants; tell engines what they need not keep."""
        match event:
            case MemoryEstimated():
                ready = cmd.EstimateReady(
                    now_ns=now_ns,
                    kv_bytes=event.kv_bytes,
                    kv_bytes_prompt=event.kv_bytes_prompt,
                    advice=event.advice,
                )
                return [(request_name(event.request_id), ready)]
            case ReservationGranted():
                granted = cmd.MemoryGranted(now_ns=now_ns, request_id=event.request_id, pressure=event.pressure)
                return [("admission", granted)]
            case ReservationRefused():
                refused = cmd.MemoryRefused(
                    now_ns=now_ns,
                    request_id=event.request_id,
                    kv_bytes_free_max=event.kv_bytes_free_max,
                    pressure=event.pressure,
                )
                return [("admission", refused)]
            case ReservationReleased() | MemoryPoolSet():
                return [("admission", cmd.MemoryFreed(now_ns=now_ns))]
            case SessionEvicted() if event.reason != "executor_lost":
                drop = cmd.DropSession(now_ns=now_ns, session_id=event.session_id)
                return [(executor_name(event.executor), drop)]
            case _:
                return []

    # ---- one decision each

    def _drop_pool(self, state: GuardState, executor: str) -> list[Event]:
        lost = sum(grant.executor == executor for grant in state.grants.values())
        gone = sorted(name for name, session in state.book.sessions.items() if session.executor == executor)
        dropped = [self._evicted(state, name, "executor_lost") for name in gone]
        return [*dropped, MemoryPoolDropped(executor=executor, reservations_lost=lost)]

    def _estimate(self, state: GuardState, command: cmd.EstimateMemory) -> MemoryEstimated:
        # Executors serve the same model. Before the first has loaded there is nothing to compute, and nobody is let in.
        layout = state.kv_layout
        prompt = kv_bytes(layout, command.prompt_tokens) if layout else 0
        whole = kv_bytes(layout, command.prompt_tokens + command.max_tokens) if layout else 0
        return MemoryEstimated(
            request_id=command.request_id,
            prompt_tokens=command.prompt_tokens,
            max_tokens=command.max_tokens,
            kv_bytes=whole,
            kv_bytes_prompt=prompt,
            advice=_advice(state, layout, command) if layout and self._is_current else None,
        )

    def _reserve(self, state: GuardState, command: cmd.ReserveMemory) -> list[Event]:
        free = state.free_bytes_max()
        held = state.grants.get(command.request_id)
        evicted: list[Event] = []
        if held is None and free < command.kv_bytes <= state.free_bytes_max_without_idle():
            evicted = self._make_room(state, command)
            for event in evicted:
                state = self.evolve(state, event)
            free = state.free_bytes_max()
        if command.kv_bytes > (held.kv_bytes if held else free):
            refused = ReservationRefused(
                request_id=command.request_id,
                kv_bytes=command.kv_bytes,
                kv_bytes_free_max=free,
                pressure=state.pressure(),
            )
            return [*evicted, refused]
        granted = ReservationGranted(
            request_id=command.request_id,
            kv_bytes=held.kv_bytes if held else command.kv_bytes,
            kv_bytes_free_max=free,
            unbound_bytes=state.reserved_bytes(""),
            session_id=command.session_id,
        )
        if not self._is_current:
            return [granted]
        after = self.evolve(state, granted)
        granted = msgspec.structs.replace(granted, pressure=after.pressure())
        return [*evicted, granted, *self._relieve(after)]

    def _release(self, state: GuardState, command: cmd.ReleaseMemory) -> list[Event]:
        grant = state.grants[command.request_id]
        released = ReservationReleased(
            request_id=command.request_id,
            kv_bytes=grant.kv_bytes,
            executor=grant.executor,
            at_ns=command.now_ns if grant.session_id else 0,
        )
        if not grant.session_id:
            return [released]
        return [released, *self._relieve(self.evolve(state, released))]

    def _observe(self, state: GuardState, command: cmd.ObserveMemory) -> list[Event]:
        pool = state.pools.get(command.executor)
        lacking = 0
        if self._is_current and pool is not None and command.free_bytes >= 0 and not pool.kv_pages:
            # Pages were taken at load; of slots, what neither requests nor cached prefixes hold is still to be had.
            untouched = pool.kv_budget_bytes - command.kv_bytes_in_use - command.prefix_cache_bytes
            lacking = max(0, untouched + pool.workspace_bytes - command.free_bytes)
        observed = MemoryObserved(
            executor=command.executor,
            used_bytes=command.used_bytes,
            total_bytes=command.total_bytes,
            kv_bytes_in_use=command.kv_bytes_in_use,
            kv_bytes_reserved=state.reserved_bytes(command.executor),
            pressure=state.pressure(),
            free_bytes=command.free_bytes if self._is_current else -1,
            lacking_bytes=lacking,
            session_bytes=state.book.kept_on(command.executor),
            devices=command.devices,
        )
        if not self._is_current:
            return [observed]
        after = self.evolve(state, observed)
        observed = msgspec.structs.replace(observed, pressure=after.pressure())
        return [observed, *self._relieve(after)]

    def _keep(self, state: GuardState, command: cmd.KeepSession) -> list[Event]:
        before = state.book.sessions.get(command.session_id)
        events: list[Event] = []
        if before is not None and before.kv_bytes and before.executor != command.executor:
            events.append(self._evicted(state, command.session_id, "moved"))
            state = self.evolve(state, events[-1])
        kept = SessionKept(
            session_id=command.session_id,
            executor=command.executor,
            tokens=command.tokens,
            kv_bytes=command.kv_bytes,
            at_ns=command.now_ns,
            pressure=0.0,
        )
        after = self.evolve(state, kept)
        events.append(msgspec.structs.replace(kept, pressure=after.pressure()))
        if command.kv_bytes > self.policy.session_bytes_max:
            events.append(self._evicted(after, command.session_id, "too_large"))
            after = self.evolve(after, events[-1])
        return [*events, *self._relieve(after)]

    # ---- giving up sessions

    def _make_room(self, state: GuardState, command: cmd.ReserveMemory) -> list[Event]:
        """Give up idle sessions of one executor until the request fits there; its own session goes last."""
        able = [name for name in state.pools if state.free_bytes(name) + state.book.idle_on(name) >= command.kv_bytes]
        target = max(able, key=lambda name: (state.free_bytes(name), name))
        names = [name for name in state.book.idle if state.book.sessions[name].executor == target]
        names.sort(key=lambda name: name == command.session_id)
        events: list[Event] = []
        for name in names:
            if state.free_bytes(target) >= command.kv_bytes:
                break
            events.append(self._evicted(state, name, "memory"))
            state = self.evolve(state, events[-1])
        return events

    def _relieve(self, state: GuardState) -> list[Event]:
        """Give up idle sessions while they have more than they may, or while pressure is too high."""
        caches = sum(pool.prefix_cache_bytes for pool in state.pools.values())
        limit = min(self.policy.sessions_bytes_max, int(SESSIONS_SHARE * caches))
        events = self._evict(state, "sessions_full", lambda left: left.book.total_bytes > limit)
        for event in events:
            state = self.evolve(state, event)
        level = self.policy.levels.evict
        return [*events, *self._evict(state, "pressure", lambda left: is_reached(level, left.pressure()))]

    def _evict(self, state: GuardState, reason: str, is_needed: Callable[[GuardState], bool]) -> list[Event]:
        """Give up idle sessions, the least recently used first, as long as it is needed."""
        events: list[Event] = []
        while state.book.idle and is_needed(state):
            events.append(self._evicted(state, state.book.idle.first()[1], reason))
            state = self.evolve(state, events[-1])
        return events

    def _evicted(self, state: GuardState, name: str, reason: str) -> SessionEvicted:
        session = state.book.sessions[name]
        return SessionEvicted(
            session_id=name,
            executor=session.executor,
            reason=reason,
            kv_bytes=session.kv_bytes,
            used_ns=session.used_ns,
            pressure=state.pressure(),
        )


def _advice(state: GuardState, layout: KvLayout, command: cmd.EstimateMemory) -> MemoryAdvice:
    prompt, wanted = command.prompt_tokens, command.max_tokens
    largest = max((pool.kv_budget_bytes for pool in state.pools.values()), default=0)
    half = max(1, wanted // 2)
    fit = max(0, min(wanted, tokens_within(layout, largest, prompt + wanted) - prompt))
    return MemoryAdvice(
        pressure=round(state.pressure(), 6),
        max_tokens_half=half,
        kv_bytes_half=kv_bytes(layout, prompt + half),
        max_tokens_fit=fit,
        kv_bytes_fit=kv_bytes(layout, prompt + fit),
    )


class MemoryActor(DeciderActor[GuardState]):
    """The guard with a clock for sessions that nobody uses."""

    def on_start(self) -> None:
        """Look for unused sessions now and then."""
        super().on_start()
        system = self.context.system
        self._checks = system.send_every(
            SESSION_PERIOD_S, self.context.ref, lambda: cmd.CheckSessions(now_ns=system.now_ns())
        )

    def on_receive(self, message: Command) -> None:
        """Consume a command; a look that finds no session overdue is no decision and leaves no trace."""
        guard = cast("MemoryGuard", self.decider)
        if isinstance(message, cmd.CheckSessions) and not guard.has_overdue(self.state, message.now_ns):
            return
        super().on_receive(message)

    def on_stop(self) -> None:
        """Stop the clock."""
        self._checks.cancel()
