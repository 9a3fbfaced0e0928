"""Which requests run, and what each does in the next step: a pure function from what there is to a plan.

Rules:
- ``schedule`` reads nothing but its argument: the same state gives the same plan, here and in a replay. What was
  measured (the speed of prefill) or looked up (the prefix cache) stands in the state.
- A request runs when a place in the batch and its whole KV memory are free, best (priority, deadline, arrival) first.
  Nobody overtakes the first in line, so nobody starves.
- Who has better priority and does not fit takes the place of the worst that run, if that makes it fit. They go back in
  line and compute their tokens again. Deadline and arrival alone displace nobody. Who run beyond the budget, because
  memory turned out to be short, lose their places in the same way.
- A step holds every decoding request, then prefill up to a budget: as many tokens as take ``target_ms`` at the speed
  last seen while others decode, two chunks if none does. Some prefill is always done, or a long prompt never ends.
- Where the bits of a row depend on the cut and on nothing else, a prompt is cut at multiples of ``chunk_tokens`` of its own positions, and
  output is computed one token at a time, also when it is computed again. So the cuts are the same whoever else runs,
  after a preemption and after a resumption. Elsewhere (``Limits.has_free_cuts``) cuts follow the budget.
"""

import bisect
from collections.abc import Iterable

import msgspec

from gptoss.messages.plan import Limits, PlannedRow, Preemption, PreemptionReason, Start, StepPlan

NO_DEADLINE = 2**63 - 1
PREFILL_TOKENS_MIN = 16
"""A step takes at least so many tokens of prefill, however slow it is."""


class Candidate(msgspec.Struct, frozen=True, array_like=True):
    """A request as the scheduler sees it.

    Attributes:
        deadline_ns: ``NO_DEADLINE`` if it has none.
        arrival: order of submission.
        num_tokens: prompt and output so far; ``num_prompt`` of them are the prompt.
        num_computed: tokens in KV memory; 0 while it waits.
        kv_bytes: what it holds, or will hold.
        num_cached: tokens that the prefix cache has of it, if those are more than ``num_computed``.
        cached_bytes: what the cache must keep for them until they are copied.
        num_draft: tokens that it would like to have verified behind the pending one.
    """

    request_id: str
    attempt: int
    priority: int
    deadline_ns: int
    arrival: int
    num_prompt: int
    num_tokens: int
    num_computed: int
    kv_bytes: int
    num_cached: int = 0
    cached_bytes: int = 0
    num_draft: int = 0

    @property
    def order(self) -> tuple[int, int, int]:
        """Its rank; the lowest goes first."""
        return (self.priority, self.deadline_ns, self.arrival)


