"""The scheduler as a function: a state goes in, a plan comes out."""

from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptoss.engine.scheduler import NO_DEADLINE, PREFILL_TOKENS_MIN, Candidate, SchedulerState, schedule
from gptoss.messages.plan import Limits, PlannedRow, Start, StepPlan

LIMITS = Limits(max_batch_size=4, chunk_tokens=100)
FREE = msgspec.structs.replace(LIMITS, is_row_invariant=True, align_tokens=8, target_ms=50.0)


def candidate(request_id: str, arrival: int = 0, **fields: Any) -> Candidate:
    values: dict[str, Any] = {
        "request_id": request_id,
        "attempt": 1,
        "priority": 0,
        "deadline_ns": NO_DEADLINE,
        "arrival": arrival,
        "num_prompt": 10,
        "num_tokens": 10,
        "num_computed": 0,
        "kv_bytes": 10,
    }
    return Candidate(**values | fields)


def decoding(request_id: str, arrival: int = 0, **fields: Any) -> Candidate:
    return candidate(request_id, arrival, **{"num_tokens": 15, "num_computed": 14} | fields)


def plan(
    *, running: tuple[Candidate, ...] = (), waiting: tuple[Candidate, ...] = (), limits: Limits = LIMITS, **fields: Any
) -> StepPlan:
    return schedule(
        SchedulerState(limits=limits, running=running, waiting=waiting, **{"kv_budget_bytes": 1000} | fields)
    )


def starts(step: StepPlan) -> list[str]:
    return [start.request_id for start in step.starts]


def lost(step: StepPlan) -> list[str]:
    return [preemption.request_id for preemption in step.preemptions]


def cuts(step: StepPlan) -> dict[str, tuple[int, int]]:
    return {row.request_id: (row.start, row.num_tokens) for row in step.rows}


def test_those_in_line_start_as_long_as_places_and_memory_last() -> None:
    waiting = tuple(candidate(name, index) for index, name in enumerate("abcdef"))
    assert starts(plan(waiting=waiting)) == ["a", "b", "c", "d"]
    assert starts(plan(waiting=waiting, kv_budget_bytes=25)) == ["a", "b"]
    assert starts(plan(running=(decoding("x"),), waiting=waiting, kv_budget_bytes=25)) == ["a"]


def test_nobody_overtakes_the_first_in_line() -> None:
    waiting = (candidate("large", 0, kv_bytes=30), candidate("small", 1))
    step = plan(running=(decoding("x"),), waiting=waiting, kv_budget_bytes=35)
    assert (starts(step), lost(step)) == ([], [])


def test_better_priority_displaces_the_worst_and_only_as_many_as_it_needs() -> None:
    running = (decoding("old", 0), decoding("new", 1), decoding("low", 2, priority=1))
    urgent = candidate("urgent", 9, priority=-1, kv_bytes=20)
    step = plan(running=running, waiting=(urgent,), kv_budget_bytes=30)
    assert lost(step) == ["low", "new"]
    assert {preemption.reason for preemption in step.preemptions} == {"priority"}
    assert starts(step) == ["urgent"]
    assert sorted(cuts(step)) == ["old", "urgent"]


def test_nobody_is_displaced_in_vain() -> None:
    running = (decoding("equal", 0), decoding("low", 1, priority=1))
    step = plan(running=running, waiting=(candidate("large", 2, kv_bytes=25),), kv_budget_bytes=30)
    assert (lost(step), starts(step)) == ([], [])


def test_deadline_and_arrival_displace_nobody() -> None:
    running = (decoding("late", 5), decoding("later", 6))
    step = plan(running=running, waiting=(candidate("early", 0, deadline_ns=1),), kv_budget_bytes=20)
    assert (lost(step), starts(step)) == ([], [])


def test_nobody_starts_ahead_of_one_just_displaced() -> None:
    running = (decoding("low", 1, priority=1, kv_bytes=20),)
    waiting = (candidate("urgent", 2, kv_bytes=5), candidate("lower", 3, priority=1, kv_bytes=5))
    step = plan(running=running, waiting=waiting, kv_budget_bytes=20)
    assert (lost(step), starts(step)) == (["low"], ["urgent"])


