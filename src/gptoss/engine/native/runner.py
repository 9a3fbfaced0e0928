"""Runs Llama-like models on a CPU through ``kernels.cpp``: one call a step, whatever the step holds.

Rules:
- A model is taken if every part of it is one that the kernels compute: root-mean-square norms, rotary positions of a
  fixed table, full attention with shared KV heads, a gated SiLU, no multipliers. ``choose_runner`` then compares its
  logits with transformers' own.
- The model's own weights are freed as they are packed. Who finds that it should not have been taken loads it again.
- KV memory is the engine's ``KvSlot`` in bfloat16, in whole blocks of 32 positions; what stands where inside of a block
  is the kernels' own affair. Between the matrix products everything is float32.
"""

import ctypes
from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any

import msgspec
import torch
from torch import nn

from gptoss.engine.attention import Chunk
from gptoss.engine.kv_cache import KvGeometry, KvSlot, LayerGeometry
from gptoss.engine.native.memory import Arena, ask_for_huge_pages, round_up
from gptoss.engine.native.weights import DEPTH, LANES, PackedWeights, WeightFormat, WeightsStruct
from gptoss.messages.model import Summation

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# torch and transformers are only partly typed.

ARCHITECTURES = frozenset({"LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"})
ROPE_TYPES = frozenset({"default", "linear", "llama3", "yarn"})
"""Those whose table does not depend on the length of the sequence."""

HEAD_DIM_MAX = 256
POSITIONS_MIN = 64
"""The table holds at least these, for the comparison with the model's own logits."""


class UnsupportedModelError(Exception):
    """The kernels do not compute this model."""


class _LayerStruct(ctypes.Structure):
    _fields_ = (
        ("attention_norm", ctypes.c_void_p),
        ("mlp_norm", ctypes.c_void_p),
        ("query_norm", ctypes.c_void_p),
        ("key_norm", ctypes.c_void_p),
        ("qkv", WeightsStruct),
        ("output", WeightsStruct),
        ("gate_up", WeightsStruct),
        ("down", WeightsStruct),
    )


class _ConfigStruct(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int32) for name in ("layers", "hidden", "heads", "kv_heads", "head_dim")),
        *((name, ctypes.c_int32) for name in ("intermediate", "vocab", "threads", "in_pairs")),
        ("epsilon", ctypes.c_float),
        ("scale", ctypes.c_float),
        *((name, ctypes.c_void_p) for name in ("cosines", "sines", "final_norm", "embedding")),
        ("head", WeightsStruct),
    )


class _StepStruct(ctypes.Structure):
    _fields_ = (
        ("rows", ctypes.c_int32),
        *((name, ctypes.c_void_p) for name in ("token_ids", "positions", "slots", "capacities")),
        ("num_logits", ctypes.c_int32),
        ("logit_rows", ctypes.c_void_p),
        ("logits", ctypes.c_void_p),
        ("logits_stride", ctypes.c_int64),
    )


