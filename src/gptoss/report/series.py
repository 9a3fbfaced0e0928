"""Long rows of values in little memory: when there are too many, neighbours become one.

Nothing is dropped: of numbers the larger stays, of steps all that happened in either.
"""

from dataclasses import dataclass, field

from gptoss.messages import events as ev

POINTS_MAX = 800
COLUMNS_MAX = 400

DECODED, PREFILLED, PREEMPTED = 1, 2, 4


class Series:
    """A number that changes now and then; between two points it stays as it was."""

    def __init__(self) -> None:
        self.points: list[tuple[int, float]] = []
        """(monotonic ns, value), ascending."""

    def add(self, at_ns: int, value: float) -> None:
        """The value from now on."""
        if self.points and self.points[-1][1] == value:
            return
        self.points.append((at_ns, value))
        if len(self.points) >= 2 * POINTS_MAX:
            pairs = zip(self.points[::2], self.points[1::2], strict=True)
            self.points = [(first[0], max(first[1], second[1])) for first, second in pairs]

    @property
    def top(self) -> float:
        """The largest value, 0 without any."""
        return max((value for _, value in self.points), default=0.0)


@dataclass(slots=True)
class Column:
    """One step, or several that follow each other.

    Attributes:
        cells: request -> what its rows did: ``DECODED``, ``PREFILLED``, ``PREEMPTED``, added up.
        longest_ns: of its steps, the longest.
    """

    first_step: int
    last_step: int
    started_ns: int
    ended_ns: int
    longest_ns: int
    tokens: int
    prefilled: int
    rows_max: int
    waiting_max: int
    cells: dict[str, int] = field(default_factory=dict[str, int])


class StepGrid:
    """Who was in which step of one executor."""

    def __init__(self) -> None:
        self.columns: list[Column] = []
        self.steps_per_column = 1
        self.num_steps = 0
        self._in_last = 0

    def add(self, event: ev.StepCommitted) -> None:
        """Take one step in."""
        self.num_steps += 1
        column = _column(event)
        if self.columns and self._in_last < self.steps_per_column:
            self.columns[-1] = _merged(self.columns[-1], column)
            self._in_last += 1
            return
        if len(self.columns) == COLUMNS_MAX:
            pairs = zip(self.columns[::2], self.columns[1::2], strict=True)
            self.columns = [_merged(first, second) for first, second in pairs]
            self.steps_per_column *= 2
        self.columns.append(column)
        self._in_last = 1


def _column(event: ev.StepCommitted) -> Column:
    cells = {row.request_id: (PREFILLED if row.prefilled else 0) | (DECODED if row.tokens else 0) for row in event.rows}
    for lost in event.preemptions:
        cells[lost.request_id] = cells.get(lost.request_id, 0) | PREEMPTED
    return Column(
        first_step=event.step,
        last_step=event.step,
        started_ns=event.started_ns,
        ended_ns=event.started_ns + event.duration_ns,
        longest_ns=event.duration_ns,
        tokens=sum(row.tokens for row in event.rows),
        prefilled=sum(row.prefilled for row in event.rows),
        rows_max=len(event.rows),
        waiting_max=event.waiting,
        cells=cells,
    )


def _merged(first: Column, second: Column) -> Column:
    cells = dict(first.cells)
    for request_id, did in second.cells.items():
        cells[request_id] = cells.get(request_id, 0) | did
    return Column(
        first_step=first.first_step,
        last_step=second.last_step,
        started_ns=first.started_ns,
        ended_ns=second.ended_ns,
        longest_ns=max(first.longest_ns, second.longest_ns),
        tokens=first.tokens + second.tokens,
        prefilled=first.prefilled + second.prefilled,
        rows_max=max(first.rows_max, second.rows_max),
        waiting_max=max(first.waiting_max, second.waiting_max),
        cells=cells,
    )
