"""The step loop on tiny models: one terminal event a request, whatever happens to it or beside it."""

from collections.abc import Callable, Sequence

import pytest
import torch
from core_run import Run, run, submit

from gptoss.engine.attention import Chunk
from gptoss.engine.load import LoadedModel
from gptoss.engine.memory_model import kv_bytes
from gptoss.engine.port import (
    Cancel,
    Drain,
    Drained,
    EngineStatus,
    Failed,
    Finished,
    Snapshot,
    StepDone,
    Submit,
)
from gptoss.messages.sampling import SamplingParams

Models = Callable[..., LoadedModel]


@pytest.mark.parametrize(
    ("kind", "temperature"),
    [
        ("llama", 0.0),
        ("llama", 1.0),
        ("mistral", 1.0),
        ("qwen3", 0.0),
        ("gpt_oss", 0.0),
        ("gpt_oss", 1.0),
        ("gemma2", 1.0),
    ],
)
def test_a_request_gets_the_same_tokens_alone_and_among_strangers(
    kind: str, temperature: float, tiny_model: Models
) -> None:
    model = tiny_model(kind)
    requests = [submit(f"r{i}", length=3 + 9 * i, temperature=temperature, seed=i) for i in range(8)]
    together = run(model, *requests)
    for request in (requests[0], requests[5]):
        assert run(model, request).tokens(request.request_id) == together.tokens(request.request_id)


@pytest.mark.parametrize("kind", ["llama", "gpt_oss", "gemma2"])
def test_a_resumed_request_goes_on_with_the_same_tokens_and_text(kind: str, tiny_model: Models) -> None:
    model = tiny_model(kind)
    request = submit("r", temperature=1.0, max_tokens=20, frequency_penalty=0.5)
    whole = run(model, request)
    tokens = whole.tokens("r")
    assert len(tokens) == 20
    for cut in (1, 7, 19):
        again = Submit(
            request_id="r",
            attempt=2,
            prompt_token_ids=request.prompt_token_ids,
            sampling=request.sampling,
            output_token_ids=tokens[:cut],
        )
        resumed = run(model, again)
        assert resumed.tokens("r") == tokens[cut:]
        assert whole.text("r").endswith(resumed.text("r"))
        end = resumed.end("r")
        assert isinstance(end, Finished)
        assert (end.attempt, end.completion_tokens) == (2, 20)


def test_a_request_resumed_after_its_last_token_ends_at_once(tiny_model: Models) -> None:
    model = tiny_model()
    request = submit("r", max_tokens=3)
    tokens = run(model, request).tokens("r")
    full = Submit(request_id="r", attempt=2, prompt_token_ids=(1,), sampling=request.sampling, output_token_ids=tokens)
    running = Run(model)
    running.handle(full)
    end = running.end("r")
    assert isinstance(end, Finished)
    assert (end.reason, end.completion_tokens) == ("length", 3)
    assert not running.core.has_work()


def test_a_long_prompt_is_prefilled_in_chunks_while_others_decode(tiny_model: Models) -> None:
    model = tiny_model()
    running = Run(model)
    running.handle(submit("short", max_tokens=30))
    running.step(2)
    running.handle(submit("long", length=600))
    running.finish()
    assert [row.prefilled for row in running.rows("long")][:4] == [256, 256, 88, 0]
    for step in [event for event in running.events if isinstance(event, StepDone)][2:5]:
        assert "short" in [row.request_id for row in step.rows if row.token_ids]
    assert sum(row.prefilled for row in running.rows("short")) == 12


def test_max_tokens_and_the_end_of_the_context_are_length(tiny_model: Models) -> None:
    model = tiny_model("llama", max_model_len=20)
    running = run(model, submit("a", max_tokens=4), submit("b", max_tokens=100), submit("c", max_tokens=None))
    for request_id, count in (("a", 4), ("b", 8), ("c", 8)):
        end = running.end(request_id)
        assert isinstance(end, Finished)
        assert (end.reason, end.completion_tokens, end.prompt_tokens) == ("length", count, 12)
        assert len(running.tokens(request_id)) == count


