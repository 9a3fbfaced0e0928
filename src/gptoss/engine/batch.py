"""Who waits and who runs, and the KV memory of those who run: what the scheduler plans over and what plans change.

Rules:
- A request keeps its memory from its start to its end or its preemption. What it takes is known before it starts, so
  the budget is never exceeded.
- Should the device refuse what the budget allows, the budget falls to what is in use, and rises again when a request
  ends. A start that was refused goes back in line; only with nobody else running it is an error.
"""

import bisect
import gc

import torch

from gptoss.engine.runner import Runner, Slot
from gptoss.engine.scheduler import SchedulerState
from gptoss.engine.sequence import Sequence
from gptoss.engine.step import one_line
from gptoss.messages.plan import Limits, StepPlan


class Batch:
    """The requests of one engine.

    Args:
        runner: makes KV slots.
        limits: of the scheduler.
        kv_budget_bytes: KV memory that running requests may hold together.

    Attributes:
        sequences: all requests by id.
        kv_bytes_in_use: held by running requests.
    """

    def __init__(self, runner: Runner, limits: Limits, kv_budget_bytes: int) -> None:
        self.limits = limits
        self.sequences: dict[str, Sequence] = {}
        self.kv_bytes_in_use = 0
        self._runner = runner
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

    def add(self, sequence: Sequence) -> None:
        """Put a request in line."""
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
        """What the scheduler needs to know."""
        waiting = [sequence.candidate() for _, sequence in self._waiting[: self._num_startable()]]
        return SchedulerState(
            limits=self.limits,
            running=tuple(sequence.candidate() for sequence in self._running),
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
        for start in plan.starts:
            error = self._start(self.sequences[start.request_id])
            if error:
                refused[start.request_id] = error
        if refused and self._running:
            self._budget_bytes_now = self.kv_bytes_in_use
        return refused

    def relieve(self) -> None:
        """Give the device back what is held without need."""
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def shorten_budget(self) -> None:
        """Memory ran out in a step: the worst that runs is to give its own back, if it is not the only one."""
        if len(self._running) > 1:
            self._budget_bytes_now = self.kv_bytes_in_use - 1

    def _num_startable(self) -> int:
        """How many of those in line could at most start in one step."""
        if not self._waiting:
            return 0
        best_priority = self._waiting[0][0][0]
        displaceable = sum(sequence.order[0] > best_priority for sequence in self._running)
        return self.limits.max_batch_size - len(self._running) + displaceable

    def _start(self, sequence: Sequence) -> str:
        """Give a request its memory. Returns why the device refused, or nothing."""
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
