"""Invariants of what is recorded: the log itself, and everything that is computed from it."""

import tempfile
from pathlib import Path
from typing import Any, cast

from gptoss.clock import SeededRng
from gptoss.messages import events as ev
from gptoss.messages.codec import encode_record
from gptoss.simulation.clients import CANARY
from gptoss.simulation.decisions import states_at_the_end
from gptoss.simulation.observed import Observed, ViolationError
from gptoss.simulation.watched import OneTerminalEvent
from gptoss.telemetry.segment_reader import SegmentReader
from gptoss.telemetry.segment_recovery import recover


def log_recovers(observed: Observed) -> None:
    """After a crash the log is a gapless prefix of what was appended, with everything that was acknowledged."""
    journal = observed.journal
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        journal.write_crashed(folder, SeededRng(f"{observed.scenario.seed}/crash"))
        recovery = recover(folder)
        recovered = list(SegmentReader(folder).read())
    if recovery.quarantined:
        raise ViolationError(f"a torn tail was taken for corruption: {recovery.quarantined[0].reason}")
    appended = observed.records
    if recovered != appended[: len(recovered)]:
        at = next(n for n, (one, other) in enumerate(zip(recovered, appended, strict=False)) if one != other)
        raise ViolationError(f"the recovered log differs at {at}: {recovered[at]} instead of {appended[at]}")
    if len(recovered) <= journal.committed_pos:
        raise ViolationError(f"{journal.committed_pos} was acknowledged, but only {len(recovered)} records recovered")
    books = OneTerminalEvent()
    for record in recovered:
        books.see(record)
    unfinished = {request_id for boot in recovery.aborted for request_id in boot.request_ids}
    if recovered and unfinished != books.open:
        raise ViolationError(f"recovery names {sorted(unfinished)} as unfinished instead of {sorted(books.open)}")


def positions_are_gapless(observed: Observed) -> None:
    """Positions count from 0 in each family, and numbers within each stream."""
    for records in (observed.records, observed.content):
        next_seq: dict[str, int] = {}
        for pos, record in enumerate(records):
            meta = record.meta
            if meta.pos != pos:
                raise ViolationError(f"the record after {pos - 1} has position {meta.pos}")
            if meta.seq != next_seq.get(meta.stream, 0):
                raise ViolationError(f"{meta.stream} goes on with {meta.seq} at {pos}")
            next_seq[meta.stream] = meta.seq + 1


def decisions_replay(observed: Observed) -> None:
    """Each decision made again from its recorded command gives the events that were recorded."""
    states_at_the_end(observed)


def projections_rebuild(observed: Observed) -> None:
    """Projections folded from the journal's bytes answer as the live ones did."""
    for name, live in observed.live.items():
        rebuilt = observed.rebuilt[name]
        if live != rebuilt:
            raise ViolationError(f"the live {name} says {_first_difference(live, rebuilt)}")


def _first_difference(live: Any, rebuilt: Any) -> str:
    if isinstance(live, dict) and isinstance(rebuilt, dict):
        known, again = cast("dict[str, Any]", live), cast("dict[str, Any]", rebuilt)
        for key, value in known.items():
            if value != again.get(key):
                return f"{key}: {_first_difference(value, again.get(key))}"
    if isinstance(live, str) and isinstance(rebuilt, str):
        for one, other in zip(live.splitlines(), rebuilt.splitlines(), strict=False):
            if one != other:
                return f"{one!r}, the rebuilt one {other!r}"
    return f"{live!r}, the rebuilt one {rebuilt!r}"


def nothing_leaks_text(observed: Observed) -> None:
    """No text of a request shows up in a control event, a metric, a log line or a query."""
    canary = CANARY.encode()
    for record in observed.records:
        if canary in encode_record(record):
            raise ViolationError(f"the prompt's text is in {record.meta.type} at {record.meta.pos}")
    for name, answer in observed.live.items():
        if CANARY in str(answer):
            raise ViolationError(f"the prompt's text is in {name}")
    if CANARY in observed.logs:
        line = next(line for line in observed.logs.splitlines() if CANARY in line)
        raise ViolationError(f"the prompt's text is in the log: {line[:200]}")


def nothing_fails_unexpectedly(observed: Observed) -> None:
    """No actor fails of itself, and nothing reaches the event loop's exception handler."""
    if observed.loop_failures:
        raise ViolationError(observed.loop_failures[0])
    for record in observed.of_type(ev.ActorFailed):
        event = record.event
        assert isinstance(event, ev.ActorFailed)
        if event.message_type not in EXPECTED_FAILURES:
            raise ViolationError(
                f"{record.meta.actor} failed on {event.message_type} at {record.meta.pos}: {event.error}"
            )


EXPECTED_FAILURES = {"Poison", "Question", "EngineExited", "render"}
"""What faults are made of; an executor ends with its engine."""


def nobody_is_let_in_unrecorded(observed: Observed) -> None:
    """Once the journal has stopped, whoever comes is refused: what cannot be recorded is not served."""
    has_stopped = False
    late: set[str] = set()
    for record in observed.of_type(ev.LogDegraded, ev.RequestReceived, ev.RequestValidated):
        if isinstance(record.event, ev.LogDegraded):
            has_stopped = True
        elif isinstance(record.event, ev.RequestReceived) and has_stopped:
            late.add(record.meta.correlation)
        elif record.meta.correlation in late:
            raise ViolationError(
                f"{record.meta.correlation} was let in at {record.meta.pos}, after the journal had stopped"
            )
