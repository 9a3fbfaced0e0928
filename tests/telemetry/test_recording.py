"""The contract of a recording, run against each kind of it."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from gptoss.clock import SystemClock
from gptoss.errors import JournalError
from gptoss.messages.envelope import Event, Family, Origin, Record
from gptoss.messages.events import ClockAnchored, PromptTokens, SlotReleased
from gptoss.telemetry.bundle_reader import BundleReader
from gptoss.telemetry.bundle_writer import Purpose, write_bundle
from gptoss.telemetry.recording import JournalRecording, ListRecording, LiveRecording, Recording
from gptoss.telemetry.segments import SegmentJournal, SegmentOptions

WRITTEN: list[tuple[str, Event]] = [
    ("system", ClockAnchored(wall_ns=1)),
    ("request/r1", PromptTokens(request_id="r1", token_ids=(1, 2))),
    ("admission", SlotReleased(request_id="r1", running=0, ran_ns=1)),
    ("system", ClockAnchored(wall_ns=2)),
]

Make = Callable[[Path, SegmentJournal], Recording]


def from_list(_: Path, journal: SegmentJournal) -> ListRecording:
    return ListRecording(list(journal.read()), list(journal.read(family="content")))


def from_bundle(folder: Path, journal: SegmentJournal) -> BundleReader:
    path = folder / "all.gptoss.zip"
    with path.open("wb") as file:
        write_bundle(file, LiveRecording(journal), Purpose(created_ns=0, created_by="test", reason="test"))
    return BundleReader(path)


KINDS: dict[str, Make] = {
    "journal": lambda folder, _: JournalRecording(folder),
    "live": lambda _, journal: LiveRecording(journal),
    "list": from_list,
    "bundle": from_bundle,
}


@pytest.fixture(params=KINDS)
def recording(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Recording]:
    """Two boots that wrote the same."""
    options = SegmentOptions(segment_bytes=400)
    for boot in ("b1", "b2"):
        journal = SegmentJournal.open(tmp_path, node="n", boot=boot, clock=SystemClock(), options=options)
        for stream, event in WRITTEN:
            journal.append(event, Origin(stream=stream))
        journal.flush()
        if boot == "b1":
            journal.close()
    made = KINDS[request.param](tmp_path, journal)
    yield made
    if isinstance(made, BundleReader):
        made.close()
    journal.close()


def seen(records: Iterator[Record]) -> list[tuple[str, int, str]]:
    return [(record.meta.boot, record.meta.pos, record.meta.stream) for record in records]


def expected(family: Family, boot: str) -> list[tuple[str, int, str]]:
    streams = [stream for stream, event in WRITTEN if family == event.FAMILY]
    return [(boot, pos, stream) for pos, stream in enumerate(streams)]


def test_boots_come_oldest_first(recording: Recording) -> None:
    assert recording.boots() == ["b1", "b2"]


def test_records_come_in_order_of_boot_and_position_without_content(recording: Recording) -> None:
    assert seen(recording.records()) == [*expected("control", "b1"), *expected("control", "b2")]
    assert seen(recording.content()) == [*expected("content", "b1"), *expected("content", "b2")]


def test_one_boot_or_one_stream_can_be_read_alone(recording: Recording) -> None:
    assert seen(recording.records(boot="b2")) == expected("control", "b2")
    assert seen(recording.content(boot="b2")) == expected("content", "b2")
    assert seen(recording.records(stream="admission")) == [("b1", 1, "admission"), ("b2", 1, "admission")]
    assert seen(recording.records(boot="b1", stream="system")) == [("b1", 0, "system"), ("b1", 2, "system")]


def test_what_is_not_there_is_empty(recording: Recording) -> None:
    assert list(recording.records(boot="b3")) == []
    assert list(recording.records(stream="nobody")) == []
    assert list(recording.content(boot="b3")) == []


def test_a_recording_can_be_read_again(recording: Recording) -> None:
    assert list(recording.records()) == list(recording.records())


def test_a_folder_without_a_journal_is_refused(tmp_path: Path) -> None:
    with pytest.raises(JournalError, match="no such folder"):
        JournalRecording(tmp_path / "none")
