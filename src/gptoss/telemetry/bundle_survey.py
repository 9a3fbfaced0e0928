"""A first look at a recording, before anything is cut out of it: who lived when, and where a replay may begin.

Memory is a few hundred bytes a request and a few bytes a record.
"""

from collections.abc import Callable
from typing import Any

from gptoss.actors.directory import REQUEST_PREFIX
from gptoss.messages import events as ev
from gptoss.messages.envelope import Event, Record
from gptoss.telemetry.recording import Recording
from gptoss.telemetry.wall_clock import wall_offset_ns

MARK_EVERY = 256
"""Wall times are known at every so many records."""
CLIENT_REASONS = frozenset({"client", "disconnect"})
CLIENT_FAULTS_BELOW = 429
"""A refusal with a lower HTTP status is the client's own doing."""


class Life:
    """A request in one boot.

    Attributes:
        first_pos, last_pos: its first and last record, those of deciders about it included.
        first_ns, last_ns: their wall times.
        accepted: (executor's stream, position) of each acceptance.
        arrived: its arrival is in this boot; without it, only its end after a crash is.
        is_error: the server failed it, refused it, gave it up or crashed under it.
    """

    __slots__ = (
        "accepted",
        "arrived",
        "boot",
        "first_ns",
        "first_pos",
        "is_error",
        "last_ns",
        "last_pos",
        "request_id",
    )

    def __init__(self, boot: str, request_id: str, pos: int, now_ns: int) -> None:
        self.boot = boot
        self.request_id = request_id
        self.first_pos = self.last_pos = pos
        self.first_ns = self.last_ns = now_ns
        self.accepted: list[tuple[str, int]] = []
        self.arrived = False
        self.is_error = False


class BootSurvey:
    """One boot.

    Attributes:
        lives: by request id, in the order of arrival.
        snapshots, loads: stream -> positions of its ``SnapshotTaken`` or ``EngineLoaded``.
        anchors: positions of clock anchors.
        always: positions of what belongs into every bundle.
        aborted: (position, boot, request ids) of each ``RunsAborted``.
        mark_ns, mark_pos: wall times and positions, ascending.
    """

    def __init__(self, boot: str) -> None:
        self.boot = boot
        self.lives: dict[str, Life] = {}
        self.snapshots: dict[str, list[int]] = {}
        self.loads: dict[str, list[int]] = {}
        self.anchors: list[int] = []
        self.always: list[int] = []
        self.aborted: list[tuple[int, str, tuple[str, ...]]] = []
        self.mark_ns: list[int] = []
        self.mark_pos: list[int] = []
        self.first_ns = self.last_ns = 0
        self.last_pos = -1
        self._offset_ns = 0
        self._notes: dict[type[Event], Callable[[Record, Any], None]] = {
            ev.NodeStarted: self._note_started,
            ev.ClockAnchored: self._note_anchored,
            ev.RunsAborted: self._note_aborted,
            ev.SnapshotTaken: lambda record, _: self.snapshots.setdefault(record.meta.stream, []).append(
                record.meta.pos
            ),
            ev.EngineLoaded: lambda record, _: self.loads.setdefault(record.meta.stream, []).append(record.meta.pos),
            ev.ExecutorAccepted: self._note_accepted,
            ev.RequestReceived: self._note_arrival,
            ev.RequestFailed: self._note_failed,
            ev.RequestRejected: self._note_rejected,
            ev.RequestCancelled: self._note_cancelled,
        }

    def oldest_in_flight(self, stream: str, at: int) -> int:
        """Where the oldest request was accepted that this executor had in flight at a position; ``at`` if it had none."""
        return min(
            (
                pos
                for life in self.lives.values()
                if life.first_pos <= at <= life.last_pos
                for accepted, pos in life.accepted
                if accepted == stream and pos <= at
            ),
            default=at,
        )

    def fold(self, record: Record) -> None:
        """Take a record in."""
        meta, event = record.meta, record.event
        self._offset_ns = wall_offset_ns(record, self._offset_ns)
        now_ns = meta.mono_ns + self._offset_ns
        if self.last_pos < 0:
            self.first_ns = now_ns
        if not self.mark_pos or meta.pos >= self.mark_pos[-1] + MARK_EVERY:
            self.mark_pos.append(meta.pos)
            # The wall clock may have been set back; what is in order of position is taken to be in order of time.
            self.mark_ns.append(max(now_ns, self.mark_ns[-1]) if self.mark_ns else now_ns)
        self.last_ns, self.last_pos = now_ns, meta.pos
        request_id = meta.correlation or meta.stream.removeprefix(REQUEST_PREFIX)
        if meta.correlation or request_id != meta.stream:
            life = self.lives.get(request_id)
            if life is None:
                life = self.lives[request_id] = Life(self.boot, request_id, meta.pos, now_ns)
            life.last_pos, life.last_ns = meta.pos, now_ns
        note = self._notes.get(type(event))
        if note is not None:
            note(record, event)

    # ---- folding

    def _life_of(self, record: Record) -> Life:
        return self.lives[record.meta.stream.removeprefix(REQUEST_PREFIX)]

    def _note_started(self, record: Record, _: ev.NodeStarted) -> None:
        self.always.append(record.meta.pos)

    def _note_anchored(self, record: Record, _: ev.ClockAnchored) -> None:
        self.anchors.append(record.meta.pos)

    def _note_aborted(self, record: Record, event: ev.RunsAborted) -> None:
        self.always.append(record.meta.pos)
        self.aborted.append((record.meta.pos, event.boot, event.request_ids))

    def _note_accepted(self, record: Record, event: ev.ExecutorAccepted) -> None:
        life = self.lives.get(event.request_id)
        if life is not None:
            life.accepted.append((record.meta.stream, record.meta.pos))

    def _note_arrival(self, record: Record, _: ev.RequestReceived) -> None:
        self._life_of(record).arrived = True

    def _note_failed(self, record: Record, _: ev.RequestFailed) -> None:
        self._life_of(record).is_error = True

    def _note_rejected(self, record: Record, event: ev.RequestRejected) -> None:
        if event.status >= CLIENT_FAULTS_BELOW:
            self._life_of(record).is_error = True

    def _note_cancelled(self, record: Record, event: ev.RequestCancelled) -> None:
        if event.reason not in CLIENT_REASONS:
            self._life_of(record).is_error = True


def survey(recording: Recording) -> list[BootSurvey]:
    """Look at a whole recording, oldest boot first."""
    boots: dict[str, BootSurvey] = {}
    for record in recording.records():
        boot = boots.get(record.meta.boot)
        if boot is None:
            boot = boots[record.meta.boot] = BootSurvey(record.meta.boot)
        boot.fold(record)
    for boot in boots.values():
        for _, crashed, names in boot.aborted:
            for name in names:
                if crashed in boots and name in boots[crashed].lives:
                    boots[crashed].lives[name].is_error = True
    return list(boots.values())
