"""Plans out of logs that begin in the middle, lose records, or span engines."""

from collections.abc import Iterator

import msgspec
import pytest
from scenarios import bundles_folder
from tiny_engine import tiny_capabilities

from gptoss.messages import events as ev
from gptoss.messages.envelope import Record
from gptoss.messages.model import ModelFingerprint
from gptoss.messages.plan import Limits, PlannedRow, Start
from gptoss.replay.plans import ExecutorLog
from gptoss.replay.verify import verify
from gptoss.telemetry.bundle_reader import BundleReader
from gptoss.telemetry.recording import ListRecording

EXECUTOR = "executor/cpu:0"
LIMITS = Limits(max_batch_size=2, chunk_tokens=8, is_row_invariant=True)
CAPABILITIES = tiny_capabilities(
    architecture="A", max_model_len=64, max_batch_size=2, kv_budget_bytes=1000, limits=LIMITS
)


@pytest.fixture(scope="module")
def preempted() -> list[Record]:
    with BundleReader(bundles_folder() / "preempted.gptoss.zip") as bundle:
        return list(bundle.records())


def scheduler(records: list[Record]) -> tuple[int, int, int]:
    result = verify(ListRecording(records))
    assert result.first is None
    found = next(each for each in result.checked if each.decider == "scheduler")
    return found.decisions, found.passed_over, found.diverged


def test_a_log_that_begins_anywhere_diverges_nowhere(preempted: list[Record]) -> None:
    """A slice keeps ``EngineLoaded`` and a contiguous rest; it may miss who was accepted before."""
    mine = [r for r in preempted if r.meta.stream == EXECUTOR]
    loaded = next(i for i, r in enumerate(mine) if isinstance(r.event, ev.EngineLoaded))
    steps = sum(isinstance(r.event, ev.StepCommitted) for r in mine)
    checked: list[int] = []
    for begin in range(loaded + 1, len(mine)):
        gone = {r.meta.pos for i, r in enumerate(mine) if i < begin and i != loaded}
        kept = [r for r in preempted if r.meta.pos not in gone]
        if not any(isinstance(r.event, ev.StepCommitted) for r in kept):
            break
        decisions, passed_over, diverged = scheduler(kept)
        assert diverged == 0
        assert decisions + passed_over <= steps
        checked.append(decisions)
    # Requests whose acceptance is missing hide the plans until they are gone; then everything is known again.
    assert checked[0] == steps - 1  # the first shows that nobody else is there
    assert any(0 < count < steps for count in checked)


def changes(step: ev.StepCommitted) -> Iterator[ev.StepCommitted]:
    row = step.rows[0]
    yield msgspec.structs.replace(step, rows=(msgspec.structs.replace(row, num_tokens=row.num_tokens + 1),))
    yield msgspec.structs.replace(step, rows=())
    yield msgspec.structs.replace(step, waiting=step.waiting + 1)
    yield msgspec.structs.replace(step, running=step.running + 1)
    yield msgspec.structs.replace(step, submits_taken=step.submits_taken + 1)
    yield msgspec.structs.replace(step, kv_bytes_in_use=step.kv_bytes_in_use + 1)
    yield msgspec.structs.replace(step, prefill_tokens_max=step.prefill_tokens_max + 1)


def test_a_changed_step_is_reported_at_it(preempted: list[Record]) -> None:
    steps = [i for i, r in enumerate(preempted) if isinstance(r.event, ev.StepCommitted)]
    for index in steps[::9]:
        event = preempted[index].event
        assert isinstance(event, ev.StepCommitted)
        for step in changes(event):
            records = [*preempted[:index], Record(preempted[index].meta, step), *preempted[index + 1 :]]
            first = verify(ListRecording(records)).first
            assert first is not None, step
            assert (first.kind, first.pos, first.decider) == ("plan", preempted[index].meta.pos, "scheduler")


def accepted(request_id: str, *, prompt: int = 4, resumed: int = 0, attempt: int = 1) -> ev.ExecutorAccepted:
    return ev.ExecutorAccepted(
        request_id=request_id,
        executor="cpu:0",
        attempt=attempt,
        prompt_tokens=prompt,
        resumed_tokens=resumed,
        max_tokens=8,
    )


def loaded(log: ExecutorLog) -> None:
    log.observe(
        ev.EngineLoaded(
            executor="cpu:0",
            capabilities=CAPABILITIES,
            fingerprint=ModelFingerprint(weights="", tokenizer="", chat_template="", config=""),
            load_ms=1.0,
            pid=1,
        )
    )


