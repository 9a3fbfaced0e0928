"""How each event shows in a request's timeline: its phase, whether that is a moment, and what to say about it."""

from collections.abc import Callable
from typing import Any

from gptoss.messages import events as ev
from gptoss.messages.envelope import Event


def many(count: int, noun: str) -> str:
    """``1 step``, ``2 steps``."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def size(size_bytes: int) -> str:
    """``1.5 MiB``, ``12.0 KiB``, ``80 B``."""
    if size_bytes < 2**10:
        return f"{size_bytes} B"
    return f"{size_bytes / 2**10:.1f} KiB" if size_bytes < 2**20 else f"{size_bytes / 2**20:.1f} MiB"


def _nothing(_event: Any) -> str:
    return ""


def _decided(event: ev.AdmissionDecided) -> str:
    return f"{event.action}: {event.reason}; {event.running}/{event.slots} running, {event.queued} queued"


def _routed(event: ev.RouteDecided) -> str:
    return f"{event.executor or 'none'}: {event.reason}; {many(len(event.candidates), 'candidate')}"


def _rejected(event: ev.RequestRejected) -> str:
    return f"{event.status} {event.code}: {event.message}"


PHASES: dict[type[Event], tuple[str, bool, Callable[[Any], str]]] = {
    ev.RequestValidated: ("validated", False, _nothing),
    ev.PromptRendered: ("rendered", False, lambda e: f"{many(e.prompt_tokens, 'token')}, at most {e.max_tokens} out"),
    ev.RequestEstimated: ("estimated", False, lambda e: f"{size(e.kv_bytes)} of KV"),
    ev.AdmissionDecided: ("decided", True, _decided),
    ev.ReservationGranted: ("reserved", True, lambda e: size(e.kv_bytes)),
    ev.ReservationRefused: (
        "no memory",
        True,
        lambda e: f"{size(e.kv_bytes)} wanted, {size(e.kv_bytes_free_max)} free",
    ),
    ev.Enqueued: ("enqueued", True, lambda e: f"position {e.position}: {e.reason}"),
    ev.Dequeued: ("queued", False, _nothing),
    ev.RequestAdmitted: ("admitted", False, lambda e: f"{e.action}, at most {e.max_tokens} out"),
    ev.RouteDecided: ("route", True, _routed),
    ev.RequestRouted: ("routed", False, lambda e: f"{e.executor}, attempt {e.attempt}"),
    ev.ExecutorAccepted: ("accepted", False, lambda e: e.executor),
    ev.Preempted: ("preempted", True, lambda e: f"at step {e.step}: {e.reason}"),
    ev.FirstTokenProduced: ("first token", True, _nothing),
    ev.FirstByteSent: ("first byte", True, _nothing),
    ev.ClientSlow: ("client slow", True, lambda e: f"not reading for {e.stalled_ms:.0f} ms"),
    ev.ClientDisconnected: ("disconnected", True, _nothing),
    ev.CancelRequested: ("cancel", True, lambda e: e.reason),
    ev.CancelApplied: ("let go", True, lambda e: many(e.completion_tokens, "token")),
    ev.ExecutorFaulted: ("fault", False, lambda e: f"{e.code}: {e.message}"),
    ev.AttemptRetried: ("retried", True, lambda e: f"after {many(e.tokens_out, 'token')}"),
    ev.DeadlineExpired: ("expired", True, _nothing),
    ev.ReservationReleased: ("released", True, lambda e: size(e.kv_bytes)),
    ev.RequestCompleted: ("completed", False, lambda e: f"{e.finish_reason}, {many(e.completion_tokens, 'token')}"),
    ev.RequestFailed: ("failed", False, lambda e: f"{e.code}: {e.message}"),
    ev.RequestCancelled: ("cancelled", False, lambda e: f"{e.reason}, {many(e.completion_tokens, 'token')}"),
    ev.RequestRejected: ("rejected", False, _rejected),
}

ONCE = {"enqueued", "no memory"}
"""Marks that repeat with every try to leave the queue."""
