"""Admission as given events, when command, then events."""

from gptoss.actors.admission import Admission
from gptoss.actors.admission_fit import AdmissionPolicy
from gptoss.actors.admission_state import AdmissionState
from gptoss.messages import commands as cmd
from gptoss.messages import events as ev
from gptoss.messages.commands import Command
from gptoss.messages.envelope import Event

ADMISSION = Admission(AdmissionPolicy(max_queue=2))


def run(*commands: Command, state: AdmissionState | None = None) -> tuple[AdmissionState, list[Event]]:
    """Feed commands; returns the state and the events of the last one."""
    state = state or ADMISSION.initial()
    events: list[Event] = []
    for command in commands:
        events = ADMISSION.decide(state, command)
        for event in events:
            state = ADMISSION.evolve(state, event)
    return state, events


def capacity(slots: int = 1, kv: int = 1000) -> cmd.SetCapacity:
    return cmd.SetCapacity(now_ns=0, executor="cpu:0", slots=slots, kv_budget_bytes=kv)


def admit(name: str, *, at: int = 0, kv: int = 100, priority: int = 0, deadline: int = 10**12) -> cmd.AdmitRequest:
    return cmd.AdmitRequest(
        now_ns=at,
        request_id=name,
        prompt_tokens=10,
        max_tokens=90,
        kv_bytes=kv,
        kv_bytes_prompt=10,
        priority=priority,
        deadline_ns=deadline,
    )


def granted(name: str, at: int = 0) -> cmd.MemoryGranted:
    return cmd.MemoryGranted(now_ns=at, request_id=name)


def withdraw(name: str, at: int = 0) -> cmd.WithdrawRequest:
    return cmd.WithdrawRequest(now_ns=at, request_id=name)


def decisions(events: list[Event]) -> list[tuple[str, str]]:
    return [(e.action, e.code) for e in events if isinstance(e, ev.AdmissionDecided)]


def test_a_request_that_fits_is_accepted_once_memory_is_granted() -> None:
    state, events = run(capacity(), admit("a"))
    assert [type(e) for e in events] == [ev.MemoryRequested]
    state, events = run(granted("a"), state=state)
    assert decisions(events) == [("accept", "")]
    assert set(state.running) == {"a"}


def test_nobody_is_admitted_before_an_executor_is_ready() -> None:
    _, events = run(admit("a"))
    assert decisions(events) == [("reject", "not_ready")]


def test_a_full_batch_queues_and_a_full_queue_refuses_with_retry_after() -> None:
    state, _ = run(capacity(), admit("a"), granted("a"), admit("b", at=1), admit("c", at=2))
    assert state.line.names() == ["b", "c"]
    _, events = run(admit("d", at=3), state=state)
    assert decisions(events) == [("reject", "queue_full")]
    assert isinstance(events[0], ev.AdmissionDecided)
    assert events[0].retry_after_s >= 1.0


def test_a_freed_slot_goes_to_the_most_urgent_then_the_oldest() -> None:
    state, _ = run(
        capacity(), admit("a"), granted("a"), admit("late", at=2, priority=0), admit("early", at=1, priority=0)
    )
    _, events = run(withdraw("a", at=9), state=state)
    assert [e.request_id for e in events if isinstance(e, ev.MemoryRequested)] == ["early"]
    urgent, _ = run(
        capacity(), admit("a"), granted("a"), admit("old", at=1, priority=5), admit("urgent", at=2, priority=-1)
    )
    _, events = run(withdraw("a", at=9), state=urgent)
    assert [e.request_id for e in events if isinstance(e, ev.MemoryRequested)] == ["urgent"]


def test_a_request_refused_by_memory_waits_in_front_and_nobody_overtakes_it() -> None:
    state, _ = run(capacity(slots=4), admit("big"))
    refused = cmd.MemoryRefused(now_ns=1, request_id="big", kv_bytes_free_max=0, pressure=1.0)
    state, events = run(refused, state=state)
    assert any(isinstance(e, ev.Enqueued) and e.reason == "memory" for e in events)
    state, events = run(admit("small", at=2, kv=1), state=state)
    assert not [e for e in events if isinstance(e, ev.MemoryRequested)]
    state, events = run(cmd.MemoryFreed(now_ns=3), state=state)
    assert [e.request_id for e in events if isinstance(e, ev.MemoryRequested)] == ["big"]
    again = cmd.MemoryRefused(now_ns=4, request_id="big", kv_bytes_free_max=50, pressure=0.9)
    assert not [e for e in run(again, state=state)[1] if isinstance(e, ev.MemoryRequested)]
    _, events = run(granted("big", at=4), state=state)
    assert [e.request_id for e in events if isinstance(e, ev.MemoryRequested)] == ["small"]


