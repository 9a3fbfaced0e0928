"""Supervision: what follows when an actor fails.

Rules:
- A failed child is replaced after a backoff: exponential from ``backoff_s`` to ``backoff_max_s``, with full jitter.
- one_for_one restarts the failed child. rest_for_one first takes down the children adopted after it, the latest first,
  then restarts all of them in order.
- A child that fails more than ``max_restarts`` times within ``within_s`` stays down: ``SupervisorEscalated``.
- The mailbox survives the restart. The letter that failed is consumed, so that it cannot fail twice.
"""

import asyncio
from collections import deque
from typing import Literal

import msgspec

from gptoss.actors.cell import Cell
from gptoss.actors.kernel import Kernel
from gptoss.clock import NS_PER_S
from gptoss.messages.events import SupervisorEscalated

MAX_DOUBLINGS = 30
MS_PER_S = 1000.0
SUSPEND_S = 1.0
"""How long a healthy sibling may finish its message before rest_for_one interrupts it."""


class Supervision(msgspec.Struct, frozen=True, kw_only=True):
    """A supervisor's settings.

    Attributes:
        max_restarts: restarts of one child that are allowed within any ``within_s`` seconds.
        backoff_s: upper bound of the first wait; it doubles with each restart in the window, up to ``backoff_max_s``.
    """

    strategy: Literal["one_for_one", "rest_for_one"] = "one_for_one"
    max_restarts: int = 3
    within_s: float = 60.0
    backoff_s: float = 0.05
    backoff_max_s: float = 5.0


class Supervisor:
    """Watches over its children, in the order in which they were spawned."""

    def __init__(self, kernel: Kernel, name: str, supervision: Supervision) -> None:
        self.name = name
        self.supervision = supervision
        self._kernel = kernel
        self._children: list[Cell] = []
        self._failures_ns: dict[Cell, deque[int]] = {}
        self._restarts: dict[Cell, asyncio.Task[None]] = {}

    @property
    def children(self) -> tuple[str, ...]:
        """Names of the living children in order."""
        return tuple(cell.name for cell in self._children)

    def adopt(self, cell: Cell) -> None:
        """Take charge of a new child."""
        self._children.append(cell)

    def child_stopped(self, cell: Cell) -> None:
        """See ``cell.Parent``."""
        self._children.remove(cell)
        self._failures_ns.pop(cell, None)
        self._restarts.pop(cell, None)

    def child_failed(self, cell: Cell) -> None:
        """See ``cell.Parent``."""
        recent = self._count_failure(cell)
        if recent > self.supervision.max_restarts:
            self._escalate(cell, recent - 1)
            return
        if cell in self._restarts:  # an earlier sibling failed at the same time and takes this one along
            return
        group = self._group(cell)
        for member in group:
            pending = self._restarts.pop(member, None)
            if pending is not None:
                pending.cancel()
        delay_s = self._backoff_s(recent)
        task = self._kernel.own(self._restart(group, delay_s), f"restart/{cell.name}")
        for member in group:
            self._restarts[member] = task

    def _group(self, cell: Cell) -> list[Cell]:
        if self.supervision.strategy == "one_for_one":
            return [cell]
        return self._children[self._children.index(cell) :]

    async def _restart(self, group: list[Cell], delay_s: float) -> None:
        for sibling in reversed(group[1:]):
            await sibling.suspend(SUSPEND_S)
        await asyncio.sleep(delay_s)
        for member in group:
            self._restarts.pop(member, None)
            member.restart(delay_s * MS_PER_S)

    def _count_failure(self, cell: Cell) -> int:
        now_ns = self._kernel.clock.monotonic_ns()
        failures = self._failures_ns.setdefault(cell, deque(maxlen=self.supervision.max_restarts + 1))
        failures.append(now_ns)
        horizon_ns = now_ns - int(self.supervision.within_s * NS_PER_S)
        while failures[0] < horizon_ns:
            failures.popleft()
        return len(failures)

    def _backoff_s(self, recent: int) -> float:
        doublings = min(recent - 1, MAX_DOUBLINGS)
        return (
            min(self.supervision.backoff_max_s, self.supervision.backoff_s * 2**doublings) * self._kernel.rng.uniform()
        )

    def _escalate(self, cell: Cell, restarts: int) -> None:
        event = SupervisorEscalated(child=cell.name, restarts=restarts, within_s=self.supervision.within_s)
        self._kernel.record(event, self.name)
        cell.finish("escalated")
        for callback in self._kernel.on_escalated:
            self._kernel.post(callback, cell.name)
