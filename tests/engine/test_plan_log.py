"""What the steps say is enough: every plan follows from the log, and a plan fed back gives the same tokens."""

import random
from collections.abc import Callable

import msgspec
import pytest
from core_run import Invariant, Run, submit

from gptoss.actors.step_record import committed_row
from gptoss.engine.core import CoreOptions
from gptoss.engine.load import LoadedModel
from gptoss.engine.memory_model import kv_bytes
from gptoss.engine.port import Cancel, Finished, StepDone, Submit
from gptoss.messages import events as ev
from gptoss.messages.model import EngineCapabilities, ModelFingerprint
from gptoss.messages.plan import plan_of
from gptoss.replay.plans import ExecutorLog

Models = Callable[..., LoadedModel]


def accepted(command: Submit) -> ev.ExecutorAccepted:
    """What an executor records of a submit."""
    return ev.ExecutorAccepted(
        request_id=command.request_id,
        executor="cpu:0",
        attempt=command.attempt,
        prompt_tokens=len(command.prompt_token_ids),
        resumed_tokens=len(command.output_token_ids),
        max_tokens=command.sampling.max_tokens or 0,
        priority=command.priority,
        deadline_ns=command.deadline_ns,
    )


def committed(step: StepDone) -> ev.StepCommitted:
    """What an executor records of a step."""
    names = [name for name in ev.StepCommitted.__struct_fields__ if name not in {"executor", "rows"}]
    return ev.StepCommitted(
        executor="cpu:0",
        rows=tuple(committed_row(row) for row in step.rows),
        **{name: getattr(step, name) for name in names},
    )


def loaded_log(capabilities: EngineCapabilities) -> ExecutorLog:
    log = ExecutorLog(set(), is_whole=True)
    fingerprint = ModelFingerprint(weights="", tokenizer="", chat_template="", config="")
    log.observe(
        ev.EngineLoaded(executor="cpu:0", capabilities=capabilities, fingerprint=fingerprint, load_ms=0.0, pid=0)
    )
    return log


@pytest.mark.parametrize("invariant", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_every_plan_follows_from_the_log(seed: int, invariant: bool, tiny_model: Models) -> None:
    chance = random.Random(seed)
    layout = tiny_model().capabilities.kv_layout
    model = tiny_model("llama", max_batch_size=2, kv_budget_bytes=kv_bytes(layout, 900))
    running = Run(model, Invariant(model) if invariant else None, CoreOptions(prefix_cache_bytes=1 << 20))
    log = loaded_log(running.core.capabilities)
    for index in range(40):
        if index < 24 and chance.random() < 0.6:
            length = chance.choice([1, 5, 40, 300, 300])
            command = submit(
                f"r{index}",
                priority=chance.choice([-2, -1, 0, 1]),
                max_tokens=chance.choice([1, 4, 20]),
            )
            prompt = submit(chance.choice("xy"), length=length).prompt_token_ids  # many begin alike
            command = msgspec.structs.replace(command, prompt_token_ids=prompt)
            running.handle(command)
            log.observe(accepted(command))
        if log.running and chance.random() < 0.1:
            victim = chance.choice(sorted(log.running))
            running.handle(Cancel(request_id=victim))
            log.observe(ev.CancelApplied(request_id=victim, executor="cpu:0", completion_tokens=0))
        if running.core.has_work():
            running.step()
            step = running.steps()[-1]
            assert log.check(committed(step)) == {}
    running.finish()
    steps = running.steps()
    assert any(step.preemptions for step in steps), "the workload is meant to preempt"
    assert any(start.num_cached for step in steps for start in step.starts), "and to find what was computed before"
    assert all(isinstance(running.end(request_id), Finished) for request_id in log.running)


class InCompany(Invariant):
    """A runner that says that its bits depend on who else is in the step, as those of a GPU do."""

    is_row_invariant = False
    is_batch_invariant = False


def test_where_bits_depend_on_the_company_the_log_says_so_cuts_are_free_and_plans_are_followed(
    tiny_model: Models,
) -> None:
    model = tiny_model("llama", kv_layout="paged")
    options = CoreOptions(prefix_cache_bytes=1 << 20, speculates=True)
    first, second = (Run(model, InCompany(model), options) for _ in range(2))
    limits = first.core.capabilities.limits
    assert limits is not None
    assert (limits.is_row_invariant, limits.is_batch_invariant, limits.draft_streams_max) == (False, False, 0)
    assert any(note.startswith("not batch-invariant") for note in first.core.notes)
    commands = [submit("a", length=100, temperature=1.0), submit("b", max_tokens=30), submit("c", length=50)]
    commands.append(msgspec.structs.replace(commands[0], request_id="a again"))
    first.handle(*commands[:3])
    first.finish()
    first.handle(commands[3])
    first.finish()
    end = first.end("a again")
    assert isinstance(end, Finished)
    assert end.cached_tokens == 96, "hits need not end where chunks do"
    taken = 0
    for step in first.steps():
        second.handle(*commands[taken : taken + step.submits_taken])
        taken += step.submits_taken
        second.events += second.core.step(plan_of(step))
    assert [step.rows for step in second.steps()] == [step.rows for step in first.steps()]


def test_a_plan_and_its_outcome_survive_the_wire(tiny_model: Models) -> None:
    running = Run(tiny_model())
    running.handle(submit("a"), submit("b", logprobs=1))
    running.finish()
    for step in running.steps():
        assert msgspec.msgpack.decode(msgspec.msgpack.encode(step), type=StepDone) == step
        again = msgspec.msgpack.decode(msgspec.msgpack.encode(plan_of(step)), type=type(plan_of(step)))
        assert again == plan_of(step)


def test_plans_fed_back_give_the_same_steps(tiny_model: Models) -> None:
    layout = tiny_model().capabilities.kv_layout
    model = tiny_model("llama", max_batch_size=2, kv_budget_bytes=kv_bytes(layout, 400))
    commands = [submit("a", length=300, temperature=1.0), submit("b", max_tokens=30), submit("c", priority=-1)]
    first, second = Run(model), Run(model)
    first.handle(*commands[:2])
    first.step(4)
    first.handle(commands[2])
    first.finish()
    taken = 0
    for step in first.steps():
        second.handle(*commands[taken : taken + step.submits_taken])
        taken += step.submits_taken
        second.events += second.core.step(plan_of(step))
    assert [step.rows for step in second.steps()] == [step.rows for step in first.steps()]
    assert any(step.preemptions for step in first.steps())
