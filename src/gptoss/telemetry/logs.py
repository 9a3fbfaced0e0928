"""Log lines, folded from the journal: one line an event of interest, one line a request, never any content.

Lines are plain dictionaries (``event``, ``level``, fields), written as JSON or, for people, by structlog's renderer without
any global configuration. Strings that came from outside are escaped and cut, so that nobody can forge a line. Load progress and
dead letters are rate-limited by the records' own times, and what was held back is counted in the next line.
"""

import functools
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Literal, TextIO, TypeAlias

import msgspec
from structlog.dev import ConsoleRenderer

from gptoss.clock import NS_PER_MS, NS_PER_S
from gptoss.messages import events as ev
from gptoss.messages.envelope import Event, Meta, Record
from gptoss.telemetry.folding import Handler, View
from gptoss.telemetry.request_view import RequestView, request_id_of
from gptoss.telemetry.wall_clock import ANCHORS, wall_offset_ns

Level: TypeAlias = Literal["debug", "info", "warning", "error"]
Fields: TypeAlias = dict[str, Any]

LEVELS: dict[str, int] = {"debug": 10, "info": 20, "warning": 30, "error": 40}
TEXT_MAX = 300
PROGRESS_EVERY_NS = 2 * NS_PER_S
DEAD_LETTERS_EVERY_NS = NS_PER_S
SERVER_ERROR_STATUS = 500
US_PER_S = 1_000_000


def log_line(record: Record, request: RequestView | None = None) -> Fields | None:
    """The line for a record, or None when it is not of interest.

    Args:
        record: any control record.
        request: the request that it is about, for its trace, and at its end for durations and token counts.
    """
    entry = _LINES.get(type(record.event))
    if entry is None:
        return None
    level, name, fields_of = entry
    event: Any = record.event
    line: Fields = {"event": name, "level": _level(event, level)}
    if request_id := request_id_of(record):
        line["request_id"] = request_id
    if trace_id := record.meta.trace_id or (request.trace_id if request is not None else ""):
        line["trace_id"] = trace_id
    line |= fields_of(record.meta, event)
    if request is not None and type(event) in _TERMINAL:
        line |= _life(request)
    for key, value in line.items():
        if isinstance(value, str) and not _is_safe(value):
            line[key] = safe_text(value)
    return line


def worst_level(kind: type[Event]) -> int:
    """The highest of ``LEVELS`` that a line of this type can have; 0 if it has no line."""
    entry = _LINES.get(kind)
    if entry is None:
        return 0
    return LEVELS["warning"] if kind is ev.RequestRejected else LEVELS[entry[0]]


def _level(event: Event, usual: Level) -> Level:
    """What is worse, or better, than most events of its type."""
    if isinstance(event, ev.RequestRejected) and event.status >= SERVER_ERROR_STATUS:
        return "warning"
    if isinstance(event, ev.SpansExported) and not event.refused and not event.overflowed:
        return "debug"
    return usual


def _life(request: RequestView) -> Fields:
    """Durations and sizes of a request that is over; what never happened is left out."""
    speed = request.tokens_per_s
    fields: Fields = {
        "endpoint": request.endpoint,
        "model": request.model,
        "executor": request.executor,
        "e2e_ms": _ms(request.e2e_ns),
        "ttft_ms": _ms(request.ttft_ns),
        "queue_ms": _ms(request.queued_ns or None),
        "tokens_per_s": None if speed is None else round(speed, 1),
        "prompt_tokens": request.prompt_tokens,
        "completion_tokens": request.completion_tokens,
        "cached_tokens": request.cached_tokens,
        "retries": request.retries,
    }
    return {key: value for key, value in fields.items() if value not in {None, "", 0}}


def _ms(nanoseconds: int | None) -> float | None:
    return None if nanoseconds is None else round(nanoseconds / NS_PER_MS, 1)


def safe_text(text: str) -> str:
    """The text cut to ``TEXT_MAX`` and, if anything in it would not print, escaped: it cannot forge a line or a colour."""
    if _is_safe(text):
        return text
    cut = text if len(text) <= TEXT_MAX else text[: TEXT_MAX - 1] + "…"
    return cut if cut.isprintable() else cut.encode("unicode_escape").decode("ascii")


def _is_safe(text: str) -> bool:
    return len(text) <= TEXT_MAX and text.isprintable()


