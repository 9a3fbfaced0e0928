"""The system under seeded schedules and faults: the invariants hold, and a seed is all that a run depends on."""

import functools
import hashlib
import subprocess
import sys
from pathlib import Path
from typing import get_args
from unittest import mock

import msgspec
import pykka
import pytest

from gptoss.actors.generation import Generation
from gptoss.messages.codec import encode_record
from gptoss.simulation.campaign import pursue, verdicts
from gptoss.simulation.faults import ANY_REQUEST
from gptoss.simulation.generate import generate
from gptoss.simulation.invariants import AT_REST, AT_THE_END
from gptoss.simulation.run import Verdict, simulate
from gptoss.simulation.scenario import Arrival, Fault, FaultKind, Scenario, Shape, read_scenario, write_scenario
from gptoss.telemetry.segment_reader import SegmentReader

SEEDS = 200
PARTS = 8

HASH_OF_JOURNAL = """
import hashlib
from gptoss.messages.codec import encode_record
from gptoss.simulation.generate import generate
from gptoss.simulation.run import simulate
for seed in {seeds}:
    journal = simulate(generate(seed))[1]
    records = [*journal.read(), *journal.read(family="content")]
    print(hashlib.sha256(b"".join(map(encode_record, records))).hexdigest())
"""


@functools.cache
def outcomes(part: int) -> list[Verdict]:
    """How every eighth seed comes out."""
    return list(verdicts(range(part, SEEDS, PARTS)))


@pytest.mark.parametrize("part", range(PARTS))
def test_every_invariant_holds(part: int) -> None:
    broken = [
        f"gptoss simulate --seed {verdict.scenario.seed}   {verdict.broken}: {verdict.message}"
        for verdict in outcomes(part)
        if verdict.broken
    ]
    assert not broken, "\n".join(broken)


def test_the_seeds_lead_to_every_kind_of_fault_and_end() -> None:
    everything = [verdict for part in range(PARTS) for verdict in outcomes(part)]
    kinds = {fault.kind for verdict in everything for fault in verdict.scenario.faults}
    assert kinds == set(get_args(FaultKind))
    seen = {name for verdict in everything for name in verdict.types}
    assert {"RequestCompleted", "RequestFailed", "RequestCancelled", "RequestRejected"} <= seen
    assert {"AttemptRetried", "Preempted", "DeadlineExpired", "EngineStalled", "ActorRestarted", "DeadLettered"} <= seen
    assert {"RestartRequested", "ExecutorDrained", "ConfigChanged", "ExecutorRated"} <= seen
    assert {"SupervisorEscalated", "LogDegraded", "DrainStarted", "ReservationRefused"} <= seen


def journal_hash(seed: int) -> str:
    journal = simulate(generate(seed))[1]
    records = [*journal.read(), *journal.read(family="content")]
    return hashlib.sha256(b"".join(map(encode_record, records))).hexdigest()


def test_the_same_seed_gives_the_same_journal_in_every_process() -> None:
    seeds = (3, 6, next(seed for seed in range(SEEDS) if generate(seed).dies))
    here = [journal_hash(seed) for seed in seeds]
    assert len(set(here)) == len(seeds)
    for hash_seed in ("1", "2"):
        code = HASH_OF_JOURNAL.format(seeds=seeds)
        environment = {"PYTHONHASHSEED": hash_seed, "PYTHONPATH": ":".join(sys.path)}
        there = subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=50, check=True
        )
        assert there.stdout.split() == here


def test_a_scenario_survives_its_file_and_runs_the_same(tmp_path: Path) -> None:
    scenario = generate(6)
    file = tmp_path / "scenario.json"
    write_scenario(scenario, file)
    assert read_scenario(file) == scenario
    again = simulate(read_scenario(file))[0]
    assert again == simulate(scenario)[0]


def test_a_finding_is_written_with_a_recording_that_can_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Generation, "end", mock.Mock())
    arrivals = tuple(Arrival(f"r{n}", 600.0 + n, 3, 4, n) for n in range(3))
    scenario = Scenario(1, Shape(request_timeout_s=2.0), arrivals, (Fault(100.0, "disk_slow", amount=0.1),))
    found, _ = simulate(scenario)
    assert found.broken == "every_request_ends"
    finding = pursue(found, tmp_path / "found")
    assert finding.smallest.scenario.faults == ()
    assert len(finding.smallest.scenario.arrivals) == 1
    assert read_scenario(finding.folder / "scenario.json") == finding.smallest.scenario
    types = [record.meta.type for record in SegmentReader(finding.folder / "journal").read()]
    assert "RequestCompleted" in types


def test_a_run_leaves_no_actor_behind_even_when_its_process_dies() -> None:
    before = pykka.ActorRegistry.get_all()
    deaths = [scenario for scenario in map(generate, range(SEEDS)) if scenario.dies]
    for scenario in deaths[:3]:
        assert simulate(scenario)[0].broken == ""
    assert pykka.ActorRegistry.get_all() == before


def test_the_guard_counts_what_an_engine_keeps_although_the_request_crashes_as_it_ends() -> None:
    shape = Shape(slots=1, lag=0.6, prefix_cache_bytes=1000, heeds_pressure=False)
    turn = Arrival("r0", 600.0, prompt_tokens=4, max_tokens=3, seed=1, session_id="s")
    ends: set[str] = set()
    for number in range(60):  # the turn ends somewhere within these 45 ms
        crash = Fault(606.0 + 0.75 * number, "actor_crashes", ANY_REQUEST)
        verdict, _ = simulate(Scenario(number, shape, (turn,), (crash,), rebuilds_views=False))
        assert (verdict.broken, verdict.message) == ("", ""), f"a crash at {crash.at_ms} ms"
        ends |= verdict.types & {"RequestCompleted", "RequestFailed"}
        ends |= {"kept by who failed"} if {"RequestFailed", "SessionKept"} <= verdict.types else set()
    assert ends == {"RequestCompleted", "RequestFailed", "kept by who failed"}


def test_virtual_time_costs_no_real_time() -> None:
    arrival = Arrival("r0", 0.0, 3, 4, 1)
    verdict, journal = simulate(Scenario(1, Shape(), (msgspec.structs.replace(arrival, at_ms=3_600_000.0),)))
    assert verdict.broken == ""
    last = list(journal.read())[-1]
    assert last.meta.mono_ns > 3600 * 10**9


def test_invariants_have_names_of_their_own() -> None:
    names = [invariant.__name__ for invariant in (*AT_REST, *AT_THE_END)]
    assert len(set(names)) == len(names)
    assert all(invariant.__doc__ for invariant in (*AT_REST, *AT_THE_END))


def test_a_verdict_crosses_processes() -> None:
    assert [type(verdict) for verdict in verdicts(range(2), jobs=2)] == [Verdict, Verdict]
