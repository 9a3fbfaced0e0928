"""What only a CUDA device can show: ``pytest -m gpu``. Elsewhere these are skipped, and say so.

The same claims as on a CPU, as far as they hold there: logits are those of eager attention, whatever goes wrong stays with
the request at fault, and a recorded run is repeated to the last bit. Bits may depend on the company; tokens in company are
compared by their log-probabilities.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import msgspec
import pytest
import torch
from core_run import Run, submit
from streams import SETTINGS, strangers, streams, targets
from transformers import AutoModelForCausalLM

from gptoss.engine.attention import Chunk
from gptoss.engine.core import CoreOptions
from gptoss.engine.load import LoadedModel
from gptoss.engine.port import Failed, Finished, StepDone, Submit
from gptoss.engine.runner import PackedRunner, Runner
from gptoss.messages.plan import plan_of

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# torch and transformers are only partly typed.

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; torch sees none"),
    pytest.mark.timeout(300),
]

Models = Callable[..., LoadedModel]
Folders = Callable[[str], str]
KINDS = ["llama", "qwen3", "mistral", "gpt_oss", "gpt_oss_yarn"]
LENGTH = 90
CACHING = CoreOptions(prefix_cache_bytes=1 << 28, provenance="tests")


@pytest.fixture(scope="module", params=["paged", "slots"])
def load(tiny_model: Models, request: pytest.FixtureRequest) -> Models:
    torch.backends.cuda.matmul.allow_tf32 = False
    return functools.partial(tiny_model, device="cuda:0", kv_layout=request.param)


def text(length: int, seed: int = 0) -> list[int]:
    return torch.randint(0, 256, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def run_through(runner: Runner, token_ids: Sequence[int], sizes: Sequence[int]) -> torch.Tensor:
    slot, other = runner.new_slot(len(token_ids)), runner.new_slot(len(token_ids))
    found: list[torch.Tensor] = []
    start = 0
    for size in sizes:
        piece = token_ids[start : start + size]
        mine = Chunk(slot=slot, token_ids=piece, start=start, num_logits=size)
        logits, _ = runner.forward([mine, Chunk(slot=other, token_ids=piece[::-1], start=start, num_logits=0)])
        assert logits is not None
        found.append(logits.float().cpu())
        start += size
    return torch.cat(found)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-3), ("bfloat16", None)])
@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_those_of_eager_attention(
    kind: str, dtype: str, tolerance: float | None, load: Models, tiny_folder: Folders
) -> None:
    model = load(kind, dtype=dtype)
    assert isinstance(model.runner, PackedRunner), model.notes
    token_ids = text(LENGTH)

    def eager(dtype: torch.dtype) -> torch.Tensor:
        plain: Any = AutoModelForCausalLM.from_pretrained(tiny_folder(kind), attn_implementation="eager", dtype=dtype)
        with torch.inference_mode():
            return plain.eval()(input_ids=torch.tensor([token_ids]), use_cache=False).logits[0].float()

    exact = eager(torch.float32)
    found = run_through(model.runner, token_ids, [40, *[1] * 30, 20])
    if tolerance is None:
        assert (found - exact).norm() < 1.5 * (eager(torch.bfloat16) - exact).norm()
    else:
        assert (found - exact).abs().max() < tolerance * exact.abs().max()


def recorded(model: LoadedModel) -> Run:
    running = Run(model, options=CACHING)
    running.handle(*targets())
    running.step(3)
    running.handle(*strangers(16))
    return running.finish()


@pytest.mark.parametrize("kind", KINDS)
def test_a_recorded_run_is_repeated_to_the_last_bit(kind: str, load: Models) -> None:
    model = load(kind, max_batch_size=32)
    first = recorded(model)
    assert first.core.capabilities.limits is not None
    assert not first.core.capabilities.limits.is_batch_invariant
    again = Run(model, options=CACHING)
    commands: list[Submit] = [*targets(), *strangers(16)]
    taken = 0
    for step in first.steps():
        again.handle(*commands[taken : taken + step.submits_taken])
        taken += step.submits_taken
        again.events += again.core.step(plan_of(step))
    assert [step.rows for step in again.steps()] == [step.rows for step in first.steps()]


@pytest.mark.parametrize("kind", KINDS)
def test_company_moves_log_probabilities_by_rounding_alone(kind: str, load: Models) -> None:
    model = load(kind, max_batch_size=32)
    together = streams(recorded(model).events)
    for request in targets():
        running = Run(model)
        running.handle(request)
        alone = streams(running.finish().events)[request.request_id]
        found = together[request.request_id]
        for mine, theirs in zip(alone.logprobs, found.logprobs, strict=True):
            if mine.token_id != theirs.token_id:
                break  # from here on the texts differ: a tie that rounding decided
            assert mine.logprob == pytest.approx(theirs.logprob, abs=1e-2)
        else:
            assert alone.token_ids == found.token_ids


def test_a_request_whose_numbers_are_not_finite_fails_alone(load: Models) -> None:
    model = load("gpt_oss", max_batch_size=32)

    class Spoiling:
        """Makes the logits of requests that begin with token 255 NaN."""

        def __init__(self, runner: Runner) -> None:
            self._runner = runner

        def __getattr__(self, name: str) -> Any:
            return getattr(self._runner, name)

        def forward(self, chunks: Sequence[Chunk]) -> list[torch.Tensor | None]:
            rows = self._runner.forward(chunks)
            return [
                row * float("nan") if chunk.start == 0 and chunk.token_ids[0] == 255 and row is not None else row
                for row, chunk in zip(rows, chunks, strict=True)
            ]

    spoiling: Any = Spoiling(model.runner)
    bad = msgspec.structs.replace(submit("bad"), prompt_token_ids=(255, 1, 2))
    running = Run(model, spoiling)
    running.handle(bad, *targets())
    running.finish()
    assert isinstance(running.end("bad"), Failed)
    assert all(isinstance(running.end(name), Finished) for name in SETTINGS)
    assert running.steps()[-1].kv_bytes_in_use == 0


def test_a_step_that_is_too_large_for_the_device_is_halved(load: Models) -> None:
    model = load("gpt_oss", max_batch_size=32)

    class Small:
        """Has no memory for more than 300 rows."""

        def __init__(self, runner: Runner) -> None:
            self._runner = runner

        def __getattr__(self, name: str) -> Any:
            return getattr(self._runner, name)

        def forward(self, chunks: Sequence[Chunk]) -> list[torch.Tensor | None]:
            if sum(len(chunk.token_ids) for chunk in chunks) > 300:
                torch.empty(1 << 50, device="cuda:0")  # the device's own error
            return self._runner.forward(chunks)

    small: Any = Small(model.runner)
    running = Run(model, small)
    running.handle(*targets())
    running.finish()
    assert all(isinstance(running.end(name), Finished) for name in SETTINGS)
    assert all(isinstance(event, StepDone | Finished) for event in running.events)
