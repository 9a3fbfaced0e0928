"""``kill -9`` during appends: what was acknowledged is there, without gaps, and the folder opens again.

``GPTOSS_TEST_CRASHES`` sets the number of runs. Half of them die in a chosen system call, after part of a write; the
other half at a random moment.
"""

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from gptoss.clock import SystemClock
from gptoss.messages.events import RequestCancelled, RequestReceived
from gptoss.telemetry.segments import SegmentJournal, SegmentOptions, SegmentReader

CRASHES = int(os.environ.get("GPTOSS_TEST_CRASHES", "48"))
PROGRAM = Path(__file__).with_name("crashing_writer.py")
KILL_AFTER_S_MAX = 0.03


class Writer:
    """The program and its pipes."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, str(PROGRAM)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
        )

    def crash(self, folder: Path, boot: str, *, in_call: int, part: float, after_s: float) -> int:
        """Let a child append until it dies; returns the last position that it said was acknowledged."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(f"{folder} {boot} {in_call} {part}\n")
        self.process.stdin.flush()
        acknowledged = -1
        for line in self.process.stdout:
            word, *rest = line.split()
            if word == "child" and not in_call:
                time.sleep(after_s)
                os.kill(int(rest[0]), signal.SIGKILL)
            elif word == "ack":
                acknowledged = max(acknowledged, int(rest[0]))
            elif word == "dead":
                return acknowledged
        raise AssertionError("the writing program ended")


@pytest.fixture(scope="module")
def writer() -> Iterator[Writer]:
    program = Writer()
    yield program
    program.process.communicate(timeout=10)
    assert program.process.returncode == 0


def check_recovered(folder: Path, boot: str, acknowledged: int) -> int:
    """Whatever reads the folder, live or after recovery, finds a gapless prefix with every acknowledged record."""
    before = list(SegmentReader(folder).read(boot=boot))
    journal = SegmentJournal.open(folder, node="n", boot=f"{boot}-after", clock=SystemClock(), options=SegmentOptions())
    try:
        records = list(journal.read(boot=boot))
        assert records == before
        assert [record.meta.pos for record in records] == list(range(len(records)))
        assert len(records) > acknowledged
        assert len(journal.recovery.torn) <= 2  # One a family at most.
        assert journal.recovery.quarantined == ()
        begun = {record.meta.correlation for record in records if isinstance(record.event, RequestReceived)}
        ended = {record.meta.correlation for record in records if isinstance(record.event, RequestCancelled)}
        aborted = {found.boot: set(found.request_ids) for found in journal.recovery.aborted}
        if records:
            assert aborted[boot] == begun - ended
        for record in records:
            assert record.meta.seq == record.meta.pos % 4
        for request_id in sorted(begun)[-2:]:
            found = list(journal.read(correlation=request_id, boot=boot))
            assert found == [record for record in records if record.meta.correlation == request_id]
    finally:
        journal.close()
    assert SegmentReader(folder).verify() == []
    return len(records)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_every_acknowledged_record_survives_kill_9(writer: Writer, tmp_path: Path) -> None:
    draw = random.Random(20)
    recovered = 0
    for number in range(CRASHES):
        folder = tmp_path / f"crash{number // 3}"  # Three crashes in a row hit the same folder.
        acknowledged = writer.crash(
            folder,
            f"boot{number}",
            in_call=1 + number if number % 2 else 0,
            part=draw.choice([0.0, 0.1, 0.5, 0.9, 1.0]),
            after_s=draw.uniform(0, KILL_AFTER_S_MAX),
        )
        if folder.exists():
            recovered += check_recovered(folder, f"boot{number}", acknowledged)
    assert recovered > CRASHES  # It was not all over before it began.
