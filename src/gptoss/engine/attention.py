"""Attention over KV slots: the seam between transformers' model code and this engine's KV memory.

Rules:
- Model code calls ``slot_attention`` (registered under ``ATTENTION_NAME``) with packed rows ``[1, T]`` of all requests of
  a step, and passes on the ``packed`` keyword it was called with. No mask is built by transformers: a name without a
  mask function gets none.
- Each request attends to its own keys at their exact length, in its own kernel call. So its result is the same
  whoever else is in the step, and nothing is ever padded.
- Query heads that share a KV head are folded into the query dimension (decode) or the batch dimension (prefill).
- Sinks (gpt-oss) are one more logit in the softmax's denominator: scaling the output by ``sigmoid(lse - sink)`` is that.
"""

from collections.abc import Sequence
from typing import Any, Protocol, cast

import msgspec
import torch
from torch.nn import functional

from gptoss.engine.kv_cache import KvSlot, LayerGeometry

ATTENTION_NAME = "gptoss_slots"

_foreach_copy = cast(
    "Any", torch
)._foreach_copy_  # private, but what torch's optimisers are built of: one call for many


class Chunk(msgspec.Struct, frozen=True, kw_only=True):
    """Tokens of one request to run in a step: one when decoding, more when prefilling.

    Attributes:
        start: absolute position of the first of ``token_ids``; what is before it was run earlier.
        num_logits: how many of the last rows want logits: 0, 1, or more when drafts are verified.
    """

    slot: Any
    token_ids: Sequence[int]
    start: int
    num_logits: int


class Packed(Protocol):
    """What model code passes through to ``slot_attention``."""

    def attend(
        self, layer: int, qkv: tuple[torch.Tensor, torch.Tensor, torch.Tensor], scale: float, options: "LayerOptions"
    ) -> torch.Tensor:
        """Attention of one layer.

        Args:
            layer: its index.
            qkv: queries ``[heads, T, head_dim]``, keys and values ``[kv_heads, T, head_dim]``, positions applied.
            scale: factor of the scores.
            options: window and sinks.

        Returns:
            ``[T, heads, head_dim]``.
        """
        ...


class LayerOptions(msgspec.Struct, frozen=True):
    """What distinguishes a layer. ``window`` 0 attends to every position; ``sinks`` is ``[heads]``."""

    window: int
    sinks: torch.Tensor | None


class UnsupportedAttentionError(Exception):
    """The model wants something that slots do not do; it is served by the generic runner."""


def slot_attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """The attention function that transformers' layers call.

    Args:
        module: the layer; its ``layer_idx`` says which.
        query: ``[1, heads, T, head_dim]``.
        key: ``[1, kv_heads, T, head_dim]``.
        value: as ``key``.
        attention_mask: none; a model that makes its own is not supported.
        options: ``scaling``, ``sliding_window``, ``s_aux`` and the ``packed`` rows of this step.

    Returns:
        ``[1, T, heads, head_dim]``, and no weights.

    Source: transformers, ``modeling_utils.AttentionInterface``.
    """
    packed: Packed | None = options.get("packed")
    if packed is None or attention_mask is not None or options.get("softcap") is not None:
        raise UnsupportedAttentionError("the model does not pass packed rows on, masks by itself or caps scores")
    scaling: float | None = options.get("scaling")
    layer_options = LayerOptions(options.get("sliding_window") or 0, options.get("s_aux"))
    scale = float(query.shape[-1] ** -0.5) if scaling is None else scaling
    return packed.attend(module.layer_idx, (query[0], key[0], value[0]), scale, layer_options)[None], None


