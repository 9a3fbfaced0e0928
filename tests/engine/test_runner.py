"""Runners against transformers' own eager attention, on tiny models with random weights."""

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from gptoss.engine.attention import Chunk
from gptoss.engine.load import LoadedModel
from gptoss.engine.memory_model import kv_bytes, kv_layout_from_config
from gptoss.engine.model_folder import check_folder
from gptoss.engine.packed_linear import PackedLinear
from gptoss.engine.runner import GenericRunner, PackedRunner, Runner

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# torch and transformers are only partly typed.

Models = Callable[..., LoadedModel]
Folders = Callable[[str], str]
PACKED = ["llama", "mistral", "qwen3", "gpt_oss"]


def prompt(length: int, seed: int = 0) -> list[int]:
    return [(index * 37 + seed * 101 + 5) % 256 for index in range(length)]


def eager_logits(folder: str, token_ids: list[int]) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32).eval()
    with torch.inference_mode():
        return model(input_ids=torch.tensor([token_ids]), use_cache=False).logits[0]


def run_through(runner: Runner, token_ids: list[int], stops: Sequence[int]) -> list[torch.Tensor]:
    """Logits at each stop, prefilled and decoded beside two strangers."""
    slot = runner.new_slot(len(token_ids))
    strangers = [prompt(len(token_ids), seed) for seed in (1, 2)]
    slots = [runner.new_slot(len(token_ids)) for _ in strangers]
    found: list[torch.Tensor] = []
    start = 0
    for stop in stops:
        mine = Chunk(slot=slot, token_ids=token_ids[start:stop], start=start, num_logits=1)
        others = [
            Chunk(slot=other, token_ids=ids[start:stop], start=start, num_logits=0)
            for other, ids in zip(slots, strangers, strict=True)
        ]
        logits = runner.forward([others[0], mine, others[1]])[1]
        assert logits is not None
        found.append(logits)
        start = stop
    return found


@pytest.mark.parametrize("kind", [*PACKED, "gemma2"])
def test_logits_are_those_of_eager_attention(kind: str, tiny_model: Models, tiny_folder: Folders) -> None:
    model = tiny_model(kind)
    assert type(model.runner) is (PackedRunner if kind in PACKED else GenericRunner)
    token_ids = prompt(40)
    stops = [5, 6, 7, 8, 9, 10, 23, 24, 25, 40]  # across the window of 8, in chunks and single tokens
    expected = eager_logits(tiny_folder(kind), token_ids)[torch.tensor(stops) - 1]
    found = torch.cat(run_through(model.runner, token_ids, stops))
    assert torch.allclose(found, expected, atol=2e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("kind", ["gpt_oss", "gemma2"])
def test_a_chunk_gives_the_logits_of_as_many_last_rows_as_it_wants(
    kind: str, tiny_model: Models, tiny_folder: Folders
) -> None:
    runner = tiny_model(kind).runner
    token_ids = prompt(30)
    expected = eager_logits(tiny_folder(kind), token_ids)[24:]
    chunks = [Chunk(slot=runner.new_slot(30), token_ids=token_ids, start=0, num_logits=count) for count in (0, 1, 6)]
    none, last, six = runner.forward(chunks)
    assert none is None
    assert last is not None
    assert six is not None
    tolerance = 2e-4 * float(expected.abs().max())
    assert last.shape == (1, expected.shape[1])
    assert torch.allclose(last, expected[-1:], atol=tolerance)
    assert torch.allclose(six, expected, atol=tolerance)


def test_a_model_outside_the_seam_is_run_generically_and_says_so(tiny_model: Models) -> None:
    (note,) = tiny_model("gemma2").notes
    assert note.startswith("generic runner, one request at a time:")
    assert tiny_model("llama").notes == ()


@pytest.mark.parametrize("kind", ["llama", "mistral"])
def test_logits_have_the_same_bits_alone_and_in_company(kind: str, tiny_model: Models) -> None:
    runner = tiny_model(kind).runner
    token_ids = prompt(30)
    alone_slot = runner.new_slot(30)
    found = run_through(runner, token_ids, [20, 21, 22, 30])
    start = 0
    for stop, expected in zip([20, 21, 22, 30], found, strict=True):
        chunk = Chunk(slot=alone_slot, token_ids=token_ids[start:stop], start=start, num_logits=1)
        logits = runner.forward([chunk])[0]
        assert logits is not None
        assert torch.equal(logits, expected)
        start = stop


@pytest.mark.parametrize("kind", PACKED)
def test_prefilling_what_was_decoded_changes_no_more_than_rounding(kind: str, tiny_model: Models) -> None:
    runner = tiny_model(kind).runner
    token_ids = prompt(30)
    one_by_one = run_through(runner, token_ids, range(10, 31))[-1]
    at_once = run_through(runner, token_ids, [29, 30])[-1]
    assert torch.allclose(at_once, one_by_one, atol=1e-5 * float(one_by_one.abs().max()))


@pytest.mark.parametrize(("kind", "length"), [("mistral", 12), ("gemma2", 5)])
def test_a_step_that_ran_twice_is_as_if_it_ran_once(kind: str, length: int, tiny_model: Models) -> None:
    runner = tiny_model(kind).runner
    slot = runner.new_slot(20)
    runner.forward([Chunk(slot=slot, token_ids=prompt(length), start=0, num_logits=0)])
    chunk = Chunk(slot=slot, token_ids=[7], start=length, num_logits=1)
    first, second = runner.forward([chunk])[0], runner.forward([chunk])[0]
    assert first is not None
    assert second is not None
    assert torch.equal(first, second)


@pytest.mark.parametrize("kind", PACKED)
@pytest.mark.parametrize("tokens", [1, 7, 8, 9, 300])
def test_a_slot_has_the_bytes_that_the_memory_model_estimates(
    kind: str, tokens: int, tiny_model: Models, tiny_folder: Folders
) -> None:
    runner = tiny_model(kind).runner
    from_config = kv_layout_from_config(check_folder(Path(tiny_folder(kind))), dtype_bytes=4)
    assert runner.layout == from_config
    assert runner.new_slot(tokens).num_bytes == kv_bytes(runner.layout, tokens)


def test_a_packed_linear_gives_a_row_the_same_bits_among_any_number_of_rows() -> None:
    torch.manual_seed(0)
    linear = torch.nn.Linear(96, 64)
    packed = PackedLinear(linear)
    rows = torch.randn(64, 96)
    with torch.inference_mode():
        expected = packed(rows)
        assert torch.allclose(expected, linear(rows), atol=1e-5)
        for count in (2, 3, 4, 7, 16, 33):
            assert torch.equal(packed(rows[:count]), expected[:count])
