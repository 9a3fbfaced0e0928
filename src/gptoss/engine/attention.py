"""Attention over KV memory: the seam between transformers' model code and this engine's.

Rules:
- Model code calls ``packed_attention`` (registered under ``ATTENTION_NAME``) with packed rows ``[1, T]`` of all requests of
  a step, and passes on the ``packed`` keyword it was called with. No mask is built by transformers: a name without a
  mask function gets none.
- Each chunk of prefill attends to its own keys at their exact length, in its own kernel call. So does each decoding
  request over slots; over pages they share their calls (``paged_attention``). Either way a result is the same whoever
  else is in the step, as far as the device's kernels allow.
- Query heads that share a KV head are folded into the query dimension (decode) or the batch dimension (prefill).
- Sinks (gpt-oss) are one more logit in the softmax's denominator: scaling the output by ``sigmoid(lse - sink)`` is that.
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol, cast

import msgspec
import torch
from torch.nn import functional

from gptoss.engine.kv_cache import LayerGeometry

ATTENTION_NAME = "gptoss_packed"
SINK_DIMS = 8
"""By which heads grow for the sink: kernels want multiples of 8."""

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
    """What model code passes through to ``packed_attention``."""

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
    """The model wants something that this engine's KV memory does not do; it is served by the generic runner."""


