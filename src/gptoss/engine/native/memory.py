"""Memory that a step reads from end to end: in huge pages where the system gives them to who asks.

With pages of 4 KiB a step over 269 MB of weights and some KV misses the translation cache at every page, which costs most
inside a virtual machine. Linux gives huge pages on request (``madvise``); elsewhere this changes nothing.
"""

import ctypes
import sys

import torch

ALIGNMENT_BYTES = 64
HUGE_PAGE_BYTES = 2 << 20
CHUNK_BYTES = 64 << 20
_PAGE_BYTES = 4096
_MADV_HUGEPAGE = 14


def round_up(count: int, to: int) -> int:
    """The first multiple of ``to`` that is at least ``count``."""
    return -(-count // to) * to


def ask_for_huge_pages(memory: torch.Tensor) -> None:
    """Ask the system to back ``memory`` with huge pages from its next touch on; a refusal does not matter."""
    if sys.platform != "linux":
        return
    start = round_up(memory.data_ptr(), _PAGE_BYTES)
    end = (memory.data_ptr() + memory.numel() * memory.element_size()) // _PAGE_BYTES * _PAGE_BYTES
    if end - start >= HUGE_PAGE_BYTES:
        ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), _MADV_HUGEPAGE)


class Arena:
    """Hands out pieces of large chunks, so that small matrices share huge pages. Nothing is ever given back."""

    def __init__(self) -> None:
        self._room = torch.empty(0, dtype=torch.uint8)

    def take(self, num_bytes: int) -> torch.Tensor:
        """Uninitialised bytes, ``[num_bytes]``, that start at a multiple of ``ALIGNMENT_BYTES``."""
        if num_bytes > self._room.numel():
            size = max(CHUNK_BYTES, num_bytes)
            chunk = torch.empty(size + HUGE_PAGE_BYTES, dtype=torch.uint8)
            chunk = chunk[-chunk.data_ptr() % HUGE_PAGE_BYTES :][:size]
            ask_for_huge_pages(chunk)
            self._room = chunk
        taken = self._room[:num_bytes]
        self._room = self._room[round_up(num_bytes, ALIGNMENT_BYTES) :]
        return taken
