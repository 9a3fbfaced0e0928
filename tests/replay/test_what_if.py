"""What another policy would have done."""

import asyncio
import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
from scenarios import INCIDENTS, all_of, bundles_folder, fakes, record, request

from gptoss.app import ServingSystem
from gptoss.errors import ConfigError, ReplayError
from gptoss.messages import events as ev
from gptoss.replay.policy import TRIABLE, read_policy
from gptoss.replay.result import WhatIfResult, to_json
from gptoss.replay.step_cost import StepCosts
from gptoss.replay.what_if import what_if
from gptoss.simulation.run import simulate
from gptoss.simulation.scenario import Arrival, Fault, Scenario, Shape
from gptoss.telemetry.bundle_reader import BundleReader
from gptoss.telemetry.bundle_slice import Selection, cut
from gptoss.telemetry.recording import ListRecording
from gptoss.testing import FakeOptions


@pytest.fixture(scope="module")
def busy() -> ListRecording:
    """Sixteen requests at once for four places, each step 10 ms long."""

    async def work(system: ServingSystem) -> None:
        await all_of(system, *(request(4, max_tokens=12, seed=n) for n in range(16)))

    return asyncio.run(record(work, drivers=fakes(FakeOptions(step_s=0.01, max_batch_size=4)), max_batch_size=4))


def of_bundle(name: str, **changes: Any) -> WhatIfResult:
    with BundleReader(bundles_folder() / f"{name}.gptoss.zip") as bundle:
        return what_if(bundle, changes)


@pytest.mark.parametrize("name", [*INCIDENTS, "preempted"])
def test_the_recorded_policy_changes_nothing(name: str) -> None:
    result = of_bundle(name)
    assert result.first is None
    assert result.estimated is None
    assert result.exact_decisions > 10
    assert result.recorded.requests >= 1


def test_a_simulation_of_the_recorded_policy_comes_out_near_the_recording(busy: ListRecording) -> None:
    result = what_if(busy, {}, from_start=True)
    then, now = result.recorded, result.estimated
    assert now is not None
    for name in ("requests", "accepted", "shrunk", "queued", "refused", "expired", "completed"):
        assert getattr(now, name) == getattr(then, name), name
    for name in ("ttft_ms_p50", "ttft_ms_p95", "e2e_ms_p50", "e2e_ms_p95"):
        assert getattr(now, name) == pytest.approx(getattr(then, name), rel=0.35, abs=30.0), name


def test_the_estimate_is_the_same_every_time(busy: ListRecording) -> None:
    first, second = (what_if(busy, {"max_batch_size": 8}) for _ in range(2))
    assert to_json(first) == to_json(second)


def test_more_places_shorten_the_queue(busy: ListRecording) -> None:
    result = what_if(busy, {"max_batch_size": 16})
    assert result.first is not None
    assert result.first.decider == "admission"
    assert result.first.chain[-1].pos == result.first.pos
    assert result.model is not None
    assert result.estimated is not None
    assert result.estimated.completed == 16
    assert result.estimated.queued < result.recorded.queued
    assert result.estimated.ttft_ms_p95 is not None
    assert result.model.ttft_ms_p95 is not None
    assert result.estimated.ttft_ms_p95 < result.model.ttft_ms_p95
    assert result.changes["max_batch_size"] == (4, 16)


def test_a_short_queue_refuses(busy: ListRecording) -> None:
    result = what_if(busy, {"max_queue": 3})
    assert result.estimated is not None
    assert result.estimated.refused > 0
    assert result.estimated.accepted + result.estimated.refused == 16


def spread(seed: int, *, faults: tuple[Fault, ...] = ()) -> ListRecording:
    """Twelve requests within 30 ms for four places, and actors that are often put off."""
    arrivals = tuple(Arrival(f"r{n}", 600.0 + 2.5 * n, prompt_tokens=4, max_tokens=12, seed=n) for n in range(12))
    shape = Shape(slots=4, lag=0.6, step_ms=5.0, heeds_pressure=False)
    verdict, journal = simulate(Scenario(seed, shape, arrivals, faults, rebuilds_views=False))
    assert not verdict.broken, verdict.message
    return ListRecording(journal.read())


def ends(result: WhatIfResult) -> int:
    figures = result.estimated
    assert figures is not None
    return figures.completed + figures.refused + figures.expired


