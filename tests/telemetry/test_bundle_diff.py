"""Two bundles side by side."""

from pathlib import Path

import msgspec
import pytest

from gptoss.messages import events as ev
from gptoss.messages.envelope import Event, Record
from gptoss.telemetry.bundle_diff import diff
from gptoss.telemetry.bundle_reader import BundleReader
from gptoss.telemetry.bundle_slice import Selection, cut
from gptoss.telemetry.bundle_summary import percentile, summarize
from gptoss.telemetry.bundle_writer import Purpose, write_bundle
from gptoss.telemetry.recording import JournalRecording, ListRecording


@pytest.fixture
def night(bad_night: Path) -> ListRecording:
    part = cut(JournalRecording(bad_night / "journal"), Selection(request_ids=("night-07", "night-08")))
    return ListRecording(part.records(), part.content())


def written(recording: ListRecording, path: Path) -> BundleReader:
    with path.open("wb") as file:
        write_bundle(file, recording, Purpose(created_ns=0, created_by="test", reason="test"))
    return BundleReader(path)


def changed(recording: ListRecording, kind: type[Event], **fields: object) -> ListRecording:
    """The recording with fields of every event of a kind replaced."""

    def change(record: Record) -> Record:
        if not isinstance(record.event, kind):
            return record
        return Record(record.meta, msgspec.structs.replace(record.event, **fields))

    return ListRecording(map(change, recording.records()), map(change, recording.content()))


def test_a_bundle_is_the_same_as_itself(night: ListRecording, tmp_path: Path) -> None:
    with written(night, tmp_path / "a.zip") as a, written(night, tmp_path / "b.zip") as b:
        found = diff(a, b)
    assert found.is_same
    assert [request.request_id for request in found.requests] == ["night-07", "night-08"]
    assert {figure.name: figure.a for figure in found.figures}["completed"] == 2
    assert (tmp_path / "a.zip").read_bytes() == (tmp_path / "b.zip").read_bytes()


def test_another_version_setting_or_outcome_is_named(night: ListRecording, tmp_path: Path) -> None:
    other = changed(night, ev.NodeStarted, version="9.9", settings='{"max_queue": 7}')
    other = changed(other, ev.RequestCompleted, finish_reason="stop")
    with written(night, tmp_path / "a.zip") as a, written(other, tmp_path / "b.zip") as b:
        found = diff(a, b)
    assert [(each.name, each.b) for each in found.servers] == [("gptoss", "9.9")]
    assert {each.name: (each.a, each.b) for each in found.settings}["max_queue"] == (512, 7)
    assert not any(request.is_same for request in found.requests)


def test_the_first_token_that_differs_is_named(night: ListRecording, tmp_path: Path) -> None:
    output = summarize(night).output["night-07"]

    def change(record: Record) -> Record:
        event = record.event
        if not isinstance(event, ev.StepTokens):
            return record
        rows = tuple(
            msgspec.structs.replace(row, token_ids=(999,))
            if row.request_id == "night-07" and row.position == 3
            else row
            for row in event.rows
        )
        return Record(record.meta, msgspec.structs.replace(event, rows=rows))

    other = ListRecording(night.records(), map(change, night.content()))
    assert len(output) > 3
    with written(night, tmp_path / "a.zip") as a, written(other, tmp_path / "b.zip") as b:
        assert {each.request_id: each.tokens_differ_at for each in diff(a, b).requests} == {
            "night-07": 3,
            "night-08": None,
        }


def test_percentiles_are_of_nearest_rank() -> None:
    assert percentile([], 50) is None
    assert percentile([3.0, 1.0, 2.0], 50) == 2.0
    assert percentile([float(n) for n in range(1, 101)], 99) == 99.0
