"""Keys and values of beginnings that were computed before, in blocks, for requests that begin in the same way.

Rules:
- A block is the KV of ``block_tokens`` consecutive tokens. Its key hashes those tokens and the key of the block before
  it, from a root of model, numerics and the tenant's salt: equal keys mean equal beginnings. The ids are compared on
  a hit besides, so that not even a collision gives a request another's keys.
- Blocks may be dropped at any time and outlive the requests that made them: KV slots give copies and take copies; pages
  are shared by counted references, and only those of rings, which are overwritten, are copied (``kv_pages``).
- At most all but the last token of a request may hit: the logits of the last one are needed.
- A sliding layer needs the last ``window`` positions before a hit's end. Blocks have them only if they were copied
  before the ring moved on, so a hit ends at the longest beginning whose last blocks do.
- Least recently used goes first. Using a block uses those before it too, and a touch leaves a block newer than its
  followers; so what goes is always the end of a chain, and no block stays that cannot be reached.
- The cache holds at most what its owner allows at the time: reserved memory always comes first.
- A session pins the beginning of its last request: those blocks go after all others, and then session by session, the
  one that was pinned first before the others. A pin keeps nobody from using a block.
"""

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, NamedTuple

from gptoss.engine.kv_cache import KvGeometry, RequestKv


class Block:
    """The KV of some consecutive tokens.

    Attributes:
        token_ids: of the block.
        parts: for each distinct window of the model, as ``RequestKv.copy_out`` gives them.
        num_bytes: what ``parts`` count as.
    """

    __slots__ = ("num_bytes", "parts", "token_ids")

    def __init__(self, token_ids: tuple[int, ...], parts: list[Any], num_bytes: int) -> None:
        self.token_ids = token_ids
        self.parts = parts
        self.num_bytes = num_bytes


class Chain:
    """The keys of a request's blocks, computed as its tokens come.

    Args:
        root: see ``PrefixCache.root``.

    Attributes:
        num_stored: its first blocks, which need not be stored any more.
        is_open: its next block could be found, since those before it are all there.
    """

    def __init__(self, root: bytes) -> None:
        self.root = root
        self.keys: list[bytes] = []
        self.num_stored = 0
        self.is_open = True


class Hit:
    """Blocks that a request can begin with; they stay whole for as long as this is held."""

    def __init__(self, blocks: list[Block], block_tokens: int) -> None:
        self.blocks = blocks
        self.num_tokens = len(blocks) * block_tokens
        self.num_bytes = sum(block.num_bytes for block in blocks)


class Kept(NamedTuple):
    """What a session pins: the first tokens of its last request, and the bytes of their blocks."""

    num_tokens: int
    num_bytes: int


