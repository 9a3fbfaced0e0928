"""Percentiles, by nearest rank."""

from collections.abc import Sequence


def nearest_rank(ordered: Sequence[float], percent: int) -> float:
    """The smallest value that at least ``percent`` of a hundred do not exceed.

    Args:
        ordered: ascending, and not empty.
        percent: 1 to 100.
    """
    return ordered[-(-len(ordered) * percent // 100) - 1]
