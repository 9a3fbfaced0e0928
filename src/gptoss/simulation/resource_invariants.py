"""Invariants of what is held and waited for: memory, slots, places in line, letters, answers."""

from gptoss.engine.memory_model import kv_bytes
from gptoss.fake_engine import FAKE_LAYOUT
from gptoss.messages import commands as cmd
from gptoss.messages import events as ev
from gptoss.messages.codec import decode_command
from gptoss.messages.envelope import Record
from gptoss.simulation.decisions import states_at_the_end
from gptoss.simulation.observed import Observed, ViolationError


def mailboxes_are_empty(observed: Observed) -> None:
    """Once nothing happens any more no letter waits: every actor that has letters got its turn."""
    for owner, letters in observed.stuck:
        raise ViolationError(f"{letters} letters wait for {owner}, which was not woken")


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
    """Who waits goes in order of priority, then arrival; nobody is tried for memory while another goes before him.

    Who was asked for before the other began to wait may still get it: that is the window of one message.
    """
    queued: dict[str, tuple[int, int]] = {}
    tried: dict[str, tuple[int, int]] = {}
    for number, record in enumerate(observed.streams.get("admission", [])):
        match record.event:
            case ev.CommandConsumed(command=raw):
                command = decode_command(raw)
                if isinstance(command, cmd.WithdrawRequest):
                    queued.pop(command.request_id, None)
            case ev.Enqueued(request_id=request_id, ask=ask):
                queued.setdefault(request_id, (ask.priority, number))
            case ev.MemoryRequested(request_id=request_id, ask=ask):
                tried[request_id] = (ask.priority, number)
            case ev.AdmissionDecided(request_id=request_id, action="accept" | "shrink" | "route_multi"):
                rank = queued.pop(request_id, tried[request_id])
                _check_turn(record, rank, tried[request_id][1], queued)
            case ev.AdmissionDecided(request_id=request_id, action="reject"):
                queued.pop(request_id, None)
            case _:
                pass


def _check_turn(record: Record, rank: tuple[int, int], tried_at: int, queued: dict[str, tuple[int, int]]) -> None:
    assert isinstance(record.event, ev.AdmissionDecided)
    for other, theirs in queued.items():
        if theirs < rank and theirs[1] < tried_at:
            raise ViolationError(
                f"{record.event.request_id} was let in at {record.meta.pos}, although {other} waited and goes first"
            )


def grants_cover_requests(observed: Observed) -> None:
    """A request that was let in has the memory that its prompt and its output need."""
    prompts: dict[str, int] = {}
    for record in observed.records:
        if isinstance(record.event, ev.PromptRendered):
            prompts[record.meta.correlation] = record.event.prompt_tokens
        elif isinstance(record.event, ev.RequestAdmitted):
            tokens = prompts[record.meta.correlation] + record.event.max_tokens
            if record.event.kv_bytes < kv_bytes(FAKE_LAYOUT, tokens):
                raise ViolationError(
                    f"{record.meta.correlation} has {record.event.kv_bytes} bytes for {tokens} tokens at {record.meta.pos}"
                )
