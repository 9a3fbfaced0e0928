"""Which traces are kept, decided when a request has ended and everything about it is known.

Rules:
- Kept whole: what the server failed or could not take, what took longer than ``trace_slow_s``, what the server gave up.
- Of all others a share, chosen by a hash of the trace id: choices of one call, and servers of one fleet, agree.
- The settings are those that ``NodeStarted`` recorded, so the same records keep the same traces.
"""

from collections.abc import Mapping
from http import HTTPStatus
from typing import Any, Literal, Self, TypeAlias

import msgspec

from gptoss.clock import NS_PER_S
from gptoss.config import Settings
from gptoss.messages.trace_context import hashed
from gptoss.telemetry.request_view import RequestView

Reason: TypeAlias = Literal["error", "slow", "cancelled", "ratio"]

SERVER_CANCELS = frozenset({"deadline", "slow_client", "shutdown", "sibling_failed"})
"""Reasons of a cancellation that are not the client's own wish."""
_HASH_BYTES = 8


class Kept(msgspec.Struct, frozen=True):
    """Why a trace is kept, and how probable that was for a request of its kind."""

    reason: Reason
    probability: float


class TailSampling(msgspec.Struct, frozen=True, kw_only=True):
    """The rules in force. ``exports`` is false where no collector is set, and then nothing is kept."""

    exports: bool = False
    errors: bool = True
    cancelled: bool = True
    slow_ns: int = 10 * NS_PER_S
    ratio: float = 0.0

    @classmethod
    def from_recorded(cls, settings: Mapping[str, Any]) -> Self:
        """The rules by the settings that ``NodeStarted`` holds; older versions recorded none and exported nothing."""
        defaults = Settings()
        return cls(
            exports=bool(settings.get("otlp_endpoint")),
            errors=bool(settings.get("trace_errors", defaults.trace_errors)),
            cancelled=bool(settings.get("trace_cancelled", defaults.trace_cancelled)),
            slow_ns=int(settings.get("trace_slow_s", defaults.trace_slow_s) * NS_PER_S),
            ratio=float(settings.get("trace_ratio", defaults.trace_ratio)),
        )

    def keeps(self, request: RequestView) -> Kept | None:
        """Whether the trace of a request that has ended is kept."""
        if not self.exports:
            return None
        if self.errors and is_server_fault(request):
            return Kept("error", 1.0)
        if (request.e2e_ns or 0) > self.slow_ns:
            return Kept("slow", 1.0)
        if self.cancelled and request.state == "cancelled" and request.outcome in SERVER_CANCELS:
            return Kept("cancelled", 1.0)
        drawn = int(hashed(request.trace_id, _HASH_BYTES), 16)
        return Kept("ratio", self.ratio) if drawn < self.ratio * 2 ** (8 * _HASH_BYTES) else None


def is_server_fault(request: RequestView) -> bool:
    """Whether the server failed a request, or had no room for it; a request that was wrong itself does not count."""
    if request.state == "rejected":
        return request.status >= HTTPStatus.INTERNAL_SERVER_ERROR or request.status == HTTPStatus.TOO_MANY_REQUESTS
    return request.state == "failed"
