"""Which requests run, and what each does in the next step.

Rules:
- A request runs when a slot and its whole KV memory are free, best (priority, arrival) first. It keeps both to its
  end, and nobody overtakes the first in line, so nobody starves.
- A step holds every decoding request, then prefill chunks in the same order up to a budget: running streams keep pace.
- Chunks end at multiples of ``chunk_tokens`` of the request's own positions, whoever else is in the step.
"""

import bisect

import msgspec

from gptoss.engine.runner import Runner
from gptoss.engine.sequence import Sequence


class Work(msgspec.Struct, frozen=True):
    """The next ``num_tokens`` pending tokens of a request."""

    sequence: Sequence
    num_tokens: int


class Scheduler:
    """Waiting and running requests of one engine.

    Args:
        max_batch_size: requests that may run at once.
        kv_budget_bytes: KV memory that they may hold together.
        chunk_tokens: largest prefill chunk; without decoding requests a step takes two.

    Attributes:
        kv_bytes_in_use: memory held by running requests.
    """

    def __init__(self, *, max_batch_size: int, kv_budget_bytes: int, chunk_tokens: int) -> None:
        self.max_batch_size = max_batch_size
        self.kv_budget_bytes = kv_budget_bytes
        self.chunk_tokens = chunk_tokens
        self.kv_bytes_in_use = 0
        self._waiting: list[tuple[tuple[int, int], int, Sequence]] = []
        self._running: list[Sequence] = []

    @property
    def num_waiting(self) -> int:
        """Requests without a slot."""
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        """Requests with a slot."""
        return len(self._running)

    def add(self, sequence: Sequence, kv_bytes: int) -> None:
        """Put a request in line; it will need ``kv_bytes``."""
        bisect.insort(self._waiting, (sequence.order, kv_bytes, sequence))

    def remove(self, sequence: Sequence) -> None:
        """Take a request out, wherever it is, and free its memory."""
        if sequence.slot is None:
            self._waiting = [entry for entry in self._waiting if entry[2] is not sequence]
            return
        self._running.remove(sequence)
        self.kv_bytes_in_use -= sequence.slot.num_bytes
        sequence.slot = None

    def start_waiting(self, runner: Runner) -> list[tuple[Sequence, str]]:
        """Let run what fits. Returns the requests whose memory the device refused, taken out of line, and why."""
        refused: list[tuple[Sequence, str]] = []
        while self._waiting and len(self._running) < self.max_batch_size:
            _, kv_bytes, sequence = self._waiting[0]
            if self.kv_bytes_in_use + kv_bytes > self.kv_budget_bytes:
                break
            del self._waiting[0]
            try:
                sequence.slot = runner.new_slot(sequence.capacity)
            except (RuntimeError, MemoryError) as error:  # torch's out-of-memory errors are RuntimeErrors
                refused.append((sequence, f"no memory for {kv_bytes} bytes of KV: {str(error)[:200]}"))
                continue
            self.kv_bytes_in_use += sequence.slot.num_bytes
            self._running.append(sequence)
        return refused

    def plan(self) -> list[Work]:
        """What the next step does."""
        work = [Work(sequence, 1) for sequence in self._running if sequence.is_decoding]
        budget = self.chunk_tokens if work else 2 * self.chunk_tokens
        for sequence in sorted(self._running, key=lambda sequence: sequence.order):
            if sequence.is_decoding:
                continue
            until_boundary = self.chunk_tokens - sequence.num_computed % self.chunk_tokens
            num_tokens = min(sequence.num_pending, until_boundary)
            if num_tokens > budget:
                break
            work.append(Work(sequence, num_tokens))
            budget -= num_tokens
        return work
