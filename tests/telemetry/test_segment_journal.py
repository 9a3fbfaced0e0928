"""The journal on disk: boots, lock, rotation, retention, and a disk that fails."""

import errno
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from gptoss.clock import SystemClock
from gptoss.errors import JournalError
from gptoss.messages.envelope import Origin, Record
from gptoss.messages.events import (
    ClockAnchored,
    LogDegraded,
    PromptTokens,
    RequestCancelled,
    RequestFailed,
    RequestReceived,
    RunsAborted,
)
from gptoss.telemetry import segments
from gptoss.telemetry.segment_recovery import record_aborted
from gptoss.telemetry.segments import SegmentJournal, SegmentOptions, SegmentReader
from gptoss.telemetry.timeline import check_complete

SYSTEM = Origin(stream="system")
OpenJournal = Callable[..., SegmentJournal]


@pytest.fixture
def open_journal() -> Iterator[OpenJournal]:
    opened: list[SegmentJournal] = []

    def open_one(folder: Path, boot: str = "b1", **options: Any) -> SegmentJournal:
        journal = SegmentJournal.open(
            folder, node="n1", boot=boot, clock=SystemClock(), options=SegmentOptions(**options)
        )
        opened.append(journal)
        return journal

    yield open_one
    for journal in opened:
        journal.close()


def append_ticks(journal: SegmentJournal, count: int, *, each_flushed: bool = False) -> None:
    for number in range(count):
        journal.append(ClockAnchored(wall_ns=number), SYSTEM)
        if each_flushed:
            assert journal.flush()


def begin(journal: SegmentJournal, request_id: str) -> None:
    event = RequestReceived(
        request_id=request_id, endpoint="chat", model="demo", stream=True, num_messages=1, priority=0, deadline_ns=1
    )
    journal.append(event, Origin(stream=f"request/{request_id}", correlation=request_id))


def end(journal: SegmentJournal, request_id: str) -> None:
    origin = Origin(stream=f"request/{request_id}", correlation=request_id)
    journal.append(RequestCancelled(reason="client"), origin)


def crashed(journal: SegmentJournal, folder: Path, copy: Path) -> Path:
    """The folder as a crash at this moment would leave it."""
    assert journal.flush()
    shutil.copytree(folder, copy)
    return copy


def names(folder: Path, family: str = "control") -> list[str]:
    return sorted(path.name for path in folder.glob(f"{family}-*"))


def test_a_new_boot_reads_the_older_ones_first(tmp_path: Path, open_journal: OpenJournal) -> None:
    for boot in ("b1", "b2", "b3"):
        journal = open_journal(tmp_path, boot)
        append_ticks(journal, 3)
        journal.close()
    journal = open_journal(tmp_path, "b4")
    append_ticks(journal, 2)
    expected = [(boot, pos) for boot in ("b1", "b2", "b3") for pos in range(3)] + [("b4", 0), ("b4", 1)]
    assert [(record.meta.boot, record.meta.pos) for record in journal.read()] == expected
    assert [record.meta.pos for record in journal.read(boot="b2", after=0)] == [1, 2]
    assert SegmentReader(tmp_path).boots() == ["b1", "b2", "b3", "b4"]


def test_two_servers_cannot_share_a_folder(tmp_path: Path, open_journal: OpenJournal) -> None:
    open_journal(tmp_path)
    with pytest.raises(JournalError, match=rf"{tmp_path} is in use by another server \(process {os.getpid()}\)"):
        open_journal(tmp_path, "b2")


def test_a_closed_journal_leaves_the_folder_to_the_next(tmp_path: Path, open_journal: OpenJournal) -> None:
    open_journal(tmp_path).close()
    assert open_journal(tmp_path, "b2").health.ok


def test_a_folder_that_cannot_be_written_is_named_with_what_to_do(tmp_path: Path, open_journal: OpenJournal) -> None:
    blocker = tmp_path / "file"
    blocker.write_text("not a folder")
    with pytest.raises(JournalError, match=rf"{blocker}/data: .*\(ENOTDIR\); make it writable or choose another"):
        open_journal(blocker / "data")