def test_the_worst_give_way_when_memory_is_short_and_nobody_starts() -> None:
    running = (decoding("a", 0), decoding("b", 1), decoding("c", 2))
    step = plan(running=running, waiting=(candidate("w", 3, kv_bytes=1),), kv_budget_bytes=15)
    assert lost(step) == ["c", "b"]
    assert {preemption.reason for preemption in step.preemptions} == {"memory"}
    assert (starts(step), list(cuts(step))) == ([], ["a"])
    assert lost(plan(running=running[:1], kv_budget_bytes=5)) == [], "the last one is never preempted"


def test_every_decoding_request_has_a_row_and_prefill_gets_the_rest() -> None:
    running = (decoding("a", 0), decoding("b", 1), candidate("p", 2, num_prompt=250, num_tokens=250))
    step = plan(running=running)
    assert cuts(step) == {"a": (14, 1), "b": (14, 1), "p": (0, 100)}
    assert [row.num_logits for row in step.rows] == [1, 1, 0]
    alone = plan(running=running[2:])
    assert alone.prefill_tokens_max == 200


def test_cuts_stay_at_multiples_where_bits_depend_on_them() -> None:
    long = candidate("p", num_prompt=250, num_tokens=250)
    found: list[int] = []
    while long.num_computed < 250:
        (row,) = plan(running=(long,), prefill_ms_per_token=0.001).rows
        found.append(row.num_tokens)
        long = msgspec.structs.replace(long, num_computed=long.num_computed + row.num_tokens)
    assert found == [100, 100, 50]


def test_output_computed_again_is_cut_as_it_was_where_bits_depend_on_it() -> None:
    resumed = candidate("r", num_prompt=10, num_tokens=14)
    assert plan(running=(resumed,)).rows == (PlannedRow("r", 1, 0, 10, 0),)
    resumed = msgspec.structs.replace(resumed, num_computed=10)
    assert plan(running=(resumed,)).rows == (PlannedRow("r", 1, 10, 1, 0),)
    assert plan(running=(resumed,), limits=FREE).rows == (PlannedRow("r", 1, 10, 4, 1),)


@pytest.mark.parametrize(("ms_per_token", "tokens"), [(0.0, 100), (1.0, 50), (0.1, 100), (10.0, PREFILL_TOKENS_MIN)])
def test_prefill_takes_no_longer_than_its_target_while_others_decode(ms_per_token: float, tokens: int) -> None:
    running = (decoding("a", 0), candidate("p", 1, num_prompt=500, num_tokens=500))
    step = plan(running=running, limits=FREE, prefill_ms_per_token=ms_per_token)
    assert step.prefill_tokens_max == tokens
    start, size = cuts(step)["p"]
    assert size <= tokens
    assert (start + size) % FREE.align_tokens == 0
    assert step.prefill_ms_per_token == ms_per_token


def test_a_slow_prefill_still_goes_on_in_whole_chunks_where_bits_depend_on_them() -> None:
    limits = msgspec.structs.replace(LIMITS, target_ms=50.0)
    running = (decoding("a", 0), candidate("p", 1, num_prompt=250, num_tokens=250), candidate("q", 2))
    step = plan(running=running, limits=limits, prefill_ms_per_token=10.0)
    assert cuts(step) == {"a": (14, 1), "p": (0, 100)}


def test_prefill_goes_to_the_best_first() -> None:
    running = (candidate("b", 1, num_prompt=150, num_tokens=150), candidate("a", 0, num_prompt=150, num_tokens=150))
    assert cuts(plan(running=running, limits=FREE)) == {"a": (0, 150), "b": (0, 48)}