class NativeRunner:
    """``engine.runner.Runner`` on the kernels.

    Args:
        library: the kernels.
        model: a transformers model on the CPU; its weights are gone afterwards.
        form: how weights are stored.
        max_model_len: positions that requests may reach.
        num_threads: that a step runs on.
        summation: in which order products with bfloat16 weights are summed; ``auto`` takes what is fastest here.

    Attributes:
        summation: the order that is kept to.
        weights_bytes: what the weights occupy.
        geometry: of the KV slots.

    Raises:
        UnsupportedModelError: see the module's rules; the model is untouched then.
    """

    is_batched = True
    is_row_invariant = True
    is_batch_invariant = True

    def __init__(
        self,
        library: ctypes.CDLL,
        model: Any,
        *,
        form: WeightFormat,
        max_model_len: int,
        num_threads: int,
        summation: Summation = "auto",
    ) -> None:
        _check(model)
        config = model.config
        head_dim = model.model.layers[0].self_attn.head_dim
        layers = [LayerGeometry(kv_heads=config.num_key_value_heads, head_dim=head_dim, window=0)]
        self.geometry = KvGeometry(layers * config.num_hidden_layers, torch.bfloat16, torch.device("cpu"))
        self.layout = msgspec.structs.replace(self.geometry.layout, block_tokens=DEPTH)
        self.dtype = torch.bfloat16
        self._vocab = config.vocab_size
        self._library = library
        self._arena = Arena()
        self._kept: list[Any] = []  # what the kernels point to
        self.weights_bytes = 0
        if summation == "auto":
            summation = "pairs" if library.gptoss_prefers_pairs() else "blocks"
        self.summation: Summation = summation
        cosines, sines = _rope_table(model, max(max_model_len, POSITIONS_MIN))
        embedding = model.model.embed_tokens.weight
        is_tied = model.lm_head.weight.data_ptr() == embedding.data_ptr()
        if not is_tied:
            embedding = self._keep(embedding.detach().to(torch.bfloat16).contiguous())
            self.weights_bytes += embedding.numel() * embedding.element_size()
        layer_structs = (_LayerStruct * config.num_hidden_layers)(
            *(self._pack_layer(each, form) for each in model.model.layers)
        )
        struct = _ConfigStruct(
            layers=config.num_hidden_layers,
            hidden=config.hidden_size,
            heads=config.num_attention_heads,
            kv_heads=config.num_key_value_heads,
            head_dim=head_dim,
            intermediate=config.intermediate_size,
            vocab=config.vocab_size,
            threads=num_threads,
            in_pairs=summation == "pairs",
            epsilon=config.rms_norm_eps,
            scale=head_dim**-0.5,
            cosines=self._keep(cosines).data_ptr(),
            sines=self._keep(sines).data_ptr(),
            final_norm=self._vector(model.model.norm.weight),
            embedding=0 if is_tied else embedding.data_ptr(),
            head=self._pack([model.lm_head], "int8" if form == "int4" else form),
        )
        library.gptoss_create.restype = ctypes.c_void_p
        self._engine = library.gptoss_create(ctypes.byref(struct), layer_structs)
        if not self._engine:
            raise MemoryError("no memory for the CPU kernels")

    def __del__(self) -> None:
        if getattr(self, "_engine", None):
            self._library.gptoss_destroy(ctypes.c_void_p(self._engine))

    def new_slot(self, tokens: int) -> KvSlot:
        """See ``Runner``."""
        slot = KvSlot(self.geometry, round_up(tokens, DEPTH))
        for store in slot.stores:
            ask_for_huge_pages(store)
        return slot

    def forward(self, chunks: Sequence[Chunk]) -> list[torch.Tensor | None]:
        """See ``Runner``."""
        lengths = [len(chunk.token_ids) for chunk in chunks]
        rows = sum(lengths)
        token_ids = (ctypes.c_int32 * rows)(*chain.from_iterable(chunk.token_ids for chunk in chunks))
        spans = (range(chunk.start, chunk.start + length) for chunk, length in zip(chunks, lengths, strict=True))
        positions = (ctypes.c_int32 * rows)(*chain.from_iterable(spans))
        slots = (ctypes.c_void_p * rows)(*_repeat([chunk.slot.stores[0].data_ptr() for chunk in chunks], lengths))
        capacities = (ctypes.c_int32 * rows)(*_repeat([chunk.slot.tokens for chunk in chunks], lengths))
        wanted: list[int] = []
        end = 0
        for chunk, length in zip(chunks, lengths, strict=True):
            end += length
            wanted += range(end - chunk.num_logits, end)
        logit_rows = (ctypes.c_int32 * len(wanted))(*wanted)
        width = round_up(self._vocab, LANES)
        logits = torch.empty((len(wanted), width))
        step = _StepStruct(
            rows=rows,
            token_ids=ctypes.addressof(token_ids),
            positions=ctypes.addressof(positions),
            slots=ctypes.addressof(slots),
            capacities=ctypes.addressof(capacities),
            num_logits=len(wanted),
            logit_rows=ctypes.addressof(logit_rows),
            logits=logits.data_ptr(),
            logits_stride=width,
        )
        if self._library.gptoss_forward(ctypes.c_void_p(self._engine), ctypes.byref(step)):
            raise MemoryError(f"no memory for a step of {rows} rows")
        found = logits[:, : self._vocab].split([chunk.num_logits for chunk in chunks])
        return [rows_of if chunk.num_logits else None for chunk, rows_of in zip(chunks, found, strict=True)]

    def _pack_layer(self, layer: Any, form: WeightFormat) -> _LayerStruct:
        attention, mlp = layer.self_attn, layer.mlp
        return _LayerStruct(
            attention_norm=self._vector(layer.input_layernorm.weight),
            mlp_norm=self._vector(layer.post_attention_layernorm.weight),
            query_norm=self._vector(attention.q_norm.weight) if hasattr(attention, "q_norm") else 0,
            key_norm=self._vector(attention.k_norm.weight) if hasattr(attention, "k_norm") else 0,
            qkv=self._pack([attention.q_proj, attention.k_proj, attention.v_proj], form),
            output=self._pack([attention.o_proj], form),
            gate_up=self._pack([mlp.gate_proj, mlp.up_proj], form, interleaved=True),
            down=self._pack([mlp.down_proj], form),
        )

    def _pack(self, linears: list[nn.Linear], form: WeightFormat, *, interleaved: bool = False) -> WeightsStruct:
        packed = self._keep(PackedWeights(self._library, self._arena, linears, form, interleaved=interleaved))
        self.weights_bytes += packed.num_bytes
        for linear in linears:
            linear.weight = nn.Parameter(torch.empty(0), requires_grad=False)
        return packed.struct

    def _vector(self, weight: torch.Tensor) -> int:
        kept = self._keep(weight.detach().float().contiguous())
        self.weights_bytes += kept.numel() * kept.element_size()
        return kept.data_ptr()

    def _keep(self, thing: Any) -> Any:
        self._kept.append(thing)
        return thing


