"""KV memory in pages: one pool, allocated at load from the KV budget, and a table of pages for each request.

Rules:
- The pool is ``[unit, 2, page, PAGE_TOKENS, kv_heads, head_dim]``, K at 0 and V at 1: a page holds some consecutive
  positions for ``unit`` layers of one store, ``unit`` being the greatest common divisor of the stores' layer counts. So one
  kind of page serves full and sliding layers alike, in whatever proportion requests need them, and bytes are exact.
- A request takes all its pages when it starts, as many as ``memory_model.kv_bytes`` says. Whoever keeps to the budget in
  bytes never finds the pool empty; whoever does not gets a ``MemoryError``.
- Sliding layers have a ring of whole pages, no shorter than the window.
- A page is free when nobody refers to it: tables count their references and give them back when they are dropped. What
  the prefix cache keeps of full layers is shared by reference; nothing is ever written to it again, since blocks are whole
  pages and what follows a block stands in other pages. Rings are overwritten, so of them the cache has copies.
- Pages are zeroed when they are taken. Attention reads whole pages and gives the rest of the last one no weight; but
  nothing times NaN is NaN, and another request may have left one there.

Freed pages may be taken again at once: the device works through reads and writes in the order in which they were asked for.
"""

import math
from collections.abc import Sequence

import msgspec
import torch

from gptoss.engine.kv_cache import KvGeometry, RequestKv
from gptoss.messages.model import KvLayout

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# torch is only partly typed.

PAGE_TOKENS = 16
SPLIT_PAGES = 8
"""A table is read in runs of so many pages; see ``paged_attention``."""
KNOWN_PLACES_MAX = 8


class PagePool:
    """All pages of an engine.

    Args:
        geometry: of the model.
        num_bytes: the most that the pages may take together.
        page_tokens: positions of a page.

    Attributes:
        layout: of the geometry, in blocks of whole pages.
        unit: layers of a page.
        storage: see the module.
        num_bytes: that the pages take.
    """

    def __init__(self, geometry: KvGeometry, num_bytes: int, page_tokens: int = PAGE_TOKENS) -> None:
        self.geometry = geometry
        self.page_tokens = page_tokens
        self.layout = paged_layout(geometry, page_tokens)
        self.unit = math.gcd(*geometry.counts)
        self.page_bytes = self.unit * page_tokens * geometry.layer_token_bytes
        self.num_pages = num_bytes // self.page_bytes
        self.num_bytes = self.num_pages * self.page_bytes
        self.storage = torch.empty(
            (self.unit, 2, self.num_pages, page_tokens, geometry.kv_heads, geometry.head_dim),
            dtype=geometry.dtype,
            device=geometry.device,
        )
        self._free = list(range(self.num_pages - 1, -1, -1))
        self._references = [0] * self.num_pages

    @property
    def num_free(self) -> int:
        """Pages that nobody refers to."""
        return len(self._free)

    def take(self, store: int, num_blocks: int) -> "PageTable":
        """Pages for ``num_blocks`` times ``page_tokens`` positions of a store, all zero.

        Raises:
            MemoryError: there are not enough.
        """
        rows = self.geometry.counts[store] // self.unit
        count = rows * num_blocks
        if count > len(self._free):
            raise MemoryError(f"{count} KV pages are needed, {len(self._free)} of {self.num_pages} are free")
        pages = self._free[len(self._free) - count :]
        del self._free[len(self._free) - count :]
        for page in pages:
            self._references[page] = 1
        table = PageTable(self, torch.tensor(pages, dtype=torch.long).view(rows, num_blocks))
        self.storage.index_fill_(2, table.pages.flatten().to(self.storage.device), 0)
        return table

    def share(self, pages: torch.Tensor) -> "PageTable":
        """Another table that refers to pages of an existing one."""
        for page in pages.flatten().tolist():
            self._references[page] += 1
        return PageTable(self, pages.clone())

    def release(self, pages: torch.Tensor) -> None:
        """Give references back."""
        for page in pages.flatten().tolist():
            self._references[page] -= 1
            if not self._references[page]:
                self._free.append(page)


def paged_layout(geometry: KvGeometry, page_tokens: int = PAGE_TOKENS) -> KvLayout:
    """What a request takes, in whole pages."""
    return msgspec.structs.replace(geometry.layout, block_tokens=page_tokens)


class PageTable:
    """References to pages; they are given back when the table is dropped.

    Attributes:
        pages: ``[layers / unit, blocks]``, on the CPU.
    """

    def __init__(self, pool: PagePool, pages: torch.Tensor) -> None:
        self.pages = pages
        self._pool = pool

    def __del__(self) -> None:
        self._pool.release(self.pages)

    def replace(self, first: int, other: "PageTable") -> None:
        """Refer to the pages of ``other`` from block ``first`` on, as far as it goes."""
        blocks = slice(first, first + other.pages.shape[1])
        theirs = self._pool.share(other.pages)
        mine = self.pages[:, blocks].clone()
        self.pages[:, blocks] = theirs.pages
        theirs.pages = mine  # and go when it is dropped


