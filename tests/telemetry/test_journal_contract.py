"""The journal port's contract, run against every store."""

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from gptoss.actors.journal import Journal
from gptoss.clock import SystemClock
from gptoss.messages.envelope import NO_CAUSE, Event, Origin, Record
from gptoss.messages.events import (
    AnswerDelivered,
    ClockAnchored,
    PromptTokens,
    RequestCancelled,
    RequestReceived,
    SlotReleased,
)
from gptoss.telemetry import journal_base
from gptoss.telemetry.memory_journal import MemoryJournal
from gptoss.telemetry.segments import SegmentJournal, SegmentOptions

SYSTEM = Origin(stream="system")
RECEIVED = RequestReceived(
    request_id="r", endpoint="chat", model="m", stream=True, num_messages=1, priority=0, deadline_ns=1
)


@pytest.fixture(params=["memory", "segments"])
def journal(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Journal]:
    if request.param == "memory":
        store: Journal = MemoryJournal(node="n1", boot="b1", clock=SystemClock())
    else:
        store = SegmentJournal.open(
            tmp_path, node="n1", boot="b1", clock=SystemClock(), options=SegmentOptions(segment_bytes=2000)
        )
    yield store
    store.close()


def tick(number: int = 0) -> ClockAnchored:
    return ClockAnchored(wall_ns=number)


def prompt(request_id: str) -> PromptTokens:
    return PromptTokens(request_id=request_id, token_ids=(1, 2, 3))


def positions(records: Iterator[Record]) -> list[int]:
    return [record.meta.pos for record in records]


def test_an_empty_journal_is_well_and_holds_nothing(journal: Journal) -> None:
    health = journal.health
    assert (health.ok, health.reason, health.last_pos, health.committed_pos) == (True, "", -1, -1)
    assert list(journal.read()) == []
    assert journal.flush()


def test_a_record_carries_what_its_origin_and_journal_know(journal: Journal) -> None:
    origin = Origin(
        stream="request/r1", cause=7, correlation="r1", trace_id="t", span_id="s", actor="request/r1", incarnation=2
    )
    meta = journal.append(tick(5), origin).meta
    assert (meta.node, meta.boot, meta.pos, meta.seq, meta.type, meta.version) == ("n1", "b1", 0, 0, "ClockAnchored", 1)
    assert (meta.stream, meta.cause, meta.correlation) == ("request/r1", 7, "r1")
    assert (meta.trace_id, meta.span_id, meta.actor, meta.incarnation) == ("t", "s", "request/r1", 2)
    assert meta.mono_ns > 0


def test_positions_are_gapless_in_each_family(journal: Journal) -> None:
    for number in range(5):
        journal.append(tick(number), SYSTEM)
        journal.append(prompt(f"r{number}"), SYSTEM)
    assert positions(journal.read()) == list(range(5))
    assert positions(journal.read(family="content")) == list(range(5))


def test_seq_is_gapless_in_each_stream_of_a_family(journal: Journal) -> None:
    for number in range(9):
        journal.append(tick(number), Origin(stream=f"s{number % 2}"))
        journal.append(prompt("r"), Origin(stream="s0"))
    assert [record.meta.seq for record in journal.read(stream="s0")] == list(range(5))
    assert [record.meta.seq for record in journal.read(stream="s1")] == list(range(4))
    assert [record.meta.seq for record in journal.read(family="content", stream="s0")] == list(range(9))


def test_late_events_of_a_finished_stream_go_on_counting(journal: Journal) -> None:
    origin = Origin(stream="request/r1", correlation="r1")
    journal.append(RequestCancelled(reason="client"), origin)
    journal.append(tick(), origin)
    journal.append(tick(), origin)
    assert [record.meta.seq for record in journal.read(stream="request/r1")] == [0, 1, 2]


def numbered(sequencer: journal_base.Sequencer, event: Event, stream: str) -> int:
    """``seq`` of the record that the event becomes."""
    return sequencer.number(event, Origin(stream=stream), NO_CAUSE, stream, 0, lambda _: None).meta.seq


def test_finished_streams_are_forgotten_in_the_end_and_live_ones_never() -> None:
    sequencer = journal_base.Sequencer(node="n", boot="b", clock=SystemClock())
    numbered(sequencer, tick(), "live")
    for number in range(journal_base.FINISHED_STREAMS_MAX + 1):
        numbered(sequencer, RequestCancelled(reason="client"), f"r{number}")
    assert numbered(sequencer, tick(), "r1") == 1
    assert numbered(sequencer, tick(), "r0") == 0
    assert numbered(sequencer, tick(), "live") == 1


