"""Admission under pressure, between tenants, for several devices, by forecast: given events, when command, then events."""

import itertools
from typing import Any

import msgspec
import pytest

from gptoss.actors.admission import Admission
from gptoss.actors.admission_fit import AdmissionPolicy
from gptoss.actors.admission_state import RELEASES_MIN, AdmissionState
from gptoss.actors.decider import recorded_form
from gptoss.actors.deciders import deciders_of
from gptoss.actors.pressure import PressureLevels
from gptoss.clock import NS_PER_S
from gptoss.config import Settings
from gptoss.messages import commands as cmd
from gptoss.messages import events as ev
from gptoss.messages.commands import Command, MemoryAdvice
from gptoss.messages.envelope import Event

LEVELS = PressureLevels(evict=0.7, shrink=0.8, queue=0.85, refuse=0.9)
POLICY = AdmissionPolicy(
    max_queue=4, version=2, ageing_s=10.0, levels=LEVELS, route_multi_tokens=8000, route_multi_kv_bytes=6000
)
ADMISSION = Admission(POLICY)
ROOMY = Admission(msgspec.structs.replace(POLICY, max_queue=100))


def run(*commands: Command, state: AdmissionState | None = None, admission: Admission = ADMISSION) -> Any:
    """Feed commands; returns the state and the events of the last one."""
    state = state or admission.initial()
    events: list[Event] = []
    for command in commands:
        events = admission.decide(state, command)
        for event in events:
            state = admission.evolve(state, event)
    return state, events


def capacity(slots: int = 1, kv: int = 1000, name: str = "cuda:0", **more: Any) -> cmd.SetCapacity:
    return cmd.SetCapacity(now_ns=0, executor=name, slots=slots, kv_budget_bytes=kv, **more)


def admit(
    name: str, *, at_s: float = 0.0, within_s: float = 60.0, pressure: float = 0.0, **more: Any
) -> cmd.AdmitRequest:
    now_ns = int(at_s * NS_PER_S)
    base = cmd.AdmitRequest(
        now_ns=now_ns,
        request_id=name,
        prompt_tokens=10,
        max_tokens=90,
        kv_bytes=100,
        kv_bytes_prompt=10,
        priority=0,
        deadline_ns=now_ns + int(within_s * NS_PER_S),
        advice=MemoryAdvice(
            pressure=pressure, max_tokens_half=45, kv_bytes_half=55, max_tokens_fit=90, kv_bytes_fit=100
        ),
    )
    return msgspec.structs.replace(base, **more)


def granted(name: str, at_s: float = 0.0) -> cmd.MemoryGranted:
    return cmd.MemoryGranted(now_ns=int(at_s * NS_PER_S), request_id=name)


def withdraw(name: str, at_s: float = 0.0) -> cmd.WithdrawRequest:
    return cmd.WithdrawRequest(now_ns=int(at_s * NS_PER_S), request_id=name)


def asked(events: list[Event]) -> list[str]:
    return [event.request_id for event in events if isinstance(event, ev.MemoryRequested)]


def decided(events: list[Event]) -> list[ev.AdmissionDecided]:
    return [event for event in events if isinstance(event, ev.AdmissionDecided)]


# ---------------------------------------------------------------- pressure


def test_below_every_level_a_request_is_asked_for_whole() -> None:
    _, events = run(capacity(), admit("a", pressure=0.79))
    assert asked(events) == ["a"]
    assert (events[0].ask.max_tokens, events[0].ask.shrunk) == (90, False)


def test_from_the_level_shrink_on_a_newcomer_gets_half_its_tokens() -> None:
    state, events = run(capacity(), admit("a", pressure=0.80))
    assert (events[0].ask.max_tokens, events[0].ask.kv_bytes, events[0].ask.shrunk) == (45, 55, True)
    _, events = run(granted("a"), state=state)
    assert decided(events)[0].action == "shrink"


def test_an_answer_that_is_bound_by_a_grammar_is_not_cut_for_pressure() -> None:
    _, events = run(capacity(), admit("a", pressure=0.84, can_shrink=False))
    assert not events[0].ask.shrunk


def test_half_of_a_short_answer_is_of_no_use_and_not_taken() -> None:
    advice = MemoryAdvice(pressure=0.84, max_tokens_half=10, kv_bytes_half=20)
    _, events = run(capacity(), admit("a", advice=advice))
    assert not events[0].ask.shrunk


