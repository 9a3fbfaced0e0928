"""The thin shell around a decider.

A decider is a frozen state and two pure functions: ``decide(state, command) -> events`` and ``evolve(state, event) ->
state``. Neither takes a clock, chance or I/O: all of that arrives inside the command. The shell journals each command as
it is consumed and the events it led to, and only then acts on them. Replay feeds the journaled commands to the same
two functions and compares.

What other deciders are told because of an event is pure as well (``tells``). So a simulated system needs no actors: it
delivers what the deciders tell each other. What is left to an actor's ``react`` has to do with the outside.

A restarted decider rebuilds its state by folding its own stream, so a crash loses no reservation and no queue place.

One that lives long records its whole state now and then (``SnapshotTaken``), so that neither a restart nor a replay
needs the stream from its beginning, which retention forgets. The larger the state, the rarer: a snapshot costs at most
``SNAPSHOT_BYTES_PER_COMMAND`` a command.

Settings that change while the server runs come as a command too (``ChangeSettings``). The shell takes it, not the decider:
``ConfigChanged`` stands in the decider's own stream at the place from which on it is another decider, made from the new
settings. Who folds the stream makes the same exchange there.
"""

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Generic, Protocol, TypeAlias, TypeVar, cast, runtime_checkable

import msgspec

from gptoss.actors.actor import LoopActor
from gptoss.actors.directory import Directory
from gptoss.messages.codec import encode_command
from gptoss.messages.commands import ChangeSettings, Command, SettingValue
from gptoss.messages.envelope import NO_CAUSE, Event, Record
from gptoss.messages.events import CommandConsumed, ConfigChanged, SnapshotTaken

SNAPSHOT_COMMANDS_MIN = 500
SNAPSHOT_BYTES_PER_COMMAND = 32

S = TypeVar("S")
Told: TypeAlias = tuple[str, Command]
"""The name of an actor, and what it is told."""
Remake: TypeAlias = Callable[[dict[str, SettingValue]], "Decider[Any]"]
"""Makes a decider anew, with these settings in the place of those that the server started with."""


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

    def tells(self, state: S, event: Event, now_ns: int) -> list[Told]:
        """What other deciders are told because of ``event``. Pure; ``state`` is that after the whole command."""
        ...


@runtime_checkable
class KeepsRecord(Protocol[S]):
    """A decider whose state has another form in snapshots than while it is decided on.

    States that are cheap to change hold indexes that follow from the rest; a snapshot has the rest, as plain data. Two
    states are the same if their records are equal.
    """

    @property
    def record_type(self) -> type[Any]:
        """Of the record."""
        ...

    def recorded(self, state: S) -> Any:
        """The record of a state."""
        ...

    def restored(self, record: Any) -> S:
        """The state of a record."""
        ...


class DeciderActor(LoopActor, Generic[S]):
    """Runs one decider. Subclasses say in ``react`` what an event leads to beside what the decider tells others.

    Attributes:
        TAKES_SNAPSHOTS: whether it lives long enough for ``SnapshotTaken``.
        about: the request that everything it records is about, for the decider of a single one.
        event_pos: position of the event that is being reacted to, the cause of what a reaction sends.
    """

    TAKES_SNAPSHOTS: ClassVar[bool] = True
    request_id: str = ""

    def __init__(self, decider: Decider[S], directory: Directory, remake: Remake | None = None) -> None:
        super().__init__()
        self.decider = decider
        self._remake = remake
        self._settings: dict[str, SettingValue] = {}
        self.directory = directory
        self.state = decider.initial()
        self.about = ""
        self.event_pos = NO_CAUSE
        self._commands_to_snapshot = SNAPSHOT_COMMANDS_MIN

    def on_start(self) -> None:
        """Rebuild the state after a crash."""
        if self.context.incarnation == 0:
            return
        journal = self.context.system.journal
        recorded: list[Event] = []
        for record in journal.read(stream=self.context.name, boot=journal.boot):
            if isinstance(record.event, SnapshotTaken):
                recorded.clear()  # what was before may be forgotten in part
            recorded.append(record.event)
        for event in recorded:
            if isinstance(event, ConfigChanged | SnapshotTaken) and event.settings:
                self._take_settings(event.settings)
            self.state = fold(self.decider, self.state, event)

    def on_receive(self, message: Command) -> None:
        """Consume a command: journal it, decide, evolve, journal the events, tell the others, react."""
        correlation = self.about or getattr(message, "request_id", None) or self.letter.correlation
        consumed = CommandConsumed(decider=self.decider.name, command=encode_command(message))
        if isinstance(message, ChangeSettings):
            self._record_decision(consumed, correlation, [(config_changed(message), "")])
            self._take_settings(message.settings)
            return
        decided: list[tuple[Event, str]] = []
        try:
            for event in self.decider.decide(self.state, message):
                self.state = self.decider.evolve(self.state, event)
                decided.append((event, getattr(event, "request_id", correlation)))
        finally:
            # A command that could not be decided was consumed all the same, and led to the events so far.
            records = self._record_decision(consumed, correlation, decided)
        now_ns = self.context.system.now_ns()
        for record in records[1:]:
            self._follow(record, now_ns)
        if self.TAKES_SNAPSHOTS:
            self._count_to_snapshot()

    def _record_decision(
        self, consumed: CommandConsumed, correlation: str, led_to: Sequence[tuple[Event, str]]
    ) -> list[Record]:
        return self.context.system.journal.append_decision(consumed, self.origin(correlation=correlation), led_to)

    def react(self, event: Event) -> None:
        """What an event leads to outside of the deciders; nothing by itself."""

    def _take_settings(self, settings: dict[str, SettingValue]) -> None:
        if self._remake is not None:
            self.decider = self._remake(settings)
            self._settings = settings

    def _follow(self, decided: Record, now_ns: int) -> None:
        """Tell the others of an event, and react to it."""
        event = decided.event
        self.event_pos = decided.meta.pos
        for name, command in self.decider.tells(self.state, event, now_ns):
            self.directory.tell(name, command, cause=self.event_pos)
        self.react(event)

    def _count_to_snapshot(self) -> None:
        self._commands_to_snapshot -= 1
        if self._commands_to_snapshot > 0:
            return
        state = msgspec.msgpack.encode(recorded_form(self.decider, self.state))
        taken = SnapshotTaken(decider=self.decider.name, state=msgspec.Raw(state), settings=self._settings)
        self.record(taken, correlation="")
        self._commands_to_snapshot = max(SNAPSHOT_COMMANDS_MIN, len(state) // SNAPSHOT_BYTES_PER_COMMAND)


def config_changed(command: ChangeSettings) -> ConfigChanged:
    """What a decider's stream says where it takes other settings."""
    return ConfigChanged(settings=command.settings, changed=command.changed, origin=command.origin)


def fold(decider: Decider[S], state: S, event: Event) -> S:
    """``evolve``, and of a snapshot the state that it holds."""
    if not isinstance(event, SnapshotTaken):
        return decider.evolve(state, event)
    keeper = keeper_of(decider)
    if keeper is not None:
        return keeper.restored(msgspec.msgpack.decode(event.state, type=keeper.record_type))
    return msgspec.msgpack.decode(event.state, type=type(state))


def recorded_form(decider: Decider[S], state: S) -> Any:
    """A state as plain data, as a snapshot holds it."""
    keeper = keeper_of(decider)
    return state if keeper is None else keeper.recorded(state)


def keeper_of(decider: Decider[S] | None) -> KeepsRecord[S] | None:
    """The decider, if its states have another form in snapshots."""
    return cast("KeepsRecord[S]", decider) if isinstance(decider, KeepsRecord) else None
