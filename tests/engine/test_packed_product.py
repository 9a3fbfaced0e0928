"""Packed products: the numbers of the plain ones, and for each row the same bits whoever is beside it."""

import copy
from typing import Any

import pytest
import torch
import transformers
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssMLP
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

from gptoss.engine.packed_experts import PackedExperts, PackedWeight, pack_experts
from gptoss.engine.packed_product import AMX_ROWS, pack, packed_product

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# torch and transformers are only partly typed.

COUNTS = [1, 2, 3, 5, 15, AMX_ROWS - 1, AMX_ROWS, AMX_ROWS + 1, AMX_ROWS + 2, 4 * AMX_ROWS + 1, 257]
"""Rows on both sides of every number at which some kernel changes its order of summation."""
DTYPES = [torch.float32, torch.bfloat16]


def random_rows(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("inputs", "outputs"), [(64, 96), (576, 1536), (1536, 576)])
def test_a_row_has_the_same_bits_among_any_number_of_rows(inputs: int, outputs: int, dtype: torch.dtype) -> None:
    packed = pack(random_rows(outputs, inputs, dtype=dtype))
    bias = random_rows(outputs, dtype=dtype)
    rows = random_rows(max(COUNTS), inputs, dtype=dtype)
    everyone = packed_product(rows, packed, bias)
    for count in COUNTS:
        first, last = packed_product(rows[:count], packed, bias), packed_product(rows[-count:], packed, bias)
        assert torch.equal(first, everyone[:count]), count
        assert torch.equal(last, everyone[-count:]), count


@pytest.mark.parametrize("shape", [(1, 96), (70, 96), (1, 1, 96), (1, 33, 96)])
def test_a_packed_product_is_the_linear_layer(shape: tuple[int, ...]) -> None:
    weight, bias = random_rows(64, 96, dtype=torch.float32), random_rows(64, dtype=torch.float32)
    rows = random_rows(*shape, dtype=torch.float32)
    found = packed_product(rows, pack(weight), bias)
    assert torch.allclose(found, torch.nn.functional.linear(rows, weight, bias), atol=1e-4)


def gpt_oss_layer() -> Any:
    config: Any = transformers.GptOssConfig(
        hidden_size=64, intermediate_size=96, num_local_experts=8, num_experts_per_tok=3
    )
    config._experts_implementation = "eager"
    return GptOssMLP(config)


def qwen3_moe_layer() -> Any:
    config: Any = transformers.Qwen3MoeConfig(
        hidden_size=64, moe_intermediate_size=96, num_experts=8, num_experts_per_tok=3
    )
    config._experts_implementation = "eager"
    return Qwen3MoeSparseMoeBlock(config)


def results(layer: Any, rows: torch.Tensor) -> torch.Tensor:
    """What the layer gives for ``[T, hidden]``; some layers return the router's logits besides."""
    with torch.inference_mode():
        out = layer(rows[None])
    return (out[0] if isinstance(out, tuple) else out).view(rows.shape)


@pytest.mark.parametrize("make", [gpt_oss_layer, qwen3_moe_layer])
def test_packed_experts_give_what_the_model_gives_and_no_row_depends_on_another(make: Any) -> None:
    torch.manual_seed(0)
    layer = torch.nn.ModuleList([make()])
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    rows = random_rows(max(COUNTS), 64, dtype=torch.float32)
    expected = results(copy.deepcopy(layer)[0], rows)
    assert pack_experts(layer) == 1
    packed: Any = layer[0]
    assert isinstance(packed.experts, PackedExperts)
    assert not list(packed.experts.parameters())
    assert isinstance((packed.gate if hasattr(packed, "gate") else packed.router).weight, PackedWeight)
    everyone = results(packed, rows)
    assert torch.allclose(everyone, expected, atol=1e-4 * float(expected.abs().max()))
    for count in COUNTS:
        assert torch.equal(results(packed, rows[:count]), everyone[:count]), count


def test_a_packed_weight_is_the_plain_one_for_all_else() -> None:
    plain = random_rows(8, 64, dtype=torch.float32)
    weight: Any = PackedWeight(plain)
    rows = random_rows(5, 64, dtype=torch.float32)
    assert weight.shape == plain.shape
    assert torch.equal(torch.matmul(rows, weight.t()), rows @ plain.t())
    assert torch.equal(torch.add(weight, 1.0), plain + 1.0)
    assert torch.allclose(torch.nn.functional.linear(rows, weight), rows @ plain.t(), atol=1e-5)
