"""Wall time of records: a boot anchors it now and then, and other records' times follow from their monotonic ones."""

from typing import TypeVar

from gptoss.messages import events as ev
from gptoss.messages.envelope import Record

ANCHORS = frozenset({ev.NodeStarted, ev.ClockAnchored})
"""Types of the records that anchor it."""

T = TypeVar("T", int, int | None)


def wall_offset_ns(record: Record, before: T) -> int | T:
    """Wall time minus monotonic time from this record on, in nanoseconds; ``before`` unless it is an anchor."""
    if isinstance(record.event, ev.NodeStarted | ev.ClockAnchored):
        return record.event.wall_ns - record.meta.mono_ns
    return before