def test_a_finished_request_leaves_no_counter_behind_that_would_live_for_ever() -> None:
    sequencer = journal_base.Sequencer(node="n", boot="b", clock=SystemClock())
    text = AnswerDelivered(request_id="r1", text="x")
    for event in (tick(), text, RequestCancelled(reason="client")):
        numbered(sequencer, event, "request/r1")
    assert numbered(sequencer, text, "request/r1") == 1
    assert not any(numbers.live for numbers in sequencer._numbers.values())


def test_requests_are_open_from_their_arrival_to_their_end() -> None:
    sequencer = journal_base.Sequencer(node="n", boot="b", clock=SystemClock())
    numbered(sequencer, tick(), "r1")
    numbered(sequencer, RECEIVED, "r1")
    numbered(sequencer, RECEIVED, "r2")
    assert sequencer.open_requests == {"r1", "r2"}
    numbered(sequencer, RequestCancelled(reason="client"), "r1")
    numbered(sequencer, tick(), "r1")
    assert sequencer.open_requests == {"r2"}


def test_a_decision_is_recorded_in_one_piece_and_names_its_command_as_the_cause(journal: Journal) -> None:
    seen: list[Record] = []
    journal.subscribe(seen.append)
    origin = Origin(
        stream="router", cause=7, correlation="r1", trace_id="t", span_id="s", actor="router", incarnation=2
    )
    journal.append(tick(), SYSTEM)
    released = SlotReleased(request_id="r2", running=1, ran_ns=1)
    records = journal.append_decision(tick(1), origin, [(tick(2), "r1"), (released, "r2"), (prompt("r2"), "r2")])
    assert [record.event for record in records] == [tick(1), tick(2), released, prompt("r2")]
    metas = [record.meta for record in records]
    assert [meta.cause for meta in metas] == [7, 1, 1, 1]
    assert [meta.correlation for meta in metas] == ["r1", "r1", "r2", "r2"]
    assert [(meta.pos, meta.seq) for meta in metas] == [(1, 0), (2, 1), (3, 2), (0, 0)]
    whose = {(m.stream, m.trace_id, m.span_id, m.actor, m.incarnation) for m in metas}
    assert whose == {("router", "t", "s", "router", 2)}
    assert len({meta.mono_ns for meta in metas}) == 1
    assert list(journal.read(after=0)) == records[:3] == seen[1:]
    assert list(journal.read(family="content")) == records[3:]


