"""The router as given events, when command, then events."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptoss.actors.router import Router, RouterPolicy
from gptoss.actors.router_state import PREFIXES_MAX, Route, RouterState, recorded, restored
from gptoss.messages import commands as cmd
from gptoss.messages import events as ev
from gptoss.messages.commands import Command
from gptoss.messages.envelope import Event

ROUTER = Router()


def run(
    *commands: Command, state: RouterState | None = None, router: Router = ROUTER
) -> tuple[RouterState, list[Event]]:
    state = state or router.initial()
    events: list[Event] = []
    for command in commands:
        events = router.decide(state, command)
        for event in events:
            state = router.evolve(state, event)
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


# ---------------------------------------------------------------- size, health, affinity

SMALL = Router(RouterPolicy(multi_prompt_len=100, multi_kv_bytes=50, multi_pressure=0.5))
NS_PER_S = 10**9


def wide(name: str = "cuda:1+cuda:2", slots: int = 2, kv: int = 200) -> cmd.SetExecutor:
    return cmd.SetExecutor(now_ns=0, executor=name, slots=slots, kv_budget_bytes=kv, multi_device=True)


def ask(name: str, *, now_s: int = 0, kv: int = 10, **fields: Any) -> cmd.RouteRequest:
    given: dict[str, Any] = {"prompt_tokens": 80, **fields}
    return cmd.RouteRequest(now_ns=now_s * NS_PER_S, request_id=name, kv_bytes=kv, **given)


def last(events: list[Event]) -> tuple[str, str]:
    assert isinstance(events[-1], ev.RouteDecided)
    return events[-1].executor, events[-1].reason


@pytest.mark.parametrize(
    ("request_", "expected"),
    [
        (ask("a"), ("cuda:0", "least_loaded")),
        (ask("a", prompt_tokens=101), ("cuda:1+cuda:2", "large_prompt")),
        (ask("a", kv=51), ("cuda:1+cuda:2", "large_kv")),
        (ask("a", multi_device=True), ("cuda:1+cuda:2", "admission")),
    ],
)
def test_large_requests_go_to_several_devices(request_: cmd.RouteRequest, expected: tuple[str, str]) -> None:
    _, events = run(joins("cuda:0"), wide(), request_, router=SMALL)
    assert last(events) == expected


def test_without_an_executor_over_several_devices_size_does_not_matter() -> None:
    _, events = run(joins("cuda:0", kv=1000), ask("a", prompt_tokens=5000, kv=900), router=SMALL)
    assert last(events) == ("cuda:0", "only_one")


def test_under_pressure_the_next_goes_to_several_devices() -> None:
    state, events = run(joins("cuda:0", slots=8), wide(slots=8), ask("a", kv=45), ask("b", kv=8), router=SMALL)
    assert last(events) == ("cuda:0", "least_loaded")
    _, events = run(ask("c", kv=5), state=state, router=SMALL)
    assert last(events) == ("cuda:1+cuda:2", "pressure")


def test_who_finds_no_room_on_the_right_kind_takes_the_other() -> None:
    state, events = run(joins("cuda:0", slots=1), wide(slots=1), ask("a"), ask("b"), router=SMALL)
    assert last(events) == ("cuda:1+cuda:2", "singles_full")
    state, _ = run(cmd.ForgetRoute(now_ns=0, request_id="a"), state=state, router=SMALL)
    _, events = run(ask("c", prompt_tokens=500), state=state, router=SMALL)
    assert last(events) == ("cuda:0", "only_one")


def test_a_prompt_goes_where_its_beginning_was_served_unless_that_is_much_busier() -> None:
    hints: dict[str, Any] = {"kv": 1, "prompt_tokens": 128, "prefix_hmacs": ("p1", "p2")}
    first = ask("a", kv=1, prompt_tokens=128, prefix_hmacs=("p1",))
    state, events = run(joins("cpu:0", slots=5), joins("cpu:1", slots=5), first)
    assert last(events) == ("cpu:0", "least_loaded")
    state, events = run(ask("b", **hints), state=state)
    assert last(events) == ("cpu:0", "prefix")
    assert isinstance(events[-1], ev.RouteDecided)
    assert [each.cached_tokens for each in events[-1].candidates] == [64, 0]
    state, events = run(ask("c", **hints), state=state)
    assert last(events) == ("cpu:0", "prefix")
    _, events = run(ask("d", **hints), state=state)
    assert last(events) == ("cpu:1", "least_loaded")


def test_a_conversation_stays_where_it_was() -> None:
    state, _ = run(joins("cpu:0", slots=8), joins("cpu:1", slots=8), ask("x"), ask("a", session_id="s", kv=1))
    state, events = run(cmd.ForgetRoute(now_ns=0, request_id="x"), ask("b", session_id="s", kv=1), state=state)
    assert last(events) == ("cpu:1", "session")


def test_what_a_lost_executor_had_cached_is_forgotten() -> None:
    state, _ = run(joins("cpu:0"), joins("cpu:1"), ask("a", prefix_hmacs=("p1",), session_id="s"))
    drop = cmd.DropExecutor(now_ns=0, executor="cpu:0", reason="died", fault=True)
    state, _ = run(drop, joins("cpu:0"), state=state)
    assert (state.prefixes, state.sessions) == ({}, {})


def test_what_is_remembered_is_bounded_and_the_oldest_goes_first() -> None:
    state, _ = run(joins("cpu:0", slots=10**6, kv=10**9), joins("cpu:1"))
    for number in range(PREFIXES_MAX + 5):
        state, _ = run(ask(f"r{number}", prefix_hmacs=(f"p{number}",)), state=state)
        state, _ = run(cmd.ForgetRoute(now_ns=0, request_id=f"r{number}"), state=state)
    assert len(state.prefixes) == PREFIXES_MAX
    assert "p4" not in state.prefixes
    assert "p5" in state.prefixes


def test_an_executor_that_failed_is_avoided_for_a_minute() -> None:
    state, _ = run(joins("cpu:0"), joins("cpu:1"))
    drop = cmd.DropExecutor(now_ns=10 * NS_PER_S, executor="cpu:0", reason="died", fault=True)
    state, events = run(drop, state=state)
    assert events == [ev.ExecutorLeft(executor="cpu:0", reason="died", fault_ns=10 * NS_PER_S)]
    state, _ = run(joins("cpu:0"), state=state)
    assert last(run(ask("a", now_s=20), state=state)[1])[0] == "cpu:1"
    assert last(run(ask("a", now_s=71), state=state)[1])[0] == "cpu:0"


def test_a_suspect_executor_is_taken_only_when_no_other_can() -> None:
    suspect = cmd.RateExecutor(now_ns=0, executor="cpu:0", suspect=True, silent_ms=20_000.0)
    state, events = run(joins("cpu:0"), joins("cpu:1", slots=1), suspect)
    assert events == [ev.ExecutorRated(executor="cpu:0", suspect=True, silent_ms=20_000.0)]
    assert run(suspect, state=state)[1] == []
    state, events = run(ask("a"), state=state)
    assert last(events)[0] == "cpu:1"
    state, events = run(ask("b"), state=state)
    assert last(events)[0] == "cpu:0"
    _, events = run(cmd.RateExecutor(now_ns=0, executor="cpu:0", suspect=False), state=state)
    assert events == [ev.ExecutorRated(executor="cpu:0", suspect=False, silent_ms=0.0)]


def test_a_draining_executor_keeps_its_requests_and_takes_nobody_new() -> None:
    state, _ = run(joins("cpu:0"), ask("a"))
    state, events = run(cmd.DrainExecutor(now_ns=0, executor="cpu:0"), state=state)
    assert events == [ev.ExecutorDrained(executor="cpu:0", running=1)]
    state, events = run(ask("b"), state=state)
    assert last(events) == ("", "no_room")
    assert state.routes["a"].executor == "cpu:0"
    drop = cmd.DropExecutor(now_ns=0, executor="cpu:0", reason="shut down")
    _, events = run(drop, joins("cpu:0"), state=state)
    assert choices(events) == [("b", "cpu:0")]


def test_a_request_that_waits_keeps_what_its_choice_depends_on() -> None:
    state, _ = run(joins("cuda:0"), wide(slots=0), ask("a"), ask("b"), router=SMALL)
    state, events = run(ask("c", prompt_tokens=500, session_id="s", prefix_hmacs=("p",)), state=state, router=SMALL)
    assert last(events) == ("", "no_room")
    _, events = run(wide(slots=1), state=state, router=SMALL)
    assert last(events) == ("cuda:1+cuda:2", "large_prompt")
    assert isinstance(events[-1], ev.RouteDecided)
    assert (events[-1].session_id, events[-1].prefix_hmacs) == ("s", ("p",))


def test_a_choice_without_hints_is_recorded_as_it_always_was() -> None:
    _, events = run(joins("cpu:0"), route("a"))
    decided = events[-1]
    assert isinstance(decided, ev.RouteDecided)
    assert (decided.prompt_tokens, decided.session_id, decided.prefix_hmacs) == (0, "", ())


# ---------------------------------------------------------------- its state


@given(
    st.lists(
        st.tuples(st.sampled_from("abcdef"), st.sampled_from(["", "cpu:0", "cpu:1", "forget", "leave"])), max_size=60
    )
)
def test_counts_and_order_follow_from_the_routes_whatever_happened(steps: list[tuple[str, str]]) -> None:
    state, plain = RouterState(), dict[str, str]()
    for number, (request_id, what) in enumerate(steps):
        if what == "leave":
            state = state.without_executor(ev.ExecutorLeft(executor="cpu:0", reason="x", fault_ns=number))
            plain = {key: executor for key, executor in plain.items() if executor != "cpu:0"}
        elif what == "forget":
            state = state.without_route(request_id) if request_id in plain else state
            plain.pop(request_id, None)
        else:
            state = state.with_route(request_id, Route(what, 10 + number))
            plain[request_id] = what
        assert {key: route.executor for key, route in state.routes.items()} == plain
        assert list(state.waiting) == [key for key, executor in plain.items() if not executor]
        for executor in ("cpu:0", "cpu:1"):
            mine = [state.routes[key].kv_bytes for key in plain if plain[key] == executor]
            assert state.bound_to(executor, "") == (len(mine), sum(mine))
            for key in plain:
                others = [state.routes[each].kv_bytes for each in plain if plain[each] == executor and each != key]
                assert state.bound_to(executor, key) == (len(others), sum(others))
    again = restored(recorded(state))
    assert list(recorded(again).routes.items()) == list(recorded(state).routes.items())
    assert list(again.waiting) == list(state.waiting)
