"""Who delayed a request."""

from typing import TYPE_CHECKING

import pytest

from gptoss.clock import NS_PER_MS
from gptoss.errors import RequestNotFound
from gptoss.messages import events as ev
from gptoss.messages.plan import Preemption, Start
from gptoss.telemetry.delays import Delay, Story, story
from gptoss.telemetry.recording import ListRecording
from gptoss.telemetry.request_records import RecordingSource
from gptoss.telemetry.timeline_text import render_story

if TYPE_CHECKING:
    from telemetry.conftest import Script


MB = 1 << 20


def story_of(script: "Script", request_id: str) -> Story:
    return story(RecordingSource(ListRecording(script.records)), request_id)


def of_kind(found: Story, kind: str) -> dict[str, Delay]:
    return {delay.who: delay for delay in found.delays if delay.kind == kind}


def start(script: "Script", request_id: str) -> None:
    script.receive(request_id)
    script.admit(request_id)
    script.route(request_id)


def end(script: "Script", request_id: str, tokens: int) -> None:
    script.request(request_id, script.completion(tokens))
    script.release(request_id)


def queued_behind_two(script: "Script") -> None:
    """One that holds its slot from before, one that gives it back in the middle of the wait."""
    start(script, "req_a")
    start(script, "req_b")
    script.receive("req_late")
    script.decide("req_late", "queue", "slots")
    script.enqueue("req_late")
    for _ in range(4):
        script.step({"req_a": (1, 0), "req_b": (1, 0)}, after_ms=10)
    released = ev.ReservationReleased(request_id="req_b", kv_bytes=2 * MB, executor="cpu")
    script.add("memory", released, correlation="req_b")
    freed = ev.SlotReleased(request_id="req_b", running=1, ran_ns=60 * NS_PER_MS)
    script.add("admission", freed, correlation="req_b")
    for _ in range(4):
        script.step({"req_a": (1, 0)}, after_ms=10)
    dequeued = ev.Dequeued(request_id="req_late", waited_ns=0, queued=0, reason="tried")
    script.add("admission", dequeued, correlation="req_late")


def test_those_who_held_slots_while_it_queued_are_named_with_their_times(script: "Script") -> None:
    queued_behind_two(script)
    script.admit("req_late")
    script.route("req_late")
    script.generate("req_late", 2)
    end(script, "req_late", 2)
    found = story_of(script, "req_late")
    held = of_kind(found, "queue")
    assert list(held) == ["req_a", "req_b"]  # the dearest first
    assert held["req_b"].took_ms == pytest.approx(42)
    assert held["req_a"].took_ms == pytest.approx(83)
    assert held["req_b"].detail == "held a slot and 2.0 MiB of KV"
    assert held["req_a"].share == pytest.approx(held["req_a"].took_ms / found.timeline.total_ms, abs=1e-3)


def test_one_that_only_the_steps_show_held_its_slot_from_before_the_recording(script: "Script") -> None:
    queued_behind_two(script)
    begin = next(i for i, r in enumerate(script.records) if r.meta.correlation == "req_late")
    found = story(RecordingSource(ListRecording(script.records[begin:])), "req_late")
    assert set(of_kind(found, "queue")) == {"req_a", "req_b"}


def test_a_prefill_that_stretched_its_steps_costs_what_they_took_beyond_the_usual(script: "Script") -> None:
    start(script, "req_1")
    script.step({"req_1": (1, 12)}, after_ms=30)
    for _ in range(5):
        script.step({"req_1": (1, 0)}, after_ms=11)  # 10 ms each
    start(script, "req_big")
    script.step({"req_1": (1, 0), "req_big": (0, 300)}, after_ms=51)
    script.step({"req_1": (1, 0), "req_big": (0, 300)}, after_ms=51)
    script.step({"req_1": (1, 0), "req_big": (1, 0)}, after_ms=11)
    end(script, "req_1", 9)
    found = story_of(script, "req_1")
    delay = of_kind(found, "step")["req_big"]
    assert delay.took_ms == pytest.approx(80)
    assert delay.detail == "prefilled 600 tokens in 2 steps that it decoded in"
    assert not of_kind(found, "queue")


def test_steps_that_ran_before_its_first_row_are_charged_to_their_rows(script: "Script") -> None:
    start(script, "req_1")
    script.step({"req_a": (0, 90), "req_b": (10, 0)}, after_ms=41)
    script.step({"req_1": (1, 12)}, after_ms=11)
    end(script, "req_1", 1)
    waited = of_kind(story_of(script, "req_1"), "engine")
    assert (waited["req_a"].took_ms, waited["req_b"].took_ms) == (pytest.approx(36), pytest.approx(4))


def test_a_preemption_names_who_got_the_memory_and_lasts_until_it_ran_again(script: "Script") -> None:
    start(script, "req_1")
    script.step({"req_1": (1, 12)}, after_ms=10)
    step = ev.StepCommitted(
        executor="cpu",
        step=90,
        started_ns=script.now_ns,
        duration_ns=NS_PER_MS,
        rows=(ev.CommittedRow("req_vip", 1, 0, 50),),
        waiting=1,
        running=1,
        kv_bytes_in_use=0,
        preemptions=(Preemption("req_1", 1, "priority"),),
        starts=(Start("req_vip", 1, 0),),
    )
    script.add("executor/cpu", step)
    lost = ev.Preempted(request_id="req_1", executor="cpu", attempt=1, step=90, reason="priority")
    script.add("executor/cpu", lost, correlation="req_1")
    script.step({"req_vip": (1, 0)}, after_ms=30)
    script.step({"req_1": (1, 12)}, after_ms=10)
    end(script, "req_1", 2)
    delay = of_kind(story_of(script, "req_1"), "preemption")["req_vip"]
    assert delay.detail == "preempted at step 90: priority"
    assert 30 <= delay.took_ms <= 42


def test_a_lost_engine_lasts_until_another_took_the_request(script: "Script") -> None:
    script.retried("req_1")
    delay = of_kind(story_of(script, "req_1"), "restart")["cpu"]
    assert delay.detail == "engine_lost: it died"
    assert delay.took_ms == pytest.approx(11)


def test_a_request_alone_is_delayed_by_nobody(script: "Script") -> None:
    script.completed("req_1", queued=False)
    assert story_of(script, "req_1").delays == ()


def test_an_unknown_request_has_no_story(script: "Script") -> None:
    with pytest.raises(RequestNotFound):
        story_of(script, "req_9")


@pytest.mark.parametrize("width", [60, 80, 140])
def test_the_text_keeps_to_the_width_and_escapes_what_others_wrote(script: "Script", width: int) -> None:
    for number in range(9):
        start(script, f"req_{number}\x1b[31m")
    script.receive("req_late")
    script.enqueue("req_late")
    script.step({f"req_{number}\x1b[31m": (1, 0) for number in range(9)}, after_ms=50)
    text = render_story(story_of(script, "req_late"), width=width)
    assert max(map(len, text.splitlines())) <= width
    assert "\x1b" not in text
    assert "and 4 others" in text
