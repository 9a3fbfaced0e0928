"""A request's life: every command in every phase, and the single terminal event."""

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptoss.actors.lifecycle import MAX_ATTEMPTS, STEPS, Lifecycle, RequestState
from gptoss.messages import commands as cmd
from gptoss.messages import events as ev
from gptoss.messages.commands import Command
from gptoss.messages.envelope import Event
from gptoss.messages.sampling import SamplingParams

LIFE = Lifecycle()


def begin(**changes: Any) -> cmd.BeginRequest:
    base = cmd.BeginRequest(
        now_ns=0,
        request_id="r",
        endpoint="chat",
        model="",
        served_model="m",
        stream=True,
        sampling=SamplingParams(max_tokens=20),
        num_stop_strings=0,
        drawn_seed=7,
        max_model_len=100,
        default_max_tokens=50,
        priority=0,
        deadline_ns=10,
        num_messages=1,
    )
    return msgspec.structs.replace(base, **changes)


RENDERED = cmd.PromptReady(now_ns=1, prompt_tokens=10, prompt_hmac="h", template="t", date="2026-01-01")
ESTIMATED = cmd.EstimateReady(now_ns=2, kv_bytes=30, kv_bytes_prompt=10)
ADMITTED = cmd.AdmissionGranted(now_ns=3, action="accept", max_tokens=20, kv_bytes=30)
ROUTED = cmd.RouteFound(now_ns=4, executor="cpu:0")
FIRST = cmd.FirstTokenSeen(now_ns=5, attempt=1)
DONE = cmd.EngineDone(now_ns=6, attempt=1, reason="stop", prompt_tokens=10, completion_tokens=4)
LOST = cmd.EngineFailure(now_ns=6, attempt=1, code="engine_lost", message="died", lost=True, tokens_out=3)
CANCEL = cmd.CancelRequest(now_ns=7, reason="client")
TO_RUNNING = (begin(), RENDERED, ESTIMATED, ADMITTED, ROUTED)


def run(*commands: Command, state: RequestState | None = None) -> tuple[RequestState, list[Event]]:
    """Feed commands; returns the state and all events."""
    state = state or LIFE.initial()
    events: list[Event] = []
    for command in commands:
        for event in LIFE.decide(state, command):
            state = LIFE.evolve(state, event)
            events.append(event)
    return state, events


def ends(events: list[Event]) -> list[Event]:
    return [event for event in events if isinstance(event, ev.TERMINAL_EVENTS)]


def test_a_served_request_walks_through_every_phase() -> None:
    state, events = run(*TO_RUNNING, FIRST, DONE)
    assert [type(e).__name__ for e in events] == [
        "RequestReceived",
        "RequestValidated",
        "PromptRendered",
        "RequestEstimated",
        "RequestAdmitted",
        "RequestRouted",
        "SamplingBound",
        "FirstTokenProduced",
        "RequestCompleted",
    ]
    assert state.phase == "ended"


def test_the_drawn_seed_is_used_only_where_none_was_given() -> None:
    drawn = run(begin())[1][1]
    given_ = run(begin(sampling=SamplingParams(seed=3)))[1][1]
    assert isinstance(drawn, ev.RequestValidated)
    assert isinstance(given_, ev.RequestValidated)
    assert (drawn.sampling.seed, given_.sampling.seed) == (7, 3)


@pytest.mark.parametrize(
    ("change", "code", "param"),
    [
        ({"model": "other"}, "model_not_found", "model"),
        ({"num_messages": 0}, "invalid_request", "messages"),
        ({"sampling": SamplingParams(temperature=3.0)}, "invalid_request", "temperature"),
        ({"sampling": SamplingParams(temperature=float("nan"))}, "invalid_request", "temperature"),
        ({"max_model_len": 0}, "not_ready", ""),
        ({"log_fault": "ENOSPC"}, "not_ready", ""),
    ],
)
def test_a_bad_request_is_refused_by_name(change: dict[str, Any], code: str, param: str) -> None:
    _, events = run(begin(**change))
    assert isinstance(events[-1], ev.RequestRejected)
    assert (events[-1].code, events[-1].param) == (code, param)


def test_a_prompt_that_does_not_fit_the_context_is_refused() -> None:
    _, events = run(begin(), msgspec.structs.replace(RENDERED, prompt_tokens=90))
    assert isinstance(events[-1], ev.RequestRejected)
    assert (events[-1].code, events[-1].param) == ("context_length_exceeded", "max_tokens")


def test_a_lost_engine_resumes_after_the_delivered_tokens() -> None:
    state, events = run(*TO_RUNNING, FIRST, LOST, msgspec.structs.replace(ROUTED, executor="cpu:1"))
    assert not ends(events)
    bound = events[-1]
    assert isinstance(bound, ev.SamplingBound)
    assert (bound.attempt, bound.resumed_tokens, state.executor) == (2, 3, "cpu:1")


def test_retries_are_bounded() -> None:
    state, _ = run(*TO_RUNNING)
    for attempt in range(1, MAX_ATTEMPTS):
        state, events = run(msgspec.structs.replace(LOST, attempt=attempt), ROUTED, state=state)
        assert not ends(events)
    _, events = run(msgspec.structs.replace(LOST, attempt=MAX_ATTEMPTS), state=state)
    assert [type(e) for e in events] == [ev.RequestFailed]


def test_an_answer_of_an_attempt_that_was_given_up_changes_nothing() -> None:
    state, _ = run(*TO_RUNNING, LOST, ROUTED)
    assert run(DONE, state=state)[1] == []


def test_cancelling_while_the_engine_runs_waits_for_its_word() -> None:
    state, events = run(*TO_RUNNING, CANCEL)
    assert isinstance(events[-1], ev.CancelRequested)
    done = msgspec.structs.replace(DONE, reason="cancelled", completion_tokens=2)
    _, events = run(done, state=state)
    assert events == [ev.RequestCancelled(reason="client", completion_tokens=2)]


@pytest.mark.parametrize("steps", range(1, 5))
def test_cancelling_before_the_engine_has_it_ends_at_once(steps: int) -> None:
    _, events = run(*TO_RUNNING[:steps], CANCEL)
    assert isinstance(events[-1], ev.RequestCancelled)


ALL = (*TO_RUNNING, FIRST, DONE, LOST, CANCEL, cmd.FirstByteWritten(now_ns=1))
REFUSED = cmd.AdmissionRefused(now_ns=3, code="queue_full", message="full", retry_after_s=1.0)


@given(st.lists(st.sampled_from([*ALL, REFUSED]), max_size=60))
def test_no_order_of_commands_ends_a_request_twice(commands: list[Command]) -> None:
    state, events = run(begin(), *commands)
    assert len(ends(events)) <= 1
    assert bool(ends(events)) == (state.phase == "ended")
    if ends(events):
        assert isinstance(events[-1], ev.TERMINAL_EVENTS)


def test_every_phase_is_in_the_table() -> None:
    assert set(STEPS) == {"new", "rendering", "estimating", "admitting", "routing", "running", "ended"}
