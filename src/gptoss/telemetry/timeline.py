"""The timeline of one request, folded from the records that name it; text in ``timeline_text``.

A phase is named for what had happened when it ended and lasts from the milestone before it, so the phases of an attempt
lie end to end and nothing between arrival and end is unaccounted for. ``mark`` phases are moments. Steps concern many
requests; only this one's rows count.
"""

from collections.abc import Iterable
from statistics import median
from typing import Any

import msgspec

from gptoss.clock import NS_PER_MS
from gptoss.errors import RequestNotFound
from gptoss.messages import events as ev
from gptoss.messages.envelope import Event, Record
from gptoss.telemetry.request_view import is_crash_end, request_id_of
from gptoss.telemetry.timeline_phases import ONCE, PHASES, many

CANCEL_STEPS_MAX = 2


class Phase(msgspec.Struct, frozen=True, kw_only=True):
    """A stretch, or with ``mark`` a moment, of a request's life; milliseconds since it was received."""

    name: str
    start_ms: float
    end_ms: float
    detail: str = ""
    attempt: int = 0
    mark: bool = False


class Decode(msgspec.Struct, frozen=True, kw_only=True):
    """The steps that produced tokens for the request, over all attempts."""

    steps: int
    tokens: int
    p50_step_ms: float
    others_max: int
    """The most other requests that shared one of its steps."""


class Timeline(msgspec.Struct, frozen=True, kw_only=True):
    """One request's life."""

    request_id: str
    endpoint: str
    model: str
    outcome: str
    """Name of the terminal phase, ``open`` while there is none."""
    total_ms: float
    """Until the terminal event, or until the newest record while there is none."""
    ttft_ms: float | None
    attempts: int
    phases: tuple[Phase, ...]
    decode: Decode | None


def timeline(records: Iterable[Record], request_id: str = "") -> Timeline:
    """Put the records of one request in the order of its life.

    Args:
        records: in the order of their positions; records of other requests are passed over.
        request_id: which request; empty takes the first that the records receive. Clients may use an id again once
            its request is over: the newest life counts.

    Raises:
        RequestNotFound: the records do not hold the request's ``RequestReceived``.
    """
    builder: _Builder | None = None
    boot = ""
    for record in records:
        event = record.event
        if isinstance(event, ev.RequestReceived) and event.request_id == (request_id or event.request_id):
            builder = _Builder(record.meta.mono_ns, event)
            request_id, boot = event.request_id, record.meta.boot
        elif builder is None:
            continue
        elif record.meta.boot != boot:
            if is_crash_end(event) and request_id_of(record) == builder.request_id:
                builder.end_by_crash(record)
        elif isinstance(event, ev.StepCommitted):
            builder.step(record.meta.mono_ns, event)
        elif request_id_of(record) == builder.request_id:
            builder.add(record)
    if builder is None:
        raise RequestNotFound(f"no RequestReceived of {request_id or 'any request'} in these records")
    return builder.build()


def as_dict(timeline: Timeline) -> dict[str, Any]:
    """The timeline as plain data for JSON."""
    return msgspec.to_builtins(timeline)


