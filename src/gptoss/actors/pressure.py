"""Pressure: how much of the KV memory is spoken for, and what is done about it, level by level.

Pressure is what requests reserved and sessions keep, as a share of what the executors can give: their KV budgets, less
what the device turns out not to have. It is the memory guard's own number (``GuardState.pressure``), not a reading of the
device: a device's memory is meant to be full, since most of it is taken at load.

    evict    idle sessions are given up, the least recently used first
    shrink   newcomers get half of the output tokens that they asked for
    queue    newcomers take their turn in the line even if they would fit
    refuse   who is forecast to miss its deadline in the line is refused, without the benefit of the doubt

A request that fits is never refused for pressure, at any level: it is granted in full before it runs and cannot grow.
"""

import msgspec


class PressureLevels(msgspec.Struct, frozen=True, kw_only=True):
    """From which pressure on each is done; 0 is never."""

    evict: float = 0.0
    shrink: float = 0.0
    queue: float = 0.0
    refuse: float = 0.0


def is_reached(level: float, pressure: float) -> bool:
    """Whether a level that is on is reached."""
    return 0.0 < level <= pressure
