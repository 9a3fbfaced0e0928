"""Walking through a recording: the state of any actor at any record, and what waited in its mailbox.

Rules:
- A decider's state is the replayed one; an executor's is what its events tell of the requests that its engine has.
- A mailbox holds the commands that the actor consumed later and that had been sent by the record's time. Messages that
  no decider takes, such as tokens, are not recorded and not shown.
"""

from collections import deque
from collections.abc import Iterator
from typing import Any

import msgspec

from gptoss.actors.decider import recorded_form
from gptoss.errors import ReplayError
from gptoss.messages import events as ev
from gptoss.messages.codec import by_name, decode_command
from gptoss.messages.envelope import Record
from gptoss.replay.diff import link, message_text
from gptoss.replay.plans import ExecutorLog
from gptoss.replay.result import Link
from gptoss.replay.verify import Verifier
from gptoss.telemetry.recording import Recording

SENT_LATER_MAX = 1000
"""So many commands in a row that were sent later end the search for those that waited."""
BACK_MAX = 10_000


class Waiting(msgspec.Struct, frozen=True, kw_only=True):
    """A command in a mailbox: consumed at ``pos``, so long after the moment."""

    pos: int
    command: str
    later_ms: float


class Moment(msgspec.Struct, frozen=True, kw_only=True):
    """An actor at a record.

    Attributes:
        state: JSON types.
        is_known: whether the recording says enough to know it.
        mailbox: next first.
    """

    boot: str
    record: Link
    actor: str
    state: Any
    is_known: bool
    mailbox: tuple[Waiting, ...]


class Walk:
    """A place in a boot that can be moved.

    Args:
        recording: what to walk through.
        boot: which boot.
        until: stop at the last record that is not beyond this position; None is the first record.

    Raises:
        ReplayError: the boot has no record up to there.
    """

    def __init__(self, recording: Recording, boot: str, until: int | None = None) -> None:
        self._recording = recording
        self._boot = boot
        self._start(until)

    def next(self) -> bool:
        """Go to the next record; False at the end."""
        if self._following is None:
            return False
        self._take(self._following)
        return True

    def back(self) -> bool:
        """Go to the record before; False at the beginning, or further back than is remembered."""
        if len(self._trail) < 2:  # noqa: PLR2004 - this place and the one before
            return False
        self._start(self._trail[-2])
        return True

    def actors(self) -> tuple[str, ...]:
        """Who can be asked for."""
        return (*self._verifier.executors, *self._verifier.streams)

    def moment(self, actor: str) -> Moment:
        """The state of an actor here, and its mailbox.

        Raises:
            ReplayError: nothing was recorded of this actor by now.
        """
        state, is_known = self._state(actor)
        mailbox = tuple(self._mailbox(actor))
        return Moment(
            boot=self._boot, record=link(self.record), actor=actor, state=state, is_known=is_known, mailbox=mailbox
        )

    # ---- parts

    def _start(self, until: int | None) -> None:
        self._verifier = Verifier()
        self._records: Iterator[Record] = self._recording.records(boot=self._boot)
        self._trail: deque[int] = deque(maxlen=BACK_MAX)
        first = next(self._records, None)
        if first is None or (until is not None and first.meta.pos > until):
            raise ReplayError(f"boot {self._boot} has no record up to {until}")
        self._take(first)
        while until is not None and self._following is not None and self._following.meta.pos <= until:
            self._take(self._following)

    def _take(self, record: Record) -> None:
        self.record = record
        self._verifier.observe(record)
        self._trail.append(record.meta.pos)
        self._following: Record | None = next(self._records, None)

    def _state(self, actor: str) -> tuple[Any, bool]:
        stream = self._verifier.streams.get(actor)
        if stream is not None:
            return by_name(recorded_form(stream.decider, stream.state)), stream.is_known
        log = self._verifier.executors.get(actor)
        if log is not None:
            return executor_state(log), log.is_known
        known = ", ".join(self.actors()[:8]) or "nobody"
        raise ReplayError(f"nothing was recorded of {actor!r} by record {self.record.meta.pos}; known are {known}")

    def _mailbox(self, actor: str) -> Iterator[Waiting]:
        here, later = self.record.meta, 0
        for record in self._recording.records(boot=self._boot, stream=actor):
            if record.meta.pos <= here.pos or not isinstance(record.event, ev.CommandConsumed):
                continue
            command = decode_command(record.event.command)
            if command.now_ns <= here.mono_ns:
                later_ms = round((record.meta.mono_ns - here.mono_ns) / 1e6, 3)
                yield Waiting(pos=record.meta.pos, command=message_text(command), later_ms=later_ms)
                later = 0
                continue
            later += 1
            if later > SENT_LATER_MAX:
                return


def executor_state(log: ExecutorLog) -> dict[str, Any]:
    """The requests of an engine as its log tells of them."""

    def request(each: Any) -> dict[str, Any]:
        names = ("attempt", "priority", "num_prompt", "num_tokens", "num_computed", "kv_bytes")
        return {name: getattr(each, name) for name in names}

    return {
        "loaded": log.capabilities is not None,
        "kv_bytes_in_use": log.kv_bytes_in_use,
        "kv_budget_bytes": log.capabilities.kv_budget_bytes if log.capabilities else 0,
        "running": {key: request(each) for key, each in log.running.items()},
        "waiting": {key: request(each) for key, each in sorted(log.line.items(), key=lambda item: item[1].order)},
        "sent": [event.request_id for event in log.sent if event],
    }
