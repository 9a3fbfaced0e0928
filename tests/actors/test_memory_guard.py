"""The memory guard as given events, when command, then events; and its ledger under random commands."""

from hypothesis import given
from hypothesis import strategies as st
from tiny_engine import tiny_capabilities

from gptoss.actors.memory_guard import MemoryGuard
from gptoss.actors.memory_state import GuardState
from gptoss.messages import commands as cmd
from gptoss.messages import events as ev
from gptoss.messages.commands import Command
from gptoss.messages.envelope import Event

GUARD = MemoryGuard()


def pool(executor: str, budget: int) -> cmd.SetMemoryPool:
    capabilities = tiny_capabilities(kv_budget_bytes=budget)
    return cmd.SetMemoryPool(now_ns=0, executor=executor, capabilities=capabilities)


def reserve(name: str, size: int) -> cmd.ReserveMemory:
    return cmd.ReserveMemory(now_ns=0, request_id=name, kv_bytes=size)


def bind(name: str, executor: str) -> cmd.BindMemory:
    return cmd.BindMemory(now_ns=0, request_id=name, executor=executor)


def release(name: str) -> cmd.ReleaseMemory:
    return cmd.ReleaseMemory(now_ns=0, request_id=name)


def run(*commands: Command, state: GuardState | None = None) -> tuple[GuardState, list[Event]]:
    state = state or GUARD.initial()
    events: list[Event] = []
    for command in commands:
        events = GUARD.decide(state, command)
        for event in events:
            state = GUARD.evolve(state, event)
    return state, events


def test_an_estimate_stays_what_it_was_while_no_executor_serves() -> None:
    estimate = cmd.EstimateMemory(now_ns=0, request_id="a", prompt_tokens=10, max_tokens=5)
    _, events = run(pool("cpu:0", 1000), cmd.DropMemoryPool(now_ns=0, executor="cpu:0"), estimate)
    assert isinstance(events[0], ev.MemoryEstimated)
    assert events[0].kv_bytes == 30


def test_an_estimate_follows_the_models_layout() -> None:
    estimate = cmd.EstimateMemory(now_ns=0, request_id="a", prompt_tokens=10, max_tokens=5)
    _, events = run(pool("cpu:0", 1000), estimate)
    assert isinstance(events[0], ev.MemoryEstimated)
    assert (events[0].kv_bytes, events[0].kv_bytes_prompt) == (30, 20)


def test_an_unbound_grant_counts_against_every_pool() -> None:
    state, _ = run(pool("cpu:0", 100), pool("cpu:1", 100), reserve("a", 80))
    _, events = run(reserve("b", 80), state=state)
    assert isinstance(events[0], ev.ReservationRefused)
    _, events = run(bind("a", "cpu:0"), reserve("b", 80), state=state)
    assert isinstance(events[0], ev.ReservationGranted)


def test_who_asks_again_keeps_the_grant_and_cannot_make_it_larger() -> None:
    state, _ = run(pool("cpu:0", 100), reserve("a", 60), bind("a", "cpu:0"))
    state, events = run(reserve("a", 50), state=state)
    assert isinstance(events[0], ev.ReservationGranted)
    assert events[0].kv_bytes == 60
    state, events = run(reserve("a", 90), state=state)
    assert isinstance(events[0], ev.ReservationRefused)
    assert (state.grants["a"].kv_bytes, state.grants["a"].executor) == (60, "cpu:0")


def test_a_grant_is_released_exactly_once() -> None:
    state, events = run(pool("cpu:0", 100), reserve("a", 60), bind("a", "cpu:0"), release("a"))
    assert events == [ev.ReservationReleased(request_id="a", kv_bytes=60, executor="cpu:0")]
    assert run(release("a"), state=state)[1] == []
    assert state.free_bytes_max() == 100


def test_a_lost_pool_unbinds_its_grants_and_they_bind_to_its_successor() -> None:
    state, events = run(
        pool("cpu:0", 100), reserve("a", 60), bind("a", "cpu:0"), cmd.DropMemoryPool(now_ns=0, executor="cpu:0")
    )
    assert events == [ev.MemoryPoolDropped(executor="cpu:0", reservations_lost=1)]
    state, _ = run(pool("cpu:0", 100), state=state)
    assert state.free_bytes_max() == 40
    state, _ = run(bind("a", "cpu:0"), release("a"), state=state)
    assert state.free_bytes_max() == 100


names = st.sampled_from(["a", "b", "c", "d"])
steps = st.one_of(
    st.builds(reserve, names, st.integers(1, 80)),
    st.builds(bind, names, st.sampled_from(["cpu:0", "cpu:1"])),
    st.builds(release, names),
)


@given(st.lists(steps, max_size=40))
def test_grants_never_exceed_the_budgets_and_all_releases_leave_nothing(commands: list[Command]) -> None:
    state, _ = run(pool("cpu:0", 100), pool("cpu:1", 50))
    grants = releases = 0
    for command in commands:
        # The router binds a grant only where there is room; the test does the same.
        if isinstance(command, cmd.BindMemory):
            grant = state.grants.get(command.request_id)
            room = state.pools[command.executor].kv_budget_bytes - state.reserved_bytes(command.executor)
            if grant is None or grant.executor or grant.kv_bytes > room:
                continue
        known = set(state.grants)
        state, events = run(command, state=state)
        grants += sum(isinstance(e, ev.ReservationGranted) and e.request_id not in known for e in events)
        releases += sum(isinstance(e, ev.ReservationReleased) for e in events)
        assert sum(grant.kv_bytes for grant in state.grants.values()) <= 150
        assert state.reserved_bytes("cpu:0") <= 100
        assert state.reserved_bytes("cpu:1") <= 50
    state, _ = run(*[release(name) for name in ("a", "b", "c", "d")], state=state)
    assert not state.grants
    assert releases <= grants
