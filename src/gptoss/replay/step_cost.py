"""How long a step takes, learnt from recorded steps: duration = base + decode rows * a + prefill tokens * b.

Least squares; then once more without the steps that are far off, such as the first after a start. A factor that comes
out negative says that the recording shows no such effect, and is left out.
"""

from collections.abc import Sequence
from statistics import median

import msgspec

from gptoss.clock import NS_PER_MS
from gptoss.messages import events as ev

SAMPLES_MAX = 50_000
OUTLIER = 6.0
"""Steps whose error is so many times the median error are left out."""

Sample = tuple[float, float, float]
"""Decode rows, prefill tokens, milliseconds."""


class StepCost(msgspec.Struct, frozen=True, kw_only=True):
    """The law, in milliseconds. ``gap_ms`` lies between a step's end and the next one's start."""

    base_ms: float
    decode_row_ms: float
    prefill_token_ms: float
    gap_ms: float
    steps: int

    def duration_ns(self, decode_rows: int, prefill_tokens: int) -> int:
        """From the start of such a step to the start of the next, in nanoseconds."""
        milliseconds = (
            self.base_ms + self.gap_ms + self.decode_row_ms * decode_rows + self.prefill_token_ms * prefill_tokens
        )
        return max(1, int(milliseconds * NS_PER_MS))


class StepCosts:
    """Takes steps and learns."""

    def __init__(self) -> None:
        self._samples: list[Sample] = []
        self._gaps_ms: list[float] = []
        self._ends: dict[str, tuple[int, int]] = {}

    def observe(self, step: ev.StepCommitted) -> None:
        """Take a recorded step; only so many are kept."""
        number, end_ns = self._ends.get(step.executor, (-1, 0))
        is_next = number + 1 == step.step
        self._ends[step.executor] = (step.step if step.running else -2, step.started_ns + step.duration_ns)
        if len(self._samples) >= SAMPLES_MAX:
            return
        if is_next:
            self._gaps_ms.append((step.started_ns - end_ns) / NS_PER_MS)
        prefill = sum(row.prefilled for row in step.rows)
        decode = sum(not row.prefilled for row in step.rows)
        self._samples.append((decode, prefill, step.duration_ns / NS_PER_MS))

    def learn(self) -> StepCost | None:
        """The law; None if there was no step."""
        if not self._samples:
            return None
        factors = _fit(self._samples)
        errors = [abs(_at(factors, sample) - sample[2]) for sample in self._samples]
        limit = OUTLIER * median(errors)
        kept = [sample for sample, error in zip(self._samples, errors, strict=True) if error <= limit]
        base, decode, prefill = _fit(kept or self._samples)
        return StepCost(
            base_ms=base,
            decode_row_ms=decode,
            prefill_token_ms=prefill,
            gap_ms=max(0.0, median(self._gaps_ms)) if self._gaps_ms else 0.0,
            steps=len(self._samples),
        )


def _at(factors: Sequence[float], sample: Sample) -> float:
    return factors[0] + factors[1] * sample[0] + factors[2] * sample[1]


def _fit(samples: Sequence[Sample]) -> list[float]:
    """Base and factors by least squares, none negative."""
    used = [0, 1, 2]
    while True:
        found = _least_squares(samples, used)
        negative = [index for index in used if found[index] < 0]
        if not negative:
            return found
        used.remove(min(negative, key=lambda index: found[index]))


def _least_squares(samples: Sequence[Sample], used: Sequence[int]) -> list[float]:
    """The factors of the columns in ``used``; of those that do not vary by themselves, 0."""
    size = len(used)
    rows = [[0.0] * (size + 1) for _ in range(size)]
    for decode, prefill, milliseconds in samples:
        columns = (1.0, decode, prefill)
        for i, first in enumerate(used):
            for j, second in enumerate(used):
                rows[i][j] += columns[first] * columns[second]
            rows[i][size] += columns[first] * milliseconds
    solved = _solve(rows)
    found = [0.0, 0.0, 0.0]
    for index, value in zip(used, solved, strict=True):
        found[index] = value
    return found


def _solve(rows: list[list[float]]) -> list[float]:
    """Gauss-Jordan elimination; unknowns that the equations leave open are 0."""
    size = len(rows)
    pivots: list[int | None] = [None] * size
    free = list(range(size))
    for column in range(size):
        best = max(free, key=lambda row: abs(rows[row][column]), default=None)
        if best is None or abs(rows[best][column]) <= 1e-9 * max(1.0, abs(rows[best][size])):
            continue
        free.remove(best)
        pivots[column] = best
        scale = rows[best][column]
        rows[best] = [value / scale for value in rows[best]]
        for other in range(size):
            if other != best:
                factor = rows[other][column]
                rows[other] = [a - factor * b for a, b in zip(rows[other], rows[best], strict=True)]
    return [0.0 if pivot is None else rows[pivot][size] for pivot in pivots]