def _repeat(values: Sequence[int], counts: Sequence[int]) -> Iterator[int]:
    return chain.from_iterable([value] * count for value, count in zip(values, counts, strict=True))


def _check(model: Any) -> None:
    """Raise ``UnsupportedModelError`` for what the kernels do not compute."""
    config, name = model.config, type(model).__name__
    if name not in ARCHITECTURES:
        raise UnsupportedModelError(f"the CPU kernels do not know {name}")
    attention = model.model.layers[0].self_attn
    rope = getattr(model.model.rotary_emb, "rope_type", "default")
    reasons = {
        f"activation {config.hidden_act}": config.hidden_act != "silu",
        f"rope type {rope}": rope not in ROPE_TYPES,
        f"head_dim {attention.head_dim}": attention.head_dim % 32 != 0 or attention.head_dim > HEAD_DIM_MAX,
        f"hidden size {config.hidden_size}": bool(config.hidden_size % 32),
        f"intermediate size {config.intermediate_size}": bool(config.intermediate_size % 32),
        "not all matrices are plain linear layers": not all(
            type(module) is nn.Linear for name, module in model.named_modules() if name.endswith(("_proj", "lm_head"))
        ),
    }
    found = [reason for reason, holds in reasons.items() if holds]
    if found:
        raise UnsupportedModelError(f"the CPU kernels do not compute {', '.join(found)}")


@torch.inference_mode()
def _rope_table(model: Any, positions: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines of each position, ``[positions, head_dim / 2]`` float32, as the model itself computes them."""
    cosines, sines = model.model.rotary_emb(torch.zeros(1), torch.arange(positions)[None])
    half = cosines.shape[-1] // 2
    return cosines[0, :, :half].float().contiguous(), sines[0, :, :half].float().contiguous()