@pytest.mark.parametrize("max_queue", [1, 2, 3])
@pytest.mark.parametrize("seed", range(8))
def test_who_was_on_the_way_to_an_executor_when_the_policies_part_gets_there(seed: int, max_queue: int) -> None:
    recording = spread(seed)
    result = what_if(recording, {"max_queue": max_queue})
    assert result.estimated is not None
    assert result.estimated.refused > 0
    assert (result.estimated.expired, ends(result)) == (0, 12)


@pytest.mark.parametrize("seed", range(4))
def test_a_cancel_that_was_on_its_way_when_the_policies_part_arrives(seed: int) -> None:
    cancels = tuple(Fault(0.0, "client_cancels", f"r{n}", on="ExecutorAccepted") for n in range(4))
    result = what_if(spread(seed, faults=cancels), {"max_queue": 1})
    assert result.estimated is not None
    assert result.estimated.expired == 0
    assert ends(result) == 12 - len(cancels)


@pytest.mark.parametrize(("seed", "max_queue"), [(2, 2), (15, 1)])
def test_an_engine_that_dies_right_after_the_policies_parted_loses_what_it_had_then(seed: int, max_queue: int) -> None:
    result = what_if(spread(seed, faults=(Fault(618.0, "engine_dies", "cuda:0"),)), {"max_queue": max_queue})
    assert result.estimated is not None
    assert (result.estimated.expired, ends(result)) == (0, 12)


def test_a_short_patience_expires(busy: ListRecording) -> None:
    result = what_if(busy, {"queue_timeout_s": 0.05})
    assert result.estimated is not None
    assert result.estimated.expired > 0
    assert result.estimated.accepted + result.estimated.expired == 16


def test_a_bundle_of_one_request_says_that_the_others_are_not_whole_in_it(busy: ListRecording) -> None:
    received = [r.meta.correlation for r in busy.records() if isinstance(r.event, ev.RequestReceived)]
    one = cut(busy, Selection(request_ids=(received[-1],)))
    result = what_if(one, {"max_batch_size": 8})
    assert result.recorded.requests == 1
    assert any("other requests are in this recording only" in note for note in result.notes)
    assert not any("other requests" in note for note in what_if(busy, {"max_batch_size": 8}).notes)


def test_a_larger_budget_shrinks_nobody() -> None:
    result = of_bundle("shrunk", kv_budget_mb=1)
    assert result.recorded.shrunk == 1
    assert result.first is not None
    fields = {field.field: (field.recorded, field.replayed) for field in result.first.fields}
    assert fields["action"] == ("shrink", "accept")
    assert fields["max_tokens"][1] == 80
    assert result.estimated is not None
    assert (result.estimated.shrunk, result.estimated.accepted, result.estimated.completed) == (0, 1, 1)


def test_more_patience_saves_who_waited_too_long() -> None:
    result = of_bundle("queued_past_deadline", queue_timeout_s=30.0)
    assert (result.recorded.expired, result.recorded.completed) == (1, 1)
    assert result.estimated is not None
    assert (result.estimated.expired, result.estimated.completed) == (0, 2)
    assert any("never ran" in line for line in result.assumptions)


def test_an_engine_that_died_dies_in_the_estimate_too() -> None:
    result = of_bundle("engine_killed", max_batch_size=1)
    assert result.first is not None
    assert result.estimated is not None
    assert result.estimated.completed == 3


def test_other_places_change_the_plans_of_a_real_engine() -> None:
    result = of_bundle("preempted", max_batch_size=4)
    assert result.first is not None
    assert result.estimated is not None
    assert result.estimated.completed == 3


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("port = 1", "port cannot be tried"),
        ("nonsense = 1", "nonsense cannot be tried"),
        ("max_queue = 'many'", "max_queue is 'many'"),
        ("max_queue = 0", "max_queue is 0"),
        ("kv_budget_mb = 0", "automatic"),
        ("", "sets nothing"),
        ("max_queue = [", "not valid TOML"),
    ],
)
def test_a_policy_that_cannot_be_tried_is_refused_by_name(text: str, words: str, tmp_path: Path) -> None:
    file = tmp_path / "changed.toml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=words):
        read_policy(file)


