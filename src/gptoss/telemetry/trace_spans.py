"""The span tree of one request that has ended, from its records. Pure.

    POST /v1/chat/completions        SERVER; child of the caller's span, where it sent one
    +- chat MODEL                    with OpenTelemetry's GenAI attributes; moments of the request are its events
       +- render                     the prompt becomes tokens
       +- queue                      until admission says yes; links to those who ran meanwhile, where it had to wait
       +- route                      until an executor has it; again for every attempt
       +- prefill                    until the first token of the attempt; links to those who shared its steps
       +- decode                     until the last

A further choice of a call has no SERVER span of its own: it stands under that of the first. What a request did not come to
has no span. Attributes hold no content: stop strings are counted, not shown.
"""

from gptoss.clock import NS_PER_MS
from gptoss.errors import error_from
from gptoss.messages import events as ev
from gptoss.messages.envelope import Event, Record
from gptoss.messages.sampling import SamplingParams
from gptoss.messages.trace_context import parse_traceparent, span_id_of
from gptoss.telemetry.logs import safe_text
from gptoss.telemetry.metric_catalogue import PROVIDER, operation_of
from gptoss.telemetry.request_view import RequestView
from gptoss.telemetry.spans import Attributes, Span
from gptoss.telemetry.tail_sampling import SERVER_CANCELS, Kept, is_server_fault
from gptoss.telemetry.trace_phases import Life, moments, phases

HTTP_OK = 200


def spans_of(life: Life) -> tuple[Span, ...]:
    """All spans of a request, parents first."""
    received = life.records[0]
    assert isinstance(received.event, ev.RequestReceived)
    spans: list[Span] = []
    parent = received.meta.span_id
    if not received.event.parent_id:
        spans.append(_server(life, received, received.event, parent))
    validated = _first(life, ev.RequestValidated)
    if validated is not None:
        chat = _chat(life, received, validated.event, parent)
        spans += [chat, *phases(life, chat)]
    return tuple(spans)


def _server(life: Life, received: Record, event: ev.RequestReceived, span_id: str) -> Span:
    request = life.request
    is_http = event.endpoint.startswith("/")
    given = parse_traceparent(event.traceparent)
    attributes: Attributes = {"gptoss.request.id": request.request_id, **_sampling(life.kept)}
    if is_http:
        attributes |= {
            "http.request.method": "POST",
            "http.route": event.endpoint,
            "url.path": event.endpoint,
            "http.response.status_code": _status(life),
        }
    return Span(
        trace_id=request.trace_id,
        span_id=span_id,
        parent_id=given[1] if given else "",
        is_parent_remote=given is not None,
        name=f"POST {event.endpoint}" if is_http else event.endpoint,
        kind="server" if is_http else "internal",
        start_ns=life.wall_offset_ns + received.meta.mono_ns,
        end_ns=life.wall_offset_ns + life.records[-1].meta.mono_ns,
        attributes=attributes | _error(request),
        error=_fault(request),
    )


def _status(life: Life) -> int:
    """What the answer's status was: once its first byte was out, a failure could change it no more."""
    request = life.request
    if request.status:
        return request.status
    if request.state == "failed" and _first(life, ev.FirstByteSent) is None:
        return error_from(request.outcome, "").status
    return HTTP_OK


def _chat(life: Life, received: Record, validated: Event, parent: str) -> Span:
    assert isinstance(received.event, ev.RequestReceived)
    assert isinstance(validated, ev.RequestValidated)
    request, event = life.request, received.event
    operation = operation_of(event.endpoint)
    model = safe_text(event.model or life.model)
    attributes: Attributes = {
        "gen_ai.operation.name": operation,
        "gen_ai.provider.name": PROVIDER,
        "gen_ai.request.stream": event.stream,
        "gen_ai.response.id": request.request_id,
        "gptoss.request.stop_sequences.count": validated.num_stop_strings,
        "gptoss.priority": event.priority,
        **({"gen_ai.request.model": model} if model else {}),
        **({"gen_ai.response.model": life.model} if life.model else {}),
        **({"gen_ai.conversation.id": event.session_id} if event.session_id else {}),
        **({"gen_ai.request.choice.count": life.choices} if not event.parent_id else {}),
        **_settings(validated.sampling),
        **_usage(life),
        **_sampling(life.kept),
    }
    return Span(
        trace_id=request.trace_id,
        span_id=span_id_of(received.meta, "chat"),
        parent_id=parent,
        name=f"{operation} {model}".rstrip(),
        start_ns=life.wall_offset_ns + received.meta.mono_ns,
        end_ns=life.wall_offset_ns + life.records[-1].meta.mono_ns,
        attributes=attributes | _error(request),
        events=moments(life),
        error=_fault(request),
    )


def _settings(sampling: SamplingParams) -> Attributes:
    attributes: Attributes = {
        "gen_ai.request.temperature": sampling.temperature,
        "gen_ai.request.top_p": sampling.top_p,
        "gen_ai.request.frequency_penalty": sampling.frequency_penalty,
        "gen_ai.request.presence_penalty": sampling.presence_penalty,
    }
    if sampling.max_tokens is not None:
        attributes["gen_ai.request.max_tokens"] = sampling.max_tokens
    if sampling.top_k:
        attributes["gen_ai.request.top_k"] = sampling.top_k
    if sampling.seed is not None:
        attributes["gen_ai.request.seed"] = sampling.seed
    return attributes


def _usage(life: Life) -> Attributes:
    request, end = life.request, life.records[-1].event
    attributes: Attributes = {
        "gen_ai.usage.input_tokens": request.prompt_tokens,
        "gen_ai.usage.output_tokens": request.completion_tokens,
    }
    if request.ttft_ns is not None:
        attributes["gptoss.time_to_first_token_ms"] = request.ttft_ns / NS_PER_MS
    if isinstance(end, ev.RequestCompleted):
        reason = "tool_calls" if end.num_calls and end.finish_reason == "stop" else end.finish_reason
        attributes["gen_ai.response.finish_reasons"] = (reason,)
        attributes["gen_ai.usage.cache_read.input_tokens"] = end.cached_tokens
        attributes["gen_ai.usage.reasoning.output_tokens"] = end.reasoning_tokens
    elif isinstance(end, ev.RequestCancelled):
        attributes["gen_ai.response.finish_reasons"] = ("cancelled",)
    return attributes


def _sampling(kept: Kept) -> Attributes:
    return {"gptoss.sampling.reason": kept.reason, "gptoss.sampling.probability": kept.probability}


def _fault(request: RequestView) -> str:
    """What makes the span an error: not what the client did wrong, or no longer wanted."""
    gave_up = request.state == "cancelled" and request.outcome in SERVER_CANCELS
    return request.outcome if is_server_fault(request) or gave_up else ""


def _error(request: RequestView) -> Attributes:
    return {"error.type": request.outcome} if request.state in {"failed", "rejected", "cancelled"} else {}


def _first(life: Life, kind: type[Event]) -> Record | None:
    return next((record for record in life.records if isinstance(record.event, kind)), None)