class SchedulerState(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that a plan depends on.

    Attributes:
        running: requests with KV memory.
        waiting: the first in line, best first; no more of them could start in one step.
        kv_budget_bytes: KV memory that running requests may hold together now.
        prefill_ms_per_token: as last measured; 0 while unknown.
    """

    limits: Limits
    running: tuple[Candidate, ...]
    waiting: tuple[Candidate, ...]
    kv_budget_bytes: int
    prefill_ms_per_token: float = 0.0


def schedule(state: SchedulerState) -> StepPlan:
    """What the next step does."""
    limits = state.limits
    places = _Places(state)
    places.shed()
    places.catch_up()
    places.fill(state.waiting)
    decoding = [candidate for candidate in places.running if _is_decoding(candidate, limits)]
    prefilling = [candidate for candidate in places.running if not _is_decoding(candidate, limits)]
    budget = _prefill_budget(state, is_anyone_decoding=bool(decoding))
    takes_drafts = len(decoding) <= limits.draft_streams_max
    rows = [_row(candidate, 1, candidate.num_draft if takes_drafts else 0) for candidate in decoding]
    return StepPlan(
        preemptions=tuple(places.preemptions),
        starts=tuple(Start(each.request_id, each.attempt, each.num_computed) for each in places.started),
        rows=(*rows, *_prefill_rows(prefilling, budget, limits)),
        prefill_tokens_max=budget,
        prefill_ms_per_token=state.prefill_ms_per_token,
        kv_budget_bytes=state.kv_budget_bytes,
    )


class _Places:
    """The batch while it is planned.

    Attributes:
        running: best first, as they are once the cache has given what it has.
        started: of those, who gets something from memory or cache in this step.
    """

    def __init__(self, state: SchedulerState) -> None:
        self.running = sorted(state.running, key=_order)
        self.started: list[Candidate] = []
        self.preemptions: list[Preemption] = []
        self._size = state.limits.max_batch_size
        self._budget = state.kv_budget_bytes
        self._in_use = sum(candidate.kv_bytes for candidate in self.running)
        self._promised = 0  # bytes that the prefix cache must keep until those who start have copied them

    def shed(self) -> None:
        """Preempt who is beyond the budget. The best one may always stay."""
        while self._in_use > self._budget and len(self.running) > 1:
            self._preempt("memory")

    def fill(self, waiting: Iterable[Candidate]) -> None:
        """Let start who fits, best first; nobody after one who does not, nor ahead of one just preempted."""
        first_lost: Candidate | None = None
        if self.preemptions:
            return  # memory is short
        for candidate in waiting:
            num_losers = self._num_losers(candidate)
            if num_losers is None or (first_lost is not None and candidate.order > first_lost.order):
                return
            for _ in range(num_losers):
                first_lost = self._preempt("priority")
            self._start(candidate)

    def _num_losers(self, candidate: Candidate) -> int | None:
        """How many must be preempted for ``candidate``; None if it cannot have a place."""
        count = 0
        room, places = self._budget - self._in_use, self._size - len(self.running)
        while room < candidate.kv_bytes or places < 1:
            count += 1
            if count > len(self.running) or self.running[-count].priority <= candidate.priority:
                return None
            room += self.running[-count].kv_bytes
            places += 1
        return count

    def _preempt(self, reason: PreemptionReason) -> Candidate:
        loser = self.running.pop()
        self._in_use -= loser.kv_bytes
        self.preemptions.append(Preemption(loser.request_id, loser.attempt, reason))
        return loser

    def catch_up(self) -> None:
        """Let those who run take what others have computed of their prompts by now."""
        for index, candidate in enumerate(self.running):
            if candidate.num_cached:
                self.running[index] = self._with_hit(candidate)
                self.started.append(self.running[index])

    def _start(self, candidate: Candidate) -> None:
        self._in_use += candidate.kv_bytes
        candidate = self._with_hit(candidate)
        self.started.append(candidate)
        bisect.insort(self.running, candidate, key=_order)

    def _with_hit(self, candidate: Candidate) -> Candidate:
        """The candidate once it has what the cache has of it, if there is room for both: they are there for a moment."""
        if self._in_use + self._promised + candidate.cached_bytes > self._budget:
            return candidate
        self._promised += candidate.cached_bytes
        num_computed = max(candidate.num_computed, candidate.num_cached)
        return msgspec.structs.replace(candidate, num_computed=num_computed)


def _order(candidate: Candidate) -> tuple[int, int, int]:
    return candidate.order


def _is_decoding(candidate: Candidate, limits: Limits) -> bool:
    """Whether its next row is a single token of output, new or computed again."""
    if candidate.num_computed < candidate.num_prompt:
        return False
    return candidate.num_tokens - candidate.num_computed == 1 or not limits.has_free_cuts


def _prefill_budget(state: SchedulerState, *, is_anyone_decoding: bool) -> int:
    limits, ms_per_token = state.limits, state.prefill_ms_per_token
    if not is_anyone_decoding:
        return 2 * limits.chunk_tokens
    if not (limits.target_ms and ms_per_token):
        return limits.chunk_tokens
    return max(PREFILL_TOKENS_MIN, min(limits.chunk_tokens, int(limits.target_ms / ms_per_token)))


def _prefill_rows(candidates: Iterable[Candidate], budget: int, limits: Limits) -> list[PlannedRow]:
    rows: list[PlannedRow] = []
    for candidate in candidates:
        pending = candidate.num_tokens - candidate.num_computed
        if limits.has_free_cuts:
            size = min(pending, _aligned(candidate.num_computed, budget, limits)) if pending > budget else pending
        else:
            until_boundary = limits.chunk_tokens - candidate.num_computed % limits.chunk_tokens
            size = min(candidate.num_prompt - candidate.num_computed, until_boundary)
        if not size or (size > budget and rows):
            break
        rows.append(_row(candidate, size, 0))
        budget -= size
        if budget <= 0:
            break
    return rows


def _aligned(start: int, size: int, limits: Limits) -> int:
    """``size``, less what a piece from ``start`` would reach beyond a multiple of ``align_tokens``, if it reaches one."""
    beyond = (start + size) % limits.align_tokens
    return size - beyond if beyond < size else size


def _row(candidate: Candidate, size: int, num_draft: int) -> PlannedRow:
    is_last = candidate.num_computed + size == candidate.num_tokens
    num_draft = num_draft if is_last else 0
    return PlannedRow(
        request_id=candidate.request_id,
        attempt=candidate.attempt,
        start=candidate.num_computed,
        num_tokens=size + num_draft,
        num_logits=1 + num_draft if is_last else 0,
        num_draft=num_draft,
    )
