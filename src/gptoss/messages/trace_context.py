"""Names of traces and spans: W3C trace context in and out, and span ids that follow from the log.

Rules:
- A request's trace is its caller's, where that sent a valid ``traceparent``; else it is named for the request.
- The id of a span is a hash of what the span is about, so that rebuilding a trace from the log names it the same.

Source: https://www.w3.org/TR/trace-context/
"""

import hashlib
import re
from typing import Self

import msgspec

from gptoss.messages.envelope import Meta

TRACE_ID_BYTES = 16
SPAN_ID_BYTES = 8
SAMPLED = "01"

_TRACEPARENT = re.compile(
    r"(?P<version>[0-9a-f]{2})-(?P<trace>[0-9a-f]{32})-(?P<parent>[0-9a-f]{16})-(?P<flags>[0-9a-f]{2})"
)


class TraceContext(msgspec.Struct, frozen=True):
    """Where a request stands in its trace.

    Attributes:
        trace_id: 32 hex digits.
        span_id: of the request's outermost span here, 16 hex digits.
        flags: two hex digits; the caller's own where there is one.
    """

    trace_id: str
    span_id: str
    flags: str = SAMPLED

    @classmethod
    def begin(cls, traceparent: str, about: str) -> Self:
        """The context of a request that arrived.

        Args:
            traceparent: the caller's; what is not valid is passed over.
            about: names the request like no other.
        """
        given = parse_traceparent(traceparent)
        if given is None:
            return cls(hashed(about, TRACE_ID_BYTES), hashed(f"{about} server", SPAN_ID_BYTES))
        return cls(given[0], hashed(f"{about} server", SPAN_ID_BYTES), given[2])

    @property
    def traceparent(self) -> str:
        """As a header: whoever gets it can name this request's span as a parent or a link."""
        return f"00-{self.trace_id}-{self.span_id}-{self.flags}"


NO_TRACE = TraceContext("", "")


def parse_traceparent(header: str) -> tuple[str, str, str] | None:
    """Trace id, parent's span id and flags of a valid ``traceparent``, else None."""
    match = _TRACEPARENT.fullmatch(header)
    if match is None or match["version"] == "ff" or not match["trace"].strip("0") or not match["parent"].strip("0"):
        return None
    return match["trace"], match["parent"], match["flags"]


def span_id_of(meta: Meta, what: str) -> str:
    """The id of the span ``what`` that a control record begins: a hash of the record's own id."""
    return hashed(f"{meta.node} {meta.boot} {meta.pos} {what}", SPAN_ID_BYTES)


def hashed(text: str, num_bytes: int) -> str:
    """``num_bytes`` in hex that follow from a text."""
    return hashlib.blake2b(text.encode(), digest_size=num_bytes).hexdigest()
