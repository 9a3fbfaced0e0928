"""Attention of decoding requests over pages: the same few kernel calls a layer, however many requests decode.

Rules:
- The pages of a request are read in splits of ``SPLIT_PAGES``, each of the same shape, and the splits of all requests make
  one batch. So nothing is padded to the longest request, and what a split gives does not depend on who else is there.
- A split gives a maximum, a total and a weighted sum; those of a request are then put together. Sinks (gpt-oss) are
  one more logit in the total.
- A split that is not full repeats pages of its own request, with no weight. So a request whose numbers are not finite
  spoils no other.
- Stock operations only, the same on every device. ``torch.nn.attention.varlen`` can read such pages itself, on CUDA
  with torch 2.12 and later; an own kernel would, too.

Source: split softmax as in Flash-Decoding, https://crfm.stanford.edu/2023/10/12/flashdecoding.html
"""

from collections.abc import Sequence

import torch

from gptoss.engine.attention import Chunk, LayerOptions
from gptoss.engine.kv_pages import SPLIT_PAGES, PagedKv

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# torch is only partly typed.


class PagedDecodes:
    """The decoding requests of one step.

    Args:
        chunks: one token each, over pages of one pool.
    """

    def __init__(self, chunks: Sequence[Chunk]) -> None:
        slots: list[PagedKv] = [chunk.slot for chunk in chunks]
        self._pool = slots[0].pool
        positions = [chunk.start for chunk in chunks]
        self._stores = [_Splits(slots, positions, store) for store in range(len(self._pool.geometry.windows))]
        self._heads = torch.arange(self._pool.geometry.kv_heads, device=self._pool.geometry.device)[:, None]

    def attend(
        self, layer: int, query: torch.Tensor, kv: torch.Tensor, scale: float, options: LayerOptions
    ) -> torch.Tensor:
        """See ``attention.Decodes``."""
        store, index = self._pool.geometry.places[layer]
        row, layer_of_page = divmod(index, self._pool.unit)
        splits = self._stores[store]
        storage = self._pool.storage[layer_of_page]
        storage.flatten(1, 2)[:, splits.targets[row]] = kv.transpose(1, 2)
        # [2, split, kv_heads, page of split, position, head_dim], in one gather
        gathered = storage.permute(0, 3, 1, 2, 4)[:, self._heads, splits.pages[row][:, None]]
        keys, values = gathered.flatten(3, 4).unbind(0)
        heads, count, head_dim = query.shape
        kv_heads = kv.shape[1]
        folded = query.transpose(0, 1).reshape(count, kv_heads, heads // kv_heads, head_dim)[splits.owners]
        sinks = None if options.sinks is None else options.sinks.float().view(kv_heads, -1)
        return splits.attend(folded, (keys, values), scale, sinks).to(query.dtype).reshape(count, heads, head_dim)


class _Splits:
    """What the layers of one store read and write in a step.

    Attributes:
        pages: ``[layers / unit, splits, SPLIT_PAGES]``.
        owners: of each split, which request it belongs to.
        targets: where the new keys and values go, ``[layers / unit, requests]``, in places of the pool.
    """

    def __init__(self, slots: Sequence[PagedKv], positions: Sequence[int], store: int) -> None:
        pool = slots[0].pool
        device = pool.geometry.device
        length = SPLIT_PAGES * pool.page_tokens
        rings = torch.tensor([slot.ring(store) for slot in slots])
        current = torch.tensor(positions)
        counts = -(-torch.minimum(current + 1, rings) // length)
        pages = torch.cat(
            [slot.splits(store)[:, :count] for slot, count in zip(slots, counts.tolist(), strict=True)], dim=1
        )
        self.pages = pages.to(device)
        owners = torch.repeat_interleave(torch.arange(len(slots)), counts)
        firsts = counts.cumsum(0) - counts  # of each request, the number of its first split
        blocks, offsets = current % rings // pool.page_tokens, current % pool.page_tokens
        own_pages = pages.flatten(1)[:, firsts * SPLIT_PAGES + blocks]
        self.targets = (own_pages * pool.page_tokens + offsets).to(device)
        numbers = torch.arange(len(owners)) - firsts[owners]  # of each split, within its request
        self.owners = owners.to(device)
        seen_from = torch.stack((numbers * length, current[owners], rings[owners])).to(device)
        self._hidden = _hidden(seen_from, length, pool.geometry.windows[store])
        self._counts = counts.to(device)

    def attend(
        self, query: torch.Tensor, kv: tuple[torch.Tensor, torch.Tensor], scale: float, sinks: torch.Tensor | None
    ) -> torch.Tensor:
        """Attention.

        Args:
            query: of each split's owner, ``[splits, kv_heads, groups, head_dim]``.
            kv: keys and values, ``[splits, kv_heads, positions, head_dim]`` each.
            scale: factor of the scores.
            sinks: ``[kv_heads, groups]``.

        Returns:
            ``[requests, kv_heads, groups, head_dim]`` float32.
        """
        keys, values = kv
        scores = (query @ keys.transpose(2, 3)).float() * scale
        scores = scores.masked_fill(self._hidden, float("-inf"))
        top = scores.amax(dim=-1)
        weights = torch.exp(scores - top[..., None])
        total = weights.sum(dim=-1)
        found = (weights.to(values.dtype) @ values).float()
        best = self._by_request(top, "max")
        if sinks is not None:
            best = torch.maximum(best, sinks)
        factors = torch.exp(top - best[self.owners])
        denominator = self._by_request(total * factors, "sum")
        if sinks is not None:
            denominator = denominator + torch.exp(sinks - best)
        return self._by_request(found * factors[..., None], "sum") / denominator[..., None]

    def _by_request(self, parts: torch.Tensor, how: str) -> torch.Tensor:
        # One thread goes through the splits of a request in their order: no atomic additions, so the bits are settled.
        return torch.segment_reduce(parts, how, lengths=self._counts, axis=0, unsafe=True)


def _hidden(seen_from: torch.Tensor, length: int, window: int) -> torch.Tensor:
    """Which places of each split the current position does not see, ``[splits, 1, 1, length]``.

    Args:
        seen_from: of each split, its first place, its owner's current position, and the length of the ring, which for full
            layers is the whole capacity.
        length: of a split.
        window: 0 sees everything.
    """
    first, current, ring = seen_from[:, :, None].unbind(0)
    places = first + torch.arange(length, device=first.device)
    age = (current - places) % ring  # the latest position at a place is so many before the current one
    hidden = (places >= ring) | (age > current)
    if window:
        hidden |= age >= window
    return hidden[:, None, None]
