"""Which records of a recording belong into a bundle: a selection of requests, and all that decided about them.

Of each boot that the selection touches, ``start`` and ``end`` are its first and last position of concern. In it are:
- ``NodeStarted``, ``RunsAborted`` and the last clock anchor before ``start``;
- each selected request's own stream, whole;
- each decider's stream from the last snapshot before ``start``, or from its beginning, up to the end of the command
  that it was at by ``end``: so it replays;
- each executor's stream from the acceptance of the oldest request that was in flight at ``start``, up to ``end``, and
  before it the ``EngineLoaded`` in force: so its steps replay;
- the other streams from ``start`` to ``end``; a slice of chosen requests leaves out what is about others alone;
- the content of the selected requests alone.

A recording is surveyed, and then read for what is taken, always in order, never held in memory. A journal on disk has
surveys of its segments and blocks (``segment_survey``), so only what is taken of it is read; any other recording is read
whole, twice. What is taken is the same.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Iterator

import msgspec

from gptoss.actors.directory import EXECUTOR_PREFIX, REQUEST_PREFIX, STANDING_DECIDERS
from gptoss.clock import NS_PER_S
from gptoss.errors import RequestError, RequestNotFound
from gptoss.messages import events as ev
from gptoss.messages.codec import decode_event
from gptoss.messages.envelope import Event, Meta, Record
from gptoss.telemetry.bundle_survey import BootSurvey, Life, survey
from gptoss.telemetry.recording import Recording, SurveyedRecording
from gptoss.telemetry.segment_survey import AnyRecord, Excerpt

CLOSING_RECORDS = 1000
"""What a command led to stands right behind it; other threads put at most so many records in between."""
IDS_IN_WORDS = 3
NEVER_NS = 2**63
COMMAND = ev.CommandConsumed.__name__
_LEADS = frozenset({COMMAND, ev.StepCommitted.__name__})
"""What leads to the records behind it."""
_ABOUT_REQUESTS = (EXECUTOR_PREFIX, f"actor/{REQUEST_PREFIX}", "actor/task/")


class Selection(msgspec.Struct, frozen=True, kw_only=True):
    """What a bundle is about; what is not given does not restrict.

    Attributes:
        request_ids: these requests; of an id that was used in two boots, the newer.
        errors: requests that the server failed, refused or gave up; ``slow_s``: those that took longer than this. Both
            together mean either.
        last: the newest so many of those that the other fields leave.
        window_s: of the last seconds of the recording; ``from_ns`` and ``to_ns``: between these wall times.
    """

    request_ids: tuple[str, ...] = ()
    errors: bool = False
    slow_s: float | None = None
    last: int | None = None
    window_s: float | None = None
    from_ns: int | None = None
    to_ns: int | None = None

    @property
    def is_of_requests(self) -> bool:
        """Whether it chooses requests, and so leaves the others out."""
        return bool(self.request_ids) or self.errors or self.slow_s is not None or self.last is not None

    def in_words(self) -> str:
        """Such as ``the last 5 requests that failed``."""
        kinds = ["that failed"] if self.errors else []
        kinds += [f"slower than {self.slow_s:g} s"] if self.slow_s is not None else []
        of = " or ".join(kinds)
        when = f"in the last {self.window_s:g} s" if self.window_s is not None else ""
        when = when or ("in a window of time" if self.from_ns is not None or self.to_ns is not None else "")
        if self.request_ids:
            more = len(self.request_ids) - IDS_IN_WORDS
            what = f"request {', '.join(self.request_ids[:IDS_IN_WORDS])}{f' and {more} more' if more > 0 else ''}"
        elif self.last is not None:
            what = f"the last {self.last} requests"
        else:
            what = "requests" if self.is_of_requests else "everything"
        return " ".join(part for part in (what, of, when) if part)


class Cut(msgspec.Struct, frozen=True):
    """What is taken of one boot.

    Attributes:
        first: position of the first record about any of the subjects, ``start`` if that is before; ``first_mono_ns`` is
            the monotonic time of the subjects' first.
        subjects: requests whose streams and content are in it.
        begins: stream -> position from which it is taken; streams that are not named are taken from ``start``.
        extra: positions that are taken wherever they are.
        leaves_others: streams that are about other requests, and executors that ran none of the subjects, are left out.
    """

    start: int
    end: int
    first: int
    first_mono_ns: int
    subjects: frozenset[str]
    begins: dict[str, int]
    extra: frozenset[int]
    leaves_others: bool


class Slice:
    """The part of a recording that a selection stands for: itself a ``Recording``. Made by ``cut``.

    Attributes:
        request_ids: the selected requests in order of arrival; empty when the selection is of everything.
    """

    def __init__(self, recording: Recording, cuts: dict[str, Cut], request_ids: tuple[str, ...]) -> None:
        self.request_ids = request_ids
        self._recording = recording
        self._cuts = cuts

    def boots(self) -> list[str]:
        """See ``Recording``."""
        return list(self._cuts)

    def records(self, *, boot: str | None = None, stream: str | None = None) -> Iterator[Record]:
        """See ``Recording``."""
        for name, part in self._cuts.items():
            if boot is None or boot == name:
                for record in _taken(self._candidates(name, part), part):
                    if stream is None or record.meta.stream == stream:
                        yield record if isinstance(record, Record) else Record(record.meta, decode_event(record))

    def content(self, *, boot: str | None = None) -> Iterator[Record]:
        """See ``Recording``."""
        for name, part in self._cuts.items():
            if boot is None or boot == name:
                for record in self._content_candidates(name, part):
                    event = _content_of(record.event, part.subjects)
                    if event is not None:
                        yield Record(record.meta, event)

    def _candidates(self, boot: str, part: Cut) -> Iterator[AnyRecord]:
        """All that is taken of a boot, and as little else as the recording can tell apart."""
        if not isinstance(self._recording, SurveyedRecording):
            return self._recording.records(boot=boot)
        excerpt = Excerpt(part.first, part.end + CLOSING_RECORDS, part.extra, part.begins)
        return self._recording.excerpt(boot, excerpt)

    def _content_candidates(self, boot: str, part: Cut) -> Iterator[Record]:
        if not isinstance(self._recording, SurveyedRecording):
            return self._recording.content(boot=boot)
        return self._recording.content_since(boot, part.first_mono_ns, part.subjects)


def cut(recording: Recording, selection: Selection) -> Slice:
    """The slice that replays what the selection is about.

    Raises:
        RequestNotFound: no request, or nothing at all, is what was asked for.
        JournalError: the recording cannot be read.
    """
    surveys = survey(recording)
    from_ns, to_ns = _window(surveys, selection)
    chosen = _chosen(surveys, selection, from_ns, to_ns)
    cuts: dict[str, Cut] = {}
    for boot in surveys:
        lives = [life for life in chosen if life.boot == boot.boot]
        if selection.is_of_requests:
            span = (min(life.first_pos for life in lives), 0) if lives else None
        else:
            span = _span(boot, from_ns, to_ns)
        if span is not None:
            cuts[boot.boot] = _cut(boot, lives, span, leaves_others=selection.is_of_requests)
    if not cuts:
        raise RequestNotFound(f"nothing is recorded that would be {selection.in_words()}")
    _add_ends_told_later(surveys, chosen, cuts)
    ids = tuple(dict.fromkeys(life.request_id for life in chosen)) if selection.is_of_requests else ()
    return Slice(recording, {boot.boot: cuts[boot.boot] for boot in surveys if boot.boot in cuts}, ids)


# ---------------------------------------------------------------- choosing


def _window(surveys: list[BootSurvey], selection: Selection) -> tuple[int, int]:
    """From when to when, in wall time."""
    from_ns, to_ns = selection.from_ns, selection.to_ns
    if selection.window_s is not None:
        newest_ns = max((boot.last_ns for boot in surveys), default=0)
        to_ns = newest_ns if to_ns is None else to_ns
        from_ns = to_ns - int(selection.window_s * NS_PER_S)
    from_ns = 0 if from_ns is None else from_ns
    to_ns = 2**63 if to_ns is None else to_ns
    if from_ns > to_ns:
        raise RequestError("the window ends before it begins", param="window")
    return from_ns, to_ns


def _chosen(surveys: list[BootSurvey], selection: Selection, from_ns: int, to_ns: int) -> list[Life]:
    lives = [life for boot in surveys for life in boot.lives.values() if life.arrived]
    if selection.request_ids:
        newest = {life.request_id: life for life in lives}
        unknown = [name for name in selection.request_ids if name not in newest]
        if unknown:
            raise RequestNotFound(f"no request has the id {unknown[0][:128]!a}", param="request_id")
        lives = [life for life in lives if newest[life.request_id] is life and life.request_id in selection.request_ids]
    lives = [life for life in lives if life.last_ns >= from_ns and life.first_ns <= to_ns]
    if selection.errors or selection.slow_s is not None:
        slow_ns = None if selection.slow_s is None else int(selection.slow_s * NS_PER_S)
        lives = [
            life
            for life in lives
            if (selection.errors and life.is_error) or (slow_ns is not None and life.last_ns - life.first_ns > slow_ns)
        ]
    return lives if selection.last is None else lives[-selection.last :]


def _span(boot: BootSurvey, from_ns: int, to_ns: int) -> tuple[int, int] | None:
    """The positions between two wall times, rounded outwards to the survey's marks; None when there are none."""
    if boot.last_ns < from_ns or boot.first_ns > to_ns:
        return None
    first = max(0, bisect_left(boot.mark_ns, from_ns) - 1)
    last = bisect_right(boot.mark_ns, to_ns)
    return boot.mark_pos[first], boot.mark_pos[last] if last < len(boot.mark_pos) else boot.last_pos


