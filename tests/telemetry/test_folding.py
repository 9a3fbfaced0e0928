"""Every record reaches the views that its type concerns, and no other."""

import io
from collections import Counter
from collections.abc import Iterable
from typing import TYPE_CHECKING

import msgspec
import pytest

from gptoss.messages import events as ev
from gptoss.messages.codec import EVENT_TYPES
from gptoss.messages.envelope import Event, Record
from gptoss.telemetry.books import Books
from gptoss.telemetry.folding import Folding, Handler, View
from gptoss.telemetry.live_views import LiveViews
from gptoss.telemetry.logs import LEVELS, LogWriter, log_line, worst_level
from gptoss.telemetry.metrics import Metrics
from gptoss.telemetry.projection import Projection
from gptoss.telemetry.request_view import RequestView
from gptoss.telemetry.trace_phases import TOLD
from gptoss.telemetry.traces import Traces

if TYPE_CHECKING:
    from telemetry.conftest import Script

CONTROL = [kind for kind in EVENT_TYPES.values() if kind.FAMILY == "control"]

ONLY_COUNTED = {
    ev.CapacitySet, ev.CommandConsumed, ev.CountersSaved, ev.DeadlineExpired, ev.ExecutorDrained, ev.ExecutorJoined,
    ev.MemoryEstimated, ev.MemoryRequested, ev.Parked, ev.ReservationRefused, ev.SamplingBound, ev.SlotReleased,
    ev.SnapshotTaken, ev.Unparked,
}  # fmt: skip
"""Types that concern no view, apart from those of batches, none of which does."""


class Noting(View):
    """Says what it is asked and what it is given."""

    def __init__(self, books: Books, *wanted: type[Event]) -> None:
        super().__init__(books)
        self.turn = lambda mono_ns: self.seen.append(("turn", mono_ns))
        self.wanted = wanted
        self.boots: list[str] = []
        self.asked: Counter[type[Event]] = Counter()
        self.seen: list[tuple[str, object]] = []

    def begin_boot(self, boot: str) -> None:
        self.boots.append(boot)

    def handlers(self, kind: type[Event]) -> Iterable[Handler]:
        self.asked[kind] += 1
        if kind in self.wanted:
            yield self._note

    def _note(self, record: Record, event: Event, request: RequestView | None) -> None:
        assert record.event is event
        self.seen.append((record.meta.type, None if request is None else request.state))


def fold_all(fold: Folding, records: Iterable[Record]) -> None:
    for record in records:
        fold.fold(record)


def test_a_view_is_given_what_it_asked_for_after_the_books_and_after_its_turn(busy: "Script") -> None:
    books = Books()
    view = Noting(books, ev.RequestCompleted, ev.RequestCancelled, ev.StepCommitted)
    other = Noting(books)
    fold_all(Folding(books, (view, other)), busy.records)
    given = [entry for entry in view.seen if entry[0] != "turn"]
    expected = [one.meta.type for one in busy.records if isinstance(one.event, view.wanted)]
    assert [name for name, _ in given] == expected
    states = {state for name, state in given if name == "RequestCompleted"}
    assert states == {"completed"}
    assert {state for name, state in given if name == "StepCommitted"} == {None}
    assert view.seen[view.seen.index(given[0]) - 1][0] == "turn"
    turns = [one.meta.mono_ns for one in busy.records if not isinstance(one.event, ev.CommandConsumed)]
    assert [at for name, at in view.seen if name == "turn"] == turns
    assert {name for name, _ in other.seen} == {"turn"}


def test_a_view_is_asked_once_for_each_type_and_boot(busy: "Script") -> None:
    books = Books()
    view = Noting(books)
    folding = Folding(books, (view,))
    fold_all(folding, busy.records)
    kinds = {type(one.event) for one in busy.records} - {ev.CommandConsumed}
    assert view.asked == dict.fromkeys(kinds, 1)
    assert view.boots == [busy.boot]
    again = [Record(msgspec.structs.replace(one.meta, boot="boot2"), one.event) for one in busy.records]
    fold_all(folding, again)
    assert view.boots == [busy.boot, "boot2"]
    assert view.asked == dict.fromkeys(kinds, 2)


