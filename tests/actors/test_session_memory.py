"""Sessions, pressure and lost memory in the guard: given events, when command, then events."""

from typing import Any

import msgspec
import pytest
from tiny_engine import tiny_capabilities

from gptoss.actors.memory_guard import SESSIONS_SHARE, GuardPolicy, MemoryGuard
from gptoss.actors.memory_state import GuardState
from gptoss.actors.pressure import PressureLevels
from gptoss.clock import NS_PER_S
from gptoss.messages import commands as cmd
from gptoss.messages import events as ev
from gptoss.messages.commands import Command
from gptoss.messages.envelope import Event

POLICY = GuardPolicy(
    version=2,
    levels=PressureLevels(evict=0.7),
    session_bytes_max=50,
    sessions_bytes_max=1000,
    session_idle_ns=180 * NS_PER_S,
)
GUARD = MemoryGuard(POLICY)


def run(*commands: Command, state: GuardState | None = None, guard: MemoryGuard = GUARD) -> Any:
    """Feed commands; returns the state and the events of the last one."""
    state = state or guard.initial()
    events: list[Event] = []
    for command in commands:
        events = guard.decide(state, command)
        for event in events:
            state = guard.evolve(state, event)
    return state, events


def pool(executor: str = "cuda:0", budget: int = 200, **more: Any) -> cmd.SetMemoryPool:
    fields = {"prefix_cache_bytes": budget, **more}
    return cmd.SetMemoryPool(
        now_ns=0, executor=executor, capabilities=tiny_capabilities(kv_budget_bytes=budget, **fields)
    )