class LogWriter(View):
    """Writes the log lines of the records it folds.

    Args:
        stream: where lines go; colours are used only when it is a terminal.
        format: ``json`` for one object a line, ``console`` for people.
        level: the least level that is written.
    """

    def __init__(self, stream: TextIO, format: Literal["json", "console"], level: Level = "info") -> None:  # noqa: A002 - the setting's own name
        super().__init__()
        self._stream = stream
        self._lowest = LEVELS[level]
        self._render = _as_json if format == "json" else _for_people(stream)
        self._throttle = _Throttle()
        self._wall_offset_ns: int | None = None
        self._broken = False
        self._is_unflushed = False

    def fold(self, record: Record) -> None:
        """Take one record in, and keep account of the requests; its line has left when this returns."""
        super().fold(record)
        self.flush()

    def begin_boot(self, boot: str) -> None:
        """See ``View``: lines are not counted by boots."""

    def handlers(self, kind: type[Event]) -> Iterator[Handler]:
        """See ``View``."""
        if kind in ANCHORS:
            yield self._anchor
        if worst_level(kind) >= self._lowest:
            yield self._put

    def _anchor(self, record: Record, _: Event, _request: RequestView | None) -> None:
        self._wall_offset_ns = wall_offset_ns(record, self._wall_offset_ns)

    def _put(self, record: Record, _: Event, request: RequestView | None) -> None:
        if self._broken or (line := log_line(record, request)) is None:
            return
        if LEVELS[line["level"]] >= self._lowest and self._throttle.lets_pass(record, line):
            self._write(record.meta, line)

    def flush(self) -> None:
        """Let the lines out that were written since the last time; called once for a burst of records."""
        if self._is_unflushed and not self._broken:
            self._is_unflushed = False
            try:
                self._stream.flush()
            except (OSError, ValueError):
                self._broken = True

    def _write(self, meta: Meta, line: Fields) -> None:
        if self._wall_offset_ns is not None:
            line = {"timestamp": _timestamp((self._wall_offset_ns + meta.mono_ns) / NS_PER_S), **line}
        text = self._render(line)
        try:
            self._stream.write(f"{text}\n")
            self._is_unflushed = True
        except (OSError, ValueError):
            # The reader of the log is gone (broken pipe, closed file): serving goes on without it.
            self._broken = True


def _as_json(line: Fields) -> str:
    """One line, ASCII alone: a terminal or a collector of whatever encoding can take it."""
    text = msgspec.json.format(msgspec.json.encode(line), indent=0).decode()
    return text if text.isascii() else json.dumps(line)


def _for_people(stream: TextIO) -> Callable[[Fields], str]:
    renderer = ConsoleRenderer(colors=stream.isatty(), pad_event_to=24, sort_keys=False)

    def render(line: Fields) -> str:
        return renderer(None, line["level"], line)

    return render


def _timestamp(wall_s: float) -> str:
    """A moment in UTC, to the millisecond."""
    fraction, second = math.modf(wall_s)
    micros = round(fraction * 1e6)
    if micros == US_PER_S:
        second, micros = second + 1, 0
    return f"{_second(second)}.{micros // 1000:03d}Z"


@functools.lru_cache(maxsize=2)
def _second(second: float) -> str:
    return datetime.fromtimestamp(second, tz=UTC).isoformat(timespec="seconds").removesuffix("+00:00")


@dataclass(slots=True)
class _Throttle:
    """Holds back lines that repeat too fast; the next one that passes says how many were held back."""

    _last_ns: dict[str, int] = field(default_factory=dict[str, int])
    _held_back: dict[str, int] = field(default_factory=dict[str, int])

    def lets_pass(self, record: Record, line: Fields) -> bool:
        event = record.event
        if isinstance(event, ev.EngineLoadProgressed):
            key, every_ns = f"{event.executor} {event.stage}", PROGRESS_EVERY_NS
        elif isinstance(event, ev.DeadLettered):
            key, every_ns = f"dead letter {event.reason}", DEAD_LETTERS_EVERY_NS
        else:  # deciders repeat on their streams where they take what the system's stream said
            return not isinstance(event, ev.ConfigChanged) or record.meta.stream == "system"
        now_ns = record.meta.mono_ns
        last_ns = self._last_ns.get(key)
        if last_ns is not None and 0 <= now_ns - last_ns < every_ns:
            self._held_back[key] = self._held_back.get(key, 0) + 1
            return False
        self._last_ns[key] = now_ns
        held_back = self._held_back.pop(key, 0)
        if held_back and isinstance(event, ev.DeadLettered):
            line["held_back"] = held_back
        return True


# ---------------------------------------------------------------- fields of each line


def _node_started(_meta: Meta, event: ev.NodeStarted) -> Fields:
    return {"version": event.version, "python": event.python, "os": event.os, "cpu_count": event.cpu_count}


