"""Every decision of a run again, from the commands in its journal."""

from typing import Any

from gptoss.actors.decider import fold
from gptoss.actors.deciders import deciders_of
from gptoss.messages.codec import decode_command
from gptoss.messages.commands import BeginRequest
from gptoss.messages.envelope import Event, Record
from gptoss.messages.events import CommandConsumed, SnapshotTaken
from gptoss.simulation.observed import Observed, ViolationError


def states_at_the_end(observed: Observed) -> dict[str, Any]:
    """The state of each decider, by stream, as its decisions made again leave it.

    Raises:
        ViolationError: a decision comes out otherwise than it was recorded.
    """
    deciders = deciders_of(observed.settings)
    named = {"admission": deciders.admission, "memory": deciders.memory, "router": deciders.router}
    states: dict[str, Any] = {name: decider.initial() for name, decider in named.items()}
    for stream, records in observed.streams.items():
        decider = deciders.of(stream)
        if decider is not None:
            mine = [record for record in records if record.meta.actor == stream]
            states[stream] = _decide_again(stream, decider, mine)
    return states


def _decide_again(stream: str, decider: Any, records: list[Record]) -> Any:
    state = decider.initial()
    expected: list[Event] = []
    for record in records:
        event, pos = record.event, record.meta.pos
        if isinstance(event, SnapshotTaken):
            if fold(decider, state, event) != state:
                raise ViolationError(f"the snapshot of {stream} at {pos} is not the state that its events make")
        elif isinstance(event, CommandConsumed):
            if expected:
                raise ViolationError(f"{stream} decided {expected[0]} before {pos}, and it was not recorded")
            command = decode_command(event.command)
            if isinstance(command, BeginRequest):
                state = decider.initial()  # the id may have been used before
            expected = decider.decide(state, command)
        else:
            if not expected or expected[0] != event:
                raise ViolationError(f"{stream} recorded {event} at {pos}; again it decides {expected[:1]}")
            state = decider.evolve(state, expected.pop(0))
    return state
