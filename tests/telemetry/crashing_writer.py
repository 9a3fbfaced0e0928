"""A program that appends to journals until it is killed; ``test_journal_crash.py`` runs it.

Each line on its standard input is ``<folder> <boot> <call number> <part>``: it forks a child that appends to that
folder for ever and prints acknowledged positions. The child kills itself with SIGKILL in its call number ``call number``
of the writing system calls, after doing ``part`` (0 to 1) of a write; 0 leaves the killing to the test. Forking saves
the start of an interpreter for every crash.
"""

import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gptoss.clock import SystemClock
from gptoss.messages.envelope import Origin
from gptoss.messages.events import ClockAnchored, RequestCancelled, RequestReceived
from gptoss.telemetry.segments import SegmentJournal, SegmentOptions

CALLS = ("open", "write", "fdatasync", "fsync", "close")
DYING_S = 0.02
real_write = os.write


def main() -> None:
    for line in sys.stdin:
        folder, boot, crash_at, part = line.split()
        child = os.fork()
        if child == 0:
            if int(crash_at):
                kill_in_call(int(crash_at), float(part))
            append_for_ever(Path(folder), boot)
        say(f"child {child}")
        os.waitpid(child, 0)
        say("dead")


def kill_in_call(number: int, part: float) -> None:
    """Let the process die in its ``number``-th system call that changes the disk."""
    left = number

    def wrap(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            nonlocal left
            left -= 1
            if left == 0:
                time.sleep(DYING_S)  # A slow disk: time for the other thread to tell of a false acknowledgement.
                if name == "write":
                    real(args[0], args[1][: int(len(args[1]) * part)])
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args)

        return call

    for name in CALLS:
        setattr(os, name, wrap(name, getattr(os, name)))


def append_for_ever(folder: Path, boot: str) -> None:
    options = SegmentOptions(segment_bytes=3000, commit_interval_s=0.0005, commit_records=8)
    journal = SegmentJournal.open(folder, node="n", boot=boot, clock=SystemClock(), options=options)
    acknowledged = -1
    number = 0
    while True:
        request_id = f"r{number // 4}"
        origin = Origin(stream=f"request/{request_id}", correlation=request_id)
        if number % 4 == 0:
            journal.append(
                RequestReceived(
                    request_id=request_id,
                    endpoint="chat",
                    model="m",
                    stream=True,
                    num_messages=1,
                    priority=0,
                    deadline_ns=0,
                ),
                origin,
            )
        elif number % 4 == 3:
            journal.append(RequestCancelled(reason="client"), origin)
        else:
            journal.append(ClockAnchored(wall_ns=number), origin)
        number += 1
        if number % 16 == 0:
            journal.flush(DYING_S / 4)
        if journal.health.committed_pos != acknowledged:
            acknowledged = journal.health.committed_pos
            say(f"ack {acknowledged}")


def say(text: str) -> None:
    real_write(1, f"{text}\n".encode())


main()