# ---------------------------------------------------------------- cutting


def _cut(boot: BootSurvey, lives: list[Life], span: tuple[int, int], *, leaves_others: bool) -> Cut:
    """What is taken of a boot: the span, and beyond its end until the last of these requests has ended."""
    start = span[0]
    end = max([span[1], *(life.last_pos for life in lives)])
    extra = set(boot.always)
    anchor = bisect_right(boot.anchors, start)
    if anchor:
        extra.add(boot.anchors[anchor - 1])
    begins: dict[str, int] = {}
    for stream in STANDING_DECIDERS:
        snapshots = boot.snapshots.get(stream, [])
        before = bisect_right(snapshots, start)
        begins[stream] = snapshots[before - 1] if before else 0
    ran_on = {stream for life in lives for stream, _ in life.accepted}
    for stream, loads in boot.loads.items():
        begin = boot.oldest_in_flight(stream, start)
        if stream in ran_on or not leaves_others:
            begins[stream] = begin
        before = bisect_right(loads, begin)
        if before:
            extra.add(loads[before - 1])
    cut = Cut(start, end, start, NEVER_NS, frozenset(), begins, frozenset(extra), leaves_others)
    return _with_subjects(cut, lives)


def _with_subjects(cut: Cut, lives: list[Life]) -> Cut:
    return msgspec.structs.replace(
        cut,
        first=min([cut.first, *(life.first_pos for life in lives)]),
        first_mono_ns=min([cut.first_mono_ns, *(life.first_mono_ns for life in lives)]),
        subjects=cut.subjects | {life.request_id for life in lives},
    )


