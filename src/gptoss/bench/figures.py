"""Figures of a load test: distributions in constant memory, and how a test ended.

Rules:
- A ``Spread`` counts values in buckets whose edges are ``GROWTH`` apart, so its percentiles are at most 1% too high. Count,
  mean and maximum are exact.
- Times are seconds while they are gathered and milliseconds where they are told.
"""

import math
from collections import Counter
from typing import Literal

import msgspec

from gptoss.clock import NS_PER_MS

GROWTH = 1.01
_LOG_GROWTH = math.log(GROWTH)
_TINY = 1e-9

Ended = Literal["all requests", "time", "interrupted"]


class Quantiles(msgspec.Struct, frozen=True, kw_only=True):
    """A distribution as it is told. All but ``count`` are 0 when there is nothing to tell."""

    count: int = 0
    mean: float = 0.0
    p50: float = 0.0
    p90: float = 0.0
    p99: float = 0.0
    max: float = 0.0


class Spread:
    """Gathers values above 0."""

    def __init__(self) -> None:
        self.count = 0
        self._sum = 0.0
        self._max = 0.0
        self._buckets: Counter[int] = Counter()

    def add(self, value: float) -> None:
        """Count a value; one below 0 counts as 0."""
        self.count += 1
        self._sum += value
        self._max = max(self._max, value)
        self._buckets[math.ceil(math.log(max(value, _TINY)) / _LOG_GROWTH)] += 1

    def add_ns(self, duration_ns: int) -> None:
        """Count a duration, as milliseconds."""
        self.add(duration_ns / NS_PER_MS)

    def quantiles(self) -> Quantiles:
        """What was gathered so far."""
        if not self.count:
            return Quantiles()
        p50, p90, p99 = self._percentiles(50, 90, 99)
        mean = round(self._sum / self.count, 4)
        return Quantiles(count=self.count, mean=mean, p50=p50, p90=p90, p99=p99, max=round(self._max, 4))

    def _percentiles(self, *percents: int) -> list[float]:
        """By nearest rank."""
        ranks = [-(-self.count * percent // 100) for percent in percents]
        found: list[float] = []
        seen = 0
        for bucket in sorted(self._buckets):
            seen += self._buckets[bucket]
            while len(found) < len(ranks) and seen >= ranks[len(found)]:
                found.append(round(min(self._max, GROWTH**bucket), 4))
        return found


class Depth(msgspec.Struct, frozen=True):
    """How many letters a mailbox held, over the samples of a test."""

    mean: float
    max: int
