"""Traces from records: which are kept, and what their spans say."""

import json
from collections.abc import Callable
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import msgspec
import pytest

from gptoss.clock import NS_PER_MS
from gptoss.messages import events as ev
from gptoss.messages.envelope import Record
from gptoss.messages.trace_context import TraceContext
from gptoss.telemetry.spans import LINKS_MAX, Span
from gptoss.telemetry.traces import Traces

if TYPE_CHECKING:
    from telemetry.conftest import Script

NewScript = Callable[[str], "Script"]
PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
KEEP_ALL: dict[str, Any] = {"otlp_endpoint": "http://collector", "trace_ratio": 1.0}
KEEP_NONE: dict[str, Any] = {"otlp_endpoint": "http://collector", "trace_ratio": 0.0}


def with_settings(records: list[Record], settings: dict[str, Any]) -> list[Record]:
    return [
        Record(one.meta, msgspec.structs.replace(one.event, settings=json.dumps(settings)))
        if isinstance(one.event, ev.NodeStarted)
        else one
        for one in records
    ]


def traced(script: "Script", settings: dict[str, Any] = KEEP_ALL) -> list[Span]:
    found: list[Span] = []
    traces = Traces(found.extend)
    for record in with_settings(script.records, settings):
        traces.fold(record)
    return found


def named(spans: list[Span]) -> dict[str, Span]:
    assert len({span.name for span in spans}) == len(spans)
    return {span.name: span for span in spans}


def test_a_request_is_a_tree_of_spans(script: "Script") -> None:
    script.completed("req_1", tokens=5, cached=4)
    spans = named(traced(script))
    assert list(spans) == [
        "POST /v1/chat/completions",
        "chat demo-20b",
        "render",
        "queue",
        "route",
        "prefill",
        "decode",
    ]
    server, chat = spans["POST /v1/chat/completions"], spans["chat demo-20b"]
    assert (server.kind, server.parent_id, server.is_parent_remote) == ("server", "", False)
    assert chat.parent_id == server.span_id
    phases = [spans[name] for name in ("render", "queue", "route", "prefill", "decode")]
    assert {span.parent_id for span in phases} == {chat.span_id}
    assert len({span.trace_id for span in spans.values()}) == 1
    assert len({span.span_id for span in spans.values()}) == len(spans)
    for span in phases:
        assert chat.start_ns <= span.start_ns <= span.end_ns <= chat.end_ns
    for before, after in pairwise(phases):
        assert before.end_ns <= after.start_ns


def test_spans_have_wall_times(script: "Script") -> None:
    script.completed("req_1")
    started = script.records[0]
    assert isinstance(started.event, ev.NodeStarted)
    received = next(one for one in script.records if isinstance(one.event, ev.RequestReceived))
    server = traced(script)[0]
    assert server.start_ns == started.event.wall_ns + received.meta.mono_ns - started.meta.mono_ns


def test_the_chat_span_has_the_genai_attributes(script: "Script") -> None:
    script.completed("req_1", tokens=5, cached=4)
    attributes = named(traced(script))["chat demo-20b"].attributes
    expected = {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "gptoss",
        "gen_ai.request.model": "demo-20b",
        "gen_ai.request.max_tokens": 32,
        "gen_ai.request.temperature": 1.0,
        "gen_ai.request.top_p": 1.0,
        "gen_ai.request.seed": 7,
        "gen_ai.request.stream": True,
        "gen_ai.request.choice.count": 1,
        "gen_ai.response.id": "req_1",
        "gen_ai.response.model": "demo-20b",
        "gen_ai.response.finish_reasons": ("stop",),
        "gen_ai.usage.input_tokens": 12,
        "gen_ai.usage.output_tokens": 5,
        "gen_ai.usage.cache_read.input_tokens": 4,
        "gen_ai.usage.reasoning.output_tokens": 0,
        "gptoss.sampling.reason": "ratio",
        "gptoss.sampling.probability": 1.0,
    }
    assert {name: attributes.get(name) for name in expected} == expected


def test_prefill_and_decode_end_with_their_tokens(script: "Script") -> None:
    script.completed("req_1", tokens=5, queued=False)
    spans = named(traced(script))
    prefill, decode = spans["prefill"], spans["decode"]
    assert prefill.end_ns == decode.start_ns
    assert prefill.attributes["gptoss.prefill.prefilled"] == 12
    assert decode.attributes["gptoss.decode.tokens"] == 5
    assert decode.end_ns - decode.start_ns == pytest.approx(4 * 20 * NS_PER_MS, abs=2 * NS_PER_MS)


