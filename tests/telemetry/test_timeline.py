"""The timeline of one request."""

from collections.abc import Iterable
from typing import TYPE_CHECKING

import pytest

from gptoss.clock import NS_PER_MS
from gptoss.errors import RequestNotFound
from gptoss.messages import events as ev
from gptoss.messages.envelope import Record
from gptoss.telemetry.timeline import Phase, Timeline, as_dict, check_complete, timeline
from gptoss.telemetry.timeline_text import render_text

if TYPE_CHECKING:
    from telemetry.conftest import Script


def spans(timeline: Timeline) -> list[Phase]:
    return [phase for phase in timeline.phases if not phase.mark]


def without(records: Iterable[Record], *types: type) -> list[Record]:
    return [record for record in records if not isinstance(record.event, types)]


def test_phases_come_in_the_order_of_the_life(script: "Script") -> None:
    script.completed("req_1")
    names = [phase.name for phase in timeline(script.records).phases]
    assert names == [
        "received",
        "validated",
        "rendered",
        "estimated",
        "decided",
        "enqueued",
        "queued",
        "reserved",
        "decided",
        "admitted",
        "route",
        "routed",
        "accepted",
        "prefill",
        "first token",
        "first byte",
        "decode",
        "completed",
        "released",
    ]


def test_phases_lie_end_to_end_from_arrival_to_end(busy: "Script") -> None:
    for request_id in ("req_done", "req_refused", "req_left", "req_again"):
        line = timeline(busy.records, request_id)
        phases = spans(line)
        assert phases[0].start_ms == 0.0
        assert [phase.end_ms for phase in phases[:-1]] == [phase.start_ms for phase in phases[1:]]
        assert phases[-1].end_ms == line.total_ms
        assert phases[-1].name == line.outcome


def test_offsets_are_the_differences_of_the_records_times(script: "Script") -> None:
    script.completed("req_1", tokens=5)
    by_type = {record.meta.type: record.meta.mono_ns for record in script.records}
    line = timeline(script.records)
    begin = by_type["RequestReceived"]
    assert line.total_ms == (by_type["RequestCompleted"] - begin) / NS_PER_MS
    assert line.ttft_ms == (by_type["FirstTokenProduced"] - begin) / NS_PER_MS
    queued = next(phase for phase in line.phases if phase.name == "queued")
    assert queued.end_ms == (by_type["Dequeued"] - begin) / NS_PER_MS


def test_steps_are_summarised_and_only_the_requests_own_rows_count(script: "Script") -> None:
    script.receive("req_1")
    script.admit("req_1")
    script.route("req_1")
    script.step({"req_1": (0, 12), "req_2": (1, 0)})
    script.step({"req_1": (1, 0), "req_2": (1, 0), "req_3": (1, 0)})
    script.request("req_1", ev.FirstTokenProduced(attempt=1))
    script.step({"req_2": (1, 0)})
    script.step({"req_1": (1, 0)})
    decode = timeline(script.records, "req_1").decode
    assert decode is not None
    assert (decode.steps, decode.tokens, decode.p50_step_ms, decode.others_max) == (2, 2, 19.0, 2)


def test_a_preemption_is_a_moment_with_its_reason(script: "Script") -> None:
    script.receive("req_1")
    script.admit("req_1")
    script.route("req_1")
    lost = ev.Preempted(request_id="req_1", executor="cpu", attempt=1, step=3, reason="memory")
    script.add("executor/cpu", lost, correlation="req_1")
    (phase,) = [phase for phase in timeline(script.records).phases if phase.name == "preempted"]
    assert phase.mark
    assert phase.detail == "at step 3: memory"


def test_a_retried_request_shows_both_attempts(script: "Script") -> None:
    script.retried("req_1")
    line = timeline(script.records)
    assert line.attempts == 2
    assert [(phase.name, phase.attempt) for phase in spans(line) if phase.name in {"prefill", "decode", "fault"}] == [
        ("prefill", 1),
        ("decode", 1),
        ("fault", 1),
        ("prefill", 2),
        ("decode", 2),
    ]
    assert line.decode is not None
    assert line.decode.tokens == 5


def test_attempts_to_leave_the_queue_are_one_phase(script: "Script") -> None:
    script.receive("req_1")
    script.decide("req_1", "queue", "slots")
    for _ in range(3):
        script.queue("req_1")
        script.add("admission", ev.MemoryRequested(request_id="req_1", ask=script.ask), correlation="req_1")
        refused = ev.ReservationRefused(request_id="req_1", kv_bytes=5, kv_bytes_free_max=1, pressure=1.0)
        script.add("memory", refused, correlation="req_1")
    script.queue("req_1")
    script.admit("req_1")
    script.route("req_1")
    script.generate("req_1", 5)
    script.request("req_1", script.completion(5))
    script.release("req_1")
    names = [phase.name for phase in timeline(script.records).phases]
    assert (names.count("queued"), names.count("enqueued"), names.count("no memory")) == (1, 1, 1)
    queued = next(phase for phase in timeline(script.records).phases if phase.name == "queued")
    assert queued.detail == "tried 4 times"
    assert check_complete(script.records) == []


