"""What the router knows: executors, routes, and who served what lately. A value; routes cost O(log n)."""

import msgspec
from immutables import Map

from gptoss.actors.ordered import Ordered
from gptoss.messages.events import ExecutorLeft, RouteDecided

FAULTS_MAX = 4
PREFIXES_MAX = 2048
SESSIONS_MAX = 1024

replace = msgspec.structs.replace


class ExecutorView(msgspec.Struct, frozen=True):
    """An executor as the router knows it."""

    slots: int
    kv_budget_bytes: int
    multi_device: bool = False
    health: str = ""


class Route(msgspec.Struct, frozen=True):
    """Where a request runs; ``executor`` is empty while it waits, and what follows is what it waits with."""

    executor: str
    kv_bytes: int
    prompt_tokens: int = 0
    session_id: str = ""
    multi_device: bool = False
    prefix_hmacs: tuple[str, ...] = ()


class RouterState(msgspec.Struct, frozen=True):
    """Executors by name and routes by request.

    Attributes:
        numbers: of the routes, in the order in which the router first heard of them; ``arrivals`` is the next.
        waiting: requests without an executor, by number.
        bound: of each executor, how many requests run there and their KV bytes.
        prefixes: hash of a beginning -> the executor that served it last; the least recently used comes first.
        sessions: likewise of conversations.
        faults: when each executor failed lately.
    """

    executors: dict[str, ExecutorView] = {}
    routes: Map[str, Route] = Map()
    numbers: Map[str, int] = Map()
    arrivals: int = 0
    waiting: Ordered[str] = Ordered()
    bound: Map[str, tuple[int, int]] = Map()
    prefixes: dict[str, str] = {}
    sessions: dict[str, str] = {}
    faults: dict[str, tuple[int, ...]] = {}

    def bound_to(self, executor: str, request_id: str) -> tuple[int, int]:
        """How many requests other than this one run on an executor, and their KV bytes."""
        running, kv_bytes = self.bound.get(executor, (0, 0))
        route = self.routes.get(request_id)
        if route is not None and route.executor == executor:
            return running - 1, kv_bytes - route.kv_bytes
        return running, kv_bytes

    # ---- changes

    def with_executor(self, name: str, view: ExecutorView) -> "RouterState":
        """With an executor, or with another view of it."""
        return replace(self, executors={**self.executors, name: view})

    def with_route(self, request_id: str, route: Route) -> "RouterState":
        """With this route of a request, in the place of the one that it has."""
        number = self.numbers.get(request_id)
        state = self if number is None else self._unplaced(request_id, number)
        if number is None:
            number = self.arrivals
            state = replace(state, numbers=self.numbers.set(request_id, number), arrivals=number + 1)
        routes = state.routes.set(request_id, route)
        if not route.executor:
            return replace(state, routes=routes, waiting=state.waiting.put((number,), request_id))
        running, kv_bytes = state.bound.get(route.executor, (0, 0))
        bound = state.bound.set(route.executor, (running + 1, kv_bytes + route.kv_bytes))
        return replace(state, routes=routes, bound=bound)

    def without_route(self, request_id: str) -> "RouterState":
        """Without a request that the router knows."""
        state = self._unplaced(request_id, self.numbers[request_id])
        return replace(state, routes=self.routes.delete(request_id), numbers=self.numbers.delete(request_id))

    def _unplaced(self, request_id: str, number: int) -> "RouterState":
        """Without the place that a known request has, on an executor or among those who wait."""
        route = self.routes[request_id]
        if not route.executor:
            return replace(self, waiting=self.waiting.take((number,)))
        running, kv_bytes = self.bound[route.executor]
        return replace(self, bound=self.bound.set(route.executor, (running - 1, kv_bytes - route.kv_bytes)))

    def decided(self, event: RouteDecided) -> "RouterState":
        """Where a request runs or waits, and with that who will have its beginning."""
        route = Route(
            event.executor,
            event.kv_bytes,
            event.prompt_tokens,
            event.session_id,
            event.multi_device,
            event.prefix_hmacs,
        )
        state = self.with_route(event.request_id, route)
        if event.executor and event.prefix_hmacs:
            prefixes = _noted(self.prefixes, event.prefix_hmacs, event.executor, PREFIXES_MAX)
            state = replace(state, prefixes=prefixes)
        if event.executor and event.session_id:
            sessions = _noted(self.sessions, (event.session_id,), event.executor, SESSIONS_MAX)
            state = replace(state, sessions=sessions)
        return state

    def without_executor(self, event: ExecutorLeft) -> "RouterState":
        """An executor is gone: its routes are forgotten, and what its cache had is lost."""
        name, faults = event.executor, self.faults
        if event.fault_ns:
            faults = {**faults, name: (*faults.get(name, ()), event.fault_ns)[-FAULTS_MAX:]}
        state = replace(
            self,
            executors={other: view for other, view in self.executors.items() if other != name},
            prefixes={key: other for key, other in self.prefixes.items() if other != name},
            sessions={key: other for key, other in self.sessions.items() if other != name},
            faults=faults,
        )
        for request_id in [key for key, route in self.routes.items() if route.executor == name]:
            state = state.without_route(request_id)
        return state


class RouterRecord(msgspec.Struct, frozen=True):
    """``RouterState`` as a snapshot holds it; routes in the order of their numbers."""

    executors: dict[str, ExecutorView] = {}
    routes: dict[str, Route] = {}
    prefixes: dict[str, str] = {}
    sessions: dict[str, str] = {}
    faults: dict[str, tuple[int, ...]] = {}


def recorded(state: RouterState) -> RouterRecord:
    """What a snapshot holds of a state: the same state always gives the same bytes."""
    in_order = sorted(state.routes, key=state.numbers.__getitem__)
    routes = {request_id: state.routes[request_id] for request_id in in_order}
    return RouterRecord(state.executors, routes, state.prefixes, state.sessions, state.faults)


def restored(record: RouterRecord) -> RouterState:
    """The state that a snapshot holds."""
    state = RouterState(
        executors=record.executors, prefixes=record.prefixes, sessions=record.sessions, faults=record.faults
    )
    for request_id, route in record.routes.items():
        state = state.with_route(request_id, route)
    return state


def _noted(known: dict[str, str], keys: tuple[str, ...], executor: str, most: int) -> dict[str, str]:
    """``known`` with ``keys`` as the most recently used, without the least recently used beyond ``most``."""
    noted = known.copy()
    for key in keys:
        noted.pop(key, None)
        noted[key] = executor
    while len(noted) > most:
        del noted[next(iter(noted))]
    return noted
