"""A bundle, or any recording, in numbers: who was in it, how each ended, what was decided and why."""

from collections import Counter

import msgspec

from gptoss.clock import NS_PER_MS
from gptoss.errors import AbortedByCrash
from gptoss.messages import events as ev
from gptoss.messages.envelope import Event
from gptoss.telemetry.percentile import nearest_rank
from gptoss.telemetry.recording import Recording
from gptoss.telemetry.request_view import RequestBook, RequestView


class RequestLine(msgspec.Struct, frozen=True, kw_only=True):
    """One request; a time is None when its moment did not come."""

    request_id: str
    boot: str
    state: str
    outcome: str
    prompt_tokens: int
    completion_tokens: int
    queue_ms: float
    ttft_ms: float | None
    e2e_ms: float | None
    retries: int


class Summary(msgspec.Struct, frozen=True, kw_only=True):
    """A recording in numbers.

    Attributes:
        requests: in the order of their arrival.
        decisions: what was decided -> why -> how often.
        records: how many of each event type.
        output: request id -> its output token ids, where the content holds them.
    """

    requests: tuple[RequestLine, ...]
    decisions: dict[str, dict[str, int]]
    records: dict[str, int]
    output: dict[str, list[int]]


def summarize(recording: Recording) -> Summary:
    """Read a recording once. Memory grows with its requests and its tokens."""
    book = RequestBook(finished_max=1)
    views: dict[tuple[str, str], RequestView] = {}
    crashed: set[tuple[str, str]] = set()
    decisions: dict[str, Counter[str]] = {}
    records: Counter[str] = Counter()
    for record in recording.records():
        records[record.meta.type] += 1
        view = book.fold(record)
        if view is not None:
            views.setdefault((record.meta.boot, view.request_id), view)
            if isinstance(record.event, ev.RequestReceived):
                views[record.meta.boot, view.request_id] = view
        elif isinstance(record.event, ev.RunsAborted):
            crashed.update((record.event.boot, name) for name in record.event.request_ids)
        decided = _decision(record.event)
        if decided is not None:
            decisions.setdefault(decided[0], Counter())[decided[1]] += 1
    return Summary(
        requests=tuple(_line(boot, view, is_crashed=(boot, name) in crashed) for (boot, name), view in views.items()),
        decisions={what: dict(why.most_common()) for what, why in sorted(decisions.items())},
        records=dict(records.most_common()),
        output=_output(recording),
    )


def _decision(event: Event) -> tuple[str, str] | None:
    match event:
        case ev.AdmissionDecided():
            return f"admission: {event.action}", event.code or _without_numbers(event.reason)
        case ev.ReservationRefused():
            return "memory: refused", f"{'some' if event.kv_bytes_free_max else 'nothing'} was free"
        case ev.RouteDecided():
            return "router", f"{event.reason}{f' ({event.executor})' if event.executor else ''}"
        case ev.Preempted():
            return "scheduler: preempted", event.reason
        case ev.CancelRequested():
            return "request: cancelled", event.reason
        case ev.RequestRejected():
            return "request: rejected", event.code
        case ev.RequestFailed():
            return "request: failed", event.code
        case ev.AttemptRetried():
            return "request: tried again", event.code
        case _:
            return None


def _without_numbers(reason: str) -> str:
    """Reasons that differ in numbers alone are one reason."""
    return " ".join("N" if word[:1].isdigit() else word for word in reason.split())


def _line(boot: str, view: RequestView, *, is_crashed: bool) -> RequestLine:
    cut_off = is_crashed and not view.is_over
    return RequestLine(
        request_id=view.request_id,
        boot=boot,
        state="failed" if cut_off else view.state,
        outcome=AbortedByCrash.code if cut_off else view.outcome,
        prompt_tokens=view.prompt_tokens,
        completion_tokens=view.completion_tokens if view.is_over else view.tokens_seen,
        queue_ms=view.queued_ns / NS_PER_MS,
        ttft_ms=None if view.ttft_ns is None else view.ttft_ns / NS_PER_MS,
        e2e_ms=None if view.e2e_ns is None else view.e2e_ns / NS_PER_MS,
        retries=view.retries,
    )


def _output(recording: Recording) -> dict[str, list[int]]:
    output: dict[str, list[int]] = {}
    for record in recording.content():
        if isinstance(record.event, ev.StepTokens):
            for row in record.event.rows:
                tokens = output.setdefault(row.request_id, [])
                del tokens[row.position :]  # of an id that was used again
                tokens.extend(row.token_ids)
    return output


def percentile(values: list[float], rank: int) -> float | None:
    """Nearest-rank percentile, None of nothing."""
    return nearest_rank(sorted(values), rank) if values else None
