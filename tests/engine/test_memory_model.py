"""KV arithmetic against configs as they are published."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptoss.engine.memory_model import (
    DEFAULT_MAX_MODEL_LEN,
    kv_bytes,
    kv_bytes_per_token,
    kv_layout_from_config,
    max_model_len_from_config,
)
from gptoss.errors import ModelLoadError
from gptoss.messages.model import KvLayout

GPT_OSS_20B: dict[str, Any] = {
    "model_type": "gpt_oss",
    "hidden_size": 2880,
    "head_dim": 64,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "num_hidden_layers": 24,
    "layer_types": ["sliding_attention", "full_attention"] * 12,
    "sliding_window": 128,
    "max_position_embeddings": 131072,
}
SMOLLM2_135M: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 576,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "num_hidden_layers": 30,
    "max_position_embeddings": 8192,
}
LLAMA_3_8B: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 4096,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "num_hidden_layers": 32,
    "max_position_embeddings": 8192,
}
MISTRAL_7B_V01: dict[str, Any] = {
    "model_type": "mistral",
    "hidden_size": 4096,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "num_hidden_layers": 32,
    "sliding_window": 4096,
    "max_position_embeddings": 32768,
}
QWEN2_5_7B: dict[str, Any] = {
    "model_type": "qwen2",
    "hidden_size": 3584,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "num_hidden_layers": 28,
    "max_window_layers": 28,
    "sliding_window": 131072,
    "use_sliding_window": False,
    "max_position_embeddings": 32768,
}
GEMMA_2_2B: dict[str, Any] = {
    "model_type": "gemma2",
    "hidden_size": 2304,
    "head_dim": 256,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "num_hidden_layers": 26,
    "sliding_window": 4096,
    "max_position_embeddings": 8192,
}
GEMMA_3_27B: dict[str, Any] = {
    "model_type": "gemma3",
    "text_config": {
        "model_type": "gemma3_text",
        "hidden_size": 5376,
        "head_dim": 128,
        "num_attention_heads": 32,
        "num_key_value_heads": 16,
        "num_hidden_layers": 62,
        "sliding_window": 1024,
    },
}
GPT2: dict[str, Any] = {"model_type": "gpt2", "n_embd": 768, "n_head": 12, "n_layer": 12, "n_positions": 1024}


@pytest.mark.parametrize(
    ("config", "layout"),
    [
        pytest.param(GPT_OSS_20B, (12, 12, 128, 8, 64), id="gpt-oss-20b"),
        pytest.param(SMOLLM2_135M, (30, 0, 0, 3, 64), id="smollm2-135m"),
        pytest.param(LLAMA_3_8B, (32, 0, 0, 8, 128), id="llama-3-8b"),
        pytest.param(MISTRAL_7B_V01, (0, 32, 4096, 8, 128), id="mistral-7b-v0.1"),
        pytest.param(QWEN2_5_7B, (28, 0, 0, 4, 128), id="qwen2.5-7b"),
        pytest.param(GEMMA_2_2B, (13, 13, 4096, 4, 256), id="gemma-2-2b"),
        pytest.param(GEMMA_3_27B, (10, 52, 1024, 16, 128), id="gemma-3-27b"),
        pytest.param(GPT2, (12, 0, 0, 12, 64), id="gpt2"),
    ],
)
def test_the_layout_of_published_configs(config: dict[str, Any], layout: tuple[int, ...]) -> None:
    read = kv_layout_from_config(config, dtype_bytes=2)
    assert (read.full_layers, read.sliding_layers, read.sliding_window, read.kv_heads, read.head_dim) == layout


def test_head_dim_is_read_and_not_derived_where_the_config_has_it() -> None:
    assert kv_layout_from_config(GPT_OSS_20B, dtype_bytes=2).head_dim == 64
    derived = {key: value for key, value in GPT_OSS_20B.items() if key != "head_dim"}
    assert kv_layout_from_config(derived, dtype_bytes=2).head_dim == 45


def test_a_null_head_dim_counts_as_absent() -> None:
    assert kv_layout_from_config({**LLAMA_3_8B, "head_dim": None}, dtype_bytes=2).head_dim == 128


def test_without_key_value_heads_every_head_has_its_own() -> None:
    config = {key: value for key, value in LLAMA_3_8B.items() if key != "num_key_value_heads"}
    assert kv_layout_from_config(config, dtype_bytes=2).kv_heads == 32


def test_qwen_with_its_sliding_window_on_keeps_the_first_layers_full() -> None:
    layout = kv_layout_from_config({**QWEN2_5_7B, "use_sliding_window": True, "max_window_layers": 20}, dtype_bytes=2)
    assert (layout.full_layers, layout.sliding_layers) == (20, 8)


def test_mistral_without_a_window_is_full() -> None:
    layout = kv_layout_from_config({**MISTRAL_7B_V01, "sliding_window": None}, dtype_bytes=2)
    assert (layout.full_layers, layout.sliding_layers, layout.sliding_window) == (32, 0, 0)


def test_layers_without_a_growing_cache_are_not_counted_and_unknown_ones_are() -> None:
    kinds = ["linear_attention"] * 3 + ["full_attention", "some_new_attention"]
    layout = kv_layout_from_config({**LLAMA_3_8B, "num_hidden_layers": 5, "layer_types": kinds}, dtype_bytes=2)
    assert (layout.full_layers, layout.sliding_layers) == (2, 0)


def test_chunked_layers_are_bounded_by_their_chunk() -> None:
    kinds = ["chunked_attention"] * 3 + ["full_attention"]
    config = {**LLAMA_3_8B, "num_hidden_layers": 4, "layer_types": kinds, "attention_chunk_size": 8192}
    assert kv_layout_from_config(config, dtype_bytes=2).sliding_window == 8192


def test_gpt_oss_bytes_follow_the_published_formula() -> None:
    layout = kv_layout_from_config(GPT_OSS_20B, dtype_bytes=2)
    token_bytes = 8 * 64 * 2 * 2
    assert kv_bytes(layout, 100) == 24 * 100 * token_bytes
    assert kv_bytes(layout, 1000) == (12 * 1000 + 12 * 128) * token_bytes
    assert kv_bytes_per_token(layout) == 24 * token_bytes


def test_a_llama_token_takes_128_kib() -> None:
    assert kv_bytes_per_token(kv_layout_from_config(LLAMA_3_8B, dtype_bytes=2)) == 128 * 1024


def test_tokens_are_taken_in_whole_blocks() -> None:
    layout = KvLayout(
        full_layers=1, sliding_layers=1, sliding_window=20, kv_heads=1, head_dim=1, dtype_bytes=1, block_tokens=16
    )
    assert kv_bytes(layout, 0) == 0
    assert kv_bytes(layout, 1) == (16 + 16) * 2
    assert kv_bytes(layout, 17) == (32 + 32) * 2
    assert kv_bytes(layout, 100) == (112 + 32) * 2


@given(
    st.integers(0, 80),
    st.integers(0, 80),
    st.integers(1, 4096),
    st.sampled_from([1, 16, 256]),
    st.integers(0, 10**6),
)
def test_bytes_never_shrink_as_tokens_grow_and_never_exceed_full_attention(
    full: int, sliding: int, window: int, block: int, tokens: int
) -> None:
    layout = KvLayout(
        full_layers=full,
        sliding_layers=sliding,
        sliding_window=window,
        kv_heads=2,
        head_dim=8,
        dtype_bytes=2,
        block_tokens=block,
    )
    assert kv_bytes(layout, tokens) <= kv_bytes(layout, tokens + 1)
    assert kv_bytes(layout, tokens) <= (tokens + block) * kv_bytes_per_token(layout)


@pytest.mark.parametrize("value", [0, -1, True, "32", 1.5])
def test_a_number_that_is_none_is_refused_by_name_and_value(value: object) -> None:
    with pytest.raises(ModelLoadError, match=f"num_hidden_layers is {value!r}"):
        kv_layout_from_config({**LLAMA_3_8B, "num_hidden_layers": value}, dtype_bytes=2)


def test_a_missing_number_is_named() -> None:
    with pytest.raises(ModelLoadError, match="num_attention_heads"):
        kv_layout_from_config({"num_hidden_layers": 2}, dtype_bytes=2)


def test_the_context_length_is_read_under_its_several_names() -> None:
    assert max_model_len_from_config(GPT_OSS_20B) == 131072
    assert max_model_len_from_config(GPT2) == 1024
    assert max_model_len_from_config({"text_config": {"max_position_embeddings": 7}}) == 7
    assert max_model_len_from_config({}) == DEFAULT_MAX_MODEL_LEN
