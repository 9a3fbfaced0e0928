"""KV arithmetic: how many bytes a number of tokens takes in a model's KV memory.

Rules:
- Pure integer arithmetic over the model's own ``config.json``; no torch, no device, no clock. The memory guard, the
  scheduler and a replay on another machine all get the same number.
- ``head_dim`` is read, and derived as ``hidden_size / num_attention_heads`` only where the config has none: gpt-oss has
  2880 / 64 = 45 by that rule, and really 64.
- A sliding layer keeps at most its window. What is unknown counts as a full layer, so an estimate errs to the safe side.
- Layers without a growing cache (linear attention, convolution, state space) count as nothing.
"""

from collections.abc import Mapping, Sequence
from typing import Any, cast

from gptoss.errors import ModelLoadError
from gptoss.messages.model import KvLayout

DEFAULT_MAX_MODEL_LEN = 2048
"""Context of a config that states none; the models that leave it out (Falcon, early ones) have this or more."""

_SLIDING_TYPES = frozenset({"sliding_attention", "chunked_attention"})
_CACHELESS_TYPES = frozenset({"linear_attention", "conv", "mamba", "mamba2", "recurrent"})

# Families whose published config.json leaves the pattern out: every n-th layer is full, the others slide.
_DEFAULT_SLIDING_PATTERN = {"gemma2": 2, "gemma3_text": 6, "gemma3": 6, "cohere2": 4}

# Families that write ``sliding_window`` but leave it off unless ``use_sliding_window`` says otherwise.
_SLIDING_OFF_BY_DEFAULT = ("qwen",)


def kv_layout_from_config(config: Mapping[str, Any], *, dtype_bytes: int) -> KvLayout:
    """Read a model's KV geometry.

    Args:
        config: the parsed ``config.json``; of a multimodal model the nested ``text_config`` is read.
        dtype_bytes: bytes of one K or V element, such as 2 for bfloat16.

    Raises:
        ModelLoadError: a needed number is missing or not a positive integer; names it.
    """
    text = _text_config(config)
    layers = _number(text, "num_hidden_layers", "n_layer", "n_layers", "num_layers")
    heads = _number(text, "num_attention_heads", "n_head", "n_heads")
    kv_heads = _number(text, "num_key_value_heads") if text.get("num_key_value_heads") is not None else heads
    if text.get("head_dim") is not None:
        head_dim = _number(text, "head_dim")
    else:
        head_dim = _number(text, "hidden_size", "n_embd", "d_model") // heads
    full, sliding = _count_layers(text, layers)
    return KvLayout(
        full_layers=full,
        sliding_layers=sliding,
        sliding_window=_window(text) if sliding else 0,
        kv_heads=kv_heads,
        head_dim=head_dim,
        dtype_bytes=dtype_bytes,
    )


def kv_bytes(layout: KvLayout, tokens: int) -> int:
    """KV bytes that ``tokens`` tokens of one request take.

    tokens x layers x kv_heads x head_dim x 2 x dtype bytes, where sliding layers stop growing at their window and
    memory is taken in whole blocks of ``block_tokens``.
    """
    block = layout.block_tokens
    full_tokens = _round_up(tokens, block)
    sliding_tokens = min(full_tokens, _round_up(layout.sliding_window, block))
    layer_tokens = layout.full_layers * full_tokens + layout.sliding_layers * sliding_tokens
    return layer_tokens * _layer_token_bytes(layout)


def tokens_within(layout: KvLayout, bytes_max: int, tokens_max: int) -> int:
    """The most tokens, up to ``tokens_max``, of which one request takes at most ``bytes_max`` KV bytes."""
    low, high = 0, tokens_max
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if kv_bytes(layout, middle) <= bytes_max else (low, middle - 1)
    return low


def kv_bytes_per_token(layout: KvLayout) -> int:
    """KV bytes of one token in all layers: the growth per token until the sliding windows are full."""
    return (layout.full_layers + layout.sliding_layers) * _layer_token_bytes(layout)


