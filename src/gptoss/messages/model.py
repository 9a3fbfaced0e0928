"""What a loaded model is: its limits, its KV geometry and its fingerprint."""

from typing import Literal, TypeAlias

import msgspec

from gptoss.messages.plan import Limits

FinishReason: TypeAlias = Literal["stop", "length", "cancelled"]


class KvLayout(msgspec.Struct, frozen=True, kw_only=True):
    """What ``memory_model`` needs to turn tokens into bytes.

    Attributes:
        full_layers: layers that keep every position.
        sliding_layers: layers that keep at most ``sliding_window`` positions.
        dtype_bytes: bytes of one K or V element.
        block_tokens: granularity in which memory is taken, in tokens.
    """

    full_layers: int
    sliding_layers: int
    sliding_window: int
    kv_heads: int
    head_dim: int
    dtype_bytes: int
    block_tokens: int = 1


Summation = Literal["auto", "blocks", "pairs"]
"""In which order the CPU kernels sum products with bfloat16 weights: that of TDPBF16PS, or that of VDPBF16PS."""


class DeviceShare(msgspec.Struct, frozen=True, kw_only=True):
    """What one device of an engine that spans several holds: its part of the weights and of the KV budget, in bytes."""

    device: str
    weights_bytes: int
    kv_budget_bytes: int


class DeviceMemory(msgspec.Struct, frozen=True, kw_only=True):
    """A reading of one device: memory in use, by this engine's process on a CPU and by everybody on a GPU."""

    device: str
    used_bytes: int
    total_bytes: int
    free_bytes: int = -1


class EngineCapabilities(msgspec.Struct, frozen=True, kw_only=True):
    """What a loaded engine can take.

    Attributes:
        max_model_len: prompt plus output, in tokens.
        max_batch_size: requests that can run at once.
        kv_budget_bytes: KV memory that may be reserved on this engine.
        limits: what its scheduler keeps to.
        prefix_cache_bytes: the most of that KV memory that cached prefixes may take while it is not reserved.
        kv_pages: pages that it consists of; 0 where each request has a contiguous slot of its own.
        summation: of the CPU kernels; ``auto`` where others run.
        multi_device: it spans several devices.
        shares: what each of those holds; they add up to ``weights_bytes``, where nothing is held twice, and
            ``kv_budget_bytes``.
        workspace_bytes: device memory that a step may take beside weights and KV, as estimated.
    """

    model_name: str
    architecture: str
    vocab_size: int
    max_model_len: int
    max_batch_size: int
    kv_budget_bytes: int
    kv_layout: KvLayout
    weights_bytes: int
    device: str
    dtype: str
    num_threads: int
    eos_token_ids: tuple[int, ...]
    limits: Limits | None = None
    prefix_cache_bytes: int = 0
    kv_pages: int = 0
    summation: Summation = "auto"
    multi_device: bool = False
    workspace_bytes: int = 0
    shares: tuple[DeviceShare, ...] = ()


class ModelFingerprint(msgspec.Struct, frozen=True, kw_only=True):
    """Hashes that say whether another machine has the same model. Hex sha256 each; empty where there is no such file."""

    weights: str
    tokenizer: str
    chat_template: str
    config: str
