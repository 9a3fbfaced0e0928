"""Invariants of requests: their end, their tokens, their time."""

from collections import defaultdict

from gptoss.clock import NS_PER_MS, NS_PER_S
from gptoss.errors import ActorError
from gptoss.fake_engine import fake_text, fake_token
from gptoss.messages import events as ev
from gptoss.messages.envelope import Event, Record
from gptoss.simulation.clients import Seen
from gptoss.simulation.observed import Observed, ViolationError

IN_LINE_NS = NS_PER_S * 3 // 4
"""How late a deadline in the line may be noticed: admission looks four times a second, and may have to be restarted."""
HOPS_NS = NS_PER_S // 2
"""How long letters may take through the deciders, restarts of these included."""
LETTERS_NS = NS_PER_S // 20
"""How long letters may take where nothing has to be restarted."""
STEPS_TO_CANCEL = 2


def every_request_ends(observed: Observed) -> None:
    """Every request that was received has its terminal event, and its consumer was told the same."""
    ends: dict[str, list[Record]] = defaultdict(list)
    for record in observed.of_type(*ev.TERMINAL_EVENTS):
        ends[record.meta.correlation].append(record)
    received = [record.meta.correlation for record in observed.of_type(ev.RequestReceived)]
    for request_id in received:
        if len(ends[request_id]) != received.count(request_id):
            raise ViolationError(f"{request_id} has {len(ends[request_id])} terminal events")
    for seen in observed.seen:
        if seen.outcome is None:
            raise ViolationError(f"the consumer of {seen.request_id} was never told that it ended")
        if received.count(seen.request_id) == 1:
            _check_outcome(seen, ends[seen.request_id][0])


def _check_outcome(seen: Seen, end: Record) -> None:
    outcome = seen.outcome
    assert outcome is not None
    failed = outcome.error is not None
    match end.event:
        case ev.RequestCompleted(finish_reason=reason):
            fits = outcome.finish_reason == reason
        case ev.RequestCancelled(reason="client"):
            fits = outcome.finish_reason == "cancelled"
        case _:
            fits = failed
    if not fits:
        raise ViolationError(f"{seen.request_id} ended with {end.meta.type}, but its consumer was told {outcome}")


def tokens_are_contiguous(observed: Observed) -> None:
    """Positions of a request's tokens follow each other over all attempts, up to its end, and hold the right tokens."""
    seeds = {
        record.meta.correlation: record.event.sampling.seed
        for record in observed.of_type(ev.RequestValidated)
        if isinstance(record.event, ev.RequestValidated)
    }
    reused = _reused(observed)
    ended = _times(observed, *ev.TERMINAL_EVENTS)
    for record in observed.of_type(ev.RequestFailed):
        if isinstance(record.event, ev.RequestFailed) and record.event.code == ActorError.code:
            ended.pop(record.meta.correlation, None)  # its actor crashed, and could not wait for the engine's word
    position: dict[str, int] = defaultdict(int)
    for record in observed.content:
        if not isinstance(record.event, ev.StepTokens):
            continue
        for row in record.event.rows:
            request_id = row.request_id
            if request_id in reused:
                continue
            if row.position != position[request_id]:
                raise ViolationError(
                    f"{request_id} goes on at position {row.position} instead of {position[request_id]} "
                    f"in step {record.event.step} of {record.event.executor}, attempt {row.attempt}"
                )
            wanted = tuple(fake_token(seeds[request_id] or 0, row.position + n) for n in range(len(row.token_ids)))
            if row.token_ids != wanted:
                raise ViolationError(f"{request_id} has {row.token_ids} at {row.position} instead of {wanted}")
            if record.meta.mono_ns > ended.get(request_id, record.meta.mono_ns):
                raise ViolationError(f"{request_id} has tokens at {row.position} after its end")
            position[request_id] += len(row.token_ids)


def text_is_delivered_whole(observed: Observed) -> None:
    """A client gets the tokens and the text of the fake's function from the first on: none lost, doubled or moved."""
    for seen in observed.seen:
        wanted = [fake_token(seen.arrival.seed, position) for position in range(len(seen.token_ids))]
        if seen.token_ids != wanted:
            at = next(n for n, (got, want) in enumerate(zip(seen.token_ids, wanted, strict=True)) if got != want)
            raise ViolationError(f"{seen.request_id} delivered {seen.token_ids[at]} at {at} instead of {wanted[at]}")
        if seen.text != "".join(map(fake_text, seen.token_ids)):
            raise ViolationError(f"the text of {seen.request_id} is not that of its tokens")
        outcome = seen.outcome
        if seen.is_whole and outcome is not None and len(seen.token_ids) != outcome.usage.completion_tokens:
            raise ViolationError(
                f"{seen.request_id} delivered {len(seen.token_ids)} tokens of {outcome.usage.completion_tokens}"
            )


