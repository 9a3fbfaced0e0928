"""Speed of the journal on disk: ``python benchmarks/bench_journal.py [--json] [--folder PATH]``.

- store: encoded records written and synced in batches of 64 and 512, one ``fdatasync`` a batch;
- append: ``append`` from one thread until everything is acknowledged, encoding and group commit included;
- caller: processor time of the appending thread for each record, appended alone and as one of two of a decision;
- latency: what one ``append`` costs its caller while the writer commits behind it, at a steady pace.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

from gptoss.clock import SystemClock
from gptoss.messages.codec import encode_command, encode_record
from gptoss.messages.commands import ForgetRoute
from gptoss.messages.envelope import Origin
from gptoss.messages.events import CommandConsumed, CommittedRow, ReservationBound, StepCommitted
from gptoss.telemetry.memory_journal import MemoryJournal
from gptoss.telemetry.segment_writer import FamilyLog, Place
from gptoss.telemetry.segments import SegmentJournal, SegmentOptions

RECORDS = 100_000
PACED_RECORDS = 20_000
PACE_PER_S = 5_000
CALLER_RECORDS = 10_000
CALLER_ROUNDS = 10
SEGMENT_BYTES = 64 * 2**20
ORIGIN = Origin(stream="executor/cpu:0", cause=12, trace_id="0" * 32, span_id="1" * 16, actor="executor/cpu:0")
EVENT = StepCommitted(
    executor="cpu:0",
    step=1000,
    started_ns=10**12,
    duration_ns=25_000_000,
    rows=tuple(CommittedRow(f"req_{n:024x}", 1, 1, 0) for n in range(4)),
    waiting=3,
    running=4,
    kv_bytes_in_use=10**8,
)

DECIDED = ReservationBound(request_id="req_1", executor="cpu:0")
COMMAND = CommandConsumed(
    decider="router",
    command=encode_command(ForgetRoute(now_ns=10**12, request_id="req_1")),
)


def bench_store(folder: Path, batch: int) -> float:
    """Events a second that the store alone makes safe."""
    journal = MemoryJournal(node="bench", boot="boot_bench", clock=SystemClock())
    data = encode_record(journal.append(EVENT, ORIGIN))
    place = Place(
        folder=folder,
        family="control",
        node="bench",
        boot=f"b{batch}",
        ordinal=batch,
        segment_bytes=SEGMENT_BYTES,
        retention_bytes=2**31,
    )
    log = FamilyLog(place, [])
    records = [data] * batch
    rounds = RECORDS // batch
    started = time.perf_counter()
    for _ in range(rounds):
        log.commit(records, ())
    taken_s = time.perf_counter() - started
    log.seal()
    return rounds * batch / taken_s


def bench_append(journal: SegmentJournal | MemoryJournal) -> float:
    """Events a second from ``append`` to acknowledgement."""
    started = time.perf_counter()
    for _ in range(RECORDS):
        journal.append(EVENT, ORIGIN)
    if not journal.flush(60):
        raise SystemExit(f"the journal did not keep up: {journal.health.reason}")
    return RECORDS / (time.perf_counter() - started)


def bench_caller(journal: SegmentJournal) -> tuple[float, float]:
    """Microseconds of the caller's processor time a record: alone with an origin of its own, and as one of two of a decision."""
    alone_s: list[float] = []
    decided_s: list[float] = []
    for _ in range(CALLER_ROUNDS):
        began = time.thread_time()
        for _ in range(CALLER_RECORDS):
            journal.append(
                DECIDED, Origin(stream="router", cause=12, correlation="req_1", actor="router", incarnation=0)
            )
        alone_s.append(time.thread_time() - began)
        journal.flush(60)
        began = time.thread_time()
        for _ in range(CALLER_RECORDS // 2):
            origin = Origin(stream="router", cause=12, correlation="req_1", actor="router", incarnation=0)
            journal.append_decision(COMMAND, origin, [(DECIDED, "req_1")])
        decided_s.append(time.thread_time() - began)
        journal.flush(60)
    return min(alone_s) / CALLER_RECORDS * 1e6, min(decided_s) / CALLER_RECORDS * 1e6


def bench_latency(journal: SegmentJournal) -> tuple[float, float, float]:
    """Microseconds of one append: p50, p99, largest."""
    taken_ns: list[int] = []
    started = time.perf_counter_ns()
    for number in range(PACED_RECORDS):
        due = started + number * 1_000_000_000 // PACE_PER_S
        while (left := due - time.perf_counter_ns()) > 0:
            time.sleep(left / 1e9)
        before = time.perf_counter_ns()
        journal.append(EVENT, ORIGIN)
        taken_ns.append(time.perf_counter_ns() - before)
    taken_ns.sort()
    return taken_ns[len(taken_ns) // 2] / 1e3, taken_ns[len(taken_ns) * 99 // 100] / 1e3, taken_ns[-1] / 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--folder", type=Path, help="where to write; the default is a temporary folder")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = Path(name)
        results = {f"store_events_per_s_batch_{batch}": bench_store(folder, batch) for batch in (64, 512)}
        journal = SegmentJournal.open(
            folder / "journal", node="bench", boot="boot_bench", clock=SystemClock(), options=SegmentOptions()
        )
        results["append_events_per_s"] = bench_append(journal)
        results["bytes_per_event"] = journal.health.stored_bytes / RECORDS
        alone_us, decided_us = bench_caller(journal)
        results |= {"append_caller_us": alone_us, "decision_caller_us_a_record": decided_us}
        p50, p99, largest = bench_latency(journal)
        results |= {"append_us_p50": p50, "append_us_p99": p99, "append_us_max": largest}
        journal.close()
    memory = MemoryJournal(node="bench", boot="boot_bench", clock=SystemClock())
    results["memory_append_events_per_s"] = bench_append(memory)
    if arguments.json:
        print(json.dumps({name: round(value, 2) for name, value in results.items()}))
        return
    for name, value in results.items():
        print(f"{name:32} {value:14,.1f}")


if __name__ == "__main__":
    main()
