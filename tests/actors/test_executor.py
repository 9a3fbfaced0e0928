"""What an engine says, as its executor writes it down."""

from collections.abc import Awaitable, Callable

from gptoss.actors.directory import Directory
from gptoss.actors.executor import ExecutorActor, ExecutorConfig
from gptoss.actors.journal import Journal
from gptoss.actors.system import System
from gptoss.engine import port
from gptoss.messages import events as ev
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
