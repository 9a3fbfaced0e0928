"""What is cut out of a recording replays: every decision in it comes out the same."""

from collections import Counter
from pathlib import Path
from typing import Any

import msgspec
import pytest

from gptoss.actors.decider import Decider, fold
from gptoss.actors.deciders import deciders_of
from gptoss.config import Settings
from gptoss.errors import RequestError, RequestNotFound
from gptoss.messages import events as ev
from gptoss.messages.codec import decode_command
from gptoss.messages.envelope import Record
from gptoss.telemetry.bundle_facts import BundleFacts
from gptoss.telemetry.bundle_redact import Redacted
from gptoss.telemetry.bundle_slice import Selection, cut
from gptoss.telemetry.recording import JournalRecording, ListRecording, Recording

EVERYTHING = Selection()


@pytest.fixture(scope="module")
def night(bad_night: Path) -> JournalRecording:
    return JournalRecording(bad_night / "journal")


def replay(recording: Recording) -> tuple[int, list[str]]:
    """Number of decisions, and a line for each that comes out otherwise than recorded."""
    deciders = deciders_of(Settings())
    known: dict[str, Decider[Any]] = {
        "memory": deciders.memory,
        "admission": deciders.admission,
        "router": deciders.router,
    }
    states: dict[tuple[str, str], Any] = {}
    expected: dict[tuple[str, str], list[ev.Event]] = {}
    problems: list[str] = []
    decisions = 0
    for record in recording.records():
        key, event = (record.meta.boot, record.meta.stream), record.event
        decider = known.get(key[1], deciders.lifecycle)
        if isinstance(event, ev.SnapshotTaken):
            states[key] = fold(decider, decider.initial(), event)
        elif isinstance(event, ev.CommandConsumed):
            if expected.get(key):
                problems.append(f"{key} never recorded {expected[key]}")
            if key not in states and record.meta.seq > 0:
                problems.append(f"{key} begins at {record.meta.seq} without a state")
            state = states.get(key, decider.initial())
            expected[key] = decider.decide(state, decode_command(event.command))
            for decided in expected[key]:
                state = decider.evolve(state, decided)
            states[key] = state
            decisions += 1
        elif expected.get(key) and event == expected[key][0]:
            expected[key].pop(0)
        elif record.meta.stream in known:
            problems.append(f"{key} at {record.meta.pos}: {event} instead of {expected.get(key)}")
    return decisions, problems + [f"{key} never recorded {rest}" for key, rest in expected.items() if rest]


def facts(recording: Recording) -> BundleFacts:
    found = BundleFacts()
    for record in (*recording.records(), *recording.content()):
        found.fold(record)
    return found


def requests_in(recording: Recording) -> set[str]:
    return {r.event.request_id for r in recording.records() if isinstance(r.event, ev.RequestReceived)}


def test_the_night_was_as_bad_as_meant(night: JournalRecording) -> None:
    kinds = Counter(record.meta.type for record in night.records())
    assert {
        "Enqueued",
        "SnapshotTaken",
        "EngineExited",
        "AttemptRetried",
        "RequestCancelled",
        "RunsAborted",
    } <= kinds.keys()
    assert len(night.boots()) == 2


@pytest.mark.parametrize(
    "selection",
    [
        EVERYTHING,
        Selection(request_ids=("night-07",)),
        Selection(request_ids=("night-29", "cancelled")),
        Selection(request_ids=("shrunk",)),
        Selection(request_ids=("crashed-0",)),
        Selection(request_ids=("s1",)),
        Selection(last=3),
        Selection(errors=True),
        Selection(slow_s=0.02),
        Selection(window_s=0.05),
    ],
    ids=lambda selection: selection.in_words().replace(" ", "-"),
)
def test_every_slice_replays_and_misses_nothing(night: JournalRecording, selection: Selection) -> None:
    part = cut(night, selection)
    decisions, problems = replay(part)
    assert problems == []
    assert decisions > 5
    assert facts(part).gaps(with_content=True) == ()
    if selection.is_of_requests:
        assert requests_in(part) == set(part.request_ids)


def test_a_slice_with_pseudonyms_replays_too(night: JournalRecording) -> None:
    part = cut(night, Selection(request_ids=("night-07",)))
    for keep in (frozenset({"night-07"}), frozenset[str]()):
        redacted = Redacted(part, content="none", keep=keep, key=b"k")
        assert replay(redacted) == (replay(part)[0], [])
        assert facts(redacted).gaps(with_content=False) == ()


def test_a_slice_begins_at_a_snapshot_where_there_is_one(night: JournalRecording) -> None:
    part = cut(night, Selection(request_ids=("shrunk",)))
    for stream in ("admission", "memory", "router"):
        first = next(part.records(stream=stream))
        assert isinstance(first.event, ev.SnapshotTaken)
    assert sum(1 for _ in part.records()) < sum(1 for _ in night.records(boot=night.boots()[0])) / 2


def test_a_selection_of_requests_takes_those_and_no_others(night: JournalRecording) -> None:
    errors = set(cut(night, Selection(errors=True)).request_ids)
    assert errors == {"too-large", "crashed-0", "crashed-1"}
    assert cut(night, Selection(last=2)).request_ids == cut(night, Selection(last=3)).request_ids[1:]
    assert set(cut(night, Selection(errors=True, last=1)).request_ids) < errors, errors
    assert "shrunk" in cut(night, Selection(slow_s=0.1)).request_ids


