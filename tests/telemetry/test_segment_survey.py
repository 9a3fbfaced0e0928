"""A journal with surveys gives the same bundles as one that is read whole, and only what a bundle needs is read."""

import shutil
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptoss.actors.directory import REQUEST_PREFIX
from gptoss.clock import NS_PER_MS, SystemClock
from gptoss.errors import JournalCorrupt
from gptoss.messages import events as ev
from gptoss.messages.codec import encode_record
from gptoss.messages.envelope import Family, Origin, Record
from gptoss.telemetry import journal_index, segment_survey
from gptoss.telemetry.bundle_slice import Selection, Slice, cut
from gptoss.telemetry.bundle_survey import survey
from gptoss.telemetry.journal_care import PruneRule, prune
from gptoss.telemetry.journal_index import INDEX_NAME
from gptoss.telemetry.recording import JournalRecording, ListRecording, Recording
from gptoss.telemetry.segment_file import FORMAT_VERSION, Ending, Header, SegmentScan, list_segments
from gptoss.telemetry.segment_reader import SegmentReader
from gptoss.telemetry.segment_survey import Excerpt, read_excerpt, survey_segment
from gptoss.telemetry.segment_writer import SegmentWriter
from gptoss.telemetry.segments import SegmentJournal, SegmentOptions
from gptoss.telemetry.survey_keeper import SurveyKeeper

CUTS = settings(max_examples=60, deadline=None)
SEGMENT_RECORDS, FRAME_RECORDS = 170, 3


class Log(NamedTuple):
    """A journal of four boots in small segments, and the same records as a list."""

    folder: Path
    whole: ListRecording
    request_ids: list[str]
    nights_ns: tuple[int, int]


@pytest.fixture(scope="module", autouse=True)
def small_blocks() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(segment_survey, "BLOCK_RECORDS", 7)
        yield


@pytest.fixture(scope="module")
def log(bad_night: Path, tmp_path_factory: pytest.TempPathFactory) -> Log:
    night = JournalRecording(bad_night / "journal")
    first = [list(night.records()), list(night.content())]
    second = [[_in_other_boot(record) for record in records] for records in first]
    folder = tmp_path_factory.mktemp("log")
    control, content = (before + after for before, after in zip(first, second, strict=True))
    write(folder, "control", control)
    write(folder, "content", content)
    whole = ListRecording(control, content)
    ids = {r.meta.stream.removeprefix(REQUEST_PREFIX) for r in control if r.meta.stream.startswith(REQUEST_PREFIX)}
    ends_ns = [boot.last_ns for boot in survey(whole)]
    return Log(folder, whole, sorted(ids), (ends_ns[0], ends_ns[2]))


def _in_other_boot(record: Record) -> Record:
    """The same night again, a day later."""
    day_ns = 86_400 * 10**9
    event = record.event
    if isinstance(event, ev.RunsAborted):
        event = msgspec.structs.replace(event, boot=f"{event.boot}-again")
    if isinstance(event, ev.NodeStarted | ev.ClockAnchored):
        event = msgspec.structs.replace(event, wall_ns=event.wall_ns + day_ns)
    return Record(msgspec.structs.replace(record.meta, boot=f"{record.meta.boot}-again"), event)


def write(folder: Path, family: Family, records: list[Record]) -> None:
    for ordinal, boot in enumerate(dict.fromkeys(record.meta.boot for record in records), start=1):
        of_boot = [record for record in records if record.meta.boot == boot]
        for number, begin in enumerate(range(0, len(of_boot), SEGMENT_RECORDS), start=1):
            part = of_boot[begin : begin + SEGMENT_RECORDS]
            writer = SegmentWriter(folder, Header(FORMAT_VERSION, "n", boot, family, ordinal, number, part[0].meta.pos))
            for at in range(0, len(part), FRAME_RECORDS):
                writer.write([encode_record(record) for record in part[at : at + FRAME_RECORDS]])
            writer.seal(Ending.ROTATED)


def told(part: Slice) -> tuple[tuple[str, ...], list[Record], list[Record]]:
    return part.request_ids, list(part.records()), list(part.content())


def outcome(recording: Recording, selection: Selection) -> object:
    try:
        return told(cut(recording, selection))
    except Exception as error:  # noqa: BLE001 - the two ways must also refuse alike
        return type(error), str(error)


@given(data=st.data())
@CUTS
def test_a_surveyed_journal_gives_what_one_that_is_read_whole_gives(log: Log, data: st.DataObject) -> None:
    time_ns = st.none() | st.integers(-2000, 2000).map(lambda ms: log.nights_ns[ms % 2] - ms * NS_PER_MS)
    selection = Selection(
        request_ids=tuple(data.draw(st.lists(st.sampled_from(log.request_ids), max_size=12, unique=True))),
        errors=data.draw(st.booleans()),
        slow_s=data.draw(st.sampled_from([None, None, 0.01, 0.05])),
        last=data.draw(st.sampled_from([None, None, 1, 2, 10])),
        window_s=data.draw(st.sampled_from([None, None, 0.01, 0.1, 100_000.0])),
        from_ns=data.draw(time_ns),
        to_ns=data.draw(time_ns),
    )
    assert outcome(JournalRecording(log.folder), selection) == outcome(log.whole, selection)


