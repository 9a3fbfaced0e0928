"""What an event says, in one line for people, and whether that is good or bad news.

Strings of a record come from clients or from whoever made a bundle: what is returned here is not escaped.
"""

from collections.abc import Callable
from typing import Any, Literal, TypeAlias

import msgspec

from gptoss.clock import NS_PER_MS
from gptoss.messages import events as ev
from gptoss.messages.envelope import Event, Record
from gptoss.telemetry.plain_text import took
from gptoss.telemetry.timeline_phases import PHASES, many, size

Tone: TypeAlias = Literal["good", "warn", "bad", ""]

_TONES: dict[type[Event], Tone] = {
    ev.RequestCompleted: "good",
    ev.RequestFailed: "bad",
    ev.RequestRejected: "bad",
    ev.RequestCancelled: "warn",
    ev.ExecutorFaulted: "bad",
    ev.EngineExited: "bad",
    ev.EngineStalled: "bad",
    ev.EngineLoadFailed: "bad",
    ev.ActorFailed: "bad",
    ev.SupervisorEscalated: "bad",
    ev.RunsAborted: "bad",
    ev.LogDegraded: "bad",
    ev.Preempted: "warn",
    ev.ReservationRefused: "warn",
    ev.AttemptRetried: "warn",
    ev.DeadLettered: "warn",
    ev.DeadlineExpired: "warn",
    ev.ActorRestarted: "warn",
}


def tone_of(event: Event) -> Tone:
    """Whether an event is good news, bad news, or to be looked at; empty for none of these."""
    return _TONES.get(type(event), "")


def describe(record: Record) -> str:
    """What an event says, in one line; not escaped."""
    event, kind = record.event, type(record.event)
    special = _DESCRIPTIONS.get(kind)
    if special is not None:
        return special(event)
    phase = PHASES.get(kind)
    if phase is not None and (detail := phase[2](event)):
        return detail
    fields = msgspec.structs.fields(kind)
    parts = [
        _said(field.name, value)
        for field in fields
        if field.name != "request_id" and (value := getattr(event, field.name)) not in ("", 0, None, ())
    ]
    return ", ".join(part for part in parts if part)


def _said(name: str, value: Any) -> str:
    if name.endswith("_ns") and isinstance(value, int):
        return f"{name[:-3]} {took(value / NS_PER_MS)}" if name in _DURATIONS else ""
    if name.endswith("_bytes") or "bytes" in name.split("_"):
        return f"{name.replace('_bytes', '')} {size(value)}" if isinstance(value, int) else ""
    if isinstance(value, bool):
        return name
    if isinstance(value, float):
        return f"{name} {value:.4g}"
    if isinstance(value, (str, int)):
        return f"{name} {value}"
    if isinstance(value, tuple):
        return f"{len(value)} {name}"  # pyright: ignore[reportUnknownArgumentType]
    return ""


_DURATIONS = {"waited_ns", "ran_ns", "duration_ns"}


def _step(event: ev.StepCommitted) -> str:
    prefilled, tokens = sum(row.prefilled for row in event.rows), sum(row.tokens for row in event.rows)
    parts = [f"step {event.step}: {many(len(event.rows), 'row')} in {took(event.duration_ns / NS_PER_MS)}"]
    parts += [f"{prefilled} prefilled"] if prefilled else []
    parts += [many(tokens, "token")] if tokens else []
    parts += [f"{event.waiting} waiting"] if event.waiting else []
    parts += [f"{len(event.preemptions)} preempted"] if event.preemptions else []
    return ", ".join(parts)


def _command(event: ev.CommandConsumed) -> str:
    fields: dict[str, Any] = msgspec.msgpack.decode(event.command)
    said = [_said(name, value) for name, value in fields.items() if name not in {"type", "now_ns", "request_id"}]
    return f"{fields.get('type', '')}: {', '.join(part for part in said if part)}".removesuffix(": ")


def _node(event: ev.NodeStarted) -> str:
    return f"gptoss {event.version}, Python {event.python}, {many(event.cpu_count, 'CPU')}, {event.os}"


def _host(event: ev.HostObserved) -> str:
    memory = f"{size(event.rss_bytes)} resident, {size(event.memory_available_bytes)} left"
    gpus = "".join(f", GPU {gpu.index} {gpu.busy_percent:.0f}%" for gpu in event.gpus)
    return f"processors {event.host_cpu_percent:.0f}% busy, {memory}, loop {took(event.loop_late_ms)} late{gpus}"


_DESCRIPTIONS: dict[type[Event], Callable[[Any], str]] = {
    ev.StepCommitted: _step,
    ev.CommandConsumed: _command,
    ev.NodeStarted: _node,
    ev.SnapshotTaken: lambda event: f"{event.decider}: {many(len(bytes(event.state)), 'byte')}",
    ev.EngineLoaded: lambda event: f"{event.capabilities.model_name} in {took(event.load_ms)}, process {event.pid}",
    ev.RunsAborted: lambda event: f"{event.boot}: {many(len(event.request_ids), 'request')} cut off",
    ev.ClockAnchored: lambda _: "",
    ev.CountersSaved: lambda event: f"at {event.pos}: {many(len(bytes(event.state)), 'byte')}",
    ev.CountersCarried: lambda event: many(len(bytes(event.state)), "byte"),
    ev.HostObserved: _host,
}
