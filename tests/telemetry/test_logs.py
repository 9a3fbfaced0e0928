"""Log lines from records."""

import io
import json
from typing import TYPE_CHECKING, Any, Literal

import msgspec
import pytest

from gptoss.messages import events as ev
from gptoss.messages.envelope import Record
from gptoss.telemetry.logs import Level, LogWriter, log_line

if TYPE_CHECKING:
    from telemetry.conftest import Script


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class BrokenPipe(io.StringIO):
    writes = 0

    def write(self, s: str, /) -> int:
        self.writes += 1
        raise BrokenPipeError


def write(script: "Script", format_name: Literal["json", "console"] = "json", level: Level = "info") -> str:
    stream = io.StringIO()
    writer = LogWriter(stream, format_name, level)
    for record in script.records:
        writer.fold(record)
    return stream.getvalue()


def lines(script: "Script", level: Level = "info") -> list[dict[str, Any]]:
    return [json.loads(line) for line in write(script, level=level).splitlines()]


def about(request_id: str, written: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [line for line in written if line.get("request_id") == request_id]


def test_the_same_records_give_the_same_lines(busy: "Script") -> None:
    assert write(busy) == write(busy)
    assert write(busy, "console") == write(busy, "console")


def test_a_request_is_one_line_with_its_durations_and_tokens(script: "Script") -> None:
    script.completed("req_1", cached=4)
    (line,) = about("req_1", lines(script))
    assert line["event"] == "request_completed"
    assert line["finish_reason"] == "stop"
    assert (line["prompt_tokens"], line["completion_tokens"], line["cached_tokens"]) == (12, 5, 4)
    assert line["queue_ms"] == 40.0
    assert line["e2e_ms"] > line["ttft_ms"] > 40.0
    assert line["tokens_per_s"] == pytest.approx(49.7, abs=0.5)


def test_ends_have_their_levels(busy: "Script") -> None:
    written = lines(busy)
    assert [line["level"] for line in about("req_refused", written)] == ["info"]
    assert [(line["event"], line["level"]) for line in about("req_left", written)] == [("request_cancelled", "info")]
    assert [line["event"] for line in about("req_again", written)] == [
        "executor_faulted",
        "attempt_retried",
        "request_completed",
    ]


def test_a_servers_refusal_is_a_warning(script: "Script") -> None:
    script.receive("req_1")
    rejected = ev.RequestRejected(code="not_ready", status=503, message="draining", retry_after_s=1)
    line = log_line(script.request("req_1", rejected))
    assert line is not None
    assert line["level"] == "warning"


def test_lines_about_a_request_name_its_trace_whoever_recorded_them(script: "Script") -> None:
    script.retried("req_1")
    script.records[:] = [
        one
        if isinstance(one.event, ev.RequestReceived)
        else Record(msgspec.structs.replace(one.meta, trace_id=""), one.event)
        for one in script.records
    ]
    written = {line["event"]: line for line in about("req_1", lines(script))}
    trace_id = next(one.meta.trace_id for one in script.records if isinstance(one.event, ev.RequestReceived))
    assert written["executor_faulted"]["trace_id"] == written["request_completed"]["trace_id"] == trace_id


def test_spans_that_no_collector_got_are_a_warning_and_others_no_news(script: "Script") -> None:
    script.add("system", ev.SpansExported(exported=5, refused=0, overflowed=0))
    script.add("system", ev.SpansExported(exported=0, refused=2, overflowed=1))
    (line,) = [line for line in lines(script) if line["event"] == "spans_exported"]
    assert (line["level"], line["refused"], line["overflowed"]) == ("warning", 2, 1)


def test_ordinary_records_have_no_line(busy: "Script") -> None:
    silent = (ev.RequestReceived, ev.StepCommitted, ev.AdmissionDecided, ev.ReservationGranted, ev.FirstTokenProduced)
    assert all(log_line(record) is None for record in busy.records if isinstance(record.event, silent))


def test_times_come_from_the_clock_anchor(script: "Script") -> None:
    assert lines(script)[0]["timestamp"] == "2023-11-14T22:13:20.000Z"
    assert lines(script)[1]["timestamp"] == "2023-11-14T22:13:20.001Z"


def test_the_level_is_a_floor(busy: "Script") -> None:
    busy.add("node", ev.ActorStarted(kind="Router"))
    assert {line["level"] for line in lines(busy, "warning")} == {"warning"}
    assert "actor_started" not in write(busy)
    assert "actor_started" in write(busy, level="debug")


def test_load_progress_is_throttled(script: "Script") -> None:
    for done in range(100):
        event = ev.EngineLoadProgressed(executor="cpu", stage="tune", done=done, total=100)
        script.add("executor/cpu", event, after_ms=100)
    progress = [line["percent"] for line in lines(script) if line.get("stage") == "tune"]
    assert progress == [0, 20, 40, 60, 80]


def test_dead_letters_are_rate_limited_and_what_was_held_back_is_counted(script: "Script") -> None:
    for index in range(50):
        letter = ev.DeadLettered(to="request/x", message_type="Token", reason="dead")
        script.add("node", letter, after_ms=1 if index < 49 else 1000)
    letters = [line for line in lines(script) if line["event"] == "dead_letter"]
    assert [line.get("held_back") for line in letters] == [None, 48]


def test_nobody_can_forge_a_line(script: "Script") -> None:
    script.rejected("req_1", model="x\n2026 [error] forged\x1b[31m")
    for format_name in ("json", "console"):
        text = write(script, format_name)
        assert "\x1b" not in text
        assert not any(line.startswith("2026") for line in text.splitlines())


def test_long_text_is_cut(script: "Script") -> None:
    line = log_line(script.add("node", ev.LogDegraded(reason="x" * 10_000)))
    assert line is not None
    assert len(line["reason"]) == 300


def test_the_console_is_coloured_only_on_a_terminal(script: "Script") -> None:
    terminal = Terminal()
    writer = LogWriter(terminal, "console")
    for record in script.records:
        writer.fold(record)
    assert "\x1b[" in terminal.getvalue()
    assert "\x1b[" not in write(script, "console")
    assert "engine_loaded" in write(script, "console")


def test_a_broken_log_stream_does_not_stop_the_server(script: "Script") -> None:
    stream = BrokenPipe()
    writer = LogWriter(stream, "json")
    for record in script.records:
        writer.fold(record)
    assert stream.writes == 1