def test_the_callers_span_is_the_parent(script: "Script") -> None:
    script.completed("req_1")
    records = [
        Record(
            msgspec.structs.replace(one.meta, trace_id=TraceContext.begin(PARENT, "r").trace_id),
            msgspec.structs.replace(one.event, traceparent=PARENT),
        )
        if isinstance(one.event, ev.RequestReceived)
        else one
        for one in script.records
    ]
    script.records[:] = records
    spans = traced(script)
    assert {span.trace_id for span in spans} == {"0af7651916cd43dd8448eb211c80319c"}
    assert (spans[0].parent_id, spans[0].is_parent_remote) == ("b7ad6b7169203331", True)
    assert not any(span.is_parent_remote for span in spans[1:])


def test_rebuilding_gives_the_same_spans(busy: "Script") -> None:
    assert traced(busy) == traced(busy) != []


def test_a_retried_request_has_the_phases_of_each_attempt(script: "Script") -> None:
    script.retried("req_1")
    spans = traced(script)
    assert [span.name for span in spans[4:]] == ["route", "prefill", "decode", "route", "prefill", "decode"]
    assert [span.attributes.get("gptoss.decode.attempt") for span in spans if span.name == "decode"] == [1, 2]
    assert [event.name for event in spans[1].events] == [
        "first_token",
        "first_byte_sent",
        "executor_faulted",
        "attempt_retried",
    ]


def test_steps_link_the_requests_that_shared_them(script: "Script") -> None:
    for name in ("req_a", "req_b"):
        script.receive(name)
        script.admit(name)
        script.route(name)
    script.step({"req_a": (0, 12)})
    script.step({"req_a": (1, 0)})
    script.step({"req_a": (1, 0), "req_b": (1, 12)})
    for name in ("req_a", "req_b"):
        script.request(name, script.completion(2))
    spans = traced(script)
    chats = {str(span.attributes["gen_ai.response.id"]): span for span in spans if span.name.startswith("chat")}
    phases = {(span.name, span.parent_id): span for span in spans}
    a, b = chats["req_a"], chats["req_b"]
    assert phases["prefill", a.span_id].links == ()
    assert phases["decode", a.span_id].links == ((b.trace_id, b.span_id),)
    assert phases["prefill", b.span_id].links == ((a.trace_id, a.span_id),)


def test_a_request_that_waited_links_those_who_ran_meanwhile(script: "Script") -> None:
    script.receive("req_a")
    script.admit("req_a")
    script.route("req_a")
    script.step({"req_a": (1, 12)})
    script.receive("req_b")
    script.enqueue("req_b")
    script.step({"req_a": (1, 0)})
    script.request("req_a", script.completion(2))
    script.add("admission", ev.Dequeued(request_id="req_b", waited_ns=1, queued=0, reason="tried"), correlation="req_b")
    script.admit("req_b")
    script.rejected("req_c")
    script.request("req_b", ev.RequestFailed(code="engine_error", message="no"))
    spans = traced(script)
    of_a = next(span for span in spans if span.attributes.get("gen_ai.response.id") == "req_a")
    queue = [span for span in spans if span.name == "queue" and span.links]
    assert [span.links for span in queue] == [((of_a.trace_id, of_a.span_id),)]


def test_links_are_bounded_and_the_rest_counted(script: "Script") -> None:
    names = [f"req_{index}" for index in range(LINKS_MAX + 8)]
    for name in names:
        script.receive(name)
        script.admit(name)
        script.route(name)
    script.step(dict.fromkeys(names, (1, 12)))
    script.request("req_0", script.completion(1))
    prefill = next(span for span in traced(script) if span.name == "prefill")
    assert len(prefill.links) == LINKS_MAX
    assert prefill.links_dropped == 7
    assert prefill.attributes["gptoss.prefill.company"] == LINKS_MAX + 7


def test_a_refused_request_has_only_the_spans_that_it_came_to(script: "Script") -> None:
    script.rejected("req_1")
    spans = traced(script)
    assert [span.name for span in spans] == ["POST /v1/chat/completions", "chat demo-20b", "render", "queue"]
    assert spans[0].attributes["http.response.status_code"] == 429
    assert (spans[0].error, spans[0].attributes["error.type"]) == ("queue_full", "queue_full")


