"""Logits against plain transformers: eager attention, no cache, the whole text at once, in float32.

Texts are given (teacher-forced) and every position is compared, so an error anywhere in a text shows, and shows where.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from core_run import Run, submit
from transformers import AutoModelForCausalLM

from gptoss.engine.attention import Chunk
from gptoss.engine.core import CoreOptions
from gptoss.engine.load import LoadedModel
from gptoss.engine.port import Finished, Submit
from gptoss.engine.runner import Runner

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# torch and transformers are only partly typed.

Models = Callable[..., LoadedModel]
Folders = Callable[[str], str]
Oracle = Callable[[str, Sequence[int]], torch.Tensor]

KINDS = ["llama", "smollm", "qwen2", "qwen3", "mistral", "gpt_oss", "gpt_oss_yarn"]
WINDOW = 8
LENGTH = 90
CUTS: dict[str, list[int]] = {
    "at once": [LENGTH],
    "one by one": [1] * LENGTH,
    "prefill, then decode": [40, *[1] * (LENGTH - 40)],
    "chunks below the window": [7] * (LENGTH // 7) + [LENGTH % 7],
    "chunks of the window": [WINDOW] * (LENGTH // WINDOW) + [LENGTH % WINDOW],
    "chunks above the window": [WINDOW + 1] * (LENGTH // (WINDOW + 1)),
    "decode between chunks": [1, 1, 20, 1, 30, 1, 1, 1, 34],
}
TOLERANCE = 2e-4
"""Largest difference of a logit in float32, as a part of the largest logit."""


def text(length: int, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (length,), generator=generator).tolist()


@pytest.fixture(scope="module")
def eager(tiny_folder: Folders) -> Callable[..., torch.Tensor]:
    """Logits ``[T, vocab]`` of a text, from transformers alone."""

    @functools.cache
    def load(kind: str, dtype: torch.dtype) -> Any:
        return AutoModelForCausalLM.from_pretrained(
            tiny_folder(kind), attn_implementation="eager", dtype=dtype, experts_implementation="eager"
        ).eval()

    def logits(kind: str, token_ids: Sequence[int], dtype: torch.dtype = torch.float32) -> torch.Tensor:
        with torch.inference_mode():
            return load(kind, dtype)(input_ids=torch.tensor([list(token_ids)]), use_cache=False).logits[0].float()

    return logits


def cut(sizes: Sequence[int]) -> Iterator[tuple[int, int]]:
    start = 0
    for size in sizes:
        if size:
            yield start, start + size
            start += size


def run_through(runner: Runner, token_ids: Sequence[int], sizes: Sequence[int], strangers: int = 0) -> torch.Tensor:
    """Logits of every position of a text that is run in pieces, beside strangers that are cut in the same way."""
    slot = runner.new_slot(len(token_ids))
    others = [(runner.new_slot(len(token_ids)), text(len(token_ids), 50 + i)) for i in range(strangers)]
    found: list[torch.Tensor] = []
    for start, stop in cut(sizes):
        mine = Chunk(slot=slot, token_ids=token_ids[start:stop], start=start, num_logits=stop - start)
        beside = [Chunk(slot=s, token_ids=ids[start:stop], start=start, num_logits=1) for s, ids in others]
        logits = runner.forward([*beside[:1], mine, *beside[1:]])[len(beside[:1])]
        assert logits is not None
        found.append(logits.float())
    return torch.cat(found)


def gap(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference, as a part of the largest logit."""
    assert found.shape == expected.shape
    return float((found - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("cuts", CUTS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_logit_of_a_text_is_that_of_eager_attention_however_it_is_cut(
    kind: str, cuts: str, laid_out: Models, eager: Oracle
) -> None:
    token_ids = text(LENGTH)
    assert sum(CUTS[cuts]) == LENGTH
    assert gap(run_through(laid_out(kind).runner, token_ids, CUTS[cuts]), eager(kind, token_ids)) < TOLERANCE


@pytest.mark.parametrize("kind", KINDS)
def test_long_texts_stay_with_eager_attention_in_the_company_of_others(
    kind: str, laid_out: Models, eager: Oracle
) -> None:
    token_ids = text(620, seed=3)
    found = run_through(laid_out(kind).runner, token_ids, [256, 256, *[1] * 30, 78], strangers=3)
    assert gap(found, eager(kind, token_ids)) < TOLERANCE


@pytest.mark.parametrize("kind", ["mistral", "gpt_oss", "gpt_oss_yarn"])
def test_the_oracle_sees_a_window_that_is_one_too_long(kind: str, laid_out: Models, eager: Oracle) -> None:
    token_ids = text(LENGTH)
    changed = [(token_ids[0] + 1) % 256, *token_ids[1:]]
    difference = (eager(kind, token_ids) - eager(kind, changed)).abs().amax(dim=1)
    assert difference[WINDOW - 1] > TOLERANCE  # within the window of the first token, and within no other for mistral
    if kind == "mistral":
        assert difference[2 * WINDOW :].max() == 0.0  # two layers reach two windows back
    found = run_through(laid_out(kind).runner, changed, [40, 50])
    assert gap(found, eager(kind, token_ids)) > TOLERANCE


@pytest.mark.parametrize("kind", [*KINDS, "llama32"])
def test_bfloat16_is_as_near_to_float32_as_transformers_own(kind: str, laid_out: Models, eager: Any) -> None:
    token_ids = text(LENGTH)
    exact = eager(kind, token_ids)
    found = run_through(laid_out(kind, dtype="bfloat16").runner, token_ids, [40, *[1] * 50], strangers=2)
    theirs = eager(kind, token_ids, torch.bfloat16)
    assert (found - exact).norm() < 1.3 * (theirs - exact).norm()


def forced(name: str, prompt: list[int], max_tokens: int) -> Submit:
    """A request whose answer comes with the log-probabilities of its tokens and the best five besides."""
    request = submit(name, max_tokens=max_tokens, temperature=1.0, seed=len(name), logprobs=5)
    return Submit(
        request_id=name, attempt=1, prompt_token_ids=tuple(prompt), sampling=request.sampling, output_token_ids=()
    )


def check_logprobs(running: Run, request: Submit, expected: Callable[[Sequence[int]], torch.Tensor]) -> None:
    """What the engine said of each token is what transformers says of the text that the engine wrote."""
    name, prompt = request.request_id, request.prompt_token_ids
    tokens = running.tokens(name)
    assert len(tokens) == request.sampling.max_tokens
    logprobs = torch.log_softmax(expected((*prompt, *tokens))[len(prompt) - 1 : -1], dim=1)
    said = [logprob for row in running.rows(name) for logprob in row.logprobs]
    assert [logprob.token_id for logprob in said] == list(tokens)
    for position, logprob in enumerate(said):
        assert logprob.logprob == pytest.approx(float(logprobs[position, logprob.token_id]), abs=2e-3)
        best = torch.topk(logprobs[position], 5)
        assert [value for _, value, _, _ in logprob.top] == pytest.approx(best.values.tolist(), abs=2e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_the_engine_says_of_its_tokens_what_transformers_says(kind: str, laid_out: Models, eager: Oracle) -> None:
    requests = [
        forced("short", text(5), 60),
        forced("chunked", text(300, seed=1), 20),
        forced("decodes beyond its window", text(WINDOW - 3, seed=2), 40),
    ]
    running = Run(laid_out(kind))
    running.handle(*requests)
    running.finish()
    for request in requests:
        check_logprobs(running, request, functools.partial(eager, kind))


@pytest.mark.parametrize("kind", KINDS)
def test_a_prefix_that_was_computed_before_changes_no_logit(kind: str, laid_out: Models, eager: Oracle) -> None:
    shared = text(300, seed=9)
    running = Run(laid_out(kind), options=CoreOptions(prefix_cache_bytes=1 << 28, provenance="tests"))
    for name, tail in (("first", []), ("again", []), ("longer", text(80, seed=4)), ("other", text(3, seed=5))):
        request = forced(name, [*shared, *tail], 20)
        running.handle(request)
        running.finish()
        end = running.end(name)
        assert isinstance(end, Finished)
        assert (end.cached_tokens >= 256) == (name != "first")
        check_logprobs(running, request, functools.partial(eager, kind))