def _add_ends_told_later(surveys: list[BootSurvey], chosen: list[Life], cuts: dict[str, Cut]) -> None:
    """A request that a crash cut off is told to have ended by a later boot."""
    told = {(life.boot, life.request_id) for life in chosen}
    names = {request_id for _, request_id in told}
    for boot in surveys:
        aborted = [pos for pos, crashed, lost in boot.aborted if any((crashed, name) in told for name in lost)]
        late = [life for life in boot.lives.values() if not life.arrived and life.request_id in names]
        if not aborted and not late:
            continue
        last = max([*aborted, *(life.last_pos for life in late)])
        part = cuts.get(boot.boot) or Cut(
            last, last, last, NEVER_NS, frozenset(), {}, frozenset(boot.always), leaves_others=True
        )
        cuts[boot.boot] = _with_subjects(msgspec.structs.replace(part, end=max(part.end, last)), late)


def _taken(records: Iterator[AnyRecord], part: Cut) -> Iterator[AnyRecord]:
    consumed: dict[str, int] = {}
    for record in records:
        meta = record.meta
        if meta.pos > part.end:
            if meta.pos > part.end + CLOSING_RECORDS:
                return
            if meta.cause == consumed.get(meta.stream) and meta.type != COMMAND:
                yield record
        elif _is_wanted(meta, part):
            if meta.type in _LEADS:
                consumed[meta.stream] = meta.pos
            yield record


def _is_wanted(meta: Meta, part: Cut) -> bool:
    stream = meta.stream
    if stream.startswith(REQUEST_PREFIX):
        return stream[len(REQUEST_PREFIX) :] in part.subjects
    begin = part.begins.get(stream)
    if begin is not None:
        return meta.pos >= begin or meta.pos in part.extra
    if meta.pos in part.extra:
        return True
    if meta.pos < part.start:
        return False
    return not part.leaves_others or meta.correlation in part.subjects or not stream.startswith(_ABOUT_REQUESTS)


def _content_of(event: Event, subjects: frozenset[str]) -> Event | None:
    if isinstance(event, ev.StepTokens | ev.StepHashed):
        rows = tuple(row for row in event.rows if row.request_id in subjects)
        return msgspec.structs.replace(event, rows=rows) if rows else None
    return event if getattr(event, "request_id", None) in subjects else None
