"""KV memory of one running request: what every layout can do, and the contiguous one. ``kv_pages`` has the paged one.

Rules:
- KV memory is taken once, for prompt plus ``max_tokens``, and never grows; its bytes are those that
  ``memory_model.kv_bytes`` estimates. On a CPU the memory of a slot is touched only as tokens arrive.
- Full layers keep position ``p`` at place ``p``. Sliding layers keep the last positions in a ring, ``p`` at ``p % ring``,
  which is no shorter than the window: a decoding query attends to the ring, since the order of keys does not matter.
- Writing a position twice is harmless where nothing is overwritten. In a ring a chunk overwrites what its own first
  rows attend to: whoever may have to undo a chunk keeps that with ``keep_overwritten``.

Layers of one window on one device are a *store*. Keys and values of some positions are ``[2, kv_heads, tokens, head_dim]``, K at 0 and V
at 1, with the layers of a store in front where all of them are meant.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any

import msgspec
import torch

from gptoss.messages.model import KvLayout


class LayerGeometry(msgspec.Struct, frozen=True, kw_only=True):
    """What one attention layer keeps. ``window`` 0 keeps every position; ``stage`` is the number of its device."""

    kv_heads: int
    head_dim: int
    window: int
    stage: int = 0


class KvGeometry:
    """Where each layer's keys and values stand.

    Args:
        layers: of the model, first to last; all of one shape and at most one window besides "keep all".
        dtype: of K and V.
        device: where tokens go in, and where all of it lives unless there are stages.
        stages: device of each stage.
        shards: processes that each have as many heads; bytes and ``layout`` are of all of them together.

    Attributes:
        windows: of each store.
        devices: of each store.
        counts: layers of each store.
        places: of each layer, (store, index within it).
        layout: the same as numbers for ``memory_model``.
        layer_token_bytes: K and V of one position in one layer.

    Raises:
        ValueError: the layers differ in a way that no layout here can hold.
    """

    def __init__(
        self,
        layers: list[LayerGeometry],
        dtype: torch.dtype,
        device: torch.device,
        *,
        stages: Sequence[torch.device] = (),
        shards: int = 1,
    ) -> None:
        shapes = {(layer.kv_heads, layer.head_dim) for layer in layers}
        windows = sorted({layer.window for layer in layers})
        if len(shapes) != 1 or len([window for window in windows if window]) > 1:
            raise ValueError(f"layers of different shapes: {sorted(shapes)}, windows {windows}")
        self.kv_heads, self.head_dim = shapes.pop()
        self.dtype = dtype
        self.device = device
        self.shards = shards
        stores = sorted({(layer.stage, layer.window) for layer in layers})
        self.windows = tuple(window for _, window in stores)
        self.devices = tuple(stages[stage] if stages else device for stage, _ in stores)
        counts = [0] * len(stores)
        places: list[tuple[int, int]] = []
        for layer in layers:
            store = stores.index((layer.stage, layer.window))
            places.append((store, counts[store]))
            counts[store] += 1
        self.places = tuple(places)
        self.counts = tuple(counts)
        self.layout = KvLayout(
            full_layers=sum(layer.window == 0 for layer in layers),
            sliding_layers=sum(layer.window > 0 for layer in layers),
            sliding_window=windows[-1],
            kv_heads=shards * self.kv_heads,
            head_dim=self.head_dim,
            dtype_bytes=dtype.itemsize,
        )
        self.layer_token_bytes = 2 * shards * self.kv_heads * self.head_dim * dtype.itemsize


class RequestKv(ABC):
    """The KV memory of one request, however it is laid out.

    Attributes:
        geometry: of the model.
        num_bytes: what it counts as.
    """

    geometry: KvGeometry
    num_bytes: int

    @abstractmethod
    def ring(self, store: int) -> int:
        """Places of a store: a later position overwrites the one so many before it."""

    @abstractmethod
    def read(self, store: int, index: int | None, first: int, end: int) -> torch.Tensor:
        """Keys and values of positions ``first`` to ``end``, at most a ring of them.

        Args:
            store: of the layers.
            index: of a layer within its store; None is all of them.
            first: first position.
            end: position after the last.

        Returns:
            a view where that can be.
        """

    @abstractmethod
    def write(self, store: int, index: int | None, first: int, kv: torch.Tensor) -> None:
        """Set what ``read`` gives, of as many positions from ``first`` on."""

    @abstractmethod
    def copy_out(self, first: int, end: int, computed: int) -> list[Any]:
        """What is kept of positions ``first`` to ``end``, for each store, to be held beyond this request's life.

        Args:
            first: first position.
            end: position after the last.
            computed: positions that were written so far; a ring holds the last of them.

        Returns:
            something for ``copy_in``; None for a store where some of the positions have been overwritten.
        """

    @abstractmethod
    def copy_in(self, end: int, parts: Sequence[Any]) -> None:
        """Take what ``copy_out`` gave of the positions before ``end``; None leaves a store as it is."""

    def copy_bytes(self, first: int, end: int, computed: int) -> int:
        """Bytes of what ``copy_out`` gives."""
        kept = [self.oldest_kept(store, first, end, computed) for store in range(len(self.geometry.windows))]
        layer_tokens = sum(
            count * (end - oldest)
            for count, oldest in zip(self.geometry.counts, kept, strict=True)
            if oldest is not None
        )
        return layer_tokens * self.geometry.layer_token_bytes

    def oldest_kept(self, store: int, first: int, end: int, computed: int) -> int | None:
        """The first position that ``copy_out`` gives of a store: at most a ring's length before ``end``."""
        ring = self.ring(store)
        oldest = max(first, end - ring)
        return oldest if oldest >= computed - ring else None

    def extend(self, layer: int, kv: torch.Tensor, start: int) -> tuple[torch.Tensor, int]:
        """Write a chunk's keys and values. Returns those that its rows attend to, and the first one's position."""
        store, index = self.geometry.places[layer]
        ring = self.ring(store)
        end = start + kv.shape[2]
        if end <= ring:
            self.write(store, index, start, kv)
            return self.read(store, index, 0, end), 0
        first = max(0, start - ring + 1)
        keys = torch.cat((self.read(store, index, first, start), kv), dim=2)
        kept = max(start, end - ring)
        self.write(store, index, kept, kv[:, :, kept - start :])
        return keys, first

    def keep_overwritten(self, start: int, end: int) -> list[torch.Tensor | None]:
        """Copies of what writing positions ``start`` to ``end`` overwrites, for each store; None for nothing."""
        rings = [self.ring(store) for store in range(len(self.geometry.windows))]
        return [
            self.read(store, None, max(start, end - ring), end).clone() if end > ring else None
            for store, ring in enumerate(rings)
        ]

    def undo(self, start: int, end: int, kept: list[torch.Tensor | None]) -> None:
        """Make as if positions ``start`` to ``end`` had not been written.

        Args:
            start: first position to undo.
            end: as given to ``keep_overwritten``.
            kept: what that returned, for this or an earlier start.
        """
        for store, part in enumerate(kept):
            if part is not None:
                count = min(end - start, part.shape[3])
                self.write(store, None, end - count, part[:, :, :, part.shape[3] - count :])


