"""The memory guard: who may use how much KV memory. It estimates, grants, binds and takes back.

Rules:
- A pool is one executor's KV budget. What is granted never exceeds it.
- A grant is first unbound: it counts against every pool until the router has chosen one, so that no choice can
  over-commit. Binding moves it to that pool; when a pool is lost, its grants are unbound again.
- Who asks again keeps the grant as it is, its pool included; a grant never grows.
- Every grant is released exactly once; a second release does nothing.
"""

import msgspec

from gptoss.actors.decider import Told
from gptoss.actors.directory import request_name
from gptoss.engine.memory_model import kv_bytes
from gptoss.messages import commands as cmd
from gptoss.messages.commands import Command
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
)
from gptoss.messages.model import EngineCapabilities, KvLayout


class Grant(msgspec.Struct, frozen=True):
    """Memory set aside for one request; ``executor`` is empty while unbound."""

    kv_bytes: int
    executor: str = ""


class GuardState(msgspec.Struct, frozen=True):
    """Pools by executor and grants by request.

    Attributes:
        kv_layout: of the newest pool that there ever was; None before the first.
    """

    pools: dict[str, EngineCapabilities] = {}
    grants: dict[str, Grant] = {}
    kv_layout: KvLayout | None = None

    def reserved_bytes(self, executor: str) -> int:
        """Bytes granted on one executor; ``""`` counts the unbound ones."""
        return sum(grant.kv_bytes for grant in self.grants.values() if grant.executor == executor)

    def free_bytes_max(self) -> int:
        """The largest request that can be granted now, in bytes."""
        free = [pool.kv_budget_bytes - self.reserved_bytes(name) for name, pool in self.pools.items()]
        return max(0, max(free, default=0) - self.reserved_bytes(""))

    def pressure(self) -> float:
        """Share of all budgets that is granted, 0 to 1."""
        budget = sum(pool.kv_budget_bytes for pool in self.pools.values())
        return sum(grant.kv_bytes for grant in self.grants.values()) / budget if budget else 0.0


class MemoryGuard:
    """The guard's decisions."""

    name = "memory"

    def initial(self) -> GuardState:
        """No pools, no grants."""
        return GuardState()

    def decide(self, state: GuardState, command: Command) -> list[Event]:
        """See the module's rules."""
        match command:
            case cmd.SetMemoryPool():
                return [MemoryPoolSet(executor=command.executor, capabilities=command.capabilities)]
            case cmd.DropMemoryPool(executor=executor) if executor in state.pools:
                lost = sum(grant.executor == executor for grant in state.grants.values())
                return [MemoryPoolDropped(executor=executor, reservations_lost=lost)]
            case cmd.EstimateMemory():
                return [_estimate(state, command)]
            case cmd.ReserveMemory():
                return [_reserve(state, command)]
            case cmd.BindMemory() if command.request_id in state.grants:
                return [ReservationBound(request_id=command.request_id, executor=command.executor)]
            case cmd.ReleaseMemory() if command.request_id in state.grants:
                grant = state.grants[command.request_id]
                return [
                    ReservationReleased(request_id=command.request_id, kv_bytes=grant.kv_bytes, executor=grant.executor)
                ]
            case cmd.ObserveMemory():
                return [_observe(state, command)]
            case _:
                return []

    def evolve(self, state: GuardState, event: Event) -> GuardState:
        """Keep the ledger."""
        pools, grants = state.pools, state.grants
        match event:
            case MemoryPoolSet():
                return GuardState({**pools, event.executor: event.capabilities}, grants, event.capabilities.kv_layout)
            case MemoryPoolDropped():
                kept = {name: pool for name, pool in pools.items() if name != event.executor}
                unbound = {
                    key: Grant(grant.kv_bytes) if grant.executor == event.executor else grant
                    for key, grant in grants.items()
                }
                return GuardState(kept, unbound, state.kv_layout)
            case ReservationGranted():
                return msgspec.structs.replace(state, grants={event.request_id: Grant(event.kv_bytes), **grants})
            case ReservationBound():
                grant = Grant(grants[event.request_id].kv_bytes, event.executor)
                return msgspec.structs.replace(state, grants={**grants, event.request_id: grant})
            case ReservationReleased():
                kept_grants = {key: grant for key, grant in grants.items() if key != event.request_id}
                return msgspec.structs.replace(state, grants=kept_grants)
            case _:
                return state

    def tells(self, state: GuardState, event: Event, now_ns: int) -> list[Told]:
        """Answer requests with estimates, and admission with grants."""
        match event:
            case MemoryEstimated():
                ready = cmd.EstimateReady(now_ns=now_ns, kv_bytes=event.kv_bytes, kv_bytes_prompt=event.kv_bytes_prompt)
                return [(request_name(event.request_id), ready)]
            case ReservationGranted():
                return [("admission", cmd.MemoryGranted(now_ns=now_ns, request_id=event.request_id))]
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
            case _:
                return []


def _estimate(state: GuardState, command: cmd.EstimateMemory) -> MemoryEstimated:
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
    )


def _reserve(state: GuardState, command: cmd.ReserveMemory) -> Event:
    free = state.free_bytes_max()
    held = state.grants.get(command.request_id)
    if command.kv_bytes <= (held.kv_bytes if held else free):
        return ReservationGranted(
            request_id=command.request_id,
            kv_bytes=held.kv_bytes if held else command.kv_bytes,
            kv_bytes_free_max=free,
            unbound_bytes=state.reserved_bytes(""),
        )
    return ReservationRefused(
        request_id=command.request_id,
        kv_bytes=command.kv_bytes,
        kv_bytes_free_max=free,
        pressure=state.pressure(),
    )


def _observe(state: GuardState, command: cmd.ObserveMemory) -> MemoryObserved:
    return MemoryObserved(
        executor=command.executor,
        used_bytes=command.used_bytes,
        total_bytes=command.total_bytes,
        kv_bytes_in_use=command.kv_bytes_in_use,
        kv_bytes_reserved=state.reserved_bytes(command.executor),
        pressure=state.pressure(),
        devices=command.devices,
    )
