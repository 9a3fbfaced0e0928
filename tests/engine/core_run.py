"""A core under test and everything it said."""

from collections.abc import Sequence
from typing import Any

import torch

from gptoss.clock import SystemClock
from gptoss.engine.attention import Chunk
from gptoss.engine.core import CoreOptions, EngineCore
from gptoss.engine.load import LoadedModel
from gptoss.engine.port import (
    Cancel,
    Drain,
    DropSession,
    EngineEvent,
    Failed,
    Finished,
    Snapshot,
    StepDone,
    StepRow,
    Submit,
)
from gptoss.engine.runner import Runner, Slot
from gptoss.messages.sampling import SamplingParams

STEPS_MAX = 2000


def submit(request_id: str, *, length: int = 12, attempt: int = 1, priority: int = 0, **settings: Any) -> Submit:
    """A request of ``length`` tokens; greedy, 12 tokens long, unless ``settings`` say otherwise."""
    prompt = tuple(
        32 + (index * 37 + 11 * sum(map(ord, request_id))) % 95 for index in range(length)
    )  # printable ASCII
    params: dict[str, Any] = {"max_tokens": 12, "temperature": 0.0, "seed": 5, "ignore_eos": True} | settings
    return Submit(
        request_id=request_id,
        attempt=attempt,
        prompt_token_ids=prompt,
        sampling=SamplingParams(**params),
        priority=priority,
    )


class Run:
    """A core and everything it said."""

    def __init__(self, model: LoadedModel, runner: Runner | None = None, options: CoreOptions | None = None) -> None:
        self.core = EngineCore(
            runner or model.runner, model.capabilities, model.tokenizer, SystemClock(), options or CoreOptions()
        )
        self.events: list[EngineEvent] = []

    def handle(self, *commands: Submit | Cancel | Drain | DropSession | Snapshot) -> None:
        for command in commands:
            self.events += self.core.handle(command)

    def step(self, count: int = 1) -> None:
        for _ in range(count):
            self.events += self.core.step()

    def finish(self) -> "Run":
        for _ in range(STEPS_MAX):
            if not self.core.has_work():
                return self
            self.step()
        raise AssertionError("the core never ran out of work")

    def steps(self) -> list[StepDone]:
        return [event for event in self.events if isinstance(event, StepDone)]

    def rows(self, request_id: str) -> list[StepRow]:
        return [row for step in self.steps() for row in step.rows if row.request_id == request_id]

    def tokens(self, request_id: str) -> tuple[int, ...]:
        return tuple(token_id for row in self.rows(request_id) for token_id in row.token_ids)

    def text(self, request_id: str) -> str:
        end = self.end(request_id)
        assert isinstance(end, Finished)
        return "".join(row.text for row in self.rows(request_id)) + end.text

    def end(self, request_id: str) -> Finished | Failed:
        ends = [e for e in self.events if isinstance(e, Finished | Failed) and e.request_id == request_id]
        assert len(ends) == 1, ends
        return ends[0]


def run(model: LoadedModel, *submits: Submit) -> Run:
    running = Run(model)
    running.handle(*submits)
    return running.finish()


class Invariant:
    """A runner that says that its bits do not depend on the cut; on greedy tokens of these models it holds."""

    is_row_invariant = True
    is_batch_invariant = True

    def __init__(self, model: LoadedModel) -> None:
        self._runner = model.runner
        self.layout = model.runner.layout
        self.geometry = model.runner.geometry
        self.is_batched = model.runner.is_batched

    def new_slot(self, tokens: int) -> Slot:
        return self._runner.new_slot(tokens)

    def forward(self, chunks: Sequence[Chunk]) -> list[torch.Tensor | None]:
        return self._runner.forward(chunks)
