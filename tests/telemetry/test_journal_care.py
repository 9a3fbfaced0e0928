"""Checking, mending and shortening a journal's folder from outside."""

import os
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from gptoss.clock import SystemClock
from gptoss.errors import JournalError
from gptoss.messages import events as ev
from gptoss.messages.envelope import Origin
from gptoss.telemetry.journal_care import PruneRule, SegmentReport, prune, repair, survey
from gptoss.telemetry.segments import SegmentJournal, SegmentOptions, SegmentReader

LAST = "control-000001-000003.seg"
INNER = "control-000001-000002.seg"


def open_journal(folder: Path, boot: str) -> SegmentJournal:
    options = SegmentOptions(segment_bytes=1500)
    return SegmentJournal.open(folder, node="n", boot=boot, clock=SystemClock(), options=options)


def tick(journal: SegmentJournal, count: int) -> None:
    for number in range(count):
        journal.append(ev.ClockAnchored(wall_ns=number), Origin(stream="s", correlation="r1"))
        assert journal.flush()


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """Three control segments, as ``kill -9`` leaves them: the last is not sealed."""
    live = tmp_path / "live"
    journal = open_journal(live, "b1")
    while not (live / LAST).exists():
        tick(journal, 1)
    tick(journal, 3)
    crashed = tmp_path / "journal"
    crashed.mkdir()
    for path in live.glob("*.seg"):
        (crashed / path.name).write_bytes(path.read_bytes())
    yield crashed
    journal.close()


def flip(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)


def control(folder: Path) -> dict[str, SegmentReport]:
    return {report.name: report for report in survey(folder) if report.family == "control"}


def test_a_whole_journal_has_nothing_wrong(folder: Path) -> None:
    found = control(folder)
    assert [report.state for report in found.values()] == ["sealed", "sealed", "open"]
    assert sum(report.records for report in found.values()) == len(list(SegmentReader(folder).read()))
    assert not any(report.problem for report in found.values())
    assert repair(folder, folder.with_name("backup")).backup == ""
    assert not folder.with_name("backup").exists()


def test_a_torn_tail_is_told_with_its_offset_and_cut_by_a_repair(folder: Path) -> None:
    records = list(SegmentReader(folder).read())
    size = (folder / LAST).stat().st_size
    with (folder / LAST).open("ab") as file:
        file.write(b"half a frame")
    report = control(folder)[LAST]
    assert (report.state, report.bad_at) == ("torn", size)
    done = repair(folder, folder.with_name("backup"))
    assert [(tail.offset, tail.num_bytes) for tail in done.torn] == [(size, 12)]
    assert (Path(done.backup) / LAST).read_bytes().endswith(b"half a frame")
    assert list(SegmentReader(folder).read()) == records
    assert not any(report.problem for report in survey(folder))


@pytest.mark.parametrize("name", [INNER, LAST])
def test_damage_inside_is_told_with_its_offset_and_the_file_is_set_aside_untouched(folder: Path, name: str) -> None:
    flip(folder / name, 200)
    damaged = (folder / name).read_bytes()
    report = control(folder)[name]
    assert report.state == "corrupt"
    assert report.bad_at is not None
    assert report.bad_at <= 200
    assert f"offset {report.bad_at}" in report.problem
    assert report.records_after > 0
    done = repair(folder, folder.with_name("backup"))
    assert [aside.path.name for aside in done.quarantined] == [f"{name}.corrupt"]
    assert (folder / f"{name}.corrupt").read_bytes() == damaged
    assert (Path(done.backup) / name).read_bytes() == damaged
    assert control(folder)[f"{name}.corrupt"].records_after == report.records_after
    journal = open_journal(folder, "b2")  # A server starts on it.
    journal.close()


def test_a_seal_that_does_not_fit_and_missing_positions_are_told(folder: Path) -> None:
    (folder / INNER).unlink()
    assert "are missing in front of it" in control(folder)[LAST].problem
    first = folder / "control-000001-000001.seg"
    flip(first, first.stat().st_size - 20)  # In the footer: it is no footer any more.
    assert control(folder)[first.name].state == "corrupt"


def test_a_running_server_keeps_repair_and_prune_out(folder: Path) -> None:
    journal = open_journal(folder, "b2")
    try:
        with pytest.raises(JournalError, match="in use by another server"):
            repair(folder, folder.with_name("backup"))
        with pytest.raises(JournalError, match="in use by another server"):
            prune(folder, PruneRule(keep_bytes=0), dry_run=False)
    finally:
        journal.close()


def test_a_copy_that_does_not_fit_on_the_disk_changes_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flip(folder / INNER, 200)
    before = {path.name: path.read_bytes() for path in folder.glob("*.seg")}

    def nearly_full(_: Path) -> SimpleNamespace:
        return SimpleNamespace(free=10)

    monkeypatch.setattr("shutil.disk_usage", nearly_full)
    with pytest.raises(JournalError, match="nothing was changed"):
        repair(folder, folder.with_name("backup"))
    assert {path.name: path.read_bytes() for path in folder.glob("*.seg")} == before


def test_prune_by_age_takes_the_oldest_only(folder: Path) -> None:
    now = time.time()
    for name, age_s in (("control-000001-000001.seg", 900), (INNER, 100), (LAST, 900)):
        os.utime(folder / name, (now - age_s, now - age_s))
    rule = PruneRule(written_before_unix_s=now - 500)
    assert [report.name for report in prune(folder, rule, dry_run=True)] == ["control-000001-000001.seg"]
    assert (folder / "control-000001-000001.seg").exists()
    prune(folder, rule, dry_run=False)
    assert list(control(folder)) == [INNER, LAST]
    assert not any(report.problem for report in survey(folder))


def test_prune_by_size_keeps_the_newest(folder: Path) -> None:
    keep = (folder / LAST).stat().st_size
    prune(folder, PruneRule(keep_bytes=keep), dry_run=False)
    assert list(control(folder)) == [LAST]


def test_prune_by_boot_takes_all_of_it(folder: Path) -> None:
    journal = open_journal(folder, "b2")
    tick(journal, 2)
    journal.close()
    prune(folder, PruneRule(boot="b1"), dry_run=False)
    assert SegmentReader(folder).boots() == ["b2"]


def test_a_missing_folder_is_said_so(tmp_path: Path) -> None:
    with pytest.raises(JournalError, match="there is no journal in"):
        survey(tmp_path / "nowhere")
