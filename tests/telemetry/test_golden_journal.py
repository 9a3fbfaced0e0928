"""A journal that any version ever wrote stays readable: one folder for each in ``golden_journals``."""

import shutil
from pathlib import Path

import msgspec
import pytest

from gptoss.messages import events as ev
from gptoss.messages.codec import EVENT_TYPES
from gptoss.telemetry.journal_care import survey
from gptoss.telemetry.newest import Newest, RequestFilter
from gptoss.telemetry.recording import JournalRecording
from gptoss.telemetry.request_records import request_records
from gptoss.telemetry.request_view import RequestRow
from gptoss.telemetry.segments import SegmentReader
from gptoss.telemetry.timeline import check_complete

FOLDERS = sorted(path for path in Path(__file__).with_name("golden_journals").iterdir() if path.is_dir())


@pytest.fixture(params=FOLDERS, ids=lambda path: path.name)
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A copy, for readers keep an index beside the segments."""
    return Path(shutil.copytree(request.param, tmp_path / "journal"))


def test_there_is_a_journal_to_read() -> None:
    assert FOLDERS


def test_every_segment_is_whole_and_every_record_decodes(folder: Path) -> None:
    reports = survey(folder)
    assert {report.family for report in reports} == {"control", "content"}
    assert [report.problem for report in reports if report.problem] == []
    recording = JournalRecording(folder)
    assert sum(report.records for report in reports) == len(list(recording.records())) + len(list(recording.content()))
    assert all(type(record.event) is EVENT_TYPES[record.meta.type] for record in recording.records())


def test_its_requests_are_what_they_were_when_it_was_written(folder: Path) -> None:
    written = msgspec.json.decode((folder / "requests.json").read_bytes(), type=list[RequestRow])
    assert Newest.in_journal(SegmentReader(folder)).requests(RequestFilter(), 1000) == written
    assert {row.outcome for row in written} >= {"length", "client", "aborted_by_crash", "context_length_exceeded"}


def test_every_request_of_it_is_complete(folder: Path) -> None:
    reader = SegmentReader(folder)
    received = {r.meta.correlation for r in reader.read() if isinstance(r.event, ev.RequestReceived)}
    for name in sorted(received):
        assert check_complete(request_records(reader, name), name) == [], name
