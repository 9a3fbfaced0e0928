"""Which items of which batch run when, and when a batch is over.

    validating -> in_progress -> finalizing -> completed
        any of these -> failed
        in_progress -> (cancelling ->) finalizing -> cancelled, and likewise expired

Rules:
- At most ``concurrency`` items run at once, over all batches. An older batch goes first; within a batch, what an earlier
  run of the server left in flight, then the file's order.
- What is done is never begun again: an item counts as done once its answer is on disk and ``BatchItemFinished`` says so.
- A batch that is to end early begins nothing more and ends when nothing of it is in flight.
"""

from collections.abc import Callable
from typing import Any

import msgspec

from gptoss.actors.decider import Told
from gptoss.messages import batch_commands as cmd
from gptoss.messages import batch_events as ev
from gptoss.messages.batch import Batch, BatchEnding, BatchStatus
from gptoss.messages.commands import Command
from gptoss.messages.envelope import Event

KEPT_MAX = 1000
"""Batches that are remembered; the oldest of those that are over make room."""
_OK = 200


class BatchesState(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that is known of batches, by id, in the order in which they were made."""

    batches: dict[str, Batch] = {}

    @property
    def num_in_flight(self) -> int:
        """Items that run now."""
        return sum(len(batch.in_flight) for batch in self.batches.values())


class Batches:
    """The decisions about batches.

    Args:
        concurrency: how many items may run at once.
    """

    name = "batches"

    def __init__(self, concurrency: int) -> None:
        self._concurrency = concurrency

    def initial(self) -> BatchesState:
        """There are none."""
        return BatchesState()

    def decide(self, state: BatchesState, command: Command) -> list[Event]:
        """What ``command`` leads to, and then what that lets begin or end."""
        handle = _HANDLERS.get(type(command))
        if handle is None:
            return []
        events = handle(state, command)
        for event in events:
            state = self.evolve(state, event)
        wall_s: int = getattr(command, "wall_s", 0)
        for step in (_finalizing(state, wall_s), self._starts(state)):
            events += step
        return events

    def evolve(self, state: BatchesState, event: Event) -> BatchesState:
        """The state after ``event``."""
        match event:
            case ev.BatchesRestored():
                return BatchesState(batches={batch.batch_id: batch for batch in event.batches})
            case ev.BatchCreated():
                batch = Batch(
                    batch_id=event.batch_id,
                    endpoint=event.endpoint,
                    input_file_id=event.input_file_id,
                    output_file_id=event.output_file_id,
                    error_file_id=event.error_file_id,
                    created_s=event.created_s,
                    expires_s=event.expires_s,
                )
                return BatchesState(batches={**state.batches, batch.batch_id: batch})
            case ev.BatchForgotten():
                kept = {name: batch for name, batch in state.batches.items() if name != event.batch_id}
                return BatchesState(batches=kept)
            case _:
                change = _CHANGES.get(type(event))
                if change is None:
                    return state
                told: Any = event
                batch = state.batches.get(told.batch_id)
                if batch is None:  # its beginning is forgotten, and with it all that could be done
                    return state
                changed = msgspec.structs.replace(batch, **change(batch, told))
                return BatchesState(batches={**state.batches, batch.batch_id: changed})

    def tells(self, state: BatchesState, event: Event, now_ns: int) -> list[Told]:
        """Nobody: items run as requests like any other."""
        del state, event, now_ns
        return []

    def _starts(self, state: BatchesState) -> list[Event]:
        free = self._concurrency - state.num_in_flight
        events: list[Event] = []
        for batch in state.batches.values():
            if batch.status != "in_progress" or batch.ending:
                continue
            if free <= 0:
                break
            fresh = range(batch.next_item, min(batch.total, batch.next_item + free))
            items = (*batch.again, *fresh)[:free]
            events += [ev.BatchItemStarted(batch_id=batch.batch_id, item=item) for item in items]
            free -= len(items)
        return events


# ---------------------------------------------------------------- decisions


def _restore(_: BatchesState, command: cmd.RestoreBatches) -> list[Event]:
    restored = tuple(
        msgspec.structs.replace(batch, in_flight=(), again=tuple(sorted((*batch.again, *batch.in_flight))))
        for batch in command.batches
    )
    events: list[Event] = [ev.BatchesRestored(batches=restored)]
    state = BatchesState(batches={batch.batch_id: batch for batch in restored})
    return [*events, *_expired(state, command.wall_s)]


def _create(state: BatchesState, command: cmd.CreateBatch) -> list[Event]:
    if command.batch_id in state.batches:
        return []
    created = ev.BatchCreated(
        batch_id=command.batch_id,
        endpoint=command.endpoint,
        input_file_id=command.input_file_id,
        output_file_id=command.output_file_id,
        error_file_id=command.error_file_id,
        created_s=command.wall_s,
        expires_s=command.wall_s + command.window_s,
    )
    surplus = len(state.batches) + 1 - KEPT_MAX
    over = [batch.batch_id for batch in state.batches.values() if batch.is_over]
    return [created, *(ev.BatchForgotten(batch_id=name) for name in over[: max(0, surplus)])]


def _accept(state: BatchesState, command: cmd.AcceptBatch) -> list[Event]:
    batch = state.batches.get(command.batch_id)
    if batch is None or batch.status != "validating":
        return []
    return [ev.BatchValidated(batch_id=batch.batch_id, num_items=command.num_items, at_s=command.wall_s)]


def _fail(state: BatchesState, command: cmd.FailBatch) -> list[Event]:
    batch = state.batches.get(command.batch_id)
    if batch is None or batch.is_over:
        return []
    return [ev.BatchFailed(batch_id=batch.batch_id, faults=command.faults, at_s=command.wall_s)]


def _finish(state: BatchesState, command: cmd.FinishBatchItem) -> list[Event]:
    batch = state.batches.get(command.batch_id)
    if batch is None or command.item not in batch.in_flight:
        return []
    return [
        ev.BatchItemFinished(
            batch_id=batch.batch_id,
            item=command.item,
            status=command.status,
            output_bytes=command.output_bytes,
            error_bytes=command.error_bytes,
        )
    ]


def _drop(state: BatchesState, command: cmd.DropBatchItem) -> list[Event]:
    batch = state.batches.get(command.batch_id)
    if batch is None or command.item not in batch.in_flight:
        return []
    return [ev.BatchItemDropped(batch_id=batch.batch_id, item=command.item)]


def _cancel(state: BatchesState, command: cmd.CancelBatch) -> list[Event]:
    batch = state.batches.get(command.batch_id)
    if batch is None or batch.status not in {"validating", "in_progress"} or batch.ending:
        return []
    return [ev.BatchCancelRequested(batch_id=batch.batch_id, at_s=command.wall_s)]


def _end(state: BatchesState, command: cmd.EndBatch) -> list[Event]:
    batch = state.batches.get(command.batch_id)
    if batch is None or batch.status != "finalizing":
        return []
    return [
        ev.BatchEnded(
            batch_id=batch.batch_id,
            ending=batch.ending,
            output_bytes=command.output_bytes,
            error_bytes=command.error_bytes,
            at_s=command.wall_s,
        )
    ]


def _expire(state: BatchesState, command: cmd.ExpireBatches) -> list[Event]:
    return _expired(state, command.wall_s)


def _expired(state: BatchesState, wall_s: int) -> list[Event]:
    return [
        ev.BatchExpired(batch_id=batch.batch_id, at_s=wall_s)
        for batch in state.batches.values()
        if batch.status in {"validating", "in_progress"} and not batch.ending and wall_s >= batch.expires_s
    ]


def _finalizing(state: BatchesState, wall_s: int) -> list[Event]:
    """Batches of which nothing is in flight and nothing is to begin."""
    events: list[Event] = []
    for batch in state.batches.values():
        if batch.status not in {"validating", "in_progress", "cancelling"} or batch.in_flight:
            continue
        is_done = batch.status == "in_progress" and not batch.again and batch.next_item >= batch.total
        if batch.ending or is_done:
            ending: BatchEnding = batch.ending or "completed"
            events.append(ev.BatchFinalizing(batch_id=batch.batch_id, ending=ending, at_s=wall_s))
    return events


_HANDLERS: dict[type[Command], Callable[[BatchesState, Any], list[Event]]] = {
    cmd.RestoreBatches: _restore,
    cmd.CreateBatch: _create,
    cmd.AcceptBatch: _accept,
    cmd.FailBatch: _fail,
    cmd.FinishBatchItem: _finish,
    cmd.DropBatchItem: _drop,
    cmd.CancelBatch: _cancel,
    cmd.EndBatch: _end,
    cmd.ExpireBatches: _expire,
}

# ---------------------------------------------------------------- changes of state


def _started(batch: Batch, event: ev.BatchItemStarted) -> dict[str, Any]:
    return {
        "in_flight": (*batch.in_flight, event.item),
        "again": tuple(item for item in batch.again if item != event.item),
        "next_item": max(batch.next_item, event.item + 1),
    }


def _finished(batch: Batch, event: ev.BatchItemFinished) -> dict[str, Any]:
    is_ok = event.status == _OK
    return {
        "in_flight": tuple(item for item in batch.in_flight if item != event.item),
        "completed": batch.completed + is_ok,
        "failed": batch.failed + (not is_ok),
        "output_bytes": event.output_bytes,
        "error_bytes": event.error_bytes,
    }


def _dropped(batch: Batch, event: ev.BatchItemDropped) -> dict[str, Any]:
    return {
        "in_flight": tuple(item for item in batch.in_flight if item != event.item),
        "again": tuple(sorted((*batch.again, event.item))),
    }


def _ended(_: Batch, event: ev.BatchEnded) -> dict[str, Any]:
    status: BatchStatus = event.ending or "completed"
    return {
        "status": status,
        "ended_s": event.at_s,
        "output_bytes": event.output_bytes,
        "error_bytes": event.error_bytes,
    }


_CHANGES: dict[type[Event], Callable[[Batch, Any], dict[str, Any]]] = {
    ev.BatchValidated: lambda _, e: {"status": "in_progress", "total": e.num_items, "in_progress_s": e.at_s},
    ev.BatchFailed: lambda _, e: {"status": "failed", "faults": e.faults, "ended_s": e.at_s, "in_flight": ()},
    ev.BatchItemStarted: _started,
    ev.BatchItemFinished: _finished,
    ev.BatchItemDropped: _dropped,
    ev.BatchCancelRequested: lambda _, e: {"status": "cancelling", "ending": "cancelled", "cancelling_s": e.at_s},
    ev.BatchExpired: lambda _, __: {"ending": "expired"},
    ev.BatchFinalizing: lambda _, e: {"status": "finalizing", "ending": e.ending, "finalizing_s": e.at_s},
    ev.BatchEnded: _ended,
}