class _Builder:
    def __init__(self, start_ns: int, received: ev.RequestReceived) -> None:
        self.request_id = received.request_id
        self._received = received
        self._start_ns = start_ns
        self._milestone_ms = 0.0
        self._phases: list[Phase] = []
        self._attempt = 0
        self._attempts = 0
        self._decode_start_ms: float | None = None
        self._decode_end_ms = 0.0
        self._attempt_steps = 0
        self._attempt_tokens = 0
        self._durations_ms: list[float] = []
        self._tokens = 0
        self._others_max = 0
        self._ttft_ms: float | None = None
        self._queue_exits = 0
        self._outcome = "open"
        self._total_ms = 0.0
        detail = f"{many(received.num_messages, 'message')}, {'streamed' if received.stream else 'not streamed'}"
        self._mark("received", 0.0, detail)

    def end_by_crash(self, record: Record) -> None:
        """The end, told by a later boot whose times do not compare: the life ends with its last record."""
        self.add(record, at_ms=self._total_ms)

    def add(self, record: Record, *, at_ms: float | None = None) -> None:
        """A record that names this request; what is no milestone of it is passed over."""
        event = record.event
        entry = PHASES.get(type(event))
        if entry is None:
            return
        at_ms = self._at_ms(record.meta.mono_ns) if at_ms is None else at_ms
        name, is_mark, detail = entry
        if isinstance(event, ev.RequestRouted | ev.ExecutorAccepted):
            self._attempt = event.attempt
            self._attempts += isinstance(event, ev.RequestRouted)
        if isinstance(event, ev.FirstTokenProduced):
            self._first_token(at_ms)
        elif isinstance(event, (ev.ExecutorFaulted, *ev.TERMINAL_EVENTS)):
            self._close_decode()
        if isinstance(event, ev.TERMINAL_EVENTS):
            if self._outcome != "open":
                return
            self._outcome, self._total_ms = name, at_ms
        if isinstance(event, ev.Dequeued):
            self._left_queue(at_ms, event.reason)
        elif is_mark:
            self._mark(name, at_ms, detail(event))
        else:
            self._span(name, at_ms, detail(event))

    def step(self, mono_ns: int, event: ev.StepCommitted) -> None:
        """A step, perhaps with a row of this request."""
        row = next((row for row in event.rows if row.request_id == self.request_id), None)
        if row is None or self._outcome != "open":
            return
        self._others_max = max(self._others_max, len(event.rows) - 1)
        if not row.tokens:
            return
        at_ms = self._at_ms(mono_ns)
        if self._decode_start_ms is None:
            self._span("prefill", at_ms, "" if self._ttft_ms is None else "resumed")
            self._decode_start_ms = at_ms
        self._decode_end_ms = at_ms
        self._attempt_steps += 1
        self._attempt_tokens += row.tokens
        self._tokens += row.tokens
        self._durations_ms.append(event.duration_ns / NS_PER_MS)

    def _left_queue(self, at_ms: float, reason: str) -> None:
        """A request may go back to the queue's front many times for want of memory: that is one wait."""
        self._queue_exits += 1
        if self._queue_exits == 1:
            self._span("queued", at_ms, reason)
            return
        index = next(i for i, phase in enumerate(self._phases) if phase.name == "queued")
        detail = reason if reason != "tried" else f"tried {self._queue_exits} times"
        self._phases[index] = msgspec.structs.replace(self._phases[index], end_ms=at_ms, detail=detail)
        self._milestone_ms = at_ms

    def _first_token(self, at_ms: float) -> None:
        """The request hears of its first token after the step that made it: the step has closed the prefill already."""
        self._ttft_ms = at_ms if self._ttft_ms is None else self._ttft_ms
        if self._decode_start_ms is None:
            self._span("prefill", at_ms)
            self._decode_start_ms = self._decode_end_ms = at_ms

    def _close_decode(self) -> None:
        if self._decode_start_ms is None:
            return
        steps = self._attempt_steps
        durations_ms = self._durations_ms[-steps:] if steps else [0.0]
        detail = f"{many(steps, 'step')}, {many(self._attempt_tokens, 'token')}, p50 step {median(durations_ms):.1f} ms"
        self._milestone_ms = self._decode_start_ms
        self._span("decode", self._decode_end_ms, detail)
        self._decode_start_ms = None
        self._attempt_steps = self._attempt_tokens = 0

    def _at_ms(self, mono_ns: int) -> float:
        at_ms = round((mono_ns - self._start_ns) / NS_PER_MS, 3)
        if self._outcome == "open":
            self._total_ms = max(self._total_ms, at_ms)
        return at_ms

    def _span(self, name: str, end_ms: float, detail: str = "") -> None:
        start_ms = min(self._milestone_ms, end_ms)
        self._phases.append(Phase(name=name, start_ms=start_ms, end_ms=end_ms, detail=detail, attempt=self._attempt))
        self._milestone_ms = end_ms

    def _mark(self, name: str, at_ms: float, detail: str) -> None:
        if name in ONCE and any(phase.name == name for phase in self._phases):
            return
        self._phases.append(
            Phase(name=name, start_ms=at_ms, end_ms=at_ms, detail=detail, attempt=self._attempt, mark=True)
        )

    def build(self) -> Timeline:
        self._close_decode()
        decode = None
        if self._durations_ms:
            decode = Decode(
                steps=len(self._durations_ms),
                tokens=self._tokens,
                p50_step_ms=round(median(self._durations_ms), 3),
                others_max=self._others_max,
            )
        return Timeline(
            request_id=self.request_id,
            endpoint=self._received.endpoint,
            model=self._received.model,
            outcome=self._outcome,
            total_ms=self._total_ms,
            ttft_ms=self._ttft_ms,
            attempts=self._attempts,
            phases=tuple(self._phases),
            decode=decode,
        )


# ---------------------------------------------------------------- completeness


def check_complete(records: Iterable[Record], request_id: str = "", *, checks_pace: bool = True) -> list[str]:
    """What is wrong with the recorded life of a request that should be over; empty when nothing is.

    Args:
        records: every record that names the request, and the steps, in the order of their positions.
        request_id: which request; empty takes the first that the records receive.
        checks_pace: whether a cancel that came late to the engine is wrong; a busy machine is late without any fault.
    """
    everything = list(records)
    if not request_id:
        arrivals = (record.event for record in everything if isinstance(record.event, ev.RequestReceived))
        request_id = next((event.request_id for event in arrivals), "")
    own = _newest_life([record for record in everything if request_id and request_id_of(record) == request_id])
    begin = own[0].meta if own else None
    steps = [
        (record.meta.pos, row.tokens)
        for record in everything
        if isinstance(record.event, ev.StepCommitted) and begin is not None
        if record.meta.boot == begin.boot and record.meta.pos >= begin.pos
        for row in record.event.rows
        if row.request_id == request_id and row.tokens
    ]
    problems = [*_check_ends(own), *_check_order(own)]
    if own and is_crash_end(own[-1].event):
        return problems  # What it held went with the process.
    pace = _check_pace(own, steps) if checks_pace else []
    return [*problems, *_check_ledgers(own), *_check_tokens(own, steps), *pace]