class PagedKv(RequestKv):
    """The KV memory of one request, in pages.

    Args:
        pool: to take them from.
        tokens: capacity in positions.

    Attributes:
        tables: of each store.

    Raises:
        MemoryError: the pool has not enough.
    """

    def __init__(self, pool: PagePool, tokens: int) -> None:
        self.pool = pool
        self.geometry = pool.geometry
        blocks = [-(-min(tokens, window or tokens) // pool.page_tokens) for window in self.geometry.windows]
        self.tables = [pool.take(store, count) for store, count in enumerate(blocks)]
        self.num_bytes = sum(table.pages.numel() for table in self.tables) * pool.page_bytes
        self._known_places: dict[tuple[int, int, int], torch.Tensor] = {}
        self._splits: dict[int, torch.Tensor] = {}

    def splits(self, store: int) -> torch.Tensor:
        """The pages of a store in runs of ``SPLIT_PAGES``, ``[layers / unit, splits, SPLIT_PAGES]``, on the CPU.

        Beyond the end stands the first page again: what is read there counts nothing, but must not be another request's.
        """
        if store not in self._splits:
            pages = self.tables[store].pages
            filling = pages[:, :1].expand(-1, -pages.shape[1] % SPLIT_PAGES)
            self._splits[store] = torch.cat((pages, filling), dim=1).view(len(pages), -1, SPLIT_PAGES)
        return self._splits[store]

    def ring(self, store: int) -> int:
        """See ``RequestKv``."""
        return self.tables[store].pages.shape[1] * self.pool.page_tokens

    def read(self, store: int, index: int | None, first: int, end: int) -> torch.Tensor:
        """See ``RequestKv``; always a copy."""
        places = self._places(store, first, end)
        if index is None:
            return torch.cat([self._flat()[:, :, row] for row in places]).transpose(2, 3)
        row, layer = divmod(index, self.pool.unit)
        return self._flat()[layer][:, places[row]].transpose(1, 2)

    def write(self, store: int, index: int | None, first: int, kv: torch.Tensor) -> None:
        """See ``RequestKv``."""
        places = self._places(store, first, first + kv.shape[-2])
        if index is None:
            for row, part in zip(places, kv.transpose(2, 3).split(self.pool.unit), strict=True):
                self._flat()[:, :, row] = part
        else:
            row, layer = divmod(index, self.pool.unit)
            self._flat()[layer][:, places[row]] = kv.transpose(1, 2)

    def copy_out(self, first: int, end: int, computed: int) -> list[PageTable | None]:
        """See ``RequestKv``; of full layers the pages themselves. All positions are multiples of a page."""
        return [
            None if oldest is None else self._keep(store, oldest, end)
            for store in range(len(self.tables))
            for oldest in [self.oldest_kept(store, first, end, computed)]
        ]

    def copy_in(self, end: int, parts: Sequence[PageTable | None]) -> None:
        """See ``RequestKv``."""
        self._known_places.clear()
        self._splits.clear()
        for store, (part, window) in enumerate(zip(parts, self.geometry.windows, strict=True)):
            if part is None:
                continue
            end_block = end // self.pool.page_tokens
            first_block = end_block - part.pages.shape[1]
            if window:
                self._copy(part.pages, self._blocks(store, torch.arange(first_block, end_block)))
            else:
                self.tables[store].replace(first_block, part)

    def _keep(self, store: int, first: int, end: int) -> PageTable:
        numbers = torch.arange(first // self.pool.page_tokens, end // self.pool.page_tokens)
        pages = self._blocks(store, numbers)
        if not self.geometry.windows[store]:
            return self.pool.share(pages)
        copy = self.pool.take(store, pages.shape[1])
        self._copy(pages, copy.pages)
        return copy

    def _copy(self, source: torch.Tensor, target: torch.Tensor) -> None:
        storage = self.pool.storage
        storage[:, :, target.flatten().to(storage.device)] = storage[:, :, source.flatten().to(storage.device)]

    def _blocks(self, store: int, numbers: torch.Tensor) -> torch.Tensor:
        """Pages of blocks of the text, ``[layers / unit, blocks]``."""
        pages = self.tables[store].pages
        return pages[:, numbers % pages.shape[1]]

    def _places(self, store: int, first: int, end: int) -> torch.Tensor:
        """Where in ``_flat`` positions stand, ``[layers / unit, positions]``; all layers ask for the same few."""
        key = (store, first, end)
        if key not in self._known_places:
            if len(self._known_places) >= KNOWN_PLACES_MAX:
                self._known_places.clear()
            positions = torch.arange(first, end)
            pages = self._blocks(store, positions // self.pool.page_tokens)
            places = pages * self.pool.page_tokens + positions % self.pool.page_tokens
            self._known_places[key] = places.to(self.pool.storage.device)
        return self._known_places[key]

    def _flat(self) -> torch.Tensor:
        """The pool without the borders of pages, ``[unit, 2, place, kv_heads, head_dim]``."""
        return self.pool.storage.flatten(2, 3)
