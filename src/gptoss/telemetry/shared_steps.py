"""The steps that a request had a part in, and whom it shared them with, in a bounded number of columns.

When there are too many steps, neighbours become one column: times and counts add up, of what is a size the larger stays.
"""

import msgspec

from gptoss.clock import NS_PER_MS
from gptoss.messages import events as ev

COLUMNS_MAX = 160


class StepColumn(msgspec.Struct, frozen=True, kw_only=True):
    """One step, or several that follow each other; milliseconds since the request was received.

    Attributes:
        first_step: number of the first, by its executor's count.
        longest_ms: of its steps, the longest.
        tokens, prefilled: of this request.
        others: the most other requests in one of them; ``others_prefilled`` the prompt tokens of those.
        is_preempted: the request lost its memory in it.
    """

    executor: str
    first_step: int
    steps: int
    start_ms: float
    end_ms: float
    longest_ms: float
    tokens: int
    prefilled: int
    others: int
    others_prefilled: int
    is_preempted: bool = False


class SharedSteps:
    """Takes in the steps of a request's life; those without it are passed over."""

    def __init__(self, request_id: str, begin_ns: int) -> None:
        self._request_id = request_id
        self._begin_ns = begin_ns
        self._columns: list[StepColumn] = []
        self._steps_per_column = 1

    def add(self, step: ev.StepCommitted) -> None:
        """Take one step in."""
        column = self._column(step)
        if column is None:
            return
        last = self._columns[-1] if self._columns else None
        if last is not None and last.steps < self._steps_per_column and last.executor == column.executor:
            self._columns[-1] = _merged(last, column)
            return
        self._columns.append(column)
        if len(self._columns) > COLUMNS_MAX:
            self._halve()

    def columns(self) -> tuple[StepColumn, ...]:
        """What was found, in order."""
        return tuple(self._columns)

    def _column(self, step: ev.StepCommitted) -> StepColumn | None:
        own = next((row for row in step.rows if row.request_id == self._request_id), None)
        is_preempted = any(lost.request_id == self._request_id for lost in step.preemptions)
        if own is None and not is_preempted:
            return None
        took_ms = round(step.duration_ns / NS_PER_MS, 3)
        start_ms = round(max(0, step.started_ns - self._begin_ns) / NS_PER_MS, 3)
        prefilled = own.prefilled if own else 0
        return StepColumn(
            executor=step.executor,
            first_step=step.step,
            steps=1,
            start_ms=start_ms,
            end_ms=round(start_ms + took_ms, 3),
            longest_ms=took_ms,
            tokens=own.tokens if own else 0,
            prefilled=prefilled,
            others=len(step.rows) - (own is not None),
            others_prefilled=sum(row.prefilled for row in step.rows) - prefilled,
            is_preempted=is_preempted,
        )

    def _halve(self) -> None:
        self._steps_per_column *= 2
        halved: list[StepColumn] = []
        for column in self._columns:
            last = halved[-1] if halved else None
            fits = last is not None and last.steps + column.steps <= self._steps_per_column
            if last is not None and fits and last.executor == column.executor:
                halved[-1] = _merged(last, column)
            else:
                halved.append(column)
        self._columns = halved


def _merged(first: StepColumn, second: StepColumn) -> StepColumn:
    return StepColumn(
        executor=first.executor,
        first_step=first.first_step,
        steps=first.steps + second.steps,
        start_ms=first.start_ms,
        end_ms=second.end_ms,
        longest_ms=max(first.longest_ms, second.longest_ms),
        tokens=first.tokens + second.tokens,
        prefilled=first.prefilled + second.prefilled,
        others=max(first.others, second.others),
        others_prefilled=first.others_prefilled + second.others_prefilled,
        is_preempted=first.is_preempted or second.is_preempted,
    )