def test_the_books_count_every_record_of_the_newest_boot(busy: "Script") -> None:
    books = Books()
    folding = Folding(books, ())
    assert (books.newest_pos, books.newest_ns) == (-1, 0)
    consumed = ev.CommandConsumed(decider="router", command=msgspec.Raw(b"\x90"))
    busy.add("router", consumed)
    fold_all(folding, busy.records)
    assert books.counts == Counter(type(one.event) for one in busy.records)
    assert (books.newest_pos, books.newest_ns) == (busy.records[-1].meta.pos, busy.now_ns)
    first = Record(msgspec.structs.replace(busy.records[0].meta, boot="boot2"), busy.records[0].event)
    folding.fold(first)
    assert books.counts == {ev.NodeStarted: 1}
    assert books.newest_pos == 0


def test_each_type_of_event_concerns_a_view_or_is_known_not_to() -> None:
    books = Books()
    log = LogWriter(io.StringIO(), "json", "debug")
    views = (Projection(books=books), Metrics(books), Traces(lambda _: None, books), log)

    def concerns_somebody(kind: type[Event]) -> bool:
        in_books, in_requests = books.folds(kind)
        return bool(in_books or in_requests) or any(tuple(view.handlers(kind)) for view in views)

    silent = {kind for kind in CONTROL if not concerns_somebody(kind)}
    of_batches = {kind for kind in CONTROL if kind.__module__.endswith("batch_events")}
    assert silent - of_batches == ONLY_COUNTED
    assert of_batches <= silent


@pytest.mark.parametrize("kind", CONTROL)
def test_a_log_asks_for_the_types_that_can_have_a_line_of_its_level(kind: type[Event]) -> None:
    for level, number in LEVELS.items():
        log = LogWriter(io.StringIO(), "json", level)  # pyright: ignore[reportArgumentType]
        wants = any(handler.__name__ == "_put" for handler in log.handlers(kind))
        assert wants == (worst_level(kind) >= number)


def test_no_line_is_worse_than_its_type_can_be(busy: "Script") -> None:
    rejected = ev.RequestRejected(code="not_ready", status=503, message="draining", retry_after_s=1)
    busy.request("req_503", rejected)
    busy.add("system", ev.SpansExported(exported=0, refused=2, overflowed=1))
    lines = [(type(one.event), log_line(one)) for one in busy.records]
    assert any(line is not None for _, line in lines)
    assert all(LEVELS[line["level"]] <= worst_level(kind) for kind, line in lines if line is not None)
    assert all(worst_level(kind) == 0 for kind, line in lines if line is None)


def test_traces_are_told_of_everything_that_a_trace_is_told_from() -> None:
    traces = Traces(lambda _: None)
    told = {kind for kind in CONTROL if tuple(traces.handlers(kind))}
    assert told == TOLD | {ev.NodeStarted, ev.ClockAnchored, ev.StepCommitted}


class Flushed(io.StringIO):
    """Counts how often it was flushed."""

    flushes = 0

    def flush(self) -> None:
        self.flushes += 1
        super().flush()


def test_the_lines_of_a_burst_leave_together(busy: "Script") -> None:
    stream = Flushed()
    views = LiveViews(log=LogWriter(stream, "json"))
    for record in busy.records:
        views.fold(record)
    assert stream.flushes == 0
    views.flush()
    views.flush()
    assert stream.flushes == 1
    alone = Flushed()
    writer = LogWriter(alone, "json")
    for record in busy.records:
        writer.fold(record)
    assert alone.flushes == len(alone.getvalue().splitlines()) > 0
    assert alone.getvalue() == stream.getvalue()


def test_rows_that_are_alike_are_counted_together_wherever_they_stand(script: "Script") -> None:
    books = Books()
    folding = Folding(books, ())
    script.start()
    names = ("a", "b", "c", "d")
    for name in names:
        script.receive(name)
    script.step(dict.fromkeys(names, (1, 0)))
    fold_all(folding, script.records)
    assert (books.step.tokens, books.step.streams, books.step.gaps) == (4, 4, {})
    first = script.records[-1]
    script.step({"a": (1, 0), "b": (2, 3), "c": (1, 0), "d": (1, 0), "nobody": (1, 0)})
    folding.fold(script.records[-1])
    gap_ns = script.records[-1].meta.mono_ns - first.meta.mono_ns
    assert books.step.gaps == {(gap_ns, 1): 3, (gap_ns, 2): 2}
    assert (books.step.tokens, books.step.streams, books.step.prefilled) == (6, 5, 3)
    assert {view.token_gap_ns for view in books.requests.open.values()} == {gap_ns}
