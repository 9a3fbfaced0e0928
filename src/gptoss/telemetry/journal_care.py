"""Looking after a journal's folder from outside: is it whole, make it whole, make it smaller.

Rules:
- ``survey`` changes nothing and needs no lock; it may look at the folder of a running server.
- ``repair`` and ``prune`` take the server's lock, so a running server keeps them out.
- ``repair`` copies all segments first. Then it does what a start does (cut torn tails that nothing whole follows, set
  damaged files aside untouched), and reads sealed segments through too, which a start believes.
- ``prune`` unlinks whole segments: the oldest of each family first, or all of one boot. The index forgets them with it.
"""

import os
import shutil
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, TypeAlias

import msgspec

from gptoss.errors import JournalCorrupt, JournalError
from gptoss.messages.envelope import Family
from gptoss.telemetry.journal_index import JournalIndex
from gptoss.telemetry.segment_file import Ending, Segment, SegmentScan, list_segments
from gptoss.telemetry.segment_recovery import Quarantined, TornTail, quarantine, recover
from gptoss.telemetry.segment_writer import sync_folder
from gptoss.telemetry.segments import lock_folder

SegmentState: TypeAlias = Literal["sealed", "open", "torn", "corrupt", "quarantined"]
"""open: without a seal and whole, as while it is written or after ``kill -9``; torn: its last bytes are no whole frame."""


class SegmentReport(msgspec.Struct, frozen=True, kw_only=True):
    """One segment file.

    Attributes:
        records: in its whole frames before the first bad bytes.
        ending: why it was sealed; empty when it is not.
        bad_at: offset of the first bytes that are no frame; None when all are good.
        records_after: in whole frames behind the bad bytes.
        problem: what is wrong, empty when nothing is.
        written_unix_s: when it was last written to.
    """

    name: str
    family: Family
    boot: str
    ordinal: int
    number: int
    size: int
    state: SegmentState
    records: int = 0
    first_pos: int = 0
    ending: str = ""
    bad_at: int | None = None
    records_after: int = 0
    problem: str = ""
    written_unix_s: float = 0.0


class Repaired(msgspec.Struct, frozen=True, kw_only=True):
    """What ``repair`` did; ``backup`` is empty when there was nothing to do."""

    backup: str = ""
    torn: tuple[TornTail, ...] = ()
    quarantined: tuple[Quarantined, ...] = ()


class PruneRule(msgspec.Struct, frozen=True, kw_only=True):
    """What may go; what is not given does not choose.

    Attributes:
        written_before_unix_s: segments that were last written to before this.
        keep_bytes: as many of the oldest segments as it takes to keep no more than this, both families together.
        boot: every segment of this boot.
    """

    written_before_unix_s: float | None = None
    keep_bytes: int | None = None
    boot: str = ""


def survey(folder: Path) -> list[SegmentReport]:
    """The state of every segment.

    Raises:
        JournalError: there is no such folder, or a newer program wrote it.
    """
    if not folder.is_dir():
        raise JournalError(f"there is no journal in {folder}: no such folder")
    reports: list[SegmentReport] = []
    for segment in list_segments(folder):
        try:
            report = _report(segment)
        except FileNotFoundError:
            continue  # Retention was quicker.
        before = reports[-1] if reports else None
        reports.append(_with_gap(before, report))
    return reports


def repair(folder: Path, backup: Path) -> Repaired:
    """Make the folder whole again, after a copy of its segments to ``backup``.

    Raises:
        JournalError: a server uses the folder, there is none, or it cannot be written.
    """
    damaged = {report.name for report in survey(folder) if report.state in {"torn", "corrupt"}}
    with _locked(folder):
        if not damaged:
            return Repaired()
        _copy(folder, backup)
        bad_seals = [s for s in list_segments(folder) if s.path.name in damaged and _is_sealed(s)]
        aside = tuple(quarantine(segment, _report(segment).problem) for segment in bad_seals)
        found = recover(folder)
        sync_folder(folder)
    return Repaired(backup=str(backup), torn=found.torn, quarantined=(*aside, *found.quarantined))


def prune(folder: Path, rule: PruneRule, *, dry_run: bool) -> list[SegmentReport]:
    """Unlink what the rule lets go, and tell what that is, oldest first. Raises as ``repair`` does."""
    reports = survey(folder)
    with _locked(folder):
        going = _going(reports, rule)
        if not dry_run:
            for report in going:
                (folder / report.name).unlink(missing_ok=True)
            JournalIndex(folder).forget_unlinked()
            sync_folder(folder)
    return going