def test_a_crashed_request_comes_with_its_end_from_the_next_boot(night: JournalRecording) -> None:
    part = cut(night, Selection(request_ids=("crashed-1",)))
    ends = [(r.meta.boot, r.event) for r in part.records() if isinstance(r.event, ev.TERMINAL_EVENTS)]
    assert [(boot, end.code) for boot, end in ends if isinstance(end, ev.RequestFailed)] == [
        (night.boots()[1], "aborted_by_crash")
    ]
    assert len(ends) == 1


def test_the_executor_of_a_slice_knows_everyone_that_ran_beside(night: JournalRecording) -> None:
    part = cut(night, Selection(request_ids=("night-20",)))
    accepted: set[str] = set()
    loaded = False
    mine = [r for r in part.records() if r.meta.stream == "executor/cpu:0"]
    first = next(r.meta.pos for r in part.records(stream="request/night-20"))
    for record in mine:
        event = record.event
        if isinstance(event, ev.EngineLoaded):
            loaded = True
        elif isinstance(event, ev.ExecutorAccepted):
            accepted.add(event.request_id)
        elif isinstance(event, ev.StepCommitted) and record.meta.pos >= first:
            assert loaded
            assert {row.request_id for row in event.rows} <= accepted
    assert "night-20" in accepted
    assert len(accepted) > 1


def test_content_is_of_the_selected_requests_alone(night: JournalRecording) -> None:
    part = cut(night, Selection(request_ids=("night-03", "night-04")))
    names: set[str] = set()
    for record in part.content():
        event = record.event
        names |= (
            {row.request_id for row in event.rows} if isinstance(event, ev.StepTokens) else {record.meta.correlation}
        )
    assert names == {"night-03", "night-04"}


def test_what_is_not_there_is_said(night: JournalRecording) -> None:
    with pytest.raises(RequestNotFound, match="no request has the id 'night-77'"):
        cut(night, Selection(request_ids=("night-01", "night-77")))
    with pytest.raises(RequestNotFound, match="requests slower than 1000 s"):
        cut(night, Selection(slow_s=1000.0))
    with pytest.raises(RequestNotFound, match="in a window of time"):
        cut(night, Selection(from_ns=1, to_ns=2))
    with pytest.raises(RequestError, match="ends before it begins"):
        cut(night, Selection(from_ns=3, to_ns=2))


def test_what_is_missing_is_named(night: JournalRecording) -> None:
    class Holed:
        def __init__(self, left_out: str) -> None:
            self.left_out = left_out

        def boots(self) -> list[str]:
            return night.boots()

        def records(self, *, boot: str | None = None, stream: str | None = None) -> Any:
            return (r for r in night.records(boot=boot, stream=stream) if not self.leaves(r))

        def content(self, *, boot: str | None = None) -> Any:
            return (r for r in night.content(boot=boot) if not self.leaves(r))

        def leaves(self, record: Record) -> bool:
            return self.left_out in {record.meta.type, f"{record.meta.stream} {record.meta.seq}"}

    def gaps(left_out: str) -> set[tuple[str, str]]:
        found = facts(Holed(left_out)).gaps(with_content=True)
        return {(gap.stream, gap.what.split(";")[0].split(":")[0]) for gap in found}

    assert ("router", "its beginning is forgotten") in gaps("router 0")
    assert any(stream == "admission" and "missing before" in what for stream, what in gaps("admission 7"))
    assert ("executor/cpu:0", "EngineLoaded is forgotten") in gaps("EngineLoaded")
    assert ("request/night-05", "its content was not recorded or is forgotten") in gaps("PromptTokens")
    assert ("system", "NodeStarted is not kept") in gaps("NodeStarted")
    assert ("request/night-05", "it had not ended when the bundle was cut") in gaps("RequestCompleted")


def test_a_selection_says_in_words_what_it_is() -> None:
    assert EVERYTHING.in_words() == "everything"
    assert Selection(request_ids=("a", "b", "c", "d")).in_words() == "request a, b, c and 1 more"
    assert Selection(errors=True, slow_s=2.0, last=5, window_s=60.0).in_words() == (
        "the last 5 requests that failed or slower than 2 s in the last 60 s"
    )
    assert msgspec.json.decode(msgspec.json.encode(Selection(last=1)), type=Selection) == Selection(last=1)


def test_a_wall_clock_that_was_set_back_hides_nothing(night: JournalRecording) -> None:
    records = list(night.records(boot=night.boots()[0]))
    middle = records[len(records) // 2].meta
    hour_ns = 3600 * 10**9
    (began_ns,) = {record.event.wall_ns for record in records if isinstance(record.event, ev.NodeStarted)}
    anchor = ev.ClockAnchored(wall_ns=began_ns - hour_ns)
    meta = msgspec.structs.replace(middle, stream="system", seq=1, type="ClockAnchored", correlation="", cause=-1)
    back = ListRecording([*records[: len(records) // 2], Record(meta, anchor), *records[len(records) // 2 :]])
    found = cut(back, Selection(from_ns=began_ns - 2 * hour_ns, to_ns=began_ns + hour_ns))
    assert requests_in(found) == requests_in(back)