def test_a_policy_file_is_read(tmp_path: Path) -> None:
    file = tmp_path / "changed.toml"
    given = {**dict.fromkeys(TRIABLE, 1), "queue_order": "priority"}
    file.write_text("".join(f"{name} = {json.dumps(value)}\n" for name, value in given.items()))
    assert read_policy(file) == given
    with pytest.raises(ConfigError, match="cannot read"):
        read_policy(tmp_path / "none.toml")


def test_a_recording_without_its_settings_is_refused(busy: ListRecording) -> None:
    headless = ListRecording(r for r in busy.records() if not isinstance(r.event, ev.NodeStarted))
    with pytest.raises(ReplayError, match="settings are not known"):
        what_if(headless, {})
    with pytest.raises(ReplayError, match="empty"):
        what_if(ListRecording([]), {})


# ---------------------------------------------------------------- the cost of steps


def steps(base_ms: float, row_ms: float, token_ms: float) -> StepCosts:
    costs = StepCosts()
    started_ns = 0
    for number in range(200):
        decode, prefill = number % 7, 64 * (number % 3 == 0)
        duration_ns = int((base_ms + row_ms * decode + token_ms * prefill) * 1e6)
        if number == 50:
            duration_ns *= 40  # the machine was elsewhere
        rows = [ev.CommittedRow(f"r{i}", 1, 1, 0) for i in range(decode)]
        if prefill:
            rows.append(ev.CommittedRow("p", 1, 1, prefill))
        step = ev.StepCommitted(
            executor="cpu:0",
            step=number,
            started_ns=started_ns,
            duration_ns=duration_ns,
            rows=tuple(rows),
            waiting=0,
            running=1,
            kv_bytes_in_use=0,
        )
        costs.observe(step)
        started_ns += duration_ns + 500_000
    return costs


def test_the_cost_of_a_step_is_learnt_from_steps() -> None:
    cost = steps(5.0, 1.5, 0.25).learn()
    assert cost is not None
    found = msgspec.structs.asdict(cost)
    expected = {"base_ms": 5.0, "decode_row_ms": 1.5, "prefill_token_ms": 0.25, "gap_ms": 0.5, "steps": 200}
    assert found == pytest.approx(expected, rel=1e-3)
    assert cost.duration_ns(4, 100) == pytest.approx((5.5 + 6.0 + 25.0) * 1e6, rel=1e-3)


def test_an_effect_that_is_not_there_is_left_out() -> None:
    cost = steps(5.0, 0.0, 0.0).learn()
    assert cost is not None
    assert cost.decode_row_ms == pytest.approx(0.0, abs=1e-6)
    assert cost.base_ms == pytest.approx(5.0, rel=1e-3)
    assert StepCosts().learn() is None


@pytest.mark.parametrize("name", ["shrunk", "queued_past_deadline", "refused_for_memory"])
def test_the_newer_rules_can_be_tried_on_an_older_recording_and_choose_alike(name: str) -> None:
    with BundleReader(bundles_folder() / f"{name}.gptoss.zip") as bundle:
        newer = what_if(bundle, {"policy_version": 2})
    assert newer.changes == {"policy_version": (1, 2)}
    assert newer.exact_decisions > 0
    assert newer.first is None, "one tenant, one executor, no deadline in doubt: what is new has nothing to do there"


async def turns(system: ServingSystem) -> None:
    """Four sessions of two turns each, one after the other."""
    for turn in range(2):
        for number in range(4):
            asked = msgspec.structs.replace(request(4 + 8 * turn, max_tokens=6, seed=number), session_id=f"s{number}")
            await all_of(system, asked)


def test_other_limits_of_sessions_and_pressure_are_tried_on_a_recording() -> None:
    drivers = fakes(FakeOptions(step_s=0.001, kv_budget_bytes=400, prefix_cache_bytes=400))
    recording = asyncio.run(record(turns, drivers=drivers))
    unchanged = what_if(recording, {"session_idle_s": 170.0})
    assert unchanged.first is None, "nobody was idle for so long"
    fewer = what_if(recording, {"session_kv_mb": 0})
    assert fewer.first is not None
    assert fewer.first.type == "SessionEvicted"
    sooner = what_if(recording, {"pressure_evict": 0.05})
    assert sooner.first is not None
    assert (sooner.first.type, sooner.first.decider) == ("SessionEvicted", "memory")
    cautious = what_if(recording, {"pressure_queue": 0.01})
    assert cautious.first is not None
    assert cautious.first.decider == "admission"
