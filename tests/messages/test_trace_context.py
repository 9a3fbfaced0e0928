"""Names of traces: a caller's own goes on, any other follows from the request."""

import pytest

from gptoss.messages.envelope import Meta
from gptoss.messages.trace_context import TraceContext, parse_traceparent, span_id_of

GIVEN = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-00"


def meta(pos: int) -> Meta:
    return Meta("node", "boot", pos, "request/r", 0, "RequestReceived", 1, -1, "r", "", "", "a", 0, 5)


def test_a_callers_trace_goes_on_under_a_span_of_this_server() -> None:
    context = TraceContext.begin(GIVEN, "node boot r 1")
    assert context.trace_id == "0af7651916cd43dd8448eb211c80319c"
    assert context.span_id != "b7ad6b7169203331"
    assert context.traceparent == f"00-{context.trace_id}-{context.span_id}-00"


def test_without_a_caller_the_request_names_its_trace() -> None:
    first, again, other = (TraceContext.begin("", f"node boot r {n}") for n in (1, 1, 2))
    assert first == again
    assert other.trace_id != first.trace_id
    assert other.span_id != first.span_id
    assert parse_traceparent(first.traceparent) == (first.trace_id, first.span_id, "01")


@pytest.mark.parametrize(
    "header",
    [
        "",
        "nonsense",
        "ff-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
        "00-00000000000000000000000000000000-b7ad6b7169203331-01",
        "00-0af7651916cd43dd8448eb211c80319c-0000000000000000-01",
        "00-0AF7651916CD43DD8448EB211C80319C-b7ad6b7169203331-01",
        GIVEN + "-more",
    ],
)
def test_a_header_that_is_not_valid_is_passed_over(header: str) -> None:
    assert parse_traceparent(header) is None
    assert TraceContext.begin(header, "r") == TraceContext.begin("", "r")


def test_span_ids_differ_by_record_and_purpose_and_never_change() -> None:
    ids = {span_id_of(meta(pos), what) for pos in (1, 2) for what in ("chat", "queue")}
    assert len(ids) == 4
    assert span_id_of(meta(1), "chat") == "084d72366f40dff4"