def replaced(log: ExecutorLog, *, lost: tuple[str, ...]) -> None:
    """The engine dies and another takes its place, as an executor records it."""
    log.observe(ev.EngineExited(executor="cpu:0", exit_code=-9, reason="killed", in_flight=len(lost)))
    for request_id in lost:
        log.observe(
            ev.ExecutorFaulted(
                request_id=request_id, executor="cpu:0", attempt=1, code="engine_lost", message="", lost=True
            )
        )
    log.observe(ev.EngineStarted(executor="cpu:0", device="cpu", model="m", folder=""))
    loaded(log)


def step_of(log: ExecutorLog, submits: int, *, ended: bool = False) -> ev.StepCommitted:
    """A step as an engine with these requests would record it."""
    twin = log.copy()
    twin.take(submits)
    empty = ev.StepCommitted(
        executor="cpu:0", step=1, started_ns=0, duration_ns=1, rows=(), waiting=0, running=0, kv_bytes_in_use=0
    )
    plan = twin.plan(msgspec.structs.replace(empty, kv_budget_bytes=1000), lambda state: state)
    assert plan is not None
    rows = tuple(
        ev.CommittedRow(r.request_id, r.attempt, r.num_logits, 0, r.start, r.num_tokens, r.num_logits, ended=ended)
        for r in plan.rows
    )
    step = msgspec.structs.replace(
        empty,
        rows=rows,
        starts=plan.starts,
        submits_taken=submits,
        prefill_tokens_max=plan.prefill_tokens_max,
        kv_budget_bytes=1000,
    )
    twin.apply(step)
    return msgspec.structs.replace(
        step, waiting=len(twin.line), running=len(twin.running), kv_bytes_in_use=twin.kv_bytes_in_use
    )


def test_a_request_cancelled_before_the_engine_took_it_counts_as_taken() -> None:
    log = ExecutorLog(set(), is_whole=True)
    loaded(log)
    log.observe(accepted("a"))
    log.observe(accepted("b"))
    log.observe(ev.CancelApplied(request_id="a", executor="cpu:0", completion_tokens=0))
    step = step_of(log, 2)
    assert step.starts == (Start("b", 1, 0),)
    assert log.check(step) == {}
    assert list(log.requests()) == ["b"]


def test_a_request_whose_end_was_lost_with_its_engine_is_over_when_it_is_resumed() -> None:
    log = ExecutorLog(set(), is_whole=True)
    loaded(log)
    log.observe(accepted("a"))
    assert log.check(step_of(log, 1, ended=True)) == {}
    replaced(log, lost=("a",))
    log.observe(accepted("a", resumed=1, attempt=2))
    log.observe(accepted("b"))
    step = step_of(log, 2)
    assert [row.request_id for row in step.rows] == ["b"]
    assert log.check(step) == {}


@pytest.mark.parametrize("lost", [(), ("a",)])
def test_an_id_that_is_used_again_is_not_over_because_an_earlier_request_had_it(lost: tuple[str, ...]) -> None:
    log = ExecutorLog(set(), is_whole=True)
    loaded(log)
    log.observe(accepted("a"))
    assert log.check(step_of(log, 1, ended=True)) == {}
    replaced(log, lost=lost)  # right after its end, which the executor may have heard of or not
    log.observe(accepted("a"))
    assert log.check(step_of(log, 1)) == {}
    replaced(log, lost=("a",))
    log.observe(accepted("a", resumed=1, attempt=2))
    step = step_of(log, 1)
    assert [row.request_id for row in step.rows] == ["a"]
    assert log.check(step) == {}


def test_a_running_request_that_found_no_room_for_its_hit_starts_where_it_was() -> None:
    log = ExecutorLog(set(), is_whole=True)
    loaded(log)
    log.observe(accepted("a", prompt=40))
    assert log.check(step_of(log, 1)) == {}
    step = step_of(log, 0)
    step = msgspec.structs.replace(step, starts=(Start("a", 1, log.running["a"].num_computed),))
    assert log.check(step) == {}
    assert PlannedRow("a", 1, 16, 16, 0) in [
        PlannedRow(r.request_id, r.attempt, r.start, r.num_tokens, r.num_logits) for r in step.rows
    ]


def test_an_engine_without_limits_has_no_plans_to_check() -> None:
    log = ExecutorLog(set(), is_whole=True)
    log.observe(
        ev.EngineLoaded(
            executor="cpu:0",
            capabilities=msgspec.structs.replace(CAPABILITIES, limits=None),
            fingerprint=ModelFingerprint(weights="", tokenizer="", chat_template="", config=""),
            load_ms=1.0,
            pid=1,
        )
    )
    step = ev.StepCommitted(
        executor="cpu:0", step=1, started_ns=0, duration_ns=1, rows=(), waiting=0, running=0, kv_bytes_in_use=0
    )
    assert log.check(step) is None