@contextmanager
def _locked(folder: Path) -> Generator[None]:
    try:
        lock_fd = lock_folder(folder)
    except OSError as error:
        raise JournalError(f"cannot write in {folder}: {error.strerror or error}") from None
    try:
        yield
    except OSError as error:
        raise JournalError(f"cannot change {folder}: {error.strerror or error}") from None
    finally:
        os.close(lock_fd)


def _copy(folder: Path, backup: Path) -> None:
    segments = [segment.path for segment in list_segments(folder)]
    needed = sum(path.stat().st_size for path in segments)
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise JournalError(
            f"a copy of {folder} needs {needed >> 20} MiB and {free >> 20} MiB are free; nothing was changed"
        )
    backup.mkdir(parents=True)
    for path in segments:
        shutil.copy2(path, backup / path.name)
    sync_folder(backup)


def _going(reports: Iterable[SegmentReport], rule: PruneRule) -> list[SegmentReport]:
    oldest_first = sorted(reports, key=lambda report: (report.ordinal, report.number, report.family))
    chosen = {report.name for report in oldest_first if rule.boot and report.boot == rule.boot}
    for family in ("control", "content"):
        for report in (report for report in oldest_first if report.family == family):
            before = rule.written_before_unix_s
            if before is None or report.written_unix_s >= before:
                break  # Only the oldest go: a hole inside the log would look like damage.
            chosen.add(report.name)
    if rule.keep_bytes is not None:
        kept = sum(report.size for report in oldest_first if report.name not in chosen)
        for report in oldest_first:
            if kept <= rule.keep_bytes:
                break
            if report.name not in chosen:
                chosen.add(report.name)
                kept -= report.size
    return [report for report in oldest_first if report.name in chosen]


# ---------------------------------------------------------------- one segment


def _report(segment: Segment) -> SegmentReport:
    status = segment.path.stat()
    report = SegmentReport(
        name=segment.path.name,
        family=segment.family,
        boot="",
        ordinal=segment.ordinal,
        number=segment.number,
        size=status.st_size,
        state="quarantined" if segment.quarantined else "corrupt",
        written_unix_s=status.st_mtime,
    )
    try:
        scan = SegmentScan(segment.path)
    except JournalCorrupt as error:
        return msgspec.structs.replace(report, bad_at=0, problem=_without_path(error, segment))
    with scan:
        report = msgspec.structs.replace(report, boot=scan.header.boot, first_pos=scan.header.first_pos)
        return _contents(segment, scan, report)


def _contents(segment: Segment, scan: SegmentScan, report: SegmentReport) -> SegmentReport:
    replace = msgspec.structs.replace
    problem = ""
    try:
        for frame in scan.frames():
            frame.stored()
    except JournalCorrupt as error:
        problem = _without_path(error, segment)
    records = scan.next_pos - scan.header.first_pos
    footer, bad_at = scan.footer, scan.bad_at
    records_after = 0
    if bad_at is not None:
        records_after = scan.records_after(bad_at)
        problem = f"the bytes at offset {bad_at} are no frame"
    elif footer is not None and footer.sha256 != scan.digest():
        problem = "the sha256 of its seal does not fit"
    elif footer is None and not problem and not segment.is_last:
        problem = "it has no seal, although the log goes on"
    state = report.state
    if not segment.quarantined:
        is_torn = bad_at is not None and segment.is_last and not scan.has_valid_after(bad_at)
        whole: SegmentState = "open" if footer is None else "sealed"
        state = "torn" if is_torn else "corrupt" if problem else whole
    ending = Ending(footer.ending).name.lower() if footer is not None else ""
    return replace(
        report, state=state, records=records, ending=ending, bad_at=bad_at, records_after=records_after, problem=problem
    )


def _with_gap(before: SegmentReport | None, report: SegmentReport) -> SegmentReport:
    """The report, with a word on positions that are missing in front of it."""
    if before is None or (before.family, before.ordinal) != (report.family, report.ordinal):
        return report
    expected = before.first_pos + before.records
    if not before.boot or not report.boot or before.bad_at is not None or report.first_pos == expected:
        return report
    gap = f"positions {expected} to {report.first_pos - 1} are missing in front of it"
    return msgspec.structs.replace(report, problem="; ".join(filter(None, (report.problem, gap))))


def _is_sealed(segment: Segment) -> bool:
    try:
        with SegmentScan(segment.path) as scan:
            return scan.read_footer() is not None
    except JournalCorrupt:
        return False


def _without_path(error: JournalCorrupt, segment: Segment) -> str:
    return error.message.removeprefix(f"{segment.path}: ")