def test_each_request_alone_is_cut_alike(log: Log) -> None:
    journal = JournalRecording(log.folder)
    records = 0
    for name in log.request_ids:
        found = told(cut(journal, Selection(request_ids=(name,))))
        assert found == told(cut(log.whole, Selection(request_ids=(name,))))
        records += len(found[1])
    assert records > 10 * len(log.request_ids)


def test_the_open_segment_of_a_living_server_is_surveyed_as_far_as_it_goes(log: Log, tmp_path: Path) -> None:
    shutil.copytree(log.folder, tmp_path / "log")
    open_one = max(path for path in (tmp_path / "log").glob("control-*.seg"))
    data = open_one.read_bytes()
    open_one.write_bytes(data[: len(data) * 2 // 3])
    journal = JournalRecording(tmp_path / "log")
    whole = ListRecording(journal.records(), journal.content())
    assert sum(1 for _ in whole.records()) < sum(1 for _ in log.whole.records())
    for selection in (Selection(), Selection(last=3), Selection(errors=True)):
        assert outcome(journal, selection) == outcome(whole, selection)


def test_surveys_of_sealed_segments_are_made_once(log: Log, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(log.folder, tmp_path / "log", ignore=shutil.ignore_patterns(INDEX_NAME))
    made: list[str] = []

    def counted(segment: segment_survey.Segment, *rest: object) -> segment_survey.SegmentSurvey:
        made.append(segment.path.name)
        return survey_segment(segment, *rest)  # pyright: ignore[reportArgumentType]

    monkeypatch.setattr(journal_index, "survey_segment", counted)
    first = [one.survey for one in SegmentReader(tmp_path / "log").surveys()]
    names = [path.name for path in sorted((tmp_path / "log").glob("control-*.seg"))]
    assert made == names
    assert [one.survey for one in SegmentReader(tmp_path / "log").surveys()] == first
    assert made == names
    (tmp_path / "log" / INDEX_NAME).write_bytes(b"no database " * 400)
    assert [one.survey for one in SegmentReader(tmp_path / "log").surveys()] == first


@pytest.mark.parametrize(
    "change",
    [
        "UPDATE surveys SET survey = CAST(substr(survey, 1, 40) AS BLOB)",
        "UPDATE surveys SET survey = zeroblob(length(survey))",
        "UPDATE surveys SET crc32 = crc32 + 1",
        "UPDATE surveys SET version = version + 1",
        "UPDATE surveys SET seal = zeroblob(length(seal))",
    ],
)
def test_a_kept_survey_that_does_not_fit_is_not_believed(log: Log, tmp_path: Path, change: str) -> None:
    shutil.copytree(log.folder, tmp_path / "log")
    expected = [one.survey for one in SegmentReader(tmp_path / "log").surveys()]
    with sqlite3.connect(tmp_path / "log" / INDEX_NAME, isolation_level=None) as db:
        assert db.execute(f"{change} WHERE name = 'control-000001-000001.seg'").rowcount == 1
    db.close()
    assert [one.survey for one in SegmentReader(tmp_path / "log").surveys()] == expected


def test_surveys_of_another_log_under_the_same_names_are_not_believed(log: Log, tmp_path: Path) -> None:
    shutil.copytree(log.folder, tmp_path / "a")
    assert list(SegmentReader(tmp_path / "a").surveys())
    records = [record for record in log.whole.records() if record.meta.boot.endswith("-again")]
    (tmp_path / "b").mkdir()
    write(tmp_path / "b", "control", records)
    shutil.copy(tmp_path / "a" / INDEX_NAME, tmp_path / "b" / INDEX_NAME)
    assert (
        told(cut(JournalRecording(tmp_path / "b"), Selection(last=2)))[:2]
        == (told(cut(ListRecording(records), Selection(last=2)))[:2])
    )


def test_surveys_of_unlinked_segments_are_forgotten(log: Log, tmp_path: Path) -> None:
    shutil.copytree(log.folder, tmp_path / "log")
    reader = SegmentReader(tmp_path / "log")
    known = {one.segment.path.name for one in reader.surveys()}
    gone = {"control-000001-000001.seg", "control-000001-000002.seg"}
    for name in gone:
        (tmp_path / "log" / name).unlink()
    assert {one.segment.path.name for one in reader.surveys()} == known - gone
    list(reader.read(stream="admission"))
    with sqlite3.connect(tmp_path / "log" / INDEX_NAME) as db:
        assert {name for (name,) in db.execute("SELECT name FROM surveys")} == known - gone
    db.close()


def test_what_is_pruned_leaves_the_index_too(log: Log, tmp_path: Path) -> None:
    shutil.copytree(log.folder, tmp_path / "log")
    known = {one.segment.path.name for one in SegmentReader(tmp_path / "log").surveys()}
    boot = log.whole.boots()[0]
    gone = {report.name for report in prune(tmp_path / "log", PruneRule(boot=boot), dry_run=False)} & known
    assert gone
    with sqlite3.connect(tmp_path / "log" / INDEX_NAME) as db:
        assert {name for (name,) in db.execute("SELECT name FROM surveys")} == known - gone
    db.close()


def test_the_index_is_its_owners_alone(log: Log, tmp_path: Path) -> None:
    shutil.copytree(log.folder, tmp_path / "log", ignore=shutil.ignore_patterns(INDEX_NAME))
    index = tmp_path / "log" / INDEX_NAME
    for older in (False, True):
        if older:
            index.chmod(0o644)
        assert list(SegmentReader(tmp_path / "log").surveys())
        assert index.stat().st_mode & 0o777 == 0o600


def test_an_index_that_another_process_holds_is_waited_for_once(
    log: Log, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(log.folder, tmp_path / "log")
    expected = [one.survey for one in SegmentReader(tmp_path / "log").surveys()]
    (tmp_path / "log" / INDEX_NAME).unlink()
    holder = sqlite3.connect(tmp_path / "log" / INDEX_NAME, isolation_level=None)
    holder.execute("BEGIN EXCLUSIVE")
    connect, waits_s = sqlite3.connect, list[float]()

    def counted(file: str, *, timeout: float, isolation_level: None) -> sqlite3.Connection:
        waits_s.append(timeout)
        return connect(file, timeout=0.01, isolation_level=isolation_level)

    monkeypatch.setattr(sqlite3, "connect", counted)
    try:
        assert [one.survey for one in SegmentReader(tmp_path / "log").surveys()] == expected
    finally:
        holder.close()
    assert len(waits_s) == 1 < len(expected)


def test_only_the_blocks_that_are_needed_are_read(log: Log, tmp_path: Path) -> None:
    shutil.copytree(log.folder, tmp_path / "log")
    segment = next(one for one in list_segments(tmp_path / "log") if one.family == "control")
    with SegmentScan(segment.path) as scan:
        layout = survey_segment(segment, scan).layout
    assert len(layout.blocks) > 10
    data = bytearray(segment.path.read_bytes())
    data[layout.blocks[4].offset + 20] ^= 1
    segment.path.write_bytes(data)

    def positions(excerpt: Excerpt) -> list[int]:
        return [stored.meta.pos for stored in read_excerpt(segment, layout, excerpt)]

    starts = [block.first_pos for block in layout.blocks]
    assert positions(Excerpt(starts[1], starts[2])) == list(range(starts[1], starts[3]))
    wanted = Excerpt(starts[6] + 1, starts[6] + 1, frozenset({starts[2], layout.next_pos + 5}))
    assert positions(wanted) == [*range(starts[2], starts[3]), *range(starts[6], starts[7])]
    assert positions(Excerpt(layout.next_pos, layout.next_pos + 9)) == []
    with pytest.raises(JournalCorrupt, match="fail their checksum"):
        positions(Excerpt(starts[3], starts[5]))


def test_a_running_server_makes_the_surveys_of_what_it_seals(tmp_path: Path) -> None:
    journal = SegmentJournal.open(
        tmp_path, node="n", boot="b", clock=SystemClock(), options=SegmentOptions(segment_bytes=2000)
    )
    for number in range(200):
        journal.append(ev.ClockAnchored(wall_ns=number), Origin(stream="system"))
        if number % 10 == 0:
            assert journal.flush()
    sealed = {path.name for path in tmp_path.glob("control-*.seg")} - {max(tmp_path.glob("control-*.seg")).name}
    assert len(sealed) > 2
    wait_for_surveys(tmp_path, sealed)
    journal.close()
    journal.close()


def test_a_damaged_segment_keeps_no_other_from_its_survey(log: Log, tmp_path: Path) -> None:
    shutil.copytree(log.folder, tmp_path / "log", ignore=shutil.ignore_patterns(INDEX_NAME))
    names = sorted(path.name for path in (tmp_path / "log").glob("control-*.seg"))
    damaged = tmp_path / "log" / names[1]
    data = bytearray(damaged.read_bytes())
    data[len(data) // 2] ^= 1
    damaged.write_bytes(data)
    keeper = SurveyKeeper(tmp_path / "log", pause_s=0)
    keeper.note_sealed()
    try:
        wait_for_surveys(tmp_path / "log", {name for name in names if name != damaged.name})
    finally:
        keeper.stop()


def wait_for_surveys(folder: Path, names: set[str]) -> None:
    """Until exactly these are kept; the test's own time-out ends it otherwise."""
    kept: set[str] = set()
    while kept != names:
        time.sleep(0.01)
        if (folder / INDEX_NAME).exists():
            db = sqlite3.connect(folder / INDEX_NAME)
            try:
                kept = {name for (name,) in db.execute("SELECT name FROM surveys")}
            except sqlite3.OperationalError:
                continue  # It is being made.
            finally:
                db.close()
