"""A first look at a recording, before anything is cut out of it: who lived when, and where a replay may begin.

Memory is a few hundred bytes a request and a few bytes a record. A journal on disk has surveys of its segments; of any
other recording one is made here.
"""

from bisect import bisect_right
from collections.abc import Iterator

from gptoss.telemetry.recording import Recording, SurveyedRecording
from gptoss.telemetry.segment_survey import MARK_EVERY, Lifespan, SegmentSurvey, Surveyor


class Life:
    """A request in one boot.

    Attributes:
        first_pos, last_pos: its first and last record, those of deciders about it included.
        first_ns, last_ns: their wall times; ``first_mono_ns`` is monotonic.
        accepted: (executor's stream, position) of each acceptance.
        arrived: its arrival is in this boot; without it, only its end after a crash is.
        is_error: the server failed it, refused it, gave it up or crashed under it.
    """

    __slots__ = (
        "accepted",
        "arrived",
        "boot",
        "first_mono_ns",
        "first_ns",
        "first_pos",
        "is_error",
        "last_ns",
        "last_pos",
        "request_id",
    )

    def __init__(self, boot: str, request_id: str, span: Lifespan, first_ns: int) -> None:
        self.boot = boot
        self.request_id = request_id
        self.first_pos = self.last_pos = span.first_pos
        self.first_ns = self.last_ns = first_ns
        self.first_mono_ns = span.first_mono_ns
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
        self._offset_pos: list[int] = []
        self._offset_ns: list[int] = []

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

    def add(self, part: SegmentSurvey) -> None:
        """Take in what comes next of this boot."""
        for pos, offset_ns in part.offsets:
            self._offset_pos.append(pos)
            self._offset_ns.append(offset_ns)
        if self.last_pos < 0:
            self.first_ns = self._wall_ns(*part.marks[0])
        self.last_pos = part.last_pos
        self.last_ns = self._wall_ns(part.last_pos, part.last_mono_ns)
        self._add_marks(part)
        for stream, positions in part.snapshots.items():
            self.snapshots.setdefault(stream, []).extend(positions)
        for stream, positions in part.loads.items():
            self.loads.setdefault(stream, []).extend(positions)
        self.anchors += part.anchors
        self.always += part.always
        self.aborted += part.aborted
        self._add_lives(part)

    def _add_marks(self, part: SegmentSurvey) -> None:
        for pos, mono_ns in part.marks:
            if self.mark_pos and pos // MARK_EVERY <= self.mark_pos[-1] // MARK_EVERY:
                continue
            now_ns = self._wall_ns(pos, mono_ns)
            self.mark_pos.append(pos)
            # The wall clock may have been set back; what is in order of position is taken to be in order of time.
            self.mark_ns.append(max(now_ns, self.mark_ns[-1]) if self.mark_ns else now_ns)

    def _add_lives(self, part: SegmentSurvey) -> None:
        for request_id, span in part.lifespans.items():
            life = self.lives.get(request_id)
            if life is None:
                first_ns = self._wall_ns(span.first_pos, span.first_mono_ns)
                life = self.lives[request_id] = Life(self.boot, request_id, span, first_ns)
            life.last_pos, life.last_ns = span.last_pos, self._wall_ns(span.last_pos, span.last_mono_ns)
        for request_id, stream, pos in part.accepted:
            if request_id in self.lives:
                self.lives[request_id].accepted.append((stream, pos))
        for request_id in part.arrived:
            self.lives[request_id].arrived = True
        for request_id in part.errors:
            self.lives[request_id].is_error = True

    def _wall_ns(self, pos: int, mono_ns: int) -> int:
        known = bisect_right(self._offset_pos, pos)
        return mono_ns + (self._offset_ns[known - 1] if known else 0)


def survey(recording: Recording) -> list[BootSurvey]:
    """Look at a whole recording, oldest boot first."""
    boots: dict[str, BootSurvey] = {}
    parts = recording.surveys() if isinstance(recording, SurveyedRecording) else _surveys_of(recording)
    for part in parts:
        if part.last_pos < 0:
            continue  # A segment that was begun and has no record yet.
        boot = boots.get(part.boot)
        if boot is None:
            boot = boots[part.boot] = BootSurvey(part.boot)
        boot.add(part)
    for boot in boots.values():
        for _, crashed, names in boot.aborted:
            for name in names:
                if crashed in boots and name in boots[crashed].lives:
                    boots[crashed].lives[name].is_error = True
    return list(boots.values())


def _surveys_of(recording: Recording) -> Iterator[SegmentSurvey]:
    """One for each boot."""
    surveyor: Surveyor | None = None
    for record in recording.records():
        if surveyor is None or record.meta.boot != surveyor.survey.boot:
            if surveyor is not None:
                yield surveyor.survey
            surveyor = Surveyor(record.meta.boot)
        surveyor.fold((record,))
    if surveyor is not None:
        yield surveyor.survey
