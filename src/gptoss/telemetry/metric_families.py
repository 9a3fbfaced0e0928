"""Counters, gauges and histograms that know no clock, and their exposition.

prometheus-client's own metric classes stamp wall times (``_created``) and lock at every observation. These hold plain
numbers, so that the same records give the same bytes, and cost a fifth; the library still does the exposition, through
a collector in a registry of our own. One thread folds and renders.
"""

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from typing import TypeAlias

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric

Labels: TypeAlias = tuple[str, ...]
"""Values of a family's labels, in the order of their names."""


class Counter:
    """A number for each combination of labels that only grows. ``name`` ends in ``_total``."""

    def __init__(self, name: str, text: str, labels: Sequence[str] = ()) -> None:
        self._name, self._text, self._labels = name, text, labels
        self._values: dict[Labels, float] = {}

    def add(self, labels: Labels, amount: float = 1) -> None:
        """Count ``amount`` more."""
        self._values[labels] = self._values.get(labels, 0) + amount

    def collect(self) -> Metric:
        """The family as the exposition wants it."""
        family = CounterMetricFamily(self._name, self._text, labels=self._labels)
        for labels, value in self._values.items():
            family.add_metric(labels, value)
        return family


class Gauge:
    """A number for each combination of labels that goes up and down."""

    def __init__(self, name: str, text: str, labels: Sequence[str] = ()) -> None:
        self._name, self._text, self._labels = name, text, labels
        self._values: dict[Labels, float] = {}

    def put(self, labels: Labels, value: float) -> None:
        """Replace the value."""
        self._values[labels] = value

    def collect(self) -> Metric:
        """The family as the exposition wants it."""
        family = GaugeMetricFamily(self._name, self._text, labels=self._labels)
        for labels, value in self._values.items():
            family.add_metric(labels, value)
        return family


class Histogram:
    """How often values fell into each bucket, for each combination of labels."""

    def __init__(self, name: str, text: str, labels: Sequence[str], bounds: Sequence[float]) -> None:
        self._name, self._text, self._labels = name, text, labels
        self._bounds = tuple(bounds)
        self._names = [*(str(float(bound)) for bound in self._bounds), "+Inf"]
        self._buckets: dict[Labels, list[int]] = {}
        self._sums: dict[Labels, float] = {}

    def observe(self, labels: Labels, value: float, times: int = 1) -> None:
        """Count ``value``, ``times`` over."""
        buckets = self._buckets.get(labels)
        if buckets is None:
            buckets = self._buckets[labels] = [0] * len(self._names)
            self._sums[labels] = 0.0
        buckets[bisect_left(self._bounds, value)] += times
        self._sums[labels] += value * times

    def collect(self) -> Metric:
        """The family as the exposition wants it: cumulative buckets."""
        family = HistogramMetricFamily(self._name, self._text, labels=self._labels)
        for labels, counts in self._buckets.items():
            total = 0
            buckets: list[tuple[str, float]] = []
            for name, count in zip(self._names, counts, strict=True):
                total += count
                buckets.append((name, total))
            family.add_metric(labels, buckets, self._sums[labels])
        return family


Family: TypeAlias = Counter | Gauge | Histogram


class FamilyCollector:
    """Shows families to a registry."""

    def __init__(self, families: Sequence[Family]) -> None:
        self._families = families

    def collect(self) -> Iterator[Metric]:
        """Every family, in the order given."""
        for family in self._families:
            yield family.collect()