def test_while_the_head_of_the_line_is_tried_a_newcomer_waits_unless_it_goes_first() -> None:
    refused = cmd.MemoryRefused(now_ns=1, request_id="big", kv_bytes_free_max=0, pressure=1.0)
    state, _ = run(capacity(slots=4), admit("big"), refused, cmd.MemoryFreed(now_ns=2))
    assert decisions(run(admit("small", at=3, kv=1), state=state)[1]) == [("queue", "")]
    _, events = run(admit("urgent", at=3, kv=1, priority=-1), state=state)
    assert [e.request_id for e in events if isinstance(e, ev.MemoryRequested)] == ["urgent"]


def test_a_request_that_leaves_the_head_of_the_line_lets_the_next_be_tried() -> None:
    refused = cmd.MemoryRefused(now_ns=1, request_id="big", kv_bytes_free_max=0, pressure=1.0)
    state, _ = run(capacity(slots=4), admit("big"), refused, admit("small", at=2, kv=1))
    _, events = run(withdraw("big", at=3), state=state)
    assert [e.request_id for e in events if isinstance(e, ev.MemoryRequested)] == ["small"]


def test_who_leaves_while_memory_is_asked_for_has_it_released_behind_the_reservation() -> None:
    state, events = run(capacity(), admit("a"), withdraw("a", at=1))
    told = [told for event in events for told in ADMISSION.tells(state, event, 1)]
    assert told == [("memory", cmd.ReleaseMemory(now_ns=1, request_id="a"))]


def test_what_no_executor_could_hold_is_shrunk_to_what_fits() -> None:
    state, events = run(capacity(kv=60), admit("a", kv=100))
    assert isinstance(events[0], ev.MemoryRequested)
    assert events[0].ask.max_tokens == 50
    _, events = run(granted("a"), state=state)
    assert decisions(events) == [("shrink", "")]


def test_what_would_be_uselessly_short_is_refused() -> None:
    _, events = run(capacity(kv=20), admit("a", kv=100))
    assert decisions(events) == [("reject", "memory_exhausted")]


def test_a_queued_request_past_its_deadline_is_refused_once() -> None:
    state, _ = run(capacity(), admit("a"), granted("a"), admit("b", at=1, deadline=5))
    state, events = run(cmd.CheckDeadlines(now_ns=6), state=state)
    assert decisions(events) == [("reject", "deadline_exceeded")]
    assert run(cmd.CheckDeadlines(now_ns=7), state=state)[1] == []


def test_withdrawing_twice_frees_one_slot() -> None:
    state, _ = run(capacity(), admit("a"), granted("a"))
    state, events = run(withdraw("a", at=5), state=state)
    assert [type(e) for e in events] == [ev.SlotReleased]
    assert run(withdraw("a", at=6), state=state)[1] == []


def test_memory_granted_to_a_request_that_left_admits_nobody() -> None:
    state, _ = run(capacity(), admit("a"), withdraw("a"))
    state, events = run(granted("a"), state=state)
    assert events == []
    assert state.free_slots == 1


def test_draining_refuses_the_new_and_keeps_the_waiting() -> None:
    state, _ = run(capacity(), admit("a"), granted("a"), admit("b", at=1), cmd.StartDraining(now_ns=2))
    _, events = run(admit("c", at=3), state=state)
    assert decisions(events) == [("reject", "not_ready")]
    _, events = run(withdraw("a", at=4), state=state)
    assert [e.request_id for e in events if isinstance(e, ev.MemoryRequested)] == ["b"]


def test_a_lost_executor_queues_instead_of_refusing() -> None:
    state, _ = run(capacity(), cmd.SetCapacity(now_ns=1, executor="cpu:0", slots=0, kv_budget_bytes=1000))
    state, events = run(admit("a", at=2), state=state)
    assert decisions(events) == [("queue", "")]
    _, events = run(capacity(), state=state)
    assert [e.request_id for e in events if isinstance(e, ev.MemoryRequested)] == ["a"]