def test_what_the_prefix_cache_has_is_not_computed() -> None:
    hit = candidate("hit", 0, num_prompt=40, num_tokens=40, num_cached=32, cached_bytes=8)
    step = plan(waiting=(hit,))
    assert step.starts == (Start("hit", 1, 32),)
    assert cuts(step) == {"hit": (32, 8)}
    tight = plan(waiting=(hit,), kv_budget_bytes=17)
    assert tight.starts == (Start("hit", 1, 0),), "what is cached and its copy must both fit for a moment"
    assert cuts(tight) == {"hit": (0, 40)}


def test_one_that_runs_takes_what_another_has_computed_of_its_prompt() -> None:
    behind = candidate("behind", 0, num_prompt=90, num_tokens=90, num_computed=16, num_cached=64, cached_bytes=8)
    step = plan(running=(behind,))
    assert step.starts == (Start("behind", 1, 64),)
    assert cuts(step) == {"behind": (64, 26)}


def test_drafts_are_verified_only_where_few_decode() -> None:
    limits = msgspec.structs.replace(FREE, draft_streams_max=2)
    guess = decoding("g", 0, num_draft=3)
    assert plan(running=(guess, decoding("a", 1)), limits=limits).rows[0] == PlannedRow("g", 1, 14, 4, 4, 3)
    assert plan(running=(guess, decoding("a", 1), decoding("b", 2)), limits=limits).rows[0].num_draft == 0
    behind = msgspec.structs.replace(guess, num_computed=10)
    assert plan(running=(behind,), limits=limits).rows == (PlannedRow("g", 1, 10, 5, 1),)


@st.composite
def candidates(draw: st.DrawFn) -> Candidate:
    index = draw(st.integers(0, 10**6))
    prompt, output = draw(st.integers(1, 300)), draw(st.integers(0, 20))
    return candidate(
        f"r{index}",
        index,
        priority=draw(st.integers(-2, 2)),
        num_prompt=prompt,
        num_tokens=prompt + output,
        num_computed=draw(st.integers(0, prompt + output - 1)),
        kv_bytes=draw(st.integers(1, 60)),
    )


@st.composite
def states(draw: st.DrawFn) -> SchedulerState:
    everyone = draw(st.lists(candidates(), max_size=12, unique_by=lambda each: each.request_id))
    running = everyone[: draw(st.integers(0, 4))]
    waiting = sorted(everyone[len(running) :], key=lambda each: each.order)
    return SchedulerState(
        limits=draw(st.sampled_from([LIMITS, FREE])),
        running=tuple(running),
        waiting=tuple(msgspec.structs.replace(each, num_computed=0) for each in waiting),
        kv_budget_bytes=draw(st.integers(60, 240)),
        prefill_ms_per_token=draw(st.sampled_from([0.0, 0.5, 20.0])),
    )


@settings(max_examples=300, deadline=None)
@given(states())
def test_any_plan_keeps_the_rules(state: SchedulerState) -> None:
    step = schedule(state)
    known = {each.request_id: each for each in (*state.running, *state.waiting)}
    runs = ({each.request_id for each in state.running} - set(lost(step))) | set(starts(step))
    in_use = sum(known[request_id].kv_bytes for request_id in runs)
    assert in_use <= state.kv_budget_bytes or len(runs) == 1
    assert len(runs) <= max(state.limits.max_batch_size, len(state.running))
    rows = [row.request_id for row in step.rows]
    assert len(rows) == len(set(rows))
    assert set(rows) <= runs
    assert bool(rows) == bool(runs), "who runs gets on"
    for row in step.rows:
        each = known[row.request_id]
        end = row.start + row.num_tokens
        assert row.start == each.num_computed
        assert 0 < row.num_tokens <= each.num_tokens - each.num_computed
        assert row.num_logits == (end == each.num_tokens)
        if not state.limits.is_row_invariant and row.start < each.num_prompt:
            assert end == each.num_prompt or end % state.limits.chunk_tokens == 0
            assert row.start // 100 == (end - 1) // 100
    assert schedule(msgspec.msgpack.decode(msgspec.msgpack.encode(state), type=SchedulerState)) == step