def workspace_bytes(config: Mapping[str, Any], *, tokens: int, rows: int, dtype_bytes: int) -> int:
    """Device memory that one step takes beside weights and KV, as an upper estimate.

    The widest moment of a layer: the residual and its norms, queries, keys and values before and after their rotation, the
    gate, up and product of the MLP (of each expert that a token visits); and at the end the logits, once in the model's
    type and twice in float32 for the sampler. Layers come one after the other, so their number does not matter.

    Args:
        config: the parsed ``config.json``.
        tokens: computed in the step, all requests together.
        rows: of logits.
        dtype_bytes: bytes of one activation.

    Raises:
        ModelLoadError: as ``kv_layout_from_config``.
    """
    text = _text_config(config)
    hidden = _number(text, "hidden_size", "n_embd", "d_model")
    heads = _number(text, "num_attention_heads", "n_head", "n_heads")
    kv_heads = int(text.get("num_key_value_heads") or heads)
    head_dim = int(text.get("head_dim") or hidden // heads)
    inner = int(text.get("moe_intermediate_size") or text.get("intermediate_size") or text.get("n_inner") or 4 * hidden)
    experts = int(text.get("num_experts_per_tok") or text.get("experts_per_token") or 1)
    per_token = (
        4 * hidden + 2 * (heads + 2 * kv_heads) * head_dim + experts * (3 * inner + (hidden if experts > 1 else 0))
    )
    per_row = _number(text, "vocab_size") * (dtype_bytes + 2 * 4)
    return tokens * per_token * dtype_bytes + rows * per_row


def max_model_len_from_config(config: Mapping[str, Any]) -> int:
    """The context in tokens (prompt plus output) that the model was made for.

    Raises:
        ModelLoadError: the config states it as something else than a positive integer.
    """
    text = _text_config(config)
    names = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "n_ctx")
    if all(text.get(name) is None for name in names):
        return DEFAULT_MAX_MODEL_LEN
    return _number(text, *names)


def _text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    nested: Any = config.get("text_config")
    return cast("Mapping[str, Any]", nested) if isinstance(nested, Mapping) else config


def _number(config: Mapping[str, Any], *names: str) -> int:
    for name in names:
        value = config.get(name)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
            raise ModelLoadError(f"config.json: {name} is {value!r}; it must be a positive integer")
        return value
    raise ModelLoadError(f"config.json has no {names[0]}; without it KV memory cannot be estimated")


def _count_layers(text: Mapping[str, Any], layers: int) -> tuple[int, int]:
    """(full, sliding) layers; the rest keeps no KV."""
    kinds: Any = text.get("layer_types")
    if isinstance(kinds, list | tuple):
        names = cast("Sequence[Any]", kinds)
        sliding = sum(kind in _SLIDING_TYPES for kind in names)
        cacheless = sum(kind in _CACHELESS_TYPES for kind in names)
        return len(names) - sliding - cacheless, sliding
    if not _slides(text):
        return layers, 0
    pattern = text.get("sliding_window_pattern", _DEFAULT_SLIDING_PATTERN.get(str(text.get("model_type"))))
    if isinstance(pattern, int) and pattern > 1:
        return layers // pattern, layers - layers // pattern
    if text.get("use_sliding_window") is True and isinstance(text.get("max_window_layers"), int):
        full = min(layers, int(text["max_window_layers"]))  # Qwen: the first layers stay full
        return full, layers - full
    return 0, layers


def _slides(text: Mapping[str, Any]) -> bool:
    if text.get("sliding_window") is None:
        return False
    off_by_default = str(text.get("model_type", "")).startswith(_SLIDING_OFF_BY_DEFAULT)
    return bool(text.get("use_sliding_window", not off_by_default))


def _window(text: Mapping[str, Any]) -> int:
    return _number(text, "sliding_window", "attention_chunk_size")


def _layer_token_bytes(layout: KvLayout) -> int:
    return layout.kv_heads * layout.head_dim * 2 * layout.dtype_bytes


def _round_up(tokens: int, block: int) -> int:
    return -(-tokens // block) * block
