"""Places and memory of running requests: preemption, and a device that has less memory than it should."""

import gc
import weakref
from collections.abc import Callable, Sequence

import pytest
import torch
from core_run import Run, run, submit

from gptoss.engine.attention import Chunk
from gptoss.engine.load import LoadedModel
from gptoss.engine.memory_model import kv_bytes
from gptoss.engine.port import Cancel, Failed, Finished
from gptoss.engine.runner import Slot

Models = Callable[..., LoadedModel]


def room_for(tiny_model: Models, tokens: int, kind: str = "llama") -> LoadedModel:
    """A model whose KV memory holds ``tokens`` tokens."""
    return tiny_model(kind, kv_budget_bytes=kv_bytes(tiny_model(kind).capabilities.kv_layout, tokens))


@pytest.mark.parametrize("kind", ["llama", "gpt_oss", "gemma2"])
def test_a_preempted_request_goes_on_with_the_same_tokens_and_logprobs(kind: str, tiny_model: Models) -> None:
    model = room_for(tiny_model, 60, kind)
    victim = submit("victim", length=20, max_tokens=20, temperature=1.0, logprobs=0)
    expected = run(model, victim)
    running = Run(model)
    running.handle(victim)
    running.step(8)
    running.handle(submit("urgent", length=20, priority=-1, max_tokens=5))
    running.finish()
    (preemption,) = [preemption for step in running.steps() for preemption in step.preemptions]
    assert (preemption.request_id, preemption.reason) == ("victim", "priority")
    assert running.tokens("victim") == expected.tokens("victim")
    found, wanted = (
        [logprob.logprob for row in each.rows("victim") for logprob in row.logprobs] for each in (running, expected)
    )
    assert found == wanted, "not only the tokens: every bit"
    assert running.text("victim") == expected.text("victim")
    ends = [event.request_id for event in running.events if isinstance(event, Finished)]
    assert ends == ["urgent", "victim"]


def test_a_preempted_request_that_is_cancelled_in_line_ends_with_its_tokens(tiny_model: Models) -> None:
    running = Run(room_for(tiny_model, 60))
    running.handle(submit("victim", length=20, max_tokens=20))
    running.step(8)
    running.handle(submit("urgent", length=20, priority=-1, max_tokens=20))
    running.step()
    assert (running.steps()[-1].waiting, running.steps()[-1].running) == (1, 1)
    running.handle(Cancel(request_id="victim"))
    end = running.end("victim")
    assert isinstance(end, Finished)
    assert (end.reason, end.completion_tokens) == ("cancelled", 8)


class SmallDevice:
    """A runner whose device refuses slots beyond ``slots_max`` at a time, and steps of more than ``rows_max`` rows."""

    def __init__(self, model: LoadedModel, *, slots_max: int = 99, rows_max: int = 10_000) -> None:
        self._runner = model.runner
        self.layout = model.runner.layout
        self.is_batched = True
        self.is_row_invariant = False
        self.is_batch_invariant = True
        self.geometry = model.runner.geometry
        self.slots_max = slots_max
        self.rows_max = rows_max
        self._alive: list[weakref.ref[Slot]] = []
        self.refusals = 0

    def new_slot(self, tokens: int) -> Slot:
        gc.collect()
        self._alive = [reference for reference in self._alive if reference() is not None]
        if len(self._alive) >= self.slots_max:
            self.refusals += 1
            raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")
        slot = self._runner.new_slot(tokens)
        self._alive.append(weakref.ref(slot))
        return slot

    def forward(self, chunks: Sequence[Chunk]) -> list[torch.Tensor | None]:
        if sum(len(chunk.token_ids) for chunk in chunks) > self.rows_max:
            self.refusals += 1
            raise MemoryError("no memory for the step")
        return self._runner.forward(chunks)


def test_a_start_that_the_device_refuses_waits_until_someone_ends(tiny_model: Models) -> None:
    model = tiny_model()
    requests = [submit(name, max_tokens=3 + index) for index, name in enumerate("abcd")]
    device = SmallDevice(model, slots_max=2)
    running = Run(model, device)
    running.handle(*requests)
    running.finish()
    assert running.steps()[0].refused == ("c", "d")
    assert all(step.running <= 2 for step in running.steps())
    for request in requests:
        assert running.tokens(request.request_id) == run(model, request).tokens(request.request_id)
    assert device.refusals <= 2 * 2 * len(requests), "it is not asked again in every step"


def test_a_start_that_the_device_refuses_although_nothing_runs_fails(tiny_model: Models) -> None:
    model = tiny_model()
    running = Run(model, SmallDevice(model, slots_max=0))
    running.handle(submit("a"), submit("b"))
    running.finish()
    for request_id in "ab":
        end = running.end(request_id)
        assert isinstance(end, Failed)
        assert end.code == "memory_exhausted"


def test_a_step_without_memory_is_made_smaller(tiny_model: Models) -> None:
    model = tiny_model()
    requests = [submit(name, length=20) for name in "abcd"]
    device = SmallDevice(model, rows_max=40)
    running = Run(model, device)
    running.handle(*requests)
    running.finish()
    assert device.refusals
    assert not any(step.preemptions for step in running.steps()), "halves were enough"
    for request in requests:
        assert running.tokens(request.request_id) == run(model, request).tokens(request.request_id)


def test_a_request_that_finds_no_memory_makes_the_worst_give_way_and_is_tried_again(tiny_model: Models) -> None:
    model = tiny_model()
    device = SmallDevice(model)
    running = Run(model, device)
    requests = [submit("a", max_tokens=30), submit("worst", priority=1, max_tokens=30)]
    running.handle(*requests)
    running.step(3)
    device.rows_max = 0
    running.step()
    assert [row.failure for row in running.steps()[-1].rows] == ["memory", "memory"]
    device.rows_max = 10_000
    running.step()
    assert [(lost.request_id, lost.reason) for lost in running.steps()[-1].preemptions] == [("worst", "memory")]
    running.finish()
    for request in requests:
        assert running.tokens(request.request_id) == run(model, request).tokens(request.request_id)


def test_a_request_that_finds_no_memory_twice_fails(tiny_model: Models) -> None:
    model = tiny_model()
    device = SmallDevice(model, rows_max=0)
    running = Run(model, device)
    running.handle(submit("a"))
    running.finish()
    end = running.end("a")
    assert isinstance(end, Failed)
    assert end.code == "memory_exhausted"
    assert device.refusals == 2
    assert running.steps()[-1].kv_bytes_in_use == 0