def test_from_the_level_queue_on_a_newcomer_takes_its_turn_and_is_tried_at_once() -> None:
    _, events = run(capacity(), admit("a", pressure=0.85))
    assert [event.action for event in decided(events)] == ["queue"]
    assert decided(events)[0].reason == "pressure"
    assert asked(events) == ["a"], "it fits perhaps, and then it runs"


def test_pressure_alone_refuses_nobody() -> None:
    _, events = run(capacity(), admit("a", pressure=1.0))
    assert asked(events) == ["a"]


def test_what_no_executor_can_hold_is_shrunk_to_what_the_guard_computed() -> None:
    advice = MemoryAdvice(max_tokens_half=45, kv_bytes_half=55, max_tokens_fit=37, kv_bytes_fit=59)
    _, events = run(capacity(kv=60), admit("a", advice=advice))
    assert (events[0].ask.max_tokens, events[0].ask.kv_bytes) == (37, 59)


# ---------------------------------------------------------------- several devices


@pytest.mark.parametrize(
    ("changes", "is_multi"),
    [
        ({"prompt_tokens": 8001}, True),
        ({"prompt_tokens": 8000}, False),
        ({"kv_bytes": 6001}, True),
        ({"kv_bytes": 6000}, False),
        ({"pressure": 0.85}, True),
    ],
)
def test_large_requests_and_those_under_pressure_go_to_several_devices(changes: dict[str, Any], is_multi: bool) -> None:
    wide = capacity(kv=10_000, name="tp", multi_device=True)
    state, events = run(capacity(), wide, admit("a", **changes))
    assert [event.ask.multi_device for event in events if isinstance(event, ev.MemoryRequested)] == [is_multi]
    _, events = run(granted("a"), state=state)
    assert decided(events)[0].action == ("route_multi" if is_multi else "accept")


def test_without_an_executor_of_several_devices_nobody_is_sent_there() -> None:
    wide = capacity(kv=10_000, name="tp", multi_device=True)
    gone = msgspec.structs.replace(wide, slots=0, kv_budget_bytes=0)
    _, events = run(capacity(kv=10_000), wide, gone, admit("a", prompt_tokens=9000))
    assert not events[0].ask.multi_device


# ---------------------------------------------------------------- the line


def busy(*, queued: int = 0, tenant: str = "a") -> AdmissionState:
    """One runs, some wait."""
    state, _ = run(capacity(), admit("running", tenant=tenant), granted("running"))
    for number in range(queued):
        state, _ = run(admit(f"{tenant}{number}", at_s=number / 100, tenant=tenant), state=state)
    return state


def test_a_full_queue_makes_room_for_a_tenant_with_fewer_requests() -> None:
    state = busy(queued=4)
    state, events = run(admit("mine", at_s=1, tenant="b"), state=state)
    refused = decided(events)[0]
    assert (refused.request_id, refused.action, refused.code) == ("a3", "reject", "queue_full")
    assert refused.retry_after_s >= 1.0
    assert set(state.waiting) == {"a0", "a1", "a2", "mine"}
    _, events = run(admit("more", at_s=2, tenant="a"), state=state)
    assert (decided(events)[0].request_id, decided(events)[0].code) == ("more", "queue_full")


def test_what_no_executor_that_is_up_can_hold_lets_the_others_pass_and_comes_back() -> None:
    large, small = capacity(kv=1000, name="large"), capacity(slots=1, kv=200, name="small")
    state, _ = run(small, large, admit("s"), granted("s"), admit("l"), granted("l"))
    state, _ = run(admit("big", at_s=1, kv_bytes=500), admit("next", at_s=2), state=state)
    state, _ = run(msgspec.structs.replace(large, slots=0, kv_budget_bytes=0), withdraw("l", 3), state=state)
    state, events = run(withdraw("s", 4), state=state)
    assert [type(event) for event in events] == [ev.SlotReleased, ev.Parked, ev.Dequeued, ev.MemoryRequested]
    assert asked(events) == ["next"]
    assert "big" in state.waiting
    state, _ = run(granted("next", 4), state=state)
    record = recorded_form(ADMISSION, state)
    assert recorded_form(ADMISSION, ADMISSION.restored(record)) == record
    _, events = run(large, state=state)
    assert [type(event) for event in events] == [ev.CapacitySet, ev.Unparked, ev.Dequeued, ev.MemoryRequested]
    assert asked(events) == ["big"]