class GeometryProbe:
    """Packed rows that compute nothing and note what each layer asks for; ``dtype`` is that of the keys."""

    def __init__(self) -> None:
        self._layers: dict[int, LayerGeometry] = {}
        self.dtype = torch.float32

    def attend(
        self, layer: int, qkv: tuple[torch.Tensor, torch.Tensor, torch.Tensor], scale: float, options: LayerOptions
    ) -> torch.Tensor:
        """See ``Packed``."""
        del scale
        query, key, value = qkv
        if value.shape != key.shape or query.shape[0] % key.shape[0] or layer in self._layers:
            raise UnsupportedAttentionError(f"layer {layer}: keys {tuple(key.shape)}, values {tuple(value.shape)}")
        self.dtype = key.dtype
        geometry = LayerGeometry(kv_heads=key.shape[0], head_dim=key.shape[2], window=options.window)
        self._layers[layer] = geometry
        return torch.zeros_like(query.transpose(0, 1))

    def layers(self) -> list[LayerGeometry]:
        """Geometry of the layers in order.

        Raises:
            UnsupportedAttentionError: some layer did not call, so layers are not all attention.
        """
        if sorted(self._layers) != list(range(len(self._layers))) or not self._layers:
            raise UnsupportedAttentionError(f"only layers {sorted(self._layers)} attend")
        return [self._layers[index] for index in range(len(self._layers))]