def test_an_end_token_stops_without_its_text(tiny_model: Models) -> None:
    model = tiny_model()
    forced = {256: 100.0}
    running = run(model, submit("eos", ignore_eos=False, logit_bias=forced), submit("go", logit_bias=forced))
    end = running.end("eos")
    assert isinstance(end, Finished)
    assert (end.reason, end.stop_reason, end.completion_tokens) == ("stop", 256, 1)
    assert (running.tokens("eos"), running.text("eos")) == ((256,), "")
    ignored = running.end("go")
    assert isinstance(ignored, Finished)
    assert (ignored.reason, ignored.completion_tokens) == ("length", 12)


def test_a_stop_token_and_a_stop_string_stop(tiny_model: Models) -> None:
    model = tiny_model()
    always_x = {ord("x"): 100.0}
    running = run(
        model,
        submit("token", stop_token_ids=(ord("x"),), logit_bias=always_x),
        submit("string", stop=("xxx", "yy"), logit_bias=always_x, max_tokens=9),
        submit("part", stop=("xxxx",), logit_bias=always_x, max_tokens=3),
    )
    ends = {request_id: running.end(request_id) for request_id in ("token", "string", "part")}
    assert [end.stop_reason for end in ends.values() if isinstance(end, Finished)] == [ord("x"), "xxx", None]
    assert [running.text(request_id) for request_id in ends] == ["", "", "xxx"]
    assert running.tokens("string") == (ord("x"),) * 3


def test_min_tokens_holds_the_end_back(tiny_model: Models) -> None:
    running = run(tiny_model(), submit("r", ignore_eos=False, min_tokens=5, logit_bias={256: 100.0}))
    end = running.end("r")
    assert isinstance(end, Finished)
    assert (end.reason, end.completion_tokens) == ("stop", 6)
    assert running.tokens("r").index(256) == 5


def test_logprobs_come_with_text_and_bytes(tiny_model: Models) -> None:
    running = run(tiny_model(), submit("r", logprobs=2, logit_bias={0xC3: 100.0}, max_tokens=1), submit("none"))
    (logprob,) = running.rows("r")[-1].logprobs
    assert (logprob.token_id, logprob.text, logprob.raw) == (0xC3, "\ufffd", b"\xc3")
    assert len(logprob.top) == 2
    assert logprob.top[0][1] >= logprob.top[1][1] >= logprob.logprob
    assert all(not row.logprobs for row in running.rows("none"))


def test_cancel_ends_a_request_and_frees_its_memory_at_once(tiny_model: Models) -> None:
    running = Run(tiny_model("llama", max_batch_size=1))
    running.handle(submit("a", max_tokens=500), submit("waits"))
    running.step(3)
    running.handle(Cancel(request_id="a"), Cancel(request_id="a"), Cancel(request_id="waits"), Cancel(request_id="?"))
    for request_id, count in (("a", 3), ("waits", 0)):
        end = running.end(request_id)
        assert isinstance(end, Finished)
        assert (end.reason, end.completion_tokens) == ("cancelled", count)
    running.handle(Snapshot(nonce=4))
    status = running.events[-1]
    assert isinstance(status, EngineStatus)
    assert (status.nonce, status.running, status.waiting, status.kv_bytes_in_use) == (4, 0, 0, 0)
    assert status.memory_bytes > 0
    assert not running.core.has_work()


def test_memory_in_use_is_what_was_estimated_and_zero_when_idle(tiny_model: Models) -> None:
    model = tiny_model("mistral")
    running = Run(model)
    running.handle(submit("a", length=50), submit("b", length=9))
    running.step()
    step = running.events[0]
    assert isinstance(step, StepDone)
    layout = model.capabilities.kv_layout
    assert step.kv_bytes_in_use == kv_bytes(layout, 62) + kv_bytes(layout, 21)
    running.finish()
    last = [event for event in running.events if isinstance(event, StepDone)][-1]
    assert (last.kv_bytes_in_use, last.running, last.waiting) == (0, 0, 0)


def test_who_does_not_fit_waits_by_priority_then_arrival(tiny_model: Models) -> None:
    layout = tiny_model().capabilities.kv_layout
    model = tiny_model("llama", kv_budget_bytes=kv_bytes(layout, 24))
    running = run(
        model, submit("a"), submit("b"), submit("c"), submit("urgent", priority=-1), submit("huge", length=99)
    )
    ends = [event.request_id for event in running.events if isinstance(event, Finished)]
    assert ends == ["urgent", "a", "b", "c"]
    refused = running.end("huge")
    assert isinstance(refused, Failed)
    assert refused.code == "memory_exhausted"


