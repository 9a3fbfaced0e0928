"""The thin shell around a decider.

A decider is a frozen state and two pure functions: ``decide(state, command) -> events`` and ``evolve(state, event) ->
state``. Neither takes a clock, chance or I/O: all of that arrives inside the command. The shell journals each command as
it is consumed, then the events it led to, and only then acts on them. Replay feeds the journaled commands to the same
two functions and compares.

A restarted decider rebuilds its state by folding its own stream, so a crash loses no reservation and no queue place.
"""

from collections.abc import Callable
from typing import Any, Generic, Protocol, TypeVar

from gptoss.actors.actor import LoopActor
from gptoss.messages.codec import encode_command
from gptoss.messages.commands import Command
from gptoss.messages.envelope import Event
from gptoss.messages.events import CommandConsumed

S = TypeVar("S")


class Decider(Protocol[S]):
    """What replay and the shell need of a deciding module."""

    @property
    def name(self) -> str:
        """Name in ``CommandConsumed`` and of the event stream."""
        ...

    def initial(self) -> S:
        """The state before the first event."""
        ...

    def decide(self, state: S, command: Command) -> list[Event]:
        """The events that ``command`` leads to. Pure."""
        ...

    def evolve(self, state: S, event: Event) -> S:
        """The state after ``event``. Pure; events of no concern leave it as it is."""
        ...


class DeciderActor(LoopActor, Generic[S]):
    """Runs one decider. Subclasses say in ``react`` what follows from each event."""

    def __init__(self, decider: Decider[S]) -> None:
        super().__init__()
        self.decider = decider
        self.state = decider.initial()
        self.reactions: dict[type[Event], Callable[[Any], None]] = {}

    def on_start(self) -> None:
        """Rebuild the state after a crash."""
        if self.context.incarnation == 0:
            return
        journal = self.context.system.journal
        for record in journal.read(stream=self.context.name, boot=journal.boot):
            self.state = self.decider.evolve(self.state, record.event)

    def on_receive(self, message: Command) -> None:
        """Consume a command: journal it, decide, evolve, journal the events, react."""
        correlation = getattr(message, "request_id", None) or self.letter.correlation
        consumed = CommandConsumed(decider=self.decider.name, command=encode_command(message))
        cause = self.record(consumed, correlation=correlation).meta.pos
        events = self.decider.decide(self.state, message)
        for event in events:
            self.state = self.decider.evolve(self.state, event)
            self.record(event, correlation=getattr(event, "request_id", correlation), cause=cause)
        for event in events:
            reaction = self.reactions.get(type(event))
            if reaction is not None:
                reaction(event)