class PackedRows:
    """The rows of one step over their KV slots.

    Args:
        chunks: those of a single token come first.
        padding: rows after the last chunk, whose result is of no interest.
    """

    def __init__(self, chunks: Sequence[Chunk], padding: int) -> None:
        self._padding = padding
        self._prefills = [chunk for chunk in chunks if len(chunk.token_ids) > 1]
        self._num_decodes = len(chunks) - len(self._prefills)
        views = [chunk.slot.decode_views(chunk.start) for chunk in chunks[: self._num_decodes]]
        self._decodes = list(zip(*views, strict=True))  # of each layer: (target, keys, values) of each request
        self._masks: dict[tuple[int, int, int, int], torch.Tensor] = {}

    def attend(
        self, layer: int, qkv: tuple[torch.Tensor, torch.Tensor, torch.Tensor], scale: float, options: LayerOptions
    ) -> torch.Tensor:
        """See ``Packed``."""
        query = qkv[0]
        kv = torch.stack(qkv[1:])
        results: list[torch.Tensor] = []
        if self._num_decodes:
            self._attend_decodes(results, layer, (query, kv), scale, options)
        row = self._num_decodes
        for chunk in self._prefills:
            rows = slice(row, row + len(chunk.token_ids))
            results.append(self._attend_prefill(layer, chunk, (query[:, rows], kv[:, :, rows]), scale, options))
            row = rows.stop
        if self._padding:
            results.append(query.new_zeros((self._padding, query.shape[0], query.shape[2])))
        return torch.cat(results) if len(results) > 1 else results[0]

    def _attend_decodes(
        self,
        results: list[torch.Tensor],
        layer: int,
        qkv: tuple[torch.Tensor, torch.Tensor],
        scale: float,
        options: LayerOptions,
    ) -> None:
        query, kv = qkv
        heads, _, head_dim = query.shape
        kv_heads = kv.shape[1]
        views = self._decodes[layer]
        _foreach_copy([target for target, _, _ in views], kv.unbind(2)[: self._num_decodes])
        sinks = options.sinks.view(1, kv_heads, -1) if options.sinks is not None else None
        folded = query.transpose(0, 1)[: self._num_decodes].reshape(-1, 1, kv_heads, heads // kv_heads, head_dim)
        for row, (_, keys, values) in zip(folded.unbind(0), views, strict=True):
            results.append(attend(row, (keys, values), scale, sinks=sinks).reshape(1, heads, head_dim))

    def _attend_prefill(
        self, layer: int, chunk: Chunk, qkv: tuple[torch.Tensor, torch.Tensor], scale: float, options: LayerOptions
    ) -> torch.Tensor:
        query, kv = qkv
        heads, rows, head_dim = query.shape
        groups = heads // kv.shape[1]
        keys, first = _store_chunk(chunk.slot, layer, kv, chunk.start)
        # [groups, kv_heads, rows, head_dim]; the keys are shared by the groups and repeated by a stride of zero
        folded = query.view(kv.shape[1], groups, rows, head_dim).transpose(0, 1)
        shared = keys[:, None].expand(-1, groups, -1, -1, -1)
        sinks = options.sinks.view(-1, groups).t()[:, :, None] if options.sinks is not None else None
        mask = self._mask(chunk.start, rows, first, options.window, query)
        out = attend(folded, (shared[0], shared[1]), scale, sinks=sinks, mask=mask, is_causal=mask is None)
        return out.permute(2, 1, 0, 3).reshape(rows, heads, head_dim)

    def _mask(self, start: int, rows: int, first: int, window: int, like: torch.Tensor) -> torch.Tensor | None:
        """What to add to the scores of keys ``first`` to ``start + rows``; None is plain causal from position 0."""
        if start == 0 and (not window or rows <= window):
            return None
        place = (start, rows, first, window)
        mask = self._masks.get(place)
        if mask is None:
            queries = torch.arange(start, start + rows, device=like.device)[:, None]
            keys = torch.arange(first, start + rows, device=like.device)[None]
            hidden = keys > queries
            if window:
                hidden |= keys <= queries - window
            mask = torch.zeros(hidden.shape, dtype=like.dtype, device=like.device).masked_fill_(hidden, float("-inf"))
            self._masks[place] = mask
        return mask


def _store_chunk(slot: KvSlot, layer: int, kv: torch.Tensor, start: int) -> tuple[torch.Tensor, int]:
    """Write a chunk's keys and values, ``[2, kv_heads, rows, head_dim]``; return those to attend to and their start."""
    store = slot.layer(layer)
    ring = store.shape[2]
    end = start + kv.shape[2]
    if end <= ring:
        store[:, :, start:end] = kv
        return store[:, :, :end], 0
    first = max(0, start - ring + 1)
    earlier = torch.arange(first, start, device=kv.device) % ring
    keys = torch.cat((store[:, :, earlier], kv), dim=2)
    kept = torch.arange(max(start, end - ring), end, device=kv.device)
    store[:, :, kept % ring] = kv[:, :, kept - start]
    return keys, first


def attend(
    query: torch.Tensor,
    kv: tuple[torch.Tensor, torch.Tensor],
    scale: float,
    *,
    sinks: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    is_causal: bool = False,
) -> torch.Tensor:
    """Softmax attention with sinks.

    Args:
        query: ``[batch, heads, rows, head_dim]``.
        kv: keys and values, ``[batch, heads, length, head_dim]`` each.
        scale: factor of the scores.
        sinks: broadcast to ``[batch, heads, rows]``.
        mask: added to the scores, ``[rows, length]``.
        is_causal: row ``i`` sees the first ``i + 1`` keys; only without a mask.

    Returns:
        ``[batch, heads, rows, head_dim]``.
    """
    keys, values = kv
    if query.device.type == "cpu":
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(  # noqa: SLF001 - the public call hides lse
            query, keys, values, 0.0, is_causal, attn_mask=mask, scale=scale
        )
        return out if sinks is None else out * torch.sigmoid(lse - sinks)[..., None].to(out.dtype)
    if sinks is None:
        return functional.scaled_dot_product_attention(
            query, keys, values, attn_mask=mask, is_causal=is_causal, scale=scale
        )
    scores = (query @ keys.transpose(2, 3)).float() * scale
    if is_causal:
        rows = torch.arange(query.shape[2], device=query.device)
        scores = scores.masked_fill(rows[None] > rows[:, None], float("-inf"))
    elif mask is not None:
        scores = scores + mask
    total = torch.logaddexp(torch.logsumexp(scores, dim=-1), sinks.float())
    return torch.exp(scores - total[..., None]).to(values.dtype) @ values
