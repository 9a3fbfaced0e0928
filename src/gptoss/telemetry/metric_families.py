"""Counters, gauges and histograms that know no clock, and their exposition.

prometheus-client's own metric classes stamp wall times (``_created``) and lock at every observation. These hold plain
numbers, so that the same records give the same bytes, and cost a fifth; the library still does the exposition, through
a collector in a registry of our own. One thread folds and renders.

What counters and histograms hold can be saved and added to those of a later run. A family whose labels or buckets
are not those of the saved one any more begins again.
"""

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from typing import TypeAlias

import msgspec
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.samples import Exemplar

Labels: TypeAlias = tuple[str, ...]
"""Values of a family's labels, in the order of their names."""


class SavedFamily(msgspec.Struct, frozen=True, array_like=True):
    """The numbers of a counter or a histogram.

    Attributes:
        labels: names of its labels.
        bounds: of its buckets; none of a counter.
        rows: for each combination of labels the counts, one of a counter, one a bucket of a histogram, and the sum.
    """

    labels: Labels
    bounds: tuple[float, ...]
    rows: list[tuple[Labels, list[float], float]]


class Counter:
    """A number for each combination of labels that only grows. ``name`` ends in ``_total``."""

    def __init__(self, name: str, text: str, labels: Sequence[str] = ()) -> None:
        self.name = name
        self._text, self._labels = text, tuple(labels)
        self._values: dict[Labels, float] = {}

    def add(self, labels: Labels, amount: float = 1) -> None:
        """Count ``amount`` more."""
        self._values[labels] = self._values.get(labels, 0) + amount

    def collect(self) -> Metric:
        """The family as the exposition wants it."""
        family = CounterMetricFamily(self.name, self._text, labels=self._labels)
        for labels, value in self._values.items():
            family.add_metric(labels, value)
        return family

    def saved(self) -> SavedFamily:
        """What it holds."""
        return SavedFamily(self._labels, (), [(labels, [value], 0.0) for labels, value in self._values.items()])

    def add_saved(self, saved: SavedFamily) -> None:
        """Go on from what was counted before."""
        if (saved.labels, saved.bounds) == (self._labels, ()):
            for labels, counts, _ in saved.rows:
                self.add(labels, counts[0])


class Reading(Counter):
    """A counter that somebody else keeps, such as the kernel: read, not counted, and not carried over a restart."""

    def put(self, labels: Labels, value: float) -> None:
        """Replace the value."""
        self._values[labels] = value


class Gauge:
    """A number for each combination of labels that goes up and down."""

    def __init__(self, name: str, text: str, labels: Sequence[str] = ()) -> None:
        self.name = name
        self._text, self._labels = text, tuple(labels)
        self._values: dict[Labels, float] = {}

    def put(self, labels: Labels, value: float) -> None:
        """Replace the value."""
        self._values[labels] = value

    def clear(self) -> None:
        """Forget every value, before all that there are now are put."""
        self._values.clear()

    def collect(self) -> Metric:
        """The family as the exposition wants it."""
        family = GaugeMetricFamily(self.name, self._text, labels=self._labels)
        for labels, value in self._values.items():
            family.add_metric(labels, value)
        return family


class _Row:
    """One combination of labels of a histogram."""

    __slots__ = ("buckets", "total")

    def __init__(self, buckets: int) -> None:
        self.buckets = [0] * buckets
        self.total = 0.0


class Histogram:
    """How often values fell into each bucket, for each combination of labels, with an example of each."""

    def __init__(self, name: str, text: str, labels: Sequence[str], bounds: Sequence[float]) -> None:
        self.name = name
        self._text, self._labels = text, tuple(labels)
        self._bounds = tuple(float(bound) for bound in bounds)
        self._names = [*(str(bound) for bound in self._bounds), "+Inf"]
        self._rows: dict[Labels, _Row] = {}
        self._exemplars: dict[tuple[Labels, int], Exemplar] = {}

    def observe(self, labels: Labels, value: float, times: int = 1) -> None:
        """Count ``value``, ``times`` over."""
        row = self._rows.get(labels)
        if row is None:
            row = self._rows[labels] = _Row(len(self._names))
        row.buckets[bisect_left(self._bounds, value)] += times
        row.total += value * times

    def exemplify(self, labels: Labels, value: float, *, trace_id: str, unix_s: float) -> None:
        """Name a trace as the newest example of a value that was observed."""
        bucket = bisect_left(self._bounds, value)
        self._exemplars[labels, bucket] = Exemplar({"trace_id": trace_id}, value, unix_s)

    def collect(self) -> Metric:
        """The family as the exposition wants it: cumulative buckets. Only OpenMetrics shows the examples."""
        family = HistogramMetricFamily(self.name, self._text, labels=self._labels)
        for labels, row in self._rows.items():
            total = 0
            buckets: list[tuple[str, float] | tuple[str, float, Exemplar]] = []
            for bucket, (name, count) in enumerate(zip(self._names, row.buckets, strict=True)):
                total += count
                exemplar = self._exemplars.get((labels, bucket))
                buckets.append((name, total) if exemplar is None else (name, total, exemplar))
            family.add_metric(labels, buckets, row.total)
        return family

    def saved(self) -> SavedFamily:
        """What it holds."""
        rows = [(labels, list[float](row.buckets), row.total) for labels, row in self._rows.items()]
        return SavedFamily(self._labels, self._bounds, rows)

    def add_saved(self, saved: SavedFamily) -> None:
        """Go on from what was counted before."""
        if (saved.labels, saved.bounds) != (self._labels, self._bounds):
            return
        for labels, counts, total in saved.rows:
            self.observe(labels, 0.0, 0)
            row = self._rows[labels]
            row.total += total
            for bucket, count in enumerate(counts):
                row.buckets[bucket] += int(count)


Family: TypeAlias = Counter | Gauge | Histogram


class FamilyCollector:
    """Shows families to a registry."""

    def __init__(self, families: Sequence[Family]) -> None:
        self._families = families

    def collect(self) -> Iterator[Metric]:
        """Every family, in the order given."""
        for family in self._families:
            yield family.collect()