def deadlines_fire(observed: Observed) -> None:
    """Nobody waits in line beyond the deadline there; what still lives at its own deadline is cancelled, and ends.

    The end may take as long as the watchdog of a silent engine.
    """
    deadlines: dict[str, int] = {}
    in_line: dict[str, int] = {}
    cancelled: set[str] = set()
    for record in observed.records:
        event, request_id, now_ns = record.event, record.meta.correlation, record.meta.mono_ns
        match event:
            case ev.RequestReceived():
                deadlines[request_id] = event.deadline_ns
                cancelled.discard(request_id)
            case ev.CancelRequested():
                cancelled.add(request_id)
            case ev.Enqueued():
                in_line[request_id] = event.ask.deadline_ns
            case ev.Dequeued():
                _check_late("left the line", request_id, now_ns - in_line.pop(request_id), IN_LINE_NS)
            case _ if isinstance(event, ev.TERMINAL_EVENTS):
                late_ns = now_ns - deadlines.pop(request_id, now_ns)
                watchdog_ns = int((observed.scenario.shape.step_timeout_s + 1.0) * NS_PER_S)
                slack_ns = LETTERS_NS + (watchdog_ns if request_id in cancelled else 0)
                _check_late("ended", request_id, late_ns, slack_ns)
            case _:
                pass


def _check_late(what: str, request_id: str, late_ns: int, slack_ns: int) -> None:
    if late_ns > slack_ns:
        raise ViolationError(f"{request_id} {what} {late_ns / NS_PER_MS:.0f} ms after its deadline")


def cancels_are_heeded(observed: Observed) -> None:
    """Who wants no more is not served on: the request is cancelled, unless it ended just then."""
    reused = _reused(observed)
    ended_ns, cancelled_ns = _times(observed, *ev.TERMINAL_EVENTS), _times(observed, ev.CancelRequested)
    for seen in observed.seen:
        request_id, left_ns = seen.request_id, seen.left_ns
        if not left_ns or request_id in reused:
            continue
        if request_id not in cancelled_ns and ended_ns.get(request_id, left_ns) > left_ns + LETTERS_NS:
            raise ViolationError(f"{request_id} was served on although its client wanted no more")


def cancel_frees_memory(observed: Observed) -> None:
    """A cancelled request has at most two rows once the engine can know, and what ended gives its memory back at once."""
    reused = _reused(observed)
    asked_ns = _times(observed, ev.CancelRequested)
    rows: dict[str, int] = defaultdict(int)
    for record in observed.of_type(ev.StepCommitted):
        assert isinstance(record.event, ev.StepCommitted)
        for row in record.event.rows:
            if record.event.started_ns > asked_ns.get(row.request_id, record.event.started_ns) + LETTERS_NS:
                rows[row.request_id] += 1
                if rows[row.request_id] > STEPS_TO_CANCEL and row.request_id not in reused:
                    raise ViolationError(f"{row.request_id} was cancelled and still runs in step {record.event.step}")
    ended_ns = _times(observed, *ev.TERMINAL_EVENTS)
    for request_id, freed_ns in _times(observed, ev.ReservationReleased).items():
        late_ns = freed_ns - ended_ns.get(request_id, freed_ns)
        if late_ns > HOPS_NS and request_id not in reused:
            raise ViolationError(f"the memory of {request_id} was free {late_ns / NS_PER_MS:.0f} ms after its end")


def _times(observed: Observed, *kinds: type[Event]) -> dict[str, int]:
    """When the last event of these types was recorded for each request."""
    return {record.meta.correlation: record.meta.mono_ns for record in observed.of_type(*kinds)}


def _reused(observed: Observed) -> set[str]:
    """Ids that more than one request had."""
    ids = [record.meta.correlation for record in observed.of_type(ev.RequestReceived)]
    return {request_id for request_id in ids if ids.count(request_id) > 1}