def turn(session: str, size: int = 20, *, at_s: float = 0.0, on: str = "cuda:0", request: str = "") -> list[Command]:
    """A whole turn: reserve, bind, keep, release."""
    now_ns, name = int(at_s * NS_PER_S), request or f"r-{session}-{at_s}"
    return [
        cmd.ReserveMemory(now_ns=now_ns, request_id=name, kv_bytes=size, session_id=session),
        cmd.BindMemory(now_ns=now_ns, request_id=name, executor=on),
        cmd.KeepSession(now_ns=now_ns, session_id=session, executor=on, tokens=size // 2, kv_bytes=size),
        cmd.ReleaseMemory(now_ns=now_ns, request_id=name),
    ]


def reserve(name: str, size: int, session: str = "") -> cmd.ReserveMemory:
    return cmd.ReserveMemory(now_ns=0, request_id=name, kv_bytes=size, session_id=session)


def evicted(events: list[Event]) -> list[tuple[str, str]]:
    return [(event.session_id, event.reason) for event in events if isinstance(event, ev.SessionEvicted)]


def test_what_a_session_keeps_counts_until_it_is_given_up() -> None:
    state, _ = run(pool(), *turn("s"))
    assert (state.free_bytes_max(), state.book.total_bytes) == (180, 20)
    assert state.pressure() == pytest.approx(0.1)
    state, events = run(cmd.CheckSessions(now_ns=180 * NS_PER_S), state=state)
    assert evicted(events) == [("s", "idle")]
    told = [told for event in events for told in GUARD.tells(state, event, 7)]
    assert told == [("executor/cuda:0", cmd.DropSession(now_ns=7, session_id="s"))]
    assert (state.free_bytes_max(), state.pressure()) == (200, 0.0)
    assert not state.book.sessions


def test_a_session_that_was_used_lately_is_kept_on() -> None:
    state, _ = run(pool(), *turn("s", at_s=0), *turn("s", at_s=100))
    assert run(cmd.CheckSessions(now_ns=200 * NS_PER_S), state=state)[1] == []
    assert not GUARD.has_overdue(state, 200 * NS_PER_S)
    assert GUARD.has_overdue(state, 280 * NS_PER_S)


def test_the_next_turn_replaces_what_was_kept() -> None:
    state, _ = run(pool(), *turn("s", 20), *turn("s", 40, at_s=1))
    assert state.book.total_bytes == 40


def test_a_request_that_needs_the_memory_gets_it_from_the_least_recently_used() -> None:
    state, _ = run(pool(), *turn("old", 30), *turn("new", 30, at_s=1))
    state, events = run(reserve("big", 165), state=state)
    assert evicted(events) == [("old", "memory"), ("new", "pressure")]
    assert isinstance(events[1], ev.ReservationGranted)
    state, _ = run(pool(), *turn("old", 30), *turn("new", 30, at_s=1), guard=QUIET)
    _, events = run(reserve("big", 165), state=state, guard=QUIET)
    assert evicted(events) == [("old", "memory")], "no more than is needed"


QUIET = MemoryGuard(msgspec.structs.replace(POLICY, levels=PressureLevels()))


def test_nothing_is_given_up_in_vain() -> None:
    state, _ = run(pool(), reserve("r", 100), *turn("s", 30), guard=QUIET)
    _, events = run(reserve("too-big", 120), state=state, guard=QUIET)
    assert [type(event) for event in events] == [ev.ReservationRefused]


def test_a_sessions_own_next_turn_gives_up_the_others_first() -> None:
    state, _ = run(pool(), *turn("mine", 50), *turn("other", 50, at_s=1), guard=QUIET)
    _, events = run(reserve("turn-2", 140, "mine"), state=state, guard=QUIET)
    assert evicted(events) == [("other", "memory")]
    _, events = run(reserve("turn-2", 190, "mine"), state=state, guard=QUIET)
    assert evicted(events) == [("other", "memory"), ("mine", "memory")]


def test_a_session_in_use_is_never_given_up() -> None:
    state, _ = run(pool(), *turn("s", 50), reserve("turn-2", 60, "s"))
    state, events = run(reserve("big", 100), state=state)
    assert [type(event) for event in events] == [ev.ReservationRefused]
    assert run(cmd.CheckSessions(now_ns=10**15), state=state)[1] == []


def test_above_the_level_evict_idle_sessions_go_until_it_is_left() -> None:
    state, _ = run(pool(), *turn("a", 30), *turn("b", 30, at_s=1))
    state, events = run(reserve("r", 100), state=state)
    assert evicted(events) == [("a", "pressure")]
    assert state.pressure() == pytest.approx(0.65)


def test_all_sessions_together_keep_to_their_limit() -> None:
    roomy = MemoryGuard(msgspec.structs.replace(POLICY, sessions_bytes_max=70, levels=PressureLevels()))
    state, _ = run(pool(), *turn("a", 30), *turn("b", 30, at_s=1), guard=roomy)
    commands = turn("c", 30, at_s=2)
    state, events = run(*commands[:3], state=state, guard=roomy)
    assert evicted(events) == [("a", "sessions_full")]
    state, _ = run(pool(), guard=roomy)
    for number in range(9):
        state, _ = run(*turn(f"s{number}", 30, at_s=number), state=state, guard=roomy)
        assert state.book.total_bytes <= min(70, SESSIONS_SHARE * 200)


def test_a_session_above_its_own_limit_is_not_kept() -> None:
    _, events = run(pool(), *turn("s", 60)[:3])
    assert evicted(events) == [("s", "too_large")]


def test_a_session_that_goes_on_elsewhere_is_given_up_where_it_was() -> None:
    state, _ = run(pool(), pool("cuda:1"), *turn("s", 20))
    commands = turn("s", 30, at_s=1, on="cuda:1")
    state, events = run(*commands[:3], state=state)
    assert evicted(events) == [("s", "moved")]
    assert events[0].executor == "cuda:0"
    assert (state.book.kept_on("cuda:0"), state.book.kept_on("cuda:1")) == (0, 30)


def test_the_sessions_of_a_lost_executor_are_gone_and_nobody_is_told() -> None:
    state, _ = run(pool(), pool("cuda:1"), *turn("s", 20), *turn("t", 20, on="cuda:1"))
    state, events = run(cmd.DropMemoryPool(now_ns=0, executor="cuda:0"), state=state)
    assert evicted(events) == [("s", "executor_lost")]
    assert [told for event in events for told in GUARD.tells(state, event, 0)] == []
    assert set(state.book.sessions) == {"t"}


def test_sessions_of_two_tenants_with_one_name_are_two() -> None:
    state, _ = run(pool(), *turn("chat@aaaa", 20), *turn("chat@bbbb", 30, at_s=1))
    assert {name: each.kv_bytes for name, each in state.book.sessions.items()} == {"chat@aaaa": 20, "chat@bbbb": 30}


def test_memory_that_the_device_does_not_have_is_not_granted() -> None:
    reading = cmd.ObserveMemory(
        now_ns=0, executor="cuda:0", used_bytes=900, total_bytes=1000, kv_bytes_in_use=0, free_bytes=120
    )
    state, events = run(pool(), reading)
    assert (events[0].lacking_bytes, state.free_bytes_max()) == (80, 120)
    state, events = run(reserve("r", 100), state=state)
    assert events[0].pressure == pytest.approx(100 / 120)
    state, _ = run(msgspec.structs.replace(reading, free_bytes=500), state=state)
    assert state.free_bytes_max() == 100
    paged, _ = run(pool(kv_pages=10), reading)
    assert paged.free_bytes_max() == 200, "pages were taken at load"


def test_an_estimate_advises_on_half_and_on_what_fits() -> None:
    estimate = cmd.EstimateMemory(now_ns=0, request_id="a", prompt_tokens=10, max_tokens=200)
    _, events = run(pool(), reserve("r", 100), estimate)
    advice = events[0].advice
    assert (advice.pressure, advice.max_tokens_half, advice.kv_bytes_half) == (0.5, 100, 220)
    assert (advice.max_tokens_fit, advice.kv_bytes_fit) == (90, 200)


def test_a_restored_state_is_the_one_that_was_recorded() -> None:
    state, _ = run(pool(), pool("cuda:1"), *turn("a", 30), *turn("b", 20, at_s=1, on="cuda:1"), reserve("r", 10, "a"))
    record = msgspec.msgpack.decode(msgspec.msgpack.encode(GUARD.recorded(state)), type=GUARD.record_type)
    assert GUARD.restored(record) == state
