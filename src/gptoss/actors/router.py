"""The router: which executor runs an admitted request.

Rules:
- Only an executor that serves, has a free slot and enough unbound KV memory comes into question. A request that none can
  take now waits until one can; its own deadline bounds that wait.
- By size: a prompt over ``multi_prompt_len``, KV memory over ``multi_kv_bytes``, or anything while the executors with one device
  hold more than ``multi_pressure`` of their memory goes to an executor that spans several devices, where there is one;
  everything else to one with a single device. Whoever finds no room on the right kind takes the other.
- By health: one that is suspect is taken when no other comes into question; each failure within a minute counts as a quarter
  of an executor's load.
- By load: share of slots plus share of KV memory.
- By affinity: who served the same beginning of a prompt lately has it in its prefix cache, which is worth as much as half of
  an executor's load at most; who served the same conversation last, a fifth.
- Then by name. The router sees no tokens: ``prefix_hmacs`` are keyed hashes of beginnings, made where the prompt is known,
  so that each decision is a function of recorded commands.
"""

import msgspec

from gptoss.actors import router_state as states
from gptoss.actors.decider import Told
from gptoss.actors.directory import request_name
from gptoss.actors.router_state import ExecutorView, Route, RouterRecord, RouterState
from gptoss.clock import NS_PER_S
from gptoss.messages import commands as cmd
from gptoss.messages.commands import PREFIX_TOKENS, Command
from gptoss.messages.envelope import Event
from gptoss.messages.events import (
    ExecutorDrained,
    ExecutorJoined,
    ExecutorLeft,
    ExecutorRated,
    RouteCandidate,
    RouteDecided,
    RouteForgotten,
)

PREFIX_WORTH = 0.5
SESSION_WORTH = 0.2
FAULT_COST = 0.25
FAULT_NS = 60 * NS_PER_S


class RouterPolicy(msgspec.Struct, frozen=True, kw_only=True):
    """Above which a request goes to an executor that spans several devices, where there is one."""

    multi_prompt_len: int = 8000
    multi_kv_bytes: int = 6000 * 1024 * 1024
    multi_pressure: float = 0.85


class Router:
    """The router's decisions."""

    name = "router"
    record_type = RouterRecord

    def __init__(self, policy: RouterPolicy | None = None) -> None:
        self.policy = policy or RouterPolicy()

    def initial(self) -> RouterState:
        """No executors, no routes."""
        return RouterState()

    def recorded(self, state: RouterState) -> RouterRecord:
        """See ``decider.KeepsRecord``."""
        return states.recorded(state)

    def restored(self, record: RouterRecord) -> RouterState:
        """See ``decider.KeepsRecord``."""
        return states.restored(record)

    def decide(self, state: RouterState, command: Command) -> list[Event]:
        """See the module's rules."""
        match command:
            case cmd.SetExecutor():
                joined = ExecutorJoined(
                    executor=command.executor,
                    slots=command.slots,
                    kv_budget_bytes=command.kv_budget_bytes,
                    multi_device=command.multi_device,
                )
                return self._then_route(state, joined, command.now_ns)
            case cmd.DropExecutor() if command.executor in state.executors:
                fault_ns = command.now_ns if command.fault else 0
                return [ExecutorLeft(executor=command.executor, reason=command.reason, fault_ns=fault_ns)]
            case cmd.DrainExecutor() if command.executor in state.executors:
                running, _ = state.bound_to(command.executor, "")
                return [ExecutorDrained(executor=command.executor, running=running)]
            case cmd.RateExecutor() if command.executor in state.executors:
                return self._rate(state, command)
            case cmd.RouteRequest():
                return [self._choose(state, command.request_id, _route_of(state, command), command.now_ns)]
            case cmd.ForgetRoute() if command.request_id in state.routes:
                executor = state.routes[command.request_id].executor
                forgotten = RouteForgotten(request_id=command.request_id, executor=executor)
                return self._then_route(state, forgotten, command.now_ns)
            case _:
                return []

    def evolve(self, state: RouterState, event: Event) -> RouterState:
        """Keep executors, routes, and who has what."""
        match event:
            case ExecutorJoined():
                view = ExecutorView(event.slots, event.kv_budget_bytes, event.multi_device)
                return state.with_executor(event.executor, view)
            case ExecutorLeft():
                return state.without_executor(event)
            case ExecutorDrained() | ExecutorRated():
                health = "draining" if isinstance(event, ExecutorDrained) else "suspect" if event.suspect else ""
                view = msgspec.structs.replace(state.executors[event.executor], health=health)
                return state.with_executor(event.executor, view)
            case RouteDecided():
                return state.decided(event)
            case RouteForgotten():
                return state.without_route(event.request_id)
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

    # ---- parts

    def _rate(self, state: RouterState, command: cmd.RateExecutor) -> list[Event]:
        health = state.executors[command.executor].health
        if health == "draining" or (health == "suspect") == command.suspect:
            return []
        rated = ExecutorRated(executor=command.executor, suspect=command.suspect, silent_ms=command.silent_ms)
        return [rated] if command.suspect else self._then_route(state, rated, command.now_ns)

    def _then_route(self, state: RouterState, first: Event, now_ns: int) -> list[Event]:
        """``first``, and a choice for each who waits and can go now."""
        events = [first]
        state = self.evolve(state, first)
        for request_id in state.waiting:
            decided = self._choose(state, request_id, state.routes[request_id], now_ns)
            if decided.executor:
                events.append(decided)
                state = self.evolve(state, decided)
        return events

    def _choose(self, state: RouterState, request_id: str, route: Route, now_ns: int) -> RouteDecided:
        candidates = tuple(_candidate(state, name, request_id, route, now_ns) for name in sorted(state.executors))
        wish = self._wish(candidates, route)
        executor, reason = _best(candidates, route, wish)
        return RouteDecided(
            request_id=request_id,
            executor=executor,
            reason=reason,
            candidates=candidates,
            kv_bytes=route.kv_bytes,
            prompt_tokens=route.prompt_tokens,
            session_id=route.session_id,
            multi_device=route.multi_device,
            prefix_hmacs=route.prefix_hmacs,
        )

    def _wish(self, candidates: tuple[RouteCandidate, ...], route: Route) -> str:
        """Why the request should run on several devices; empty if it need not."""
        if all(not candidate.multi_device for candidate in candidates):
            return ""
        if 0 < self.policy.multi_prompt_len < route.prompt_tokens:
            return "large_prompt"
        if 0 < self.policy.multi_kv_bytes < route.kv_bytes:
            return "large_kv"
        if route.multi_device:
            return "admission"
        singles = [candidate for candidate in candidates if not candidate.multi_device]
        bound = sum(candidate.kv_bytes_bound for candidate in singles)
        budget = bound + sum(candidate.kv_bytes_free for candidate in singles)
        return "pressure" if budget and 0 < self.policy.multi_pressure < bound / budget else ""


