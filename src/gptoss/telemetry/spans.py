"""A span as plain data, before anybody's library encodes it. Times are wall times in nanoseconds."""

from collections.abc import Callable
from typing import Literal, TypeAlias

import msgspec

Value: TypeAlias = str | int | float | bool | tuple[str, ...]
Attributes: TypeAlias = dict[str, Value]

LINKS_MAX = 32


class SpanEvent(msgspec.Struct, frozen=True):
    """A moment in a span."""

    name: str
    at_ns: int
    attributes: Attributes = {}


class Span(msgspec.Struct, frozen=True, kw_only=True):
    """One operation of a trace.

    Attributes:
        parent_id: span id of its parent, empty at the root; ``is_parent_remote``: that is the caller's own span.
        error: code of the failure, empty when there was none.
        links: (trace id, span id) of what it had to do with elsewhere, at most ``LINKS_MAX``.
        links_dropped: links beyond those.
    """

    trace_id: str
    span_id: str
    parent_id: str
    name: str
    start_ns: int
    end_ns: int
    kind: Literal["server", "internal"] = "internal"
    is_parent_remote: bool = False
    attributes: Attributes = {}
    events: tuple[SpanEvent, ...] = ()
    links: tuple[tuple[str, str], ...] = ()
    links_dropped: int = 0
    error: str = ""


SpanSink: TypeAlias = Callable[[tuple[Span, ...]], None]
"""Takes all spans of one request; it must not block."""