@pytest.mark.parametrize(
    ("broken", "word"),
    [
        (Submit(request_id="r", attempt=1, prompt_token_ids=(), sampling=SamplingParams()), "empty"),
        (Submit(request_id="r", attempt=1, prompt_token_ids=(1, 300), sampling=SamplingParams()), "300"),
        (Submit(request_id="r", attempt=1, prompt_token_ids=(-1,), sampling=SamplingParams()), "-1"),
        (
            Submit(
                request_id="r", attempt=1, prompt_token_ids=(1,), output_token_ids=(999,), sampling=SamplingParams()
            ),
            "999",
        ),
        (submit("r", length=640), "640"),
        (submit("r", logit_bias={300: 1.0}), "logit_bias"),
        (submit("r", temperature=9.0), "temperature"),
    ],
)
def test_a_submit_that_cannot_run_fails_and_harms_nobody(broken: Submit, word: str, tiny_model: Models) -> None:
    running = run(tiny_model(), submit("good"), broken)
    end = running.end("r")
    assert isinstance(end, Failed)
    assert end.code == "invalid_request"
    assert word in end.message
    assert isinstance(running.end("good"), Finished)


class Sabotage:
    """A runner that spoils the steps of requests whose chunk starts with a token."""

    def __init__(self, model: LoadedModel, token_id: int, *, raises: bool) -> None:
        self._runner = model.runner
        self._token_id = token_id
        self._raises = raises
        self.layout = model.runner.layout
        self.is_batched = True
        self.is_row_invariant = False
        self.is_batch_invariant = True
        self.geometry = model.runner.geometry
        self.new_slot = model.runner.new_slot

    def forward(self, chunks: Sequence[Chunk]) -> list[torch.Tensor | None]:
        marked = [chunk.token_ids[0] == self._token_id for chunk in chunks]
        if self._raises and any(marked):
            raise RuntimeError("spoiled")
        logits = self._runner.forward(chunks)
        return [row * float("nan") if bad and row is not None else row for bad, row in zip(marked, logits, strict=True)]


@pytest.mark.parametrize("raises", [True, False])
def test_only_the_request_at_fault_fails(raises: bool, tiny_model: Models) -> None:
    model = tiny_model()
    good = [submit("a"), submit("bb"), submit("ccc")]
    expected = run(model, *good)
    bad = Submit(request_id="bad", attempt=1, prompt_token_ids=(299, 1, 2), sampling=SamplingParams(temperature=0.0))
    running = Run(model, Sabotage(model, 299, raises=raises))
    running.handle(good[0], bad, *good[1:])
    running.finish()
    end = running.end("bad")
    assert isinstance(end, Failed)
    assert end.code == "engine_error"
    assert ("spoiled" if raises else "finite") in end.message
    for request in good:
        assert running.tokens(request.request_id) == expected.tokens(request.request_id)
    assert [e.kv_bytes_in_use for e in running.events if isinstance(e, StepDone)][-1] == 0


def test_a_submit_sent_twice_is_one_request_and_a_new_attempt_replaces_the_old(tiny_model: Models) -> None:
    running = Run(tiny_model())
    running.handle(submit("r"), submit("r"))
    running.step(2)
    running.handle(submit("r", attempt=2))
    running.finish()
    ends = [event for event in running.events if isinstance(event, Finished)]
    assert [(end.attempt, end.reason) for end in ends] == [(1, "cancelled"), (2, "length")]


def test_drain_finishes_what_runs_and_takes_nothing_new(tiny_model: Models) -> None:
    running = Run(tiny_model())
    running.handle(submit("a"), Drain(), submit("late"))
    refused = running.end("late")
    assert isinstance(refused, Failed)
    assert refused.code == "not_ready"
    running.finish()
    assert isinstance(running.end("a"), Finished)
    assert running.events[-1] == Drained()
    running.handle(Drain())
    assert running.events.count(Drained()) == 2