def _route_of(state: RouterState, command: cmd.RouteRequest) -> Route:
    # What no choice depends on is not recorded with it.
    has_kinds = any(view.multi_device for view in state.executors.values())
    is_known = bool(has_kinds or command.prefix_hmacs or command.session_id)
    return Route(
        "",
        command.kv_bytes,
        command.prompt_tokens if is_known else 0,
        command.session_id,
        command.multi_device,
        command.prefix_hmacs,
    )


def _best(candidates: tuple[RouteCandidate, ...], route: Route, wish: str) -> tuple[str, str]:
    """The executor, and why."""
    able = [
        each
        for each in candidates
        if each.running < each.slots and each.kv_bytes_free >= route.kv_bytes and each.health != "draining"
    ]
    if not able:
        return "", "no_room" if candidates else "no_executor"
    right = [each for each in able if each.multi_device == bool(wish)]
    pools = [[each for each in pool if not each.health] for pool in (right, able)] + [right, able]
    pool = next(pool for pool in pools if pool)
    best = min(pool, key=lambda each: (each.score, each.executor))
    return best.executor, _reason(best, wish, is_only=len(able) == 1)


def _reason(best: RouteCandidate, wish: str, *, is_only: bool) -> str:
    if best.multi_device:
        return wish or "singles_full"
    if best.cached_tokens:
        return "prefix"
    if best.session:
        return "session"
    return "only_one" if is_only else "least_loaded"


def _candidate(state: RouterState, name: str, request_id: str, route: Route, now_ns: int) -> RouteCandidate:
    view = state.executors[name]
    running, kv_bound = state.bound_to(name, request_id)
    kv_share = kv_bound / view.kv_budget_bytes if view.kv_budget_bytes else 1.0
    cached = _cached_tokens(state, name, route)
    session = bool(route.session_id) and state.sessions.get(route.session_id) == name
    faults = sum(now_ns - fault_ns < FAULT_NS for fault_ns in state.faults.get(name, ()))
    worth = PREFIX_WORTH * cached / max(1, route.prompt_tokens) if cached else SESSION_WORTH * session
    return RouteCandidate(
        executor=name,
        running=running,
        slots=view.slots,
        kv_bytes_bound=kv_bound,
        kv_bytes_free=view.kv_budget_bytes - kv_bound,
        score=round(running / max(1, view.slots) + kv_share + FAULT_COST * faults - worth, 6),
        multi_device=view.multi_device,
        cached_tokens=cached,
        session=session,
        faults=faults,
        health=view.health,
    )


def _cached_tokens(state: RouterState, name: str, route: Route) -> int:
    """How much of the prompt an executor has, as far as the hashes tell: the longest beginning that it served last."""
    for index in range(len(route.prefix_hmacs) - 1, -1, -1):
        if state.prefixes.get(route.prefix_hmacs[index]) == name:
            return PREFIX_TOKENS << index
    return 0