def test_an_open_request_is_shown_as_far_as_it_is(busy: "Script") -> None:
    line = timeline(busy.records, "req_open")
    assert line.outcome == "open"
    assert spans(line)[-1].name == "decode"


def test_the_newest_life_of_a_reused_id_counts(script: "Script") -> None:
    script.rejected("req_1")
    script.completed("req_1")
    assert timeline(script.records, "req_1").outcome == "completed"
    assert timeline(script.records).outcome == "completed"
    assert check_complete(script.records, "req_1") == []


def test_a_request_that_the_records_do_not_hold_is_refused(script: "Script") -> None:
    with pytest.raises(RequestNotFound, match="req_9"):
        timeline(script.records, "req_9")


def test_the_same_records_give_the_same_timeline(busy: "Script") -> None:
    assert as_dict(timeline(busy.records, "req_again")) == as_dict(timeline(iter(busy.records), "req_again"))


# ---------------------------------------------------------------- text


def test_the_text_fits_into_80_columns_and_names_every_phase(busy: "Script") -> None:
    line = timeline(busy.records, "req_again")
    text = render_text(line, width=80, color=False)
    assert max(len(row) for row in text.splitlines()) <= 80
    assert "\x1b" not in text
    for phase in line.phases:
        assert phase.name in text
    assert "2 attempts" in text


def test_colour_is_written_only_on_demand(script: "Script") -> None:
    script.completed("req_1")
    line = timeline(script.records)
    assert "\x1b[" in render_text(line, width=100, color=True)
    assert "\x1b[" not in render_text(line, width=100, color=False)


def test_what_a_client_wrote_cannot_steer_the_terminal(script: "Script") -> None:
    script.rejected("req_1", model="evil\x1b[2J\nforged")
    text = render_text(timeline(script.records))
    assert "\x1b" not in text
    assert "evil\\x1b[2J" in text


def test_bars_never_leave_their_column(script: "Script") -> None:
    script.receive("req_1")
    text = render_text(timeline(script.records[:6]), width=60)
    assert max(len(row) for row in text.splitlines()) <= 60


# ---------------------------------------------------------------- completeness


def test_scripted_lives_that_are_over_are_complete(busy: "Script") -> None:
    for request_id in ("req_done", "req_refused", "req_left", "req_again"):
        assert check_complete(busy.records, request_id) == []


def test_an_open_request_is_not_complete(busy: "Script") -> None:
    problems = check_complete(busy.records, "req_open")
    assert "0 records are a terminal event; there must be exactly one" in problems


@pytest.mark.parametrize(
    ("missing", "problem"),
    [
        (ev.RequestCompleted, "0 records are a terminal event"),
        (ev.RequestReceived, "0 records are a RequestReceived"),
        (ev.ReservationReleased, "a reservation was not released"),
        (ev.ReservationGranted, "a reservation was released that was not held"),
        (ev.MemoryRequested, "a slot was released that was not held"),
        (ev.Dequeued, "a place in the queue was not released"),
        (ev.SlotReleased, "a slot was not released"),
        (ev.SamplingBound, "seq 7 of request/req_1 stands where 6 should"),
    ],
)
def test_a_missing_record_is_a_problem(script: "Script", missing: type, problem: str) -> None:
    script.completed("req_1")
    problems = check_complete(without(script.records, missing), "req_1")
    assert any(problem in found for found in problems), problems


def test_a_second_terminal_event_is_a_problem(script: "Script") -> None:
    script.completed("req_1")
    script.request("req_1", ev.RequestFailed(code="engine_error", message="late"))
    assert check_complete(script.records)[0] == "2 records are a terminal event; there must be exactly one"


def test_progress_and_tokens_after_the_end_are_problems(script: "Script") -> None:
    script.completed("req_1")
    script.request("req_1", ev.FirstTokenProduced(attempt=1))
    script.step({"req_1": (1, 0)})
    problems = check_complete(script.records)
    assert "FirstTokenProduced comes after the end" in problems
    assert "a step made tokens after the end" in problems
    assert "steps made 6 tokens and the end counts 5" in problems


def test_more_than_two_steps_after_a_cancel_are_a_problem(script: "Script") -> None:
    script.cancelled("req_1", steps_after=3)
    assert check_complete(script.records) == ["3 steps made tokens after the cancel; at most 2 may"]
