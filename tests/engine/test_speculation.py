"""Guessing tokens: what is guessed, and that it never changes what comes out."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from core_run import Invariant, Run, submit

from gptoss.engine.attention import Chunk
from gptoss.engine.core import CoreOptions
from gptoss.engine.load import LoadedModel
from gptoss.engine.native.build import NativeUnavailableError, find_compiler
from gptoss.engine.port import Finished, Submit
from gptoss.engine.speculation import PAUSE_TOKENS, SIZE_FIRST, SIZE_MAX, Drafter
from gptoss.messages.plan import plan_of

Models = Callable[..., LoadedModel]
SPECULATES = CoreOptions(speculates=True)


# ---------------------------------------------------------------- guesses


def test_what_followed_before_is_guessed_to_follow_again() -> None:
    token_ids = [1, 2, 3, 4, 5, 6, 7, 8, 9, 1, 2, 3]
    drafter = Drafter(token_ids)
    assert drafter.guess(99) == (4, 5, 6, 7)
    assert drafter.guess(2) == (4, 5)
    assert drafter.guess(0) == ()
    token_ids.append(99)
    assert drafter.guess(99) == ()


def test_the_latest_occurrence_counts_and_never_the_text_itself() -> None:
    assert Drafter([1, 2, 3, 4, 1, 2, 3, 5, 1, 2, 3]).guess(1) == (5,)
    assert Drafter([1, 2, 3]).guess(9) == ()
    assert Drafter([7, 7, 7, 7]).guess(9) == (7,)


def test_the_size_follows_success() -> None:
    token_ids = list(range(40)) * 2
    drafter = Drafter(token_ids)
    token_ids += [0, 1, 2]
    assert len(drafter.guess(99)) == SIZE_FIRST
    drafter.learn(4, 4)
    assert len(drafter.guess(99)) == SIZE_MAX
    drafter.learn(8, 2)
    assert len(drafter.guess(99)) == 3
    drafter.learn(3, 0)
    assert drafter.guess(99) == (), "after nothing was right there is a pause"
    token_ids += range(3, 3 + PAUSE_TOKENS)
    assert len(drafter.guess(99)) == 1


# ---------------------------------------------------------------- in the engine


def tokens(model: LoadedModel, *requests: Submit, options: CoreOptions | None = None) -> dict[str, Any]:
    running = Run(model, model.runner if model.runner.is_row_invariant else Invariant(model), options)
    running.handle(*requests)
    running.finish()
    return {
        request.request_id: (running.tokens(request.request_id), running.text(request.request_id))
        for request in requests
    }


def requests(**settings: Any) -> list[Submit]:
    return [submit(name, length=40, **{"max_tokens": 60} | settings) for name in "ab"]


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen3", "gpt_oss"])
@pytest.mark.parametrize("settings", [{"temperature": 0.0}, {"temperature": 1.0, "logit_bias": {65: 40.0, 66: 40.0}}])
def test_guesses_change_no_token(kind: str, settings: dict[str, Any], tiny_model: Models) -> None:
    model = tiny_model(kind)
    asked = requests(**settings)
    running = Run(model, Invariant(model), SPECULATES)
    running.handle(*asked)
    running.finish()
    rows = [row for step in running.steps() for row in step.rows if row.num_draft]
    assert any(len(row.token_ids) > 1 for row in rows)
    assert any(len(row.token_ids) <= row.num_draft for row in rows), "some are to be wrong"
    expected = tokens(model, *asked)
    for request in asked:
        found = (running.tokens(request.request_id), running.text(request.request_id))
        assert found == expected[request.request_id]
        end = running.end(request.request_id)
        assert isinstance(end, Finished)
        assert (end.completion_tokens, end.reason) == (60, "length")


def test_where_bits_do_not_depend_on_the_cut_not_a_bit_changes(tiny_model: Models) -> None:
    try:
        find_compiler()
    except NativeUnavailableError as error:
        pytest.skip(str(error))
    model = tiny_model("llama32", dtype="bfloat16", kernels="native")
    asked = requests(temperature=1.0, logprobs=2, logit_bias={65: 40.0, 66: 40.0, 67: 40.0})
    logprobs: list[list[Any]] = []
    for options in (None, SPECULATES):
        running = Run(model, options=options)
        running.handle(*asked)
        running.finish()
        logprobs.append([row.logprobs for request in asked for row in running.rows(request.request_id)])
    assert any(len(each) > 1 for each in logprobs[1])
    assert [one for each in logprobs[0] for one in each] == [one for each in logprobs[1] for one in each]


def test_a_runner_whose_bits_depend_on_the_cut_does_not_speculate_and_says_so(tiny_model: Models) -> None:
    model = tiny_model()
    running = Run(model, options=SPECULATES)
    assert "speculation" in " ".join(running.core.notes)
    running.handle(*requests())
    running.finish()
    assert not any(row.num_draft for step in running.steps() for row in step.rows)


def test_requests_whose_next_draw_depends_on_the_last_are_not_guessed_for(tiny_model: Models) -> None:
    model = tiny_model()
    running = Run(model, Invariant(model), SPECULATES)
    running.handle(submit("a", length=40, max_tokens=60, frequency_penalty=0.1, logit_bias={7: 100.0}))
    running.handle(submit("b", length=40, max_tokens=60, min_tokens=30, ignore_eos=False, logit_bias={7: 100.0}))
    running.finish()
    assert not any(row.num_draft for row in running.rows("a"))
    first = next(index for index, row in enumerate(running.rows("b")) if row.num_draft)
    assert sum(len(row.token_ids) for row in running.rows("b")[:first]) >= 30


def test_a_stop_inside_a_guess_ends_there(tiny_model: Models) -> None:
    model = tiny_model()
    always_x = {ord("x"): 100.0}
    asked = [
        submit("string", stop=("x" * 17,), logit_bias=always_x, max_tokens=50),
        submit("length", logit_bias=always_x, max_tokens=23),
        submit("token", logit_bias=always_x, max_tokens=50, min_tokens=9, stop_token_ids=(ord("x"),)),
    ]
    running = Run(model, Invariant(model), SPECULATES)
    running.handle(*asked)
    running.finish()
    assert {name: len(running.tokens(name)) for name in ("string", "length")} == {"string": 17, "length": 23}
    assert tokens(model, *asked) == {
        each.request_id: (running.tokens(each.request_id), running.text(each.request_id)) for each in asked
    }
    assert running.steps()[-1].kv_bytes_in_use == 0


def test_many_streams_are_not_guessed_for(tiny_model: Models) -> None:
    model = tiny_model()
    running = Run(model, Invariant(model), SPECULATES)
    running.handle(*(submit(name, logit_bias={7: 100.0}, max_tokens=30) for name in "abcdef"))
    running.finish()
    assert not any(row.num_draft for step in running.steps() for row in step.rows)


def test_plans_with_guesses_can_be_fed_back(tiny_model: Models) -> None:
    model = tiny_model("gpt_oss")
    first, again = (Run(model, Invariant(model), SPECULATES) for _ in range(2))
    first.handle(*requests())
    again.handle(*requests())
    first.finish()
    for step in first.steps():
        again.events += again.core.step(plan_of(step))
    assert [step.rows for step in again.steps()] == [step.rows for step in first.steps()]
    assert any(row.num_draft for step in first.steps() for row in step.rows)


# ---------------------------------------------------------------- undoing


class Stumbling(Invariant):
    """Computes what is to be done for several, and then fails; for one alone it succeeds."""

    def forward(self, chunks: Sequence[Chunk]) -> list[torch.Tensor | None]:
        found = super().forward(chunks)
        if len(chunks) > 1:
            raise RuntimeError("stumbled")
        return found


@pytest.mark.parametrize("kind", ["mistral", "gpt_oss"])
def test_a_step_that_failed_half_way_leaves_nothing_in_a_ring(kind: str, tiny_model: Models) -> None:
    model = tiny_model(kind)
    asked = [submit(name, length=262 + index, logprobs=0) for index, name in enumerate("abc")]
    found: list[list[float]] = []
    for runner in (Invariant(model), Stumbling(model)):
        running = Run(model, runner)
        for request in asked:  # the last pieces of the prompts reach back beyond the window, beside others that decode
            running.handle(request)
            running.step(2)
        running.finish()
        rows = [row for request in asked for row in running.rows(request.request_id)]
        assert any(row.start == 256 and row.num_tokens > 1 for row in rows)
        found.append([each.logprob for row in rows for each in row.logprobs])
    assert found[1] == pytest.approx(found[0], abs=1e-4)