def test_a_read_only_folder_is_refused_and_the_lock_is_let_go(
    tmp_path: Path, open_journal: OpenJournal, monkeypatch: pytest.MonkeyPatch
) -> None:
    real_open = os.open

    def read_only_open(path: Any, flags: int, *rest: int) -> int:
        if flags & os.O_EXCL:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        return real_open(path, flags, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", read_only_open)
        with pytest.raises(JournalError, match=r"Read-only file system \(EROFS\)"):
            open_journal(tmp_path)
    assert open_journal(tmp_path).health.ok


def test_full_segments_are_sealed_and_verify(tmp_path: Path, open_journal: OpenJournal) -> None:
    journal = open_journal(tmp_path, segment_bytes=1000)
    append_ticks(journal, 50, each_flushed=True)
    journal.close()
    assert len(names(tmp_path)) > 3
    assert SegmentReader(tmp_path).verify() == []
    assert [record.meta.pos for record in SegmentReader(tmp_path).read()] == list(range(50))
    assert [record.meta.pos for record in SegmentReader(tmp_path).read(after=40)] == list(range(41, 50))


def test_a_segment_is_never_rewritten(tmp_path: Path, open_journal: OpenJournal) -> None:
    journal = open_journal(tmp_path)
    append_ticks(journal, 5)
    journal.close()
    before = (tmp_path / names(tmp_path)[0]).read_bytes()
    journal = open_journal(tmp_path, "b2")
    append_ticks(journal, 5)
    assert journal.flush()
    assert (tmp_path / names(tmp_path)[0]).read_bytes() == before
    assert len(names(tmp_path)) == 2


def test_retention_unlinks_the_oldest_segments_of_its_family_only(tmp_path: Path, open_journal: OpenJournal) -> None:
    journal = open_journal(tmp_path, segment_bytes=1000, control_retention_bytes=5000)
    journal.append(PromptTokens(request_id="r1", token_ids=(1,)), SYSTEM)
    append_ticks(journal, 100, each_flushed=True)
    kept = sum((tmp_path / name).stat().st_size for name in names(tmp_path))
    assert kept <= 5000 + 1000
    positions = [record.meta.pos for record in journal.read()]
    assert positions == list(range(positions[0], 100))
    assert positions[0] > 0
    assert len(list(journal.read(family="content"))) == 1
    everything = kept + sum((tmp_path / name).stat().st_size for name in names(tmp_path, "content"))
    assert journal.health.stored_bytes == everything


def test_a_lower_retention_takes_effect_at_start(tmp_path: Path, open_journal: OpenJournal) -> None:
    journal = open_journal(tmp_path, segment_bytes=1000)
    append_ticks(journal, 50, each_flushed=True)
    journal.close()
    open_journal(tmp_path, "b2", control_retention_bytes=1)
    assert names(tmp_path) == ["control-000002-000001.seg"]


def test_segments_that_vanish_under_a_reader_count_as_forgotten(tmp_path: Path, open_journal: OpenJournal) -> None:
    journal = open_journal(tmp_path, segment_bytes=1000)
    append_ticks(journal, 50, each_flushed=True)
    reading = journal.read()
    assert next(reading).meta.pos == 0
    for name in names(tmp_path)[:3]:
        (tmp_path / name).unlink()
    positions = [record.meta.pos for record in reading]
    assert positions[-1] == 49
    assert positions == sorted(positions)


def test_a_reader_follows_a_live_server(tmp_path: Path, open_journal: OpenJournal) -> None:
    journal = open_journal(tmp_path, segment_bytes=1000)
    reader = SegmentReader(tmp_path)
    for count in range(1, 21):
        append_ticks(journal, 1, each_flushed=True)
        assert [record.meta.pos for record in reader.read()] == list(range(count))
        assert [record.meta.pos for record in reader.read(stream="system")] == list(range(count))


def test_a_reader_of_a_missing_folder_says_so(tmp_path: Path) -> None:
    with pytest.raises(JournalError, match="there is no journal in"):
        SegmentReader(tmp_path / "nowhere")


def test_a_crash_tells_which_requests_never_ended(tmp_path: Path, open_journal: OpenJournal) -> None:
    journal = open_journal(tmp_path / "live")
    for request_id in ("r1", "r2", "r3"):
        begin(journal, request_id)
    end(journal, "r2")
    after = open_journal(crashed(journal, tmp_path / "live", tmp_path / "crash"), "b2")
    assert [(found.boot, found.request_ids) for found in after.recovery.aborted] == [("b1", ("r1", "r3"))]


def test_unfinished_requests_are_known_although_their_begin_was_in_an_earlier_segment(
    tmp_path: Path, open_journal: OpenJournal
) -> None:
    journal = open_journal(tmp_path / "live", segment_bytes=1000, control_retention_bytes=2000)
    begin(journal, "r1")
    begin(journal, "r2")
    append_ticks(journal, 30, each_flushed=True)
    end(journal, "r2")
    folder = crashed(journal, tmp_path / "live", tmp_path / "crash")
    assert "control-000001-000001.seg" not in names(folder)
    after = open_journal(folder, "b2")
    assert [found.request_ids for found in after.recovery.aborted] == [("r1",)]


def test_a_boot_that_closed_in_order_is_not_aborted(tmp_path: Path, open_journal: OpenJournal) -> None:
    journal = open_journal(tmp_path)
    begin(journal, "r1")
    journal.close()
    assert open_journal(tmp_path, "b2").recovery.aborted == ()


def test_aborted_boots_are_reported_until_they_are_recorded(tmp_path: Path, open_journal: OpenJournal) -> None:
    first = open_journal(tmp_path / "0")
    begin(first, "r1")
    second = open_journal(crashed(first, tmp_path / "0", tmp_path / "1"), "b2")
    begin(second, "r2")
    third = open_journal(crashed(second, tmp_path / "1", tmp_path / "2"), "b3")
    found = third.recovery.aborted
    assert [(boot.boot, boot.request_ids) for boot in found] == [("b1", ("r1",)), ("b2", ("r2",))]
    record_aborted(third, found)
    fourth = open_journal(crashed(third, tmp_path / "2", tmp_path / "3"), "b4")
    assert [(boot.boot, boot.request_ids) for boot in fourth.recovery.aborted] == [("b3", ())]
    for request_id, boots in (("r1", ["b1", "b3"]), ("r2", ["b2", "b3"])):
        told = list(fourth.read(correlation=request_id))
        assert [record.meta.boot for record in told] == boots
        assert isinstance(told[-1].event, RequestFailed)
        assert told[-1].event.code == "aborted_by_crash"
        assert check_complete(told, request_id) == []


def test_a_crash_while_ends_are_told_leaves_the_others_to_the_next_start(
    tmp_path: Path, open_journal: OpenJournal
) -> None:
    first = open_journal(tmp_path / "0")
    for request_id in ("r1", "r2", "r3"):
        begin(first, request_id)
    second = open_journal(crashed(first, tmp_path / "0", tmp_path / "1"), "b2")
    told = second.append(RunsAborted(boot="b1", request_ids=("r1", "r2", "r3")), SYSTEM)
    failed = RequestFailed(code="aborted_by_crash", message="")
    second.append(failed, Origin(stream="request/r2", correlation="r2", cause=told.meta.pos))
    third = open_journal(crashed(second, tmp_path / "1", tmp_path / "2"), "b3")
    found = third.recovery.aborted
    assert [(boot.boot, boot.request_ids) for boot in found] == [("b1", ("r1", "r3")), ("b2", ())]
    record_aborted(third, found)
    fourth = open_journal(crashed(third, tmp_path / "2", tmp_path / "3"), "b4")
    assert [(boot.boot, boot.request_ids) for boot in fourth.recovery.aborted] == [("b3", ())]
    ends = [record.meta.correlation for record in fourth.read() if isinstance(record.event, RequestFailed)]
    assert sorted(ends) == ["r1", "r2", "r3"]


@pytest.mark.parametrize("call", ["fdatasync", "write"])
@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC])
def test_a_disk_error_stops_the_writer_for_good(
    call: str, number: int, tmp_path: Path, open_journal: OpenJournal, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = open_journal(tmp_path)
    append_ticks(journal, 5)
    assert journal.flush()
    seen: list[Record] = []
    journal.subscribe(seen.append)
    calls: list[int] = []

    def failing(fd: int, *_: object) -> int:
        calls.append(fd)
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(os, call, failing)
        append_ticks(journal, 3)
        assert not journal.flush(timeout_s=5)
    append_ticks(journal, 2)  # The disk is well again, and it makes no difference.
    assert not journal.flush(timeout_s=5)
    health = journal.health
    assert not health.ok
    assert errno.errorcode[number] in health.reason
    assert health.committed_pos == 4
    assert len(calls) == 1
    assert any(isinstance(record.event, LogDegraded) for record in seen)
    assert [record.meta.pos for record in seen] == list(range(5, 11))
    assert [record.meta.pos for record in journal.read()] == list(range(11))
    journal.close()
    assert [record.meta.pos for record in open_journal(tmp_path, "b2").read(boot="b1", limit=5)] == list(range(5))


def test_a_full_disk_at_rotation_stops_the_writer_too(
    tmp_path: Path, open_journal: OpenJournal, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = open_journal(tmp_path, segment_bytes=200)
    append_ticks(journal, 4)
    assert journal.flush()

    def failing(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", failing)
        append_ticks(journal, 1)
        assert not journal.flush(timeout_s=5)
    assert "ENOSPC" in journal.health.reason
    assert journal.health.committed_pos == 3


def test_a_disk_that_hangs_delays_no_append_and_acknowledges_nothing(
    tmp_path: Path, open_journal: OpenJournal, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = open_journal(tmp_path)
    is_free = threading.Event()
    real_sync = os.fdatasync

    def hanging(fd: int) -> None:
        assert is_free.wait(30)
        real_sync(fd)

    monkeypatch.setattr(os, "fdatasync", hanging)
    monkeypatch.setattr(segments, "BACKLOG_WARNING_RECORDS", 1000)
    append_ticks(journal, 3000)
    assert not journal.flush(timeout_s=0.05)
    append_ticks(journal, 1000)
    health = journal.health
    assert (health.ok, health.committed_pos) == (True, -1)
    assert health.commit_ns > 0
    assert "records wait for the disk" in health.reason
    assert [record.meta.pos for record in journal.read()] == list(range(4000))
    is_free.set()
    assert journal.flush()
    assert (journal.health.committed_pos, journal.health.commit_ns) == (3999, 0)
    assert journal.health.reason == ""


def test_after_a_disk_error_memory_stays_bounded(
    tmp_path: Path, open_journal: OpenJournal, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(_: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(segments, "DEGRADED_RECORDS_MAX", 10)
    journal = open_journal(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fdatasync", failing)
        append_ticks(journal, 1)
        assert not journal.flush()
    append_ticks(journal, 100)
    assert [record.meta.pos for record in journal.read(after=50)] == list(range(92, 102))


def test_a_record_that_does_not_encode_leaves_its_numbers_to_the_next(
    open_journal: OpenJournal, tmp_path: Path
) -> None:
    journal = open_journal(tmp_path)
    seen: list[tuple[int, int]] = []
    journal.subscribe(lambda record: seen.append((record.meta.pos, record.meta.seq)))
    journal.append(ClockAnchored(wall_ns=0), SYSTEM)
    with pytest.raises(OverflowError):
        journal.append(ClockAnchored(wall_ns=2**70), SYSTEM)
    journal.append(ClockAnchored(wall_ns=1), SYSTEM)
    assert seen == [(0, 0), (1, 1)]


def test_a_decision_is_kept_and_told_up_to_the_event_that_does_not_encode(
    open_journal: OpenJournal, tmp_path: Path
) -> None:
    journal = open_journal(tmp_path)
    seen: list[int] = []
    journal.subscribe(lambda record: seen.append(record.meta.pos))
    first, second, too_large, last = (ClockAnchored(wall_ns=number) for number in (0, 1, 2**70, 3))
    with pytest.raises(OverflowError):
        journal.append_decision(first, SYSTEM, [(second, ""), (too_large, ""), (last, "")])
    journal.append(last, SYSTEM)
    assert seen == [0, 1, 2]
    assert [record.event for record in journal.read()] == [first, second, last]