def test_nobodys_record_comes_between_those_of_a_decision(journal: Journal) -> None:
    def work(name: str) -> None:
        for number in range(100):
            journal.append_decision(tick(number), Origin(stream=name), [(tick(number), ""), (tick(number), "")])

    threads = [threading.Thread(target=work, args=(f"s{n}",)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    records = list(journal.read())
    assert [record.meta.pos for record in records] == list(range(1200))
    for first in range(0, 1200, 3):
        assert len({record.meta.stream for record in records[first : first + 3]}) == 1
        assert [record.meta.cause for record in records[first : first + 3]] == [NO_CAUSE, first, first]


@pytest.mark.parametrize("flushed", [False, True])
def test_reading_gives_back_what_was_appended(journal: Journal, *, flushed: bool) -> None:
    written = [journal.append(SlotReleased(request_id=f"r{n}", running=n, ran_ns=n), SYSTEM) for n in range(100)]
    if flushed:
        assert journal.flush()
    assert list(journal.read()) == written


@pytest.mark.parametrize("flushed", [False, True])
def test_reading_can_be_narrowed(journal: Journal, *, flushed: bool) -> None:
    for number in range(60):
        journal.append(tick(number), Origin(stream=f"s{number % 3}", correlation=f"r{number % 4}"))
        if flushed and number % 10 == 0:
            assert journal.flush()
    assert positions(journal.read(stream="s1")) == list(range(1, 60, 3))
    assert positions(journal.read(correlation="r2")) == list(range(2, 60, 4))
    assert positions(journal.read(correlation="r2", stream="s1")) == list(range(10, 60, 12))
    assert positions(journal.read(after=50)) == list(range(51, 60))
    assert positions(journal.read(after=50, correlation="r3")) == [51, 55, 59]
    assert positions(journal.read(limit=4)) == [0, 1, 2, 3]
    assert positions(journal.read(stream="s0", limit=2)) == [0, 3]
    assert positions(journal.read(boot="b1", after=57)) == [58, 59]
    assert positions(journal.read(boot="other")) == []
    assert positions(journal.read(correlation="nobody")) == []


def test_watchers_see_control_records_only_in_order_until_they_stop(journal: Journal) -> None:
    journal.append(tick(), SYSTEM)
    seen: list[Record] = []
    stop = journal.subscribe(seen.append)
    expected = [journal.append(tick(number), SYSTEM) for number in range(5)]
    journal.append(prompt("r1"), SYSTEM)
    stop()
    stop()
    journal.append(tick(), SYSTEM)
    assert seen == expected


def test_a_watcher_of_some_types_sees_records_of_these_only(journal: Journal) -> None:
    ticks: list[Record] = []
    both: list[Record] = []
    everything: list[Record] = []
    journal.subscribe(ticks.append, (ClockAnchored,))
    journal.append(tick(), SYSTEM)
    stop = journal.subscribe(both.append, {ClockAnchored, SlotReleased})
    journal.subscribe(everything.append)
    expected = [
        journal.append(event, SYSTEM)
        for event in (tick(1), RequestCancelled(reason="client"), SlotReleased(request_id="r", running=0, ran_ns=1))
    ]
    assert [record.meta.pos for record in ticks] == [0, 1]
    assert both == [expected[0], expected[2]]
    assert everything == expected
    stop()
    journal.append(tick(2), SYSTEM)
    assert len(both) == 2
    assert [record.meta.pos for record in ticks] == [0, 1, 4]


def test_a_watcher_may_leave_while_it_is_told(journal: Journal) -> None:
    seen: list[int] = []

    def once(record: Record) -> None:
        seen.append(record.meta.pos)
        stop()

    stop = journal.subscribe(once)
    later: list[Record] = []
    journal.subscribe(later.append)
    journal.append_decision(tick(), SYSTEM, [(tick(1), "")])
    journal.append(tick(2), SYSTEM)
    assert seen == [0]
    assert [record.meta.pos for record in later] == [0, 1, 2]


def test_a_watcher_that_raises_harms_nobody_and_is_named_in_health(
    journal: Journal, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(record: Record) -> None:
        raise ValueError(f"cannot fold {record.meta.pos}")

    seen: list[Record] = []
    journal.subscribe(broken)
    journal.subscribe(seen.append)
    journal.append(tick(), SYSTEM)
    journal.append(tick(), SYSTEM)
    assert len(seen) == 2
    assert journal.health.ok
    assert "ValueError: cannot fold 1" in journal.health.reason
    assert len(caplog.records) == 1


def test_a_watcher_may_not_append(journal: Journal) -> None:
    def append_again(_: Record) -> None:
        journal.append(tick(), SYSTEM)

    journal.subscribe(append_again)
    journal.append(tick(), SYSTEM)
    assert "must not append" in journal.health.reason
    assert positions(journal.read()) == [0]


def test_appends_of_many_threads_are_numbered_in_the_order_watchers_see(journal: Journal) -> None:
    seen: list[int] = []
    journal.subscribe(lambda record: seen.append(record.meta.pos))

    def work(name: str) -> None:
        for number in range(200):
            journal.append(tick(number), Origin(stream=name))

    threads = [threading.Thread(target=work, args=(f"s{n}",)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == list(range(800))
    assert positions(journal.read()) == seen
    for name in ("s0", "s3"):
        numbers = [
            record.event.wall_ns for record in journal.read(stream=name) if isinstance(record.event, ClockAnchored)
        ]
        assert numbers == list(range(200))


def test_flush_acknowledges_everything_appended_so_far(journal: Journal) -> None:
    for number in range(30):
        journal.append(tick(number), SYSTEM)
    journal.append(prompt("r1"), SYSTEM)
    assert journal.flush()
    assert journal.health.committed_pos == journal.health.last_pos == 29


def test_closing_twice_and_appending_after_it_do_not_raise(journal: Journal) -> None:
    journal.append(tick(), SYSTEM)
    journal.close()
    journal.close()
    journal.append(tick(), SYSTEM)
    assert positions(journal.read()) == [0, 1]


def test_the_memory_journal_keeps_its_newest_records() -> None:
    journal = MemoryJournal(node="n", boot="b", clock=SystemClock(), capacity=3)
    for number in range(5):
        journal.append(tick(number), SYSTEM)
    assert positions(journal.read()) == [2, 3, 4]
    assert journal.health.last_pos == 4
