"""Invariants of what is held and waited for: memory, slots, places in line, letters, answers."""

from gptoss.messages import commands as cmd
from gptoss.messages import events as ev
from gptoss.messages.codec import decode_command
from gptoss.simulation.decisions import states_at_the_end
from gptoss.simulation.observed import Observed, ViolationError


def mailboxes_are_empty(observed: Observed) -> None:
    """Once nothing happens any more no letter waits: every actor that has letters got its turn."""
    for owner, inbox in observed.inboxes:
        if not inbox.empty():
            raise ViolationError(f"{len(inbox)} letters wait for {owner}, which was not woken")


def letters_balance(observed: Observed) -> None:
    """Every letter that was sent was handled or is a dead letter in the journal."""
    dead = 0
    for owner, inbox in observed.inboxes:
        if inbox.sent != inbox.taken + inbox.dead + len(inbox):
            raise ViolationError(
                f"of {inbox.sent} letters to {owner}, {inbox.taken} were handled and {inbox.dead} were not deliverable"
            )
        dead += inbox.dead
    recorded = sum(1 for _ in observed.of_type(ev.DeadLettered))
    if dead != recorded:
        raise ViolationError(f"{dead} letters could not be delivered, but {recorded} dead letters were recorded")


def asks_resolve(observed: Observed) -> None:
    """Every ask has its answer or its error once its time-out is over."""
    for question, reply in observed.asks:
        if not reply.done():
            raise ViolationError(f"the ask to {question} has neither answer nor error")


def nothing_is_held_at_rest(observed: Observed) -> None:
    """Without requests nobody holds memory, a slot, a place in line or a route."""
    states = states_at_the_end(observed)
    admission, memory, router = states["admission"], states["memory"], states["router"]
    held: dict[str, tuple[str, ...]] = {
        "memory": tuple(memory.grants),
        "a slot": (*admission.running, *admission.pending),
        "a place in line": tuple(admission.waiting),
        "a route": tuple(router.routes),
    }
    for what, request_ids in held.items():
        if request_ids:
            raise ViolationError(f"{', '.join(request_ids)} still holds {what} although no request runs")


def nobody_jumps_the_queue(observed: Observed) -> None:
    """Who waits goes in order of priority, then arrival; nobody who came later with no better priority goes first."""
    waiting: dict[str, tuple[int, int]] = {}
    asked: dict[str, tuple[int, int]] = {}
    for number, record in enumerate(observed.streams.get("admission", [])):
        event = record.event
        match event:
            case ev.CommandConsumed():
                command = decode_command(event.command)
                if isinstance(command, cmd.AdmitRequest):
                    asked[command.request_id] = (command.priority, number)
                elif isinstance(command, cmd.WithdrawRequest):
                    waiting.pop(command.request_id, None)
            case ev.AdmissionDecided(action="queue", request_id=request_id):
                waiting[request_id] = asked[request_id]
            case ev.AdmissionDecided(request_id=request_id):
                waiting.pop(request_id, None)
                if event.action != "reject":
                    _check_turn(request_id, asked[request_id], waiting, record.meta.pos)
            case _:
                pass


def _check_turn(request_id: str, rank: tuple[int, int], waiting: dict[str, tuple[int, int]], pos: int) -> None:
    # Who asked before the other was refused for memory may have been on the way: that is one message's window.
    ahead = [other for other, theirs in waiting.items() if theirs < rank]
    if ahead:
        raise ViolationError(f"{request_id} is let in at {pos} although {', '.join(ahead)} waits and goes first")
