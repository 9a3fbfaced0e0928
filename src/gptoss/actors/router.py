"""The router: which executor runs an admitted request.

First policy: of the executors that serve, have a free slot and enough unbound KV memory, the least loaded by share of
slots, then by share of KV memory, then by name. A request that none can take now waits until one can; its own
deadline bounds that wait.
"""

import msgspec

from gptoss.actors.decider import Told
from gptoss.actors.directory import request_name
from gptoss.messages import commands as cmd
from gptoss.messages.commands import Command
from gptoss.messages.envelope import Event
from gptoss.messages.events import ExecutorJoined, ExecutorLeft, RouteCandidate, RouteDecided, RouteForgotten


class ExecutorView(msgspec.Struct, frozen=True):
    """An executor as the router knows it."""

    slots: int
    kv_budget_bytes: int


class Route(msgspec.Struct, frozen=True):
    """Where a request runs; ``executor`` is empty while it waits."""

    executor: str
    kv_bytes: int


class RouterState(msgspec.Struct, frozen=True):
    """Executors by name and routes by request."""

    executors: dict[str, ExecutorView] = {}
    routes: dict[str, Route] = {}


class Router:
    """The router's decisions."""

    name = "router"

    def initial(self) -> RouterState:
        """No executors, no routes."""
        return RouterState()

    def decide(self, state: RouterState, command: Command) -> list[Event]:
        """See the module's policy."""
        match command:
            case cmd.SetExecutor():
                joined = ExecutorJoined(
                    executor=command.executor, slots=command.slots, kv_budget_bytes=command.kv_budget_bytes
                )
                return [joined, *self._route_waiting(self.evolve(state, joined))]
            case cmd.DropExecutor() if command.executor in state.executors:
                return [ExecutorLeft(executor=command.executor, reason=command.reason)]
            case cmd.RouteRequest():
                return [_choose(state, command.request_id, command.kv_bytes)]
            case cmd.ForgetRoute() if command.request_id in state.routes:
                executor = state.routes[command.request_id].executor
                forgotten = RouteForgotten(request_id=command.request_id, executor=executor)
                return [forgotten, *self._route_waiting(self.evolve(state, forgotten))]
            case _:
                return []

    def evolve(self, state: RouterState, event: Event) -> RouterState:
        """Keep executors and routes."""
        executors, routes = state.executors, state.routes
        match event:
            case ExecutorJoined():
                view = ExecutorView(event.slots, event.kv_budget_bytes)
                return RouterState({**executors, event.executor: view}, routes)
            case ExecutorLeft():
                kept = {name: view for name, view in executors.items() if name != event.executor}
                return RouterState(kept, {k: r for k, r in routes.items() if r.executor != event.executor})
            case RouteDecided():
                return RouterState(executors, {**routes, event.request_id: Route(event.executor, event.kv_bytes)})
            case RouteForgotten():
                return RouterState(executors, {k: r for k, r in routes.items() if k != event.request_id})
            case _:
                return state

    def tells(self, state: RouterState, event: Event, now_ns: int) -> list[Told]:
        """Tell the memory guard where a reservation is, and the request where it runs."""
        if not isinstance(event, RouteDecided) or not event.executor:
            return []
        request_id, executor = event.request_id, event.executor
        return [
            ("memory", cmd.BindMemory(now_ns=now_ns, request_id=request_id, executor=executor)),
            (request_name(request_id), cmd.RouteFound(now_ns=now_ns, executor=executor)),
        ]

    def _route_waiting(self, state: RouterState) -> list[Event]:
        events: list[Event] = []
        for request_id, route in state.routes.items():
            if not route.executor:
                decided = _choose(state, request_id, route.kv_bytes)
                if decided.executor:
                    events.append(decided)
                    state = self.evolve(state, decided)
        return events


def _choose(state: RouterState, request_id: str, kv_bytes: int) -> RouteDecided:
    candidates = tuple(_candidate(state, name, request_id) for name in sorted(state.executors))
    able = [c for c in candidates if c.running < c.slots and c.kv_bytes_free >= kv_bytes]
    if able:
        best = min(able, key=lambda c: (c.score, c.executor))
        executor, reason = best.executor, "least_loaded" if len(able) > 1 else "only_one"
    else:
        executor, reason = "", "no_room" if candidates else "no_executor"
    return RouteDecided(
        request_id=request_id, executor=executor, reason=reason, candidates=candidates, kv_bytes=kv_bytes
    )


def _candidate(state: RouterState, name: str, request_id: str) -> RouteCandidate:
    view = state.executors[name]
    bound = [r.kv_bytes for k, r in state.routes.items() if r.executor == name and k != request_id]
    kv_bound = sum(bound)
    kv_share = kv_bound / view.kv_budget_bytes if view.kv_budget_bytes else 1.0
    return RouteCandidate(
        executor=name,
        running=len(bound),
        slots=view.slots,
        kv_bytes_bound=kv_bound,
        kv_bytes_free=view.kv_budget_bytes - kv_bound,
        score=round(len(bound) / max(1, view.slots) + kv_share, 6),
    )
