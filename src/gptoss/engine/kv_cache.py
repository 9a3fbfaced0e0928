"""KV memory of one running request: a contiguous slot for each layer, as long as the request can become.

Rules:
- A slot is allocated once, for prompt plus ``max_tokens``, and never grows; its bytes are those that
  ``memory_model.kv_bytes`` estimates. On a CPU the pages are touched only as tokens arrive.
- Full layers keep position ``p`` at index ``p``. Sliding layers keep the last ``window`` positions in a ring, ``p`` at
  ``p % window``: a decoding query attends to the whole ring, since the order of keys does not matter.
- Writing a position twice is harmless where nothing is overwritten. In a ring a chunk overwrites what its own first
  rows attend to: whoever may have to undo a chunk keeps that with ``keep_overwritten``.

Shapes: ``[layer, 2, kv_heads, tokens, head_dim]``, with K at 0 and V at 1, for each distinct window of the model.
"""

from collections.abc import Iterator

import msgspec
import torch

from gptoss.messages.model import KvLayout


class LayerGeometry(msgspec.Struct, frozen=True, kw_only=True):
    """What one attention layer keeps. ``window`` 0 keeps every position."""

    kv_heads: int
    head_dim: int
    window: int


class KvGeometry:
    """Where each layer's keys and values stand.

    Args:
        layers: of the model, first to last; all of one shape and at most one window besides "keep all".
        dtype: of K and V.
        device: where they live.

    Attributes:
        windows: distinct windows; each has one tensor in every slot.
        places: of each layer, (index into ``windows``, index within that tensor).
        layout: the same as numbers for ``memory_model``.

    Raises:
        ValueError: the layers differ in a way that slots cannot hold.
    """

    def __init__(self, layers: list[LayerGeometry], dtype: torch.dtype, device: torch.device) -> None:
        shapes = {(layer.kv_heads, layer.head_dim) for layer in layers}
        windows = sorted({layer.window for layer in layers})
        if len(shapes) != 1 or len([window for window in windows if window]) > 1:
            raise ValueError(f"layers of different shapes: {sorted(shapes)}, windows {windows}")
        self.kv_heads, self.head_dim = shapes.pop()
        self.dtype = dtype
        self.device = device
        self.windows = tuple(windows)
        counts = [0] * len(windows)
        places: list[tuple[int, int]] = []
        for layer in layers:
            store = windows.index(layer.window)
            places.append((store, counts[store]))
            counts[store] += 1
        self.places = tuple(places)
        self.counts = tuple(counts)
        self.layout = KvLayout(
            full_layers=sum(layer.window == 0 for layer in layers),
            sliding_layers=sum(layer.window > 0 for layer in layers),
            sliding_window=windows[-1],
            kv_heads=self.kv_heads,
            head_dim=self.head_dim,
            dtype_bytes=dtype.itemsize,
        )


class KvSlot:
    """The KV memory of one request.

    Args:
        geometry: of the model.
        tokens: capacity in positions.

    Attributes:
        num_bytes: what it occupies.
    """

    def __init__(self, geometry: KvGeometry, tokens: int) -> None:
        self.geometry = geometry
        self.tokens = tokens
        self.stores = [
            torch.empty(
                (count, 2, geometry.kv_heads, min(tokens, window or tokens), geometry.head_dim),
                dtype=geometry.dtype,
                device=geometry.device,
            )
            for count, window in zip(geometry.counts, geometry.windows, strict=True)
        ]
        self.num_bytes = sum(store.numel() * store.element_size() for store in self.stores)

    def layer(self, layer: int) -> torch.Tensor:
        """K and V of one layer, ``[2, kv_heads, tokens, head_dim]``."""
        store, index = self.geometry.places[layer]
        return self.stores[store][index]

    def copy_out(self, first: int, end: int, computed: int) -> list[torch.Tensor | None]:
        """Copies of what is kept of positions ``first`` to ``end``, for each distinct window.

        Args:
            first: first position.
            end: position after the last.
            computed: positions that the slot has seen; a ring holds the last of them.

        Returns:
            ``[layer, 2, kv_heads, tokens, head_dim]`` each. Of a ring at most its length, the last of the positions; None
            where some of those have been overwritten.
        """
        parts: list[torch.Tensor | None] = []
        for store in self.stores:
            ring = store.shape[3]
            oldest = max(first, end - ring)
            is_there = oldest >= computed - ring
            kept = store[:, :, :, _places(oldest, end, ring)] if is_there else None
            parts.append(None if kept is None else kept.clone(memory_format=torch.contiguous_format))
        return parts

    def copy_in(self, end: int, parts: list[torch.Tensor | None]) -> None:
        """Put back what ``copy_out`` gave of the positions before ``end``; None leaves a store as it is."""
        for store, part in zip(self.stores, parts, strict=True):
            if part is not None:
                store[:, :, :, _places(end - part.shape[3], end, store.shape[3])] = part

    def keep_overwritten(self, start: int, end: int) -> list[torch.Tensor | None]:
        """Copies of what writing positions ``start`` to ``end`` overwrites, for each distinct window; None for nothing."""
        kept: list[torch.Tensor | None] = []
        for store in self.stores:
            ring = store.shape[3]
            places = _places(max(start, end - ring), end, ring)
            part = store[:, :, :, places].clone(memory_format=torch.contiguous_format) if end > ring else None
            kept.append(part)
        return kept

    def undo(self, start: int, end: int, kept: list[torch.Tensor | None]) -> None:
        """Make as if positions ``start`` to ``end`` had not been written.

        Args:
            start: first position to undo.
            end: as given to ``keep_overwritten``.
            kept: what that returned, for this or an earlier start.
        """
        for store, part in zip(self.stores, kept, strict=True):
            if part is not None:
                count = min(end - start, part.shape[3])
                places = _places(end - count, end, store.shape[3])
                store[:, :, :, places] = part[:, :, :, part.shape[3] - count :]

    def decode_views(self, position: int) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """For each layer, where the K and V of ``position`` go, and the keys and values to attend to after that."""
        views: list[list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]] = []
        for store in self.stores:
            ring = store.shape[3]
            length = min(position + 1, ring)
            # unbind makes the views of all layers in one call; slicing layer by layer costs twenty times as much
            targets = store[:, :, :, position % ring].unbind(0)
            keys = store[:, :1, :, :length].unbind(0)
            values = store[:, 1:, :, :length].unbind(0)
            views.append(list(zip(targets, keys, values, strict=True)))
        return (views[store][index] for store, index in self.geometry.places)


def _places(first: int, end: int, ring: int) -> slice | torch.Tensor:
    """Where positions ``first`` to ``end``, at most ``ring`` of them, stand in a ring."""
    begin = first % ring
    if begin + end - first <= ring:
        return slice(begin, begin + end - first)
    return torch.arange(first, end) % ring