def test_a_parked_request_expires_at_its_deadline() -> None:
    state, _ = run(capacity(kv=200, name="small"), capacity(kv=1000, name="large"))
    state, _ = run(admit("s"), granted("s"), admit("l"), granted("l"), state=state)
    state, _ = run(admit("big", within_s=5, kv_bytes=500), capacity(slots=0, kv=0, name="large"), state=state)
    state, _ = run(withdraw("l"), withdraw("s"), state=state)
    assert "big" in state.waiting
    state, events = run(cmd.CheckDeadlines(now_ns=6 * NS_PER_S), state=state)
    assert [(each.request_id, each.code) for each in decided(events)] == [("big", "deadline_exceeded")]
    assert not state.waiting
    assert not len(state.parked)


# ---------------------------------------------------------------- forecasts


def paced(interval_s: float, *, queued: int) -> AdmissionState:
    """A line of which one was let in every ``interval_s``, with so many left."""
    state, _ = run(capacity(), admit("r"), granted("r"), admission=ROOMY)
    total = RELEASES_MIN + 2 + queued
    for number in range(total):
        state, _ = run(admit(f"q{number}", within_s=10_000), state=state, admission=ROOMY)
    running = "r"
    for number in range(RELEASES_MIN + 2):
        at_s = (number + 1) * interval_s
        state, events = run(withdraw(running, at_s), state=state, admission=ROOMY)
        (running,) = asked(events)
        state, _ = run(granted(running, at_s), state=state, admission=ROOMY)
    return state


def test_who_cannot_be_served_by_its_deadline_is_refused_at_once_and_told_when_to_come_again() -> None:
    state = paced(2.0, queued=4)
    now_s = 20.0
    _, events = run(admit("late", at_s=now_s, within_s=6.0), state=state, admission=ROOMY)
    (refused,) = decided(events)
    assert (refused.action, refused.code) == ("reject", "deadline_exceeded")
    assert refused.wait_s == pytest.approx(10.0, rel=0.01), "four before it, and one that runs"
    assert refused.retry_after_s == pytest.approx(4.0, rel=0.05), "by then the line is short enough"
    _, events = run(admit("patient", at_s=now_s, within_s=30.0), state=state, admission=ROOMY)
    assert [each.action for each in decided(events)] == ["queue"]
    assert decided(events)[0].wait_s == pytest.approx(10.0, rel=0.01)


def test_below_the_level_refuse_a_forecast_has_the_benefit_of_the_doubt() -> None:
    state = paced(2.0, queued=3)
    _, events = run(admit("a", at_s=20.0, within_s=7.0, pressure=0.0), state=state)
    assert [each.action for each in decided(events)] == ["queue"]
    _, events = run(admit("a", at_s=20.0, within_s=7.0, pressure=0.95), state=state)
    assert [each.action for each in decided(events)] == ["reject"]


def test_who_would_be_next_may_always_wait() -> None:
    state = paced(2.0, queued=0)
    _, events = run(admit("a", at_s=20.0, within_s=0.1, pressure=0.95), state=state)
    assert [each.action for each in decided(events)] == ["queue"]


def test_nobody_is_refused_on_a_guess_before_the_pace_is_known() -> None:
    _, events = run(admit("a", at_s=1.0, within_s=0.01), state=busy(queued=2))
    assert [each.action for each in decided(events)] == ["queue"]


# ---------------------------------------------------------------- the state


def test_a_restored_state_decides_as_the_one_that_was_recorded() -> None:
    state = busy(queued=2)
    for number, tenant in enumerate("bcb"):
        if number == 2:
            state, _ = run(withdraw("a0", 1), state=state)
        state, _ = run(admit(f"{tenant}{number}", at_s=1 + number, tenant=tenant), state=state)
    again = ADMISSION.restored(
        msgspec.msgpack.decode(msgspec.msgpack.encode(ADMISSION.recorded(state)), type=ADMISSION.record_type)
    )
    assert again == state
    for at_s in itertools.count(5):
        if not state.waiting:
            break
        running = next(iter(state.running))
        state, events = run(withdraw(running, at_s), state=state)
        again, same = run(withdraw(running, at_s), state=again)
        assert events == same
        (name,) = asked(events)
        state, _ = run(granted(name, at_s), state=state)
        again, _ = run(granted(name, at_s), state=again)


def test_policy_version_1_knows_none_of_it() -> None:
    old = deciders_of(Settings(policy_version=1, max_queue=2)).admission
    state, events = run(capacity(), admit("a", pressure=0.99, tenant="t"), admission=old)
    assert not events[0].ask.shrunk
    _, events = run(granted("a"), state=state, admission=old)
    assert (events[0].tenant, events[0].pressure, events[0].kv_bytes_max) == ("", 0.0, 0)
    assert old.policy.fingerprint == "1a11a20458cd", "recordings name their policy by this"
