"""Invariants of what is held: memory, slots, places in line, letters, answers."""

from gptoss.engine.memory_model import kv_bytes
from gptoss.fake_engine import FAKE_LAYOUT
from gptoss.messages import events as ev
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
    held["a session"] = tuple(name for name, session in memory.book.sessions.items() if session.in_use)
    for what, request_ids in held.items():
        if request_ids:
            raise ViolationError(f"{', '.join(request_ids)} still holds {what} although no request runs")


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
