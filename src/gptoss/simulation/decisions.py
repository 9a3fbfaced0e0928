"""Every decision of a run again, by the verifier that also replays recordings: deciders, step plans and lives."""

from typing import Any

from gptoss.actors.deciders import deciders_of
from gptoss.replay.verify import Verifier
from gptoss.simulation.observed import Observed, ViolationError


def states_at_the_end(observed: Observed) -> dict[str, Any]:
    """The state of each long-living decider as its decisions made again leave it.

    Raises:
        ViolationError: a decision comes out otherwise than it was recorded, or a request's life does not add up.
    """
    verifier = Verifier()
    for record in observed.records:
        verifier.observe(record)
    deciders = deciders_of(observed.settings)
    named = {"admission": deciders.admission, "memory": deciders.memory, "router": deciders.router}
    states: dict[str, Any] = {name: decider.initial() for name, decider in named.items()}
    states |= {name: verifier.streams[name].state for name in named if name in verifier.streams}
    verifier.end_boot()
    if verifier.first is not None:
        first = verifier.first
        raise ViolationError(f"{first.decider} {first.kind} at {first.pos}: {first.type}, {first.fields[:3]}")
    if verifier.problems:
        raise ViolationError(verifier.problems[0])
    return states
