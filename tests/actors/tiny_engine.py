"""What a tiny engine says of itself: one layer and one head of one number, so that a token is two bytes of KV memory."""

from typing import Any

import msgspec

from gptoss.messages.model import EngineCapabilities, KvLayout

_LAYOUT = KvLayout(full_layers=1, sliding_layers=0, sliding_window=0, kv_heads=1, head_dim=1, dtype_bytes=1)
_CAPABILITIES = EngineCapabilities(
    model_name="m",
    architecture="a",
    vocab_size=10,
    max_model_len=100,
    max_batch_size=4,
    kv_budget_bytes=200,
    kv_layout=_LAYOUT,
    weights_bytes=0,
    device="cpu",
    dtype="float32",
    num_threads=1,
    eos_token_ids=(0,),
)


def tiny_capabilities(**changes: Any) -> EngineCapabilities:
    """Those of a tiny engine, with some fields otherwise."""
    return msgspec.structs.replace(_CAPABILITIES, **changes)