def _newest_life(own: list[Record]) -> list[Record]:
    """The request's records from its last arrival on, if its id had been used before."""
    begin, is_over = 0, False
    for index, record in enumerate(own):
        if isinstance(record.event, ev.TERMINAL_EVENTS):
            is_over = True
        elif isinstance(record.event, ev.RequestReceived) and is_over:
            begin, is_over = index, False
    return own[begin:]


def _of(records: list[Record], *types: type[Event]) -> list[Record]:
    return [record for record in records if isinstance(record.event, types)]


def _check_ends(own: list[Record]) -> list[str]:
    problems: list[str] = []
    for what, types in (("RequestReceived", (ev.RequestReceived,)), ("terminal event", ev.TERMINAL_EVENTS)):
        if (count := len(_of(own, *types))) != 1:
            problems.append(f"{count} records are a {what}; there must be exactly one")
    return problems


def _check_order(own: list[Record]) -> list[str]:
    """The request's own stream has no gap, begins with its arrival and makes no progress after its end."""
    received = _of(own, ev.RequestReceived)
    stream = [record for record in own if received and _place(record) == _place(received[0])]
    problems = [
        f"seq {record.meta.seq} of {record.meta.stream} stands where {expected} should"
        for expected, record in enumerate(stream, start=stream[0].meta.seq if stream else 0)
        if record.meta.seq != expected
    ][:1]
    terminal_pos = next((record.meta.pos for record in _of(stream, *ev.TERMINAL_EVENTS)), None)
    if terminal_pos is not None:
        late = [record for record in _of(stream, *_PROGRESS) if record.meta.pos > terminal_pos]
        problems += [f"{record.meta.type} comes after the end" for record in late]
    return problems


def _place(record: Record) -> tuple[str, str]:
    """Where ``seq`` counts."""
    return record.meta.boot, record.meta.stream


def _check_ledgers(own: list[Record]) -> list[str]:
    """What was taken is given back, once: memory, the slot and the place in the queue."""
    problems: list[str] = []
    for what, (taking, giving) in _LEDGERS.items():
        held = False
        for record in own:
            if isinstance(record.event, taking):
                held = True
            elif isinstance(record.event, giving):
                if not held and not isinstance(record.event, ev.Enqueued):
                    problems.append(f"a {what} was released that was not held")
                held = False
        if held:
            problems.append(f"a {what} was not released")
    return problems


def _check_tokens(own: list[Record], steps: list[tuple[int, int]]) -> list[str]:
    """The steps made the tokens that the end counts, and none after it."""
    problems: list[str] = []
    tokens = sum(count for _, count in steps)
    for record in _of(own, ev.RequestCompleted):
        event = record.event
        assert isinstance(event, ev.RequestCompleted)
        retried = bool(_of(own, ev.AttemptRetried))  # what an attempt made and could not deliver is made again
        if steps and (tokens < event.completion_tokens if retried else tokens != event.completion_tokens):
            problems.append(f"steps made {tokens} tokens and the end counts {event.completion_tokens}")
        if any(pos > record.meta.pos for pos, _ in steps):
            problems.append("a step made tokens after the end")
    return problems


def _check_pace(own: list[Record], steps: list[tuple[int, int]]) -> list[str]:
    """A cancel takes effect within so many steps."""
    cancels = _of(own, ev.CancelRequested)
    late = sum(pos > cancels[0].meta.pos for pos, _ in steps) if cancels else 0
    if late <= CANCEL_STEPS_MAX:
        return []
    return [f"{late} steps made tokens after the cancel; at most {CANCEL_STEPS_MAX} may"]


_LEDGERS: dict[str, tuple[tuple[type[Event], ...], tuple[type[Event], ...]]] = {
    "reservation": ((ev.ReservationGranted,), (ev.ReservationReleased,)),
    "place in the queue": ((ev.Enqueued,), (ev.Dequeued,)),
    # Asking for memory takes the slot; a refusal puts the request back into the queue.
    "slot": ((ev.MemoryRequested,), (ev.SlotReleased, ev.Enqueued)),
}

_PROGRESS = (
    ev.RequestValidated,
    ev.PromptRendered,
    ev.RequestEstimated,
    ev.RequestAdmitted,
    ev.RequestRouted,
    ev.SamplingBound,
    ev.FirstTokenProduced,
    ev.AttemptRetried,
)