def test_a_request_that_was_wrong_is_no_error_of_the_server(script: "Script") -> None:
    script.receive("req_1")
    script.request("req_1", ev.RequestRejected(code="invalid_request", status=400, message="no"))
    assert traced(script, KEEP_NONE) == []
    server = traced(script)[0]
    assert (server.error, server.attributes["http.response.status_code"]) == ("", 400)


def test_further_choices_stand_under_the_span_of_the_first(script: "Script") -> None:
    for name, parent in (("req_1", ""), ("req_1-1", "req_1")):
        script.receive(name)
        received = script.records[-5]
        assert isinstance(received.event, ev.RequestReceived)
        meta = msgspec.structs.replace(received.meta, trace_id="ab" * 16, span_id="cd" * 8)
        script.records[-5] = Record(meta, msgspec.structs.replace(received.event, parent_id=parent))
    for name in ("req_1-1", "req_1"):
        script.request(name, script.completion(1))
    spans = traced(script)
    assert [span.name for span in spans].count("POST /v1/chat/completions") == 1
    assert {span.trace_id for span in spans} == {"ab" * 16}
    assert {span.parent_id for span in spans if span.name.startswith("chat")} == {"cd" * 8}
    counts = [span.attributes.get("gen_ai.request.choice.count") for span in spans if span.name.startswith("chat")]
    assert counts == [None, 2]


# ---------------------------------------------------------------- which are kept


def reasons(script: "Script", settings: dict[str, Any]) -> dict[str, Any]:
    return {
        str(span.attributes["gptoss.request.id"]): span.attributes["gptoss.sampling.reason"]
        for span in traced(script, settings)
        if span.kind == "server"
    }


def lives(script: "Script") -> None:
    """One of each kind that the rules know."""
    script.completed("req_fine")
    script.rejected("req_refused")
    script.receive("req_failed")
    script.request("req_failed", ev.RequestFailed(code="engine_error", message="no"))
    for name, reason in (("req_late", "deadline"), ("req_left", "disconnect")):
        script.receive(name)
        cancelled = ev.RequestCancelled(reason=msgspec.convert(reason, ev.CancelReason), completion_tokens=0)
        script.request(name, cancelled)
    script.receive("req_slow")
    script.request("req_slow", script.completion(1), after_ms=10_500)


def test_errors_slow_ones_and_those_that_the_server_gave_up_are_kept(script: "Script") -> None:
    lives(script)
    kept = {"req_refused": "error", "req_failed": "error", "req_late": "cancelled", "req_slow": "slow"}
    assert reasons(script, KEEP_NONE) == kept


@pytest.mark.parametrize(
    ("setting", "value", "left_out"),
    [
        ("trace_errors", False, {"req_refused", "req_failed"}),
        ("trace_cancelled", False, {"req_late"}),
        ("trace_slow_s", 60, {"req_slow"}),
    ],
)
def test_each_rule_has_a_setting(script: "Script", setting: str, value: Any, left_out: set[str]) -> None:
    lives(script)
    everyone = {"req_refused", "req_failed", "req_late", "req_slow"}
    assert set(reasons(script, {**KEEP_NONE, setting: value})) == everyone - left_out


def test_of_the_others_a_share_is_kept_that_the_span_names(script: "Script") -> None:
    for index in range(400):
        script.receive(f"req_{index}")
        script.request(f"req_{index}", script.completion(1))
    kept = [span for span in traced(script, {**KEEP_NONE, "trace_ratio": 0.1}) if span.kind == "server"]
    assert 20 <= len(kept) <= 65
    assert {span.attributes["gptoss.sampling.probability"] for span in kept} == {0.1}
    more = {span.trace_id for span in traced(script, {**KEEP_NONE, "trace_ratio": 0.3}) if span.kind == "server"}
    assert {span.trace_id for span in kept} <= more


def test_without_a_collector_nothing_is_kept(busy: "Script") -> None:
    assert traced(busy, {"trace_ratio": 1.0}) == []
    assert traced(busy, {}) == []


def test_what_is_over_is_forgotten(busy: "Script") -> None:
    traces = Traces(lambda _: None)
    for record in with_settings(busy.records, KEEP_ALL):
        traces.fold(record)
    assert set(traces._running) == set(traces._spans) == set(traces._company.present) == {"req_open"}


def test_another_boot_begins_anew(busy: "Script", new_script: NewScript) -> None:
    second = new_script("boot2")
    second.start()
    second.completed("req_done")
    busy.records += second.records
    spans = traced(busy)
    chats = [span for span in spans if span.attributes.get("gen_ai.response.id") == "req_done"]
    assert len({span.span_id for span in chats}) == 2
