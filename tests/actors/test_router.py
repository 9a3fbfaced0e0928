"""The router as given events, when command, then events."""

from gptoss.actors.router import Router, RouterState
from gptoss.messages import commands as cmd
from gptoss.messages import events as ev
from gptoss.messages.commands import Command
from gptoss.messages.envelope import Event

ROUTER = Router()


def run(*commands: Command, state: RouterState | None = None) -> tuple[RouterState, list[Event]]:
    state = state or ROUTER.initial()
    events: list[Event] = []
    for command in commands:
        events = ROUTER.decide(state, command)
        for event in events:
            state = ROUTER.evolve(state, event)
    return state, events


def joins(name: str, slots: int = 2, kv: int = 100) -> cmd.SetExecutor:
    return cmd.SetExecutor(now_ns=0, executor=name, slots=slots, kv_budget_bytes=kv)


def route(name: str, kv: int = 10) -> cmd.RouteRequest:
    return cmd.RouteRequest(now_ns=0, request_id=name, kv_bytes=kv, prompt_tokens=1)


def choices(events: list[Event]) -> list[tuple[str, str]]:
    return [(e.request_id, e.executor) for e in events if isinstance(e, ev.RouteDecided)]


def test_requests_spread_over_the_least_loaded() -> None:
    state, events = run(joins("cpu:0"), joins("cpu:1"), route("a"))
    assert choices(events) == [("a", "cpu:0")]
    _, events = run(route("b"), state=state)
    assert choices(events) == [("b", "cpu:1")]


def test_a_decision_records_every_candidate_it_saw() -> None:
    _, events = run(joins("cpu:0"), joins("cpu:1", kv=5), route("a"))
    assert isinstance(events[0], ev.RouteDecided)
    assert [(c.executor, c.kv_bytes_free) for c in events[0].candidates] == [("cpu:0", 100), ("cpu:1", 5)]
    assert (events[0].executor, events[0].reason) == ("cpu:0", "only_one")


def test_without_an_executor_a_request_waits_for_one_and_then_goes_there() -> None:
    state, events = run(route("a"))
    assert choices(events) == [("a", "")]
    _, events = run(joins("cpu:0"), state=state)
    assert choices(events) == [("a", "cpu:0")]


def test_a_full_executor_takes_the_next_when_one_leaves() -> None:
    state, events = run(joins("cpu:0", slots=1), route("a"), route("b"))
    assert choices(events) == [("b", "")]
    _, events = run(cmd.ForgetRoute(now_ns=1, request_id="a"), state=state)
    assert choices(events) == [("b", "cpu:0")]


def test_a_lost_executor_takes_its_routes_with_it() -> None:
    state, _ = run(joins("cpu:0"), joins("cpu:1"), route("a"))
    state, events = run(cmd.DropExecutor(now_ns=1, executor="cpu:0", reason="died"), state=state)
    assert events == [ev.ExecutorLeft(executor="cpu:0", reason="died")]
    _, events = run(route("a"), state=state)
    assert choices(events) == [("a", "cpu:1")]
