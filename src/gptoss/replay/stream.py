"""One decider's stream, decided again: each recorded command goes to the decider, and what it says is compared.

Rules:
- A stream is known from its record 0, from a ``SnapshotTaken``, or, of a request, from its ``BeginRequest``: an id may be
  used again. What stands before is passed over.
- Events are compared in order and whole. After a difference the replay goes on with its own event, so that one wrong
  record is one divergence and not the first of many.
- The state follows the events one by one, as they are met in the recording. An actor that failed in the middle of a
  command was rebuilt from what it had recorded by then; so is the state here.
- A command is over at the next one of its stream. At the end of a recording its events may be cut off.
"""

from collections import deque
from collections.abc import Iterator
from typing import Any

import msgspec

from gptoss.actors.decider import Decider, fold, recorded_form
from gptoss.errors import JournalError
from gptoss.messages.codec import UNREADABLE, decode_command
from gptoss.messages.commands import BeginRequest, Command
from gptoss.messages.envelope import Event, Meta, Record
from gptoss.messages.events import (
    ActorFailed,
    ActorRestarted,
    ActorStarted,
    ActorStopped,
    CommandConsumed,
    SnapshotTaken,
)
from gptoss.replay.diff import diff, message_text
from gptoss.replay.result import Divergence, FieldDiff, Kind

LIFE_OF_ACTORS = frozenset({ActorStarted, ActorRestarted, ActorStopped})


class Tally:
    """Counts of one decider, over all its streams."""

    __slots__ = ("decisions", "diverged", "events", "passed_over", "snapshots")

    def __init__(self) -> None:
        self.decisions = self.events = self.snapshots = self.passed_over = self.diverged = 0


class DeciderStream:
    """See the module's rules.

    Args:
        decider: decides again.
        first: where the stream's first record stands.
        tally: counts what is done.

    Attributes:
        state: of the decider, as replayed.
        is_known: whether ``state`` is what it should be.
        command: the last command; None before the first.
        last: the last record that was taken.
    """

    __slots__ = ("_command_pos", "_expected", "_next_seq", "command", "decider", "is_known", "last", "state", "tally")

    def __init__(self, decider: Decider[Any], first: Meta, tally: Tally) -> None:
        self.decider = decider
        self.state: Any = decider.initial()
        self.is_known = first.seq == 0
        self.command: Command | None = None
        self.tally = tally
        self.last = first
        self._command_pos = -1
        self._expected: deque[Event] = deque()
        self._next_seq = first.seq

    @property
    def is_waiting(self) -> bool:
        """Whether the last command led to more than was recorded so far."""
        return bool(self._expected)

    def observe(self, record: Record) -> Iterator[Divergence]:
        """Take the next record of the stream, and say what differs."""
        meta = self.last = record.meta
        event: Any = record.event
        if meta.seq != self._next_seq:
            yield from self._gap(meta)
        self._next_seq = meta.seq + 1
        kind = type(record.event)
        if kind is CommandConsumed:
            if self._expected:
                yield from self.close()
            yield from self._consume(record, event.command)
        elif meta.actor != meta.stream or kind in LIFE_OF_ACTORS:
            return
        elif kind is ActorFailed:
            self._expected.clear()
        elif kind is SnapshotTaken:
            if self._expected:
                yield from self.close()
            yield from self._compare_state(record, event)
        elif self.is_known:
            yield from self._compare(record)
        else:
            self.tally.passed_over += 1

    def close(self) -> Iterator[Divergence]:
        """No more events of the last command will come."""
        while self._expected:
            yield self._missing()

    # ---- parts

    def _consume(self, record: Record, encoded: msgspec.Raw) -> Iterator[Divergence]:
        meta = record.meta
        try:
            command = decode_command(encoded)
        except JournalError as error:
            self.is_known = False
            yield self._error(meta, "command", str(error))
            return
        self.command, self._command_pos = command, meta.pos
        if type(command) is BeginRequest and meta.incarnation == 0:
            self.state, self.is_known = self.decider.initial(), True
        if not self.is_known:
            self.tally.passed_over += 1
            return
        self.tally.decisions += 1
        try:
            self._expected.extend(self.decider.decide(self.state, command))
        except Exception as error:  # noqa: BLE001 - a decider that raises on a recorded command is a finding
            yield self._error(meta, "decision", f"{type(error).__name__}: {error}")

    def _compare(self, record: Record) -> Iterator[Divergence]:
        event = record.event
        self.tally.events += 1
        expected = self._expected
        if expected and expected[0] == event:
            self._evolve(expected.popleft())
            return
        if event in expected:
            while expected[0] != event:
                yield self._missing()
            self._evolve(expected.popleft())
            return
        replayed = self._expected.popleft() if self._expected else None
        kind: Kind = "unexpected" if replayed is None else "differs"
        yield self._divergence(kind, record.meta, record.meta.type, diff(event, replayed))
        if replayed is not None:
            self._evolve(replayed)

    def _compare_state(self, record: Record, event: SnapshotTaken) -> Iterator[Divergence]:
        try:
            recorded = fold(self.decider, self.state, event)
        except UNREADABLE as error:
            yield self._error(record.meta, "state", str(error))
            return
        if self.is_known:
            self.tally.snapshots += 1
            theirs, ours = (recorded_form(self.decider, state) for state in (recorded, self.state))
            if theirs != ours:
                yield self._divergence("snapshot", record.meta, record.meta.type, diff(theirs, ours))
        self.state, self.is_known = recorded, True

    def _gap(self, meta: Meta) -> Iterator[Divergence]:
        missing = meta.seq - self._next_seq
        if 0 < missing <= len(self._expected):
            for _ in range(missing):
                yield self._missing()
            return
        self._expected.clear()
        if self.is_known:
            found = FieldDiff(field="seq", recorded=meta.seq, replayed=self._next_seq)
            yield self._divergence("gap", meta, meta.type, (found,))
        self.is_known = False

    def _missing(self) -> Divergence:
        event = self._expected.popleft()
        self._evolve(event)
        found = self._divergence("missing", self.last, type(event).__name__, diff(None, event))
        return msgspec.structs.replace(found, pos=self._command_pos)

    def _evolve(self, event: Event) -> None:
        self.state = self.decider.evolve(self.state, event)

    def _error(self, meta: Meta, what: str, message: str) -> Divergence:
        return self._divergence("error", meta, meta.type, (FieldDiff(field=what, recorded=None, replayed=message),))

    def _divergence(self, kind: Kind, at: Meta, event_type: str, fields: tuple[FieldDiff, ...]) -> Divergence:
        self.tally.diverged += 1
        return Divergence(
            kind=kind,
            boot=at.boot,
            pos=at.pos,
            stream=at.stream,
            decider=self.decider.name,
            type=event_type,
            command=message_text(self.command) if self.command else "",
            command_pos=self._command_pos,
            fields=fields,
        )
