"""The stories of chosen requests, all told in one reading of a recording."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TypeAlias

from gptoss.messages import events as ev
from gptoss.messages.envelope import Record
from gptoss.telemetry.delays import Delay, DelayFold
from gptoss.telemetry.recording import Recording
from gptoss.telemetry.request_view import RequestRow, is_crash_end, request_id_of
from gptoss.telemetry.timeline import Timeline, timeline

_Key: TypeAlias = tuple[str, str]
"""(boot, request id)"""


@dataclass(slots=True)
class Told:
    """A request in detail."""

    boot: str
    timeline: Timeline
    delays: list[Delay]


def tell(recording: Recording, chosen: Iterable[RequestRow]) -> list[Told]:
    """The stories of these requests, in their order; one whose arrival is not recorded has none."""
    teller = _Teller([(row.boot, row.request_id) for row in chosen])
    for record in recording.records():
        teller.add(record)
    return list(teller.told())


class _Teller:
    def __init__(self, keys: list[_Key]) -> None:
        self._own: dict[_Key, list[Record]] = {key: [] for key in keys}
        self._folds: dict[_Key, DelayFold] = {}
        self._running: dict[_Key, DelayFold] = {}

    def add(self, record: Record) -> None:
        event, key = record.event, (record.meta.boot, request_id_of(record))
        if is_crash_end(event):
            self._crashed(record)
            return
        if isinstance(event, ev.StepCommitted):
            self._step(record, event)
        elif key in self._own:
            self._mine(record, key)
        for (boot, _), fold in self._running.items():
            if boot == key[0]:
                fold.add(record)
        if isinstance(event, ev.TERMINAL_EVENTS):
            self._running.pop(key, None)

    def told(self) -> Iterator[Told]:
        for key, fold in self._folds.items():
            life = timeline(self._own[key], key[1])
            yield Told(key[0], life, fold.delays(life))

    def _mine(self, record: Record, key: _Key) -> None:
        if isinstance(record.event, ev.RequestReceived):  # An id that is used again: the newer life counts.
            self._own[key] = []
            self._folds[key] = self._running[key] = DelayFold(key[1], record.meta.mono_ns)
        self._own[key].append(record)

    def _step(self, record: Record, event: ev.StepCommitted) -> None:
        for row in event.rows:
            if (own := self._own.get((record.meta.boot, row.request_id))) is not None:
                own.append(record)

    def _crashed(self, record: Record) -> None:
        """The end of a request of an earlier boot."""
        for (boot, request_id), own in self._own.items():
            if request_id == request_id_of(record) and boot != record.meta.boot:
                own.append(record)
