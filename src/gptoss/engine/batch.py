"""Who waits and who runs, and the KV memory of those who run: what the scheduler plans over and what plans change.

Rules:
- A request keeps its memory from its start to its end or its preemption. What it takes is known before it starts, so
  the budget is never exceeded.
- The prefix cache lives in the part of the budget that no running request holds, and gives way to them.
- Where bits depend on the cut alone, only whole chunks of prompts are cached, and hits end where chunks do: what follows a
  hit is then computed exactly as it would have been.
- Should the device refuse what the budget allows, the budget falls to what is in use, and rises again when a request
  ends. A start that was refused goes back in line; only with nobody else running it is an error.
"""

import bisect
import gc
from typing import Any

import torch

from gptoss.engine.kv_cache import RequestKv
from gptoss.engine.prefix_cache import Chain, Hit, Kept, PrefixCache
from gptoss.engine.runner import Runner, Slot
from gptoss.engine.scheduler import SchedulerState
from gptoss.engine.sequence import Sequence
from gptoss.engine.speculation import Drafter
from gptoss.engine.step import one_line
from gptoss.messages.plan import Limits, StepPlan


class Batch:
    """The requests of one engine.

    Args:
        runner: makes KV slots.
        limits: of the scheduler.
        kv_budget_bytes: KV memory that running requests may hold together, with the prefix cache.
        cache: of prefixes, if there is one.
        cache_bytes_max: the most that it may hold.

    Attributes:
        sequences: all requests by id.
        kv_bytes_in_use: held by running requests.
    """

    def __init__(
        self,
        runner: Runner,
        limits: Limits,
        kv_budget_bytes: int,
        cache: PrefixCache | None = None,
        cache_bytes_max: int = 0,
    ) -> None:
        self.limits = limits
        self.sequences: dict[str, Sequence] = {}
        self.kv_bytes_in_use = 0
        self._runner = runner
        self._cache = cache
        self._cache_bytes_max = cache_bytes_max
        self._budget_bytes = kv_budget_bytes
        self._budget_bytes_now = kv_budget_bytes
        self._waiting: list[tuple[tuple[int, int, int], Sequence]] = []
        self._running: list[Sequence] = []

    @property
    def num_waiting(self) -> int:
        """Requests without KV memory."""
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        """Requests with KV memory."""
        return len(self._running)

    @property
    def cache_bytes(self) -> int:
        """Held by the prefix cache."""
        return self._cache.num_bytes if self._cache else 0

    def add(self, sequence: Sequence) -> None:
        """Put a request in line."""
        if self.limits.draft_streams_max:
            sequence.drafter = Drafter(sequence.token_ids)
        if self._cache:
            sequence.chain = Chain(self._cache.root(sequence.submit.cache_salt))
        self.sequences[sequence.submit.request_id] = sequence
        bisect.insort(self._waiting, (sequence.order, sequence))

    def remove(self, sequence: Sequence) -> None:
        """Take a request out, wherever it is, and free its memory."""
        del self.sequences[sequence.submit.request_id]
        if sequence.slot is None:
            self._waiting = [entry for entry in self._waiting if entry[1] is not sequence]
        else:
            self._free(sequence)
        self._budget_bytes_now = self._budget_bytes

    def state(self, prefill_ms_per_token: float) -> SchedulerState:
        """What the scheduler needs to know; those who run make their guesses for it."""
        are_few = len(self._running) <= self.limits.draft_streams_max
        for sequence in self._running:
            sequence.draft = sequence.guess() if are_few else ()
        waiting = [sequence.candidate(self._find(sequence)) for _, sequence in self._waiting[: self._num_startable()]]
        return SchedulerState(
            limits=self.limits,
            running=tuple(sequence.candidate(self._find_more(sequence)) for sequence in self._running),
            waiting=tuple(waiting),
            kv_budget_bytes=self._budget_bytes_now,
            prefill_ms_per_token=prefill_ms_per_token,
        )

    def place(self, plan: StepPlan) -> dict[str, str]:
        """Preempt and start whom the plan says.

        Returns:
            why the device refused memory, for each request that it refused; they are back in line.
        """
        for preemption in plan.preemptions:
            sequence = self.sequences[preemption.request_id]
            self._free(sequence)
            bisect.insort(self._waiting, (sequence.order, sequence))
        refused: dict[str, str] = {}
        sequences = [self.sequences[start.request_id] for start in plan.starts]
        # All hits are held before any memory is taken, and are the last that the cache drops to make room for it.
        hits = [self._hit(sequence, start.num_cached) for start, sequence in zip(plan.starts, sequences, strict=True)]
        for start, sequence, hit in zip(plan.starts, sequences, hits, strict=True):
            error = "" if sequence.slot else self._start(sequence)
            self._load(sequence, hit)
            if error:
                refused[start.request_id] = error
        if refused and self._running:
            self._budget_bytes_now = self.kv_bytes_in_use
        return refused

    def relieve(self) -> None:
        """Give the device back what is held without need."""
        if self._cache:
            self._cache.shrink(0)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def shorten_budget(self) -> None:
        """Memory ran out in a step: the worst that runs is to give its own back, if it is not the only one."""
        if len(self._running) > 1:
            self._budget_bytes_now = self.kv_bytes_in_use - 1

    def keep(self, sequence: Sequence) -> None:
        """Put what a running request has computed into the prefix cache, as far as there is room."""
        if self._cache and sequence.chain and isinstance(sequence.slot, RequestKv):
            room = self._cache_room(self.kv_bytes_in_use)
            self._cache.store(sequence.chain, self._cacheable(sequence), sequence.slot, sequence.num_computed, room)

    def keep_session(self, sequence: Sequence, bytes_max: int) -> Kept:
        """Keep the beginning of a request that is over for the next one of its session, as far as it is cached.

        A request that did not run changes nothing.
        """
        session_id = sequence.submit.session_id
        if not (session_id and bytes_max and self._cache and sequence.chain and sequence.slot is not None):
            return Kept(0, 0)
        return self._cache.pin(session_id, sequence.chain, bytes_max)

    def drop_session(self, session_id: str) -> list[Any]:
        """Let what was kept for a session go its way; there is nothing to say about it."""
        if self._cache:
            self._cache.unpin(session_id)
        return []

    def distrust(self, sequence: Sequence) -> None:
        """Take out of the prefix cache whatever a request has in common with it: its logits made no sense."""
        if self._cache and sequence.chain:
            self._cache.forget(sequence.chain)

    def _find(self, sequence: Sequence, tokens_max: int | None = None) -> Hit | None:
        """What the prefix cache has for a request that is to start."""
        if self._cache is None or sequence.chain is None:
            return None
        token_ids = self._cacheable(sequence)
        usable = len(token_ids) - 1
        return self._cache.find(sequence.chain, token_ids, usable if tokens_max is None else min(usable, tokens_max))

    def _hit(self, sequence: Sequence, tokens: int) -> Hit | None:
        """Those tokens of a request from the prefix cache, which notes that they are used."""
        hit = self._find(sequence, tokens)
        if self._cache and sequence.chain and hit:
            self._cache.touch(sequence.chain, len(hit.blocks))
        return hit

    def _find_more(self, sequence: Sequence) -> Hit | None:
        """What the prefix cache has for one that runs and is still at its prompt."""
        return self._find(sequence) if sequence.num_computed + 1 < sequence.num_prompt else None

    def _cacheable(self, sequence: Sequence) -> list[int] | tuple[int, ...]:
        """The tokens that the cache may hold of a request: where bits depend on the cut alone, those of its prompt only."""
        return sequence.token_ids if self.limits.has_free_cuts else sequence.submit.prompt_token_ids

    def _cache_room(self, kv_bytes_in_use: int) -> int:
        return max(0, min(self._cache_bytes_max, self._budget_bytes_now - kv_bytes_in_use))

    def _num_startable(self) -> int:
        """How many of those in line could at most start in one step."""
        if not self._waiting:
            return 0
        best_priority = self._waiting[0][0][0]
        displaceable = sum(sequence.order[0] > best_priority for sequence in self._running)
        return self.limits.max_batch_size - len(self._running) + displaceable

    def _start(self, sequence: Sequence) -> str:
        """Give a request its memory. Returns why the device refused, or nothing."""
        if self._cache:
            self._cache.shrink(self._cache_room(self.kv_bytes_in_use + sequence.kv_bytes))
        slot, error = self._new_slot(sequence.capacity)
        if slot is None:
            self.relieve()
            slot, error = self._new_slot(sequence.capacity)
        if slot is None:
            return error
        self._waiting.remove((sequence.order, sequence))
        self._running.append(sequence)
        self.kv_bytes_in_use += sequence.kv_bytes
        sequence.slot = slot
        return ""

    def _load(self, sequence: Sequence, hit: Hit | None) -> None:
        """Put a hit into the memory of its request."""
        if self._cache is None or sequence.chain is None or hit is None or not isinstance(sequence.slot, RequestKv):
            return
        self._cache.load(hit, sequence.slot, sequence.num_computed)
        if sequence.counts_hits:
            sequence.num_cached += hit.num_tokens - sequence.num_computed
        sequence.num_computed = hit.num_tokens
        sequence.chain.num_stored = len(hit.blocks)

    def _new_slot(self, tokens: int) -> tuple[Slot | None, str]:
        try:
            return self._runner.new_slot(tokens), ""
        except (RuntimeError, MemoryError) as error:  # torch's out-of-memory errors are RuntimeErrors
            return None, one_line(error)

    def _free(self, sequence: Sequence) -> None:
        self._running.remove(sequence)
        self.kv_bytes_in_use -= sequence.kv_bytes
        sequence.slot = None
        sequence.num_computed = 0
        sequence.counts_hits = False
        sequence.draft = ()
        if sequence.chain:
            sequence.chain.num_stored, sequence.chain.is_open = 0, True