def _runs_aborted(_meta: Meta, event: ev.RunsAborted) -> Fields:
    return {"boot": event.boot, "requests": len(event.request_ids)}


def _config_changed(_meta: Meta, event: ev.ConfigChanged) -> Fields:
    values = ", ".join(f"{name}={event.settings[name]}" for name in event.changed if name in event.settings)
    fields: Fields = {"origin": event.origin, "changed": values}
    return fields | ({"needs_restart": ", ".join(event.refused)} if event.refused else {})


def _progressed(_meta: Meta, event: ev.EngineLoadProgressed) -> Fields:
    fields: Fields = {"executor": event.executor, "stage": event.stage}
    if event.total:
        fields["percent"] = round(100 * event.done / event.total)
    return fields


def _loaded(_meta: Meta, event: ev.EngineLoaded) -> Fields:
    can = event.capabilities
    fields: Fields = {
        "executor": event.executor,
        "model": can.model_name,
        "dtype": can.dtype,
        "load_ms": round(event.load_ms),
        "max_model_len": can.max_model_len,
        "max_batch_size": can.max_batch_size,
        "kv_budget_mb": can.kv_budget_bytes >> 20,
    }
    if can.kv_pages:
        fields["kv_pages"] = can.kv_pages
    return fields | ({"notes": "; ".join(event.notes)} if event.notes else {})


def _fields(*names: str) -> Callable[[Meta, Any], Fields]:
    """The event's own fields of these names."""
    return lambda _meta, event: {name: getattr(event, name) for name in names}


def _actor(*names: str) -> Callable[[Meta, Any], Fields]:
    """The recording actor, then the event's own fields of these names."""
    return lambda meta, event: {"actor": meta.actor, **{name: getattr(event, name) for name in names}}


_LINES: dict[type[Event], tuple[Level, str, Callable[[Meta, Any], Fields]]] = {
    ev.NodeStarted: ("info", "node_started", _node_started),
    ev.NodeStopped: ("info", "node_stopped", _fields("reason")),
    ev.RunsAborted: ("warning", "runs_aborted", _runs_aborted),
    ev.DrainStarted: ("info", "drain_started", _fields("timeout_s")),
    ev.ConfigChanged: ("info", "config_changed", _config_changed),
    ev.LogDegraded: ("error", "log_degraded", _fields("reason")),
    ev.ActorStarted: ("debug", "actor_started", _actor("kind")),
    ev.ActorStopped: ("debug", "actor_stopped", _actor("reason", "unhandled")),
    ev.ActorFailed: ("error", "actor_failed", _actor("message_type", "code", "error")),
    ev.ActorRestarted: ("warning", "actor_restarted", _actor("restarts", "backoff_ms")),
    ev.SupervisorEscalated: ("error", "supervisor_escalated", _fields("child", "restarts", "within_s")),
    ev.DeadLettered: ("warning", "dead_letter", _fields("to", "message_type", "reason")),
    ev.EngineStarted: ("info", "engine_started", _fields("executor", "device", "model")),
    ev.EngineLoadProgressed: ("info", "engine_load_progressed", _progressed),
    ev.EngineLoaded: ("info", "engine_loaded", _loaded),
    ev.EngineLoadFailed: ("error", "engine_load_failed", _fields("executor", "code", "message")),
    ev.EngineExited: ("warning", "engine_exited", _fields("executor", "exit_code", "reason", "in_flight", "planned")),
    ev.EngineSickened: ("error", "engine_sickened", _fields("executor", "failures")),
    ev.RestartRequested: ("info", "restart_requested", _fields("executor", "origin", "in_flight", "timeout_s")),
    ev.ExecutorRated: ("warning", "executor_rated", _fields("executor", "suspect", "silent_ms")),
    ev.EngineStalled: ("error", "engine_stalled", _fields("executor", "silent_ms")),
    ev.ExecutorFaulted: ("warning", "executor_faulted", _fields("executor", "attempt", "code", "message", "lost")),
    ev.AttemptRetried: ("warning", "attempt_retried", _fields("attempt", "code", "tokens_out")),
    ev.SpansExported: ("warning", "spans_exported", _fields("exported", "refused", "overflowed")),
    ev.ClientSlow: ("warning", "client_slow", _fields("stalled_ms")),
    ev.RequestCompleted: ("info", "request_completed", _fields("finish_reason")),
    ev.RequestFailed: ("error", "request_failed", _fields("code", "message")),
    ev.RequestCancelled: ("info", "request_cancelled", _fields("reason")),
    ev.RequestRejected: ("info", "request_rejected", _fields("status", "code", "message")),
}
_TERMINAL = frozenset(ev.TERMINAL_EVENTS)