class PrefixCache:
    """Blocks of one engine.

    Args:
        geometry: of the KV memory.
        block_tokens: length of a block.
        provenance: names the model and its numerics; blocks of one are of no use to another.

    Attributes:
        num_bytes: that the blocks hold.
    """

    def __init__(self, geometry: KvGeometry, block_tokens: int, provenance: str) -> None:
        self.block_tokens = block_tokens
        self.num_bytes = 0
        self._blocks: OrderedDict[bytes, Block] = OrderedDict()  # least recently used first
        self._pinned: dict[bytes, Block] = {}
        self._pins: dict[bytes, int] = {}  # how many sessions pin each of those
        self._sessions: OrderedDict[str, list[bytes]] = OrderedDict()  # the one pinned first is first
        self._provenance = provenance
        self._windows = geometry.windows
        self._tail = max(-(-window // block_tokens) for window in self._windows)

    def root(self, salt: str) -> bytes:
        """Where the chains of a tenant begin; another salt shares nothing with them."""
        return hashlib.blake2b(f"{self._provenance}\0{salt}".encode(), digest_size=16).digest()

    def find(self, chain: Chain, token_ids: Sequence[int], tokens_max: int) -> Hit:
        """The longest cached beginning of ``token_ids``, of at most ``tokens_max`` tokens. Changes nothing."""
        found: list[Block] = []
        for index in range(min(tokens_max, len(token_ids)) // self.block_tokens):
            block = self._get(self._key(chain, token_ids, index))
            if block is None or block.token_ids != self._tokens(token_ids, index):
                break
            found.append(block)
        while found and self._tail and not all(map(_is_whole, found[-self._tail :])):
            found.pop()
        return Hit(found, self.block_tokens)

    def touch(self, chain: Chain, num_blocks: int) -> None:
        """Note that the first ``num_blocks`` of a chain were used."""
        for key in reversed(chain.keys[:num_blocks]):
            if key in self._blocks:
                self._blocks.move_to_end(key)

    def load(self, hit: Hit, slot: RequestKv, computed: int = 0) -> None:
        """Put a hit into KV memory that has the first ``computed`` tokens already."""
        first = computed // self.block_tokens
        for index, block in enumerate(hit.blocks):
            needs_ring = index >= len(hit.blocks) - self._tail
            if index < first and not needs_ring:
                continue
            parts = [
                part if needs_ring or not window else None
                for part, window in zip(block.parts, self._windows, strict=True)
            ]
            slot.copy_in((index + 1) * self.block_tokens, parts)

    def store(self, chain: Chain, token_ids: Sequence[int], slot: RequestKv, computed: int, bytes_max: int) -> None:
        """Keep the blocks of a request that were completed since the last call.

        Args:
            chain: of the request.
            token_ids: that may be kept, from the request's first on.
            slot: its KV memory.
            computed: tokens in ``slot``.
            bytes_max: what the cache may hold now.
        """
        num_blocks = min(computed, len(token_ids)) // self.block_tokens
        if num_blocks <= chain.num_stored or not chain.is_open:
            return
        own = set(chain.keys)
        for index in range(chain.num_stored, num_blocks):
            key = self._key(chain, token_ids, index)
            known = self._get(key)
            if known is not None and _is_whole(known):
                continue
            first, end = index * self.block_tokens, (index + 1) * self.block_tokens
            num_bytes = slot.copy_bytes(first, end, computed)
            chain.is_open = index == 0 or self._get(chain.keys[index - 1]) is not None
            chain.is_open = chain.is_open and self._make_room(key, num_bytes, own, bytes_max)
            if not chain.is_open:
                break
            self._put(key, Block(self._tokens(token_ids, index), slot.copy_out(first, end, computed), num_bytes))
            own.add(key)
        chain.num_stored = num_blocks
        self.touch(chain, num_blocks)

    def forget(self, chain: Chain) -> None:
        """Drop what a request is made of, whoever stored it: something is wrong with its keys or values."""
        for key in chain.keys:
            block = self._blocks.pop(key, None) or self._pinned.pop(key, None)
            self.num_bytes -= block.num_bytes if block else 0
        chain.is_open = False

    def pin(self, session_id: str, chain: Chain, bytes_max: int) -> Kept:
        """Let a session pin the beginning of a chain, as far as it is stored, instead of what it pinned before.

        Args:
            session_id: names the session.
            chain: of its last request.
            bytes_max: what its blocks may take.
        """
        keys: list[bytes] = []
        num_bytes = 0
        for key in chain.keys[: chain.num_stored]:
            block = self._get(key)
            if block is None or num_bytes + block.num_bytes > bytes_max:
                break
            keys.append(key)
            num_bytes += block.num_bytes
        for key in keys:
            self._pins[key] = self._pins.get(key, 0) + 1
            if key in self._blocks:
                self._pinned[key] = self._blocks.pop(key)
        self.unpin(session_id)
        if keys:
            self._sessions[session_id] = keys
        return Kept(len(keys) * self.block_tokens, num_bytes)

    def unpin(self, session_id: str) -> None:
        """Let a session pin nothing more; its blocks are then the most recently used ones."""
        for key in reversed(self._sessions.pop(session_id, [])):
            self._pins[key] -= 1
            if self._pins[key]:
                continue
            del self._pins[key]
            block = self._pinned.pop(key, None)
            if block is not None:
                self._blocks[key] = block

    def shrink(self, bytes_max: int) -> None:
        """Drop least recently used blocks, pinned ones last, until at most ``bytes_max`` are held."""
        while self.num_bytes > bytes_max:
            if not self._blocks:
                self.unpin(next(iter(self._sessions)))
                continue
            _, block = self._blocks.popitem(last=False)
            self.num_bytes -= block.num_bytes

    def _make_room(self, key: bytes, num_bytes: int, own: set[bytes], bytes_max: int) -> bool:
        """Drop blocks until one fits in place of its older copy; False if that would cost a block of the chain's own."""
        older = self._get(key)
        growth = num_bytes - (older.num_bytes if older else 0)
        while self.num_bytes + growth > bytes_max:
            oldest = next(iter(self._blocks), None)
            if oldest is None or oldest in own or oldest == key:
                return False
            self.num_bytes -= self._blocks.pop(oldest).num_bytes
        return True

    def _put(self, key: bytes, block: Block) -> None:
        older = self._get(key)
        self.num_bytes += block.num_bytes - (older.num_bytes if older else 0)
        blocks = self._pinned if key in self._pinned else self._blocks
        blocks[key] = block

    def _get(self, key: bytes) -> Block | None:
        return self._blocks.get(key) or self._pinned.get(key)

    def _key(self, chain: Chain, token_ids: Sequence[int], index: int) -> bytes:
        while len(chain.keys) <= index:
            previous = chain.keys[-1] if chain.keys else chain.root
            ids = array("q", self._tokens(token_ids, len(chain.keys)))
            chain.keys.append(hashlib.blake2b(previous + ids.tobytes(), digest_size=16).digest())
        return chain.keys[index]

    def _tokens(self, token_ids: Sequence[int], index: int) -> tuple[int, ...]:
        return tuple(token_ids[index * self.block_tokens : (index + 1) * self.block_tokens])


def _is_whole(block: Block) -> bool:
    return all(part is not None for part in block.parts)
