"""What an engine says, as its executor writes it down."""

from collections.abc import Awaitable, Callable

import pytest

from gptoss.actors.actor import LoopActor
from gptoss.actors.directory import Directory
from gptoss.actors.executor import ExecutorActor, ExecutorConfig
from gptoss.actors.journal import Journal
from gptoss.actors.system import System
from gptoss.engine import port
from gptoss.messages import commands as cmd
from gptoss.messages import events as ev
from gptoss.messages.model import FinishReason
from gptoss.messages.plan import Preemption, Start, plan_of
from gptoss.messages.sampling import SamplingParams

Until = Callable[[Callable[[], object]], Awaitable[None]]

STEP = port.StepDone(
    step=7,
    started_ns=1,
    duration_ns=2,
    rows=(
        port.StepRow(
            request_id="r",
            attempt=1,
            token_ids=(4, 5),
            text="ab",
            start=12,
            num_tokens=4,
            num_logits=4,
            num_draft=3,
            ended=True,
        ),
        port.StepRow(request_id="s", attempt=2, start=9, num_tokens=1, num_logits=1, failure="memory"),
    ),
    waiting=1,
    running=2,
    kv_bytes_in_use=100,
    submits_taken=2,
    preemptions=(Preemption("t", 1, "priority"),),
    starts=(Start("r", 1, 8),),
    refused=("u",),
    prefill_tokens_max=256,
    prefill_ms_per_token=0.5,
    kv_budget_bytes=1000,
)


STATUS = port.EngineStatus(
    nonce=1, step=7, waiting=0, running=0, kv_bytes_in_use=0, memory_bytes=2**40, device_memory_total_bytes=2**41
)


class ScriptedDriver:
    """Says what a test makes it say."""

    def __init__(self) -> None:
        self.sent: list[port.EngineCommand] = []
        self.say: Callable[[port.EngineEvent], None]

    def start(self, load: port.Load, sink: Callable[[port.EngineEvent], None]) -> None:
        del load
        self.say = sink

    def send(self, command: port.EngineCommand) -> None:
        self.sent.append(command)

    def kill(self) -> None:
        self.sent.append(port.Shutdown())


class Listener(LoopActor):
    """Notes whatever it is told, under its name."""

    def __init__(self, heard: list[tuple[str, object]]) -> None:
        super().__init__()
        self._heard = heard

    def on_receive(self, message: object) -> None:
        self._heard.append((self.context.name, message))


@pytest.mark.parametrize("is_alive", [True, False])
@pytest.mark.parametrize("reason", ["stop", "length", "cancelled"])
async def test_the_guard_hears_what_is_kept_of_a_turn_before_anybody_hears_of_its_end(
    system: System, until: Until, reason: FinishReason, is_alive: bool
) -> None:
    driver, directory, heard = ScriptedDriver(), Directory(), list[tuple[str, object]]()
    for name in ("memory", "request/r") if is_alive else ("memory",):
        directory.add(name, system.spawn(lambda: Listener(heard), name=name))
    config = ExecutorConfig(
        executor="cpu", load=port.Load(folder="", model_name="m"), step_timeout_s=60.0, keep_content=False
    )
    executor = system.spawn(lambda: ExecutorActor(config, lambda _: driver, directory), name="executor/cpu")
    executor.tell(
        port.Submit(request_id="r", attempt=1, prompt_token_ids=(1,), sampling=SamplingParams(), session_id="s@t")
    )
    await until(lambda: driver.sent)
    done = port.Finished(
        request_id="r",
        attempt=1,
        reason=reason,
        prompt_tokens=1,
        completion_tokens=4,
        session_tokens=5,
        session_bytes=20,
    )
    driver.say(done)
    driver.say(STATUS)
    await until(lambda: any(isinstance(message, cmd.ObserveMemory) for _, message in heard))
    await until(lambda: not is_alive or any(isinstance(message, cmd.EngineDone) for _, message in heard))
    kept = [message for name, message in heard if name == "memory" and isinstance(message, cmd.KeepSession)]
    told = [(each.session_id, each.executor, each.tokens, each.kv_bytes) for each in kept]
    assert told == ([] if reason == "cancelled" else [("s@t", "cpu", 5, 20)])
    kinds = [type(message) for _, message in heard]
    assert not (kept and is_alive) or kinds.index(cmd.KeepSession) < kinds.index(cmd.EngineDone)


async def test_a_step_is_written_down_with_its_whole_plan(system: System, journal: Journal, until: Until) -> None:
    driver = ScriptedDriver()
    load = port.Load(folder="", model_name="m")
    config = ExecutorConfig(executor="cpu", load=load, step_timeout_s=60.0, keep_content=True)
    executor = system.spawn(lambda: ExecutorActor(config, lambda _: driver, Directory()), name="executor/cpu")
    sampling = SamplingParams(max_tokens=30, seed=1)
    submit = port.Submit(
        request_id="r",
        attempt=1,
        prompt_token_ids=(1, 2, 3),
        sampling=sampling,
        output_token_ids=(9,),
        priority=-1,
        deadline_ns=77,
    )
    executor.tell(submit)
    await until(lambda: driver.sent)
    driver.say(STEP)
    await until(lambda: any(isinstance(record.event, ev.Preempted) for record in journal.read()))
    records = list(journal.read())
    (accepted,) = (record.event for record in records if isinstance(record.event, ev.ExecutorAccepted))
    assert (accepted.prompt_tokens, accepted.resumed_tokens, accepted.max_tokens) == (3, 1, 30)
    assert (accepted.priority, accepted.deadline_ns) == (-1, 77)
    (committed,) = (record for record in records if isinstance(record.event, ev.StepCommitted))
    assert isinstance(committed.event, ev.StepCommitted)
    assert plan_of(committed.event) == plan_of(STEP)
    assert (committed.event.submits_taken, committed.event.refused) == (2, ("u",))
    assert [(row.tokens, row.failure, row.ended) for row in committed.event.rows] == [
        (2, "", True),
        (0, "memory", False),
    ]
    (preempted,) = (record for record in records if isinstance(record.event, ev.Preempted))
    assert preempted.event == ev.Preempted(request_id="t", executor="cpu", attempt=1, step=7, reason="priority")
    assert (preempted.meta.correlation, preempted.meta.cause) == ("t", committed.meta.pos)
