"""The newest requests and events of a recording."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from gptoss.clock import SystemClock
from gptoss.messages import events as ev
from gptoss.messages.envelope import Origin, Record
from gptoss.telemetry.event_tail import EventQuery, EventTail
from gptoss.telemetry.memory_journal import MemoryJournal
from gptoss.telemetry.newest import Newest, RequestFilter
from gptoss.telemetry.recording import ListRecording
from gptoss.telemetry.segment_tail import SegmentTail
from gptoss.telemetry.segments import SegmentJournal, SegmentOptions, SegmentReader

if TYPE_CHECKING:
    from telemetry.conftest import Script

ALL = RequestFilter()


def names(script: "Script", wanted: RequestFilter = ALL, limit: int = 10) -> list[str]:
    return [row.request_id for row in Newest.in_recording(ListRecording(script.records)).requests(wanted, limit)]


def test_requests_come_newest_arrival_first_and_no_more_than_asked_for(busy: "Script") -> None:
    assert names(busy) == ["req_open", "req_again", "req_left", "req_refused", "req_done"]
    assert names(busy, limit=2) == ["req_open", "req_again"]


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        (RequestFilter(errors=True), ["req_refused"]),
        (RequestFilter(outcome="queue_full"), ["req_refused"]),
        (RequestFilter(outcome="completed"), ["req_again", "req_done"]),
        (RequestFilter(outcome="running"), ["req_open"]),
        (RequestFilter(slow_s=0.14), ["req_again", "req_done"]),
        (RequestFilter(since_unix_s=1e12), []),
    ],
)
def test_requests_are_chosen_by_what_they_came_to(busy: "Script", wanted: RequestFilter, expected: list[str]) -> None:
    assert names(busy, wanted) == expected


def test_what_an_older_boot_left_open_ended_with_it(busy: "Script", new_script: Callable[[str], "Script"]) -> None:
    later = new_script("boot2")
    later.start()
    later.receive("req_new")
    rows = Newest.in_recording(ListRecording([*busy.records, *later.records])).requests(ALL, 10)
    states = {row.request_id: (row.state, row.outcome) for row in rows}
    assert states["req_open"] == ("failed", "aborted_by_crash")
    assert states["req_new"] == ("received", "")


def test_events_leave_chatter_out_unless_it_is_asked_for(busy: "Script") -> None:
    newest = Newest.in_recording(ListRecording(busy.records))
    assert "StepCommitted" not in {record.meta.type for record, _ in newest.events(EventQuery(), 1000)}
    newest = Newest.in_recording(ListRecording(busy.records))
    steps = newest.events(EventQuery(types=frozenset({"StepCommitted"})), 3)
    assert [record.event for record, _ in steps] == [
        record.event for record in busy.records if isinstance(record.event, ev.StepCommitted)
    ][-3:]
    assert all(unix_s is not None for _, unix_s in steps)


# ---------------------------------------------------------------- over files


def received(name: str) -> ev.RequestReceived:
    return ev.RequestReceived(
        request_id=name, endpoint="e", model="m", stream=False, num_messages=1, priority=0, deadline_ns=0
    )


def write(journal: SegmentJournal | MemoryJournal, begin: int, end: int) -> None:
    for number in range(begin, end):
        name = f"r{number}"
        journal.append(received(name), Origin(stream=f"request/{name}", correlation=name))
        cancelled = ev.RequestCancelled(reason="client")
        journal.append(cancelled, Origin(stream=f"request/{name}", correlation=name))
        assert journal.flush()


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[SegmentJournal]:
    options = SegmentOptions(segment_bytes=2000)
    opened = SegmentJournal.open(tmp_path, node="n", boot="b1", clock=SystemClock(), options=options)
    yield opened
    opened.close()


def test_the_newest_of_a_long_journal_are_found_without_reading_its_beginning(
    journal: SegmentJournal, tmp_path: Path
) -> None:
    write(journal, 0, 60)
    first, *rest = sorted(tmp_path.glob("control-*"))
    assert len(rest) > 3
    damaged = bytearray(first.read_bytes())
    damaged[-60] ^= 1  # Whoever reads here raises.
    first.write_bytes(damaged)
    rows = Newest.in_journal(SegmentReader(tmp_path)).requests(ALL, 3)
    assert [row.request_id for row in rows] == ["r59", "r58", "r57"]
    events = Newest.in_journal(SegmentReader(tmp_path)).events(EventQuery(types=frozenset({"RequestCancelled"})), 2)
    assert [record.meta.correlation for record, _ in events] == ["r58", "r59"]


def test_all_requests_are_found_through_all_segments(journal: SegmentJournal, tmp_path: Path) -> None:
    write(journal, 0, 60)
    rows = Newest.in_journal(SegmentReader(tmp_path)).requests(RequestFilter(outcome="client"), 100)
    assert [row.request_id for row in rows] == [f"r{number}" for number in reversed(range(60))]


def test_a_folder_is_followed_across_segments(journal: SegmentJournal, tmp_path: Path) -> None:
    write(journal, 0, 5)
    tail = SegmentTail(tmp_path)
    assert tail.look() == []
    seen: list[Record] = []
    for number in range(5, 40, 3):
        write(journal, number, number + 3)
        seen += tail.look()
    assert seen == list(journal.read(after=9))


def test_a_live_journal_is_followed_page_by_page() -> None:
    journal = MemoryJournal(node="n", boot="b1", clock=SystemClock())
    write(journal, 0, 5)
    tail = EventTail(journal)
    query = EventQuery(types=frozenset({"RequestCancelled"}))
    page = tail.page(query, after=-1, limit=2)
    assert [record.meta.correlation for record in page.records] == ["r0", "r1"]
    assert (page.next, page.newest) == (3, 9)
    page = tail.page(query, after=page.next, limit=100)
    assert [record.meta.correlation for record in page.records] == ["r2", "r3", "r4"]
    write(journal, 5, 7)
    page = tail.page(query, after=page.next, limit=100)
    assert [record.meta.correlation for record in page.records] == ["r5", "r6"]
    assert tail.page(query, after=page.next, limit=100).records == ()


def test_a_page_looks_at_a_bounded_number_of_records(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gptoss.telemetry.event_tail.SCAN_MAX", 4)
    journal = MemoryJournal(node="n", boot="b1", clock=SystemClock())
    write(journal, 0, 10)
    page = EventTail(journal).page(EventQuery(stream="request/r9"), after=-1, limit=10)
    assert (page.records, page.next, page.newest) == ((), 3, 19)