def packed_attention(
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


class Decodes(Protocol):
    """The decoding requests of a step over one layout of KV memory."""

    def attend(
        self, layer: int, query: torch.Tensor, kv: torch.Tensor, scale: float, options: "LayerOptions"
    ) -> torch.Tensor:
        """Write the new keys and values, and attend to those and all before.

        Args:
            layer: its index.
            query: ``[heads, requests, head_dim]``.
            kv: ``[2, kv_heads, requests, head_dim]``.
            scale: factor of the scores.
            options: see ``Packed.attend``.

        Returns:
            ``[requests, heads, head_dim]``.
        """
        ...


class PackedRows:
    """The rows of one step over their KV memory.

    Args:
        chunks: those of a single token come first.
        padding: rows after the last chunk, whose result is of no interest.
        decodes: makes what runs those of a single token.
    """

    def __init__(self, chunks: Sequence[Chunk], padding: int, decodes: Callable[[Sequence[Chunk]], Decodes]) -> None:
        self._padding = padding
        self._prefills = [chunk for chunk in chunks if len(chunk.token_ids) > 1]
        self._num_decodes = len(chunks) - len(self._prefills)
        self._decodes = decodes(chunks[: self._num_decodes]) if self._num_decodes else None
        self._masks: dict[tuple[int, int, int, int, torch.device], torch.Tensor] = {}

    def attend(
        self, layer: int, qkv: tuple[torch.Tensor, torch.Tensor, torch.Tensor], scale: float, options: LayerOptions
    ) -> torch.Tensor:
        """See ``Packed``."""
        query = qkv[0]
        kv = torch.stack(qkv[1:])
        results: list[torch.Tensor] = []
        row = self._num_decodes
        if self._decodes:
            results.append(self._decodes.attend(layer, query[:, :row], kv[:, :, :row], scale, options))
        for chunk in self._prefills:
            rows = slice(row, row + len(chunk.token_ids))
            results.append(self._attend_prefill(layer, chunk, (query[:, rows], kv[:, :, rows]), scale, options))
            row = rows.stop
        if self._padding:
            results.append(query.new_zeros((self._padding, query.shape[0], query.shape[2])))
        return torch.cat(results) if len(results) > 1 else results[0]

    def _attend_prefill(
        self, layer: int, chunk: Chunk, qkv: tuple[torch.Tensor, torch.Tensor], scale: float, options: LayerOptions
    ) -> torch.Tensor:
        query, kv = qkv
        heads, rows, head_dim = query.shape
        groups = heads // kv.shape[1]
        keys, first = chunk.slot.extend(layer, kv, chunk.start)
        # [groups, kv_heads, rows, head_dim]; the groups share the keys
        folded = query.view(kv.shape[1], groups, rows, head_dim).transpose(0, 1)
        sinks = options.sinks.view(-1, groups).t()[:, :, None] if options.sinks is not None else None
        mask = self._mask(chunk.start, rows, first, options.window, query)
        out = attend(folded, (keys[:1], keys[1:]), scale, sinks=sinks, mask=mask, is_causal=mask is None)
        return out.permute(2, 1, 0, 3).reshape(rows, heads, head_dim)

    def _mask(self, start: int, rows: int, first: int, window: int, like: torch.Tensor) -> torch.Tensor | None:
        """What to add to the scores of keys ``first`` to ``start + rows``; None is plain causal from position 0."""
        if start == 0 and (not window or rows <= window):
            return None
        place = (start, rows, first, window, like.device)
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


class SlotDecodes:
    """``Decodes`` over contiguous slots: a kernel call for each request, at its exact length.

    Args:
        chunks: one token each.
    """

    def __init__(self, chunks: Sequence[Chunk]) -> None:
        views = [chunk.slot.decode_views(chunk.start) for chunk in chunks]
        self._layers = list(zip(*views, strict=True))  # of each layer: (target, keys, values) of each request

    def attend(
        self, layer: int, query: torch.Tensor, kv: torch.Tensor, scale: float, options: LayerOptions
    ) -> torch.Tensor:
        """See ``Decodes``."""
        heads, count, head_dim = query.shape
        kv_heads = kv.shape[1]
        views = self._layers[layer]
        _foreach_copy([target for target, _, _ in views], kv.unbind(2))
        sinks = options.sinks.view(1, kv_heads, -1) if options.sinks is not None else None
        folded = query.transpose(0, 1).reshape(count, 1, kv_heads, heads // kv_heads, head_dim)
        found = [
            attend(row, (keys, values), scale, sinks=sinks)
            for row, (_, keys, values) in zip(folded.unbind(0), views, strict=True)
        ]
        return torch.cat(found).reshape(count, heads, head_dim)


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
        kv: keys and values, ``[1, heads, length, head_dim]`` each: one for the whole batch.
        scale: factor of the scores.
        sinks: broadcast to ``[batch, heads, rows]``.
        mask: added to the scores, ``[rows, length]``.
        is_causal: row ``i`` sees the first ``i + 1`` keys; only without a mask.

    Returns:
        ``[batch, heads, rows, head_dim]``.
    """
    if query.device.type != "cpu":
        return attend_portably(query, kv, scale, sinks=sinks, mask=mask, is_causal=is_causal)
    keys, values = (each.expand(query.shape[0], -1, -1, -1) for each in kv)  # repeated by a stride of zero
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(  # noqa: SLF001 - the public call hides lse
        query, keys, values, 0.0, is_causal, attn_mask=mask, scale=scale
    )
    return out if sinks is None else out * torch.sigmoid(lse - sinks)[..., None].to(out.dtype)


def attend_portably(
    query: torch.Tensor,
    kv: tuple[torch.Tensor, torch.Tensor],
    scale: float,
    *,
    sinks: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    is_causal: bool = False,
) -> torch.Tensor:
    """``attend`` with torch's public call alone, for any device; memory does not grow with rows times keys times heads.

    That call knows no sinks. So there is one more key, seen by every row: heads get further dimensions, in which this key
    is 1, all others are 0, and a query is what makes its score the sink. Its value is 0.
    """
    keys, values = kv
    rows, length, head_dim = query.shape[2], keys.shape[2], query.shape[3]
    if sinks is not None:
        if is_causal:
            mask = query.new_full((rows, length), float("-inf")).triu_(1)
            is_causal = False
        mask = functional.pad(mask, (0, 1)) if mask is not None else None
        widened = functional.pad(query, (0, SINK_DIMS))
        widened[..., head_dim] = (sinks.float() / scale).to(query.dtype)
        query = widened
        keys = functional.pad(keys, (0, SINK_DIMS, 0, 1))
        keys[:, :, length, head_dim] = 1.0
        values = functional.pad(values, (0, SINK_DIMS, 0, 1))
    shared = (each.expand(query.shape[0], -1, -1, -1) for each in (keys, values))
    out = functional.scaled_dot_product_attention(query, *shared, attn_mask=mask, is_causal=is_causal, scale=scale)
    return out[..., :head_dim]
