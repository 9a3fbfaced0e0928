"""Whole lives of requests: what no decider sees, such as one end each and tokens that add up.

Rules:
- A life is looked at if the recording has all of it: it began while the deciders' states were known, and what it took
  was given back, or the server stopped in order. A life that a crash or a bundle's edge cuts off is left alone.
- What is held is what is in flight.
"""

from collections.abc import Iterator

import msgspec

from gptoss.actors.directory import REQUEST_PREFIX
from gptoss.messages import events as ev
from gptoss.messages.commands import Command, ForgetRoute, ReleaseMemory, WithdrawRequest
from gptoss.messages.envelope import Record
from gptoss.telemetry.timeline import check_complete

GIVE_BACKS = frozenset({ForgetRoute, ReleaseMemory, WithdrawRequest})
TERMINALS = frozenset(ev.TERMINAL_EVENTS)


class _Life:
    __slots__ = ("given_back", "has_ended", "records", "steps_known")

    def __init__(self) -> None:
        self.records: list[Record] = []
        self.has_ended = False
        self.given_back = 0
        self.steps_known = False


class Lives:
    """The requests of one boot.

    Attributes:
        num_checked: lives that were looked at as wholes.
    """

    def __init__(self) -> None:
        self.num_checked = 0
        self._open: dict[str, _Life] = {}
        self._settled: list[str] = []

    def observe(self, record: Record) -> None:
        """Take any record that names a request; a life that cannot be followed to its end must not begin here."""
        request_id, kind = record.meta.correlation, type(record.event)
        if kind is ev.RequestReceived:
            self._open[request_id] = _Life()
        life = self._open.get(request_id)
        if life is None:
            return
        if kind is not ev.CommandConsumed or record.meta.stream.startswith(REQUEST_PREFIX):
            life.records.append(record)  # what the others are told shows in what they say
        if kind is ev.ExecutorAccepted:
            life.steps_known = True
        elif kind in TERMINALS:
            life.has_ended = True

    def step(self, record: Record, step: ev.StepCommitted) -> None:
        """Take a step: each request keeps its own row."""
        for row in step.rows:
            life = self._open.get(row.request_id)
            if life is not None and life.steps_known and row.tokens:
                life.records.append(Record(record.meta, msgspec.structs.replace(step, rows=(row,))))

    def command(self, command: Command) -> Iterator[str]:
        """Take a command that a decider consumes; says what is wrong with lives that are over by now."""
        if self._settled:
            yield from self._check_settled()
        if type(command) in GIVE_BACKS:
            request_id: str = getattr(command, "request_id")  # noqa: B009 - those three have one
            life = self._open.get(request_id)
            if life is not None and life.has_ended:
                life.given_back += 1
                if life.given_back == len(GIVE_BACKS):
                    self._settled.append(request_id)

    def end(self, *, in_order: bool) -> Iterator[str]:
        """The boot is over; ``in_order`` if the server stopped and nothing is cut off."""
        if in_order:
            for request_id in tuple(self._open):
                yield from self._check(request_id)
        self._open.clear()

    def forget_steps(self) -> None:
        """Steps are missing: nobody's tokens can be counted."""
        for life in self._open.values():
            life.steps_known = False
            life.records = [record for record in life.records if not isinstance(record.event, ev.StepCommitted)]

    def _check_settled(self) -> Iterator[str]:
        for request_id in self._settled:
            yield from self._check(request_id)
        self._settled.clear()

    def _check(self, request_id: str) -> Iterator[str]:
        life = self._open.pop(request_id, None)
        if life is None:
            return
        self.num_checked += 1
        for problem in check_complete(life.records, request_id, checks_pace=False):
            yield f"{request_id}: {problem}"