class KvSlot(RequestKv):
    """The contiguous layout: for each store one tensor, ``[layer, 2, kv_heads, tokens, head_dim]``.

    Args:
        geometry: of the model.
        tokens: capacity in positions.
    """

    def __init__(self, geometry: KvGeometry, tokens: int) -> None:
        self.geometry = geometry
        self.tokens = tokens
        self.stores = [
            torch.empty(
                (count, 2, geometry.kv_heads, min(tokens, window or tokens), geometry.head_dim),
                dtype=geometry.dtype,
                device=device,
            )
            for count, window, device in zip(geometry.counts, geometry.windows, geometry.devices, strict=True)
        ]
        self.num_bytes = geometry.shards * sum(store.nbytes for store in self.stores)

    def ring(self, store: int) -> int:
        """See ``RequestKv``."""
        return self.stores[store].shape[3]

    def read(self, store: int, index: int | None, first: int, end: int) -> torch.Tensor:
        """See ``RequestKv``."""
        return self._of(store, index)[..., _places(first, end, self.ring(store)), :]

    def write(self, store: int, index: int | None, first: int, kv: torch.Tensor) -> None:
        """See ``RequestKv``."""
        places = _places(first, first + kv.shape[-2], self.ring(store))
        self._of(store, index)[..., places, :] = kv

    def _of(self, store: int, index: int | None) -> torch.Tensor:
        return self.stores[store] if index is None else self.stores[store][index]

    def copy_out(self, first: int, end: int, computed: int) -> list[torch.Tensor | None]:
        """See ``RequestKv``; copies, ``[layer, 2, kv_heads, tokens, head_dim]``."""
        kept = [self.oldest_kept(store, first, end, computed) for store in range(len(self.stores))]
        return [
            None if oldest is None else self.read(store, None, oldest, end).clone() for store, oldest in enumerate(kept)
        ]

    def copy_in(self, end: int, parts: Sequence[torch.Tensor | None]) -> None:
        """See ``RequestKv``."""
        for store, part in enumerate(parts):
            if part is not None:
                self.write(store, None, end - part.shape[3], part)

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
