"""Lists of requests and events as lines for a terminal: aligned at any width, with or without colour.

Strings of a record were written by clients or by whoever made a bundle: they are escaped before they reach a terminal.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal

import msgspec
from rich.table import Table
from rich.text import Text

from gptoss.clock import NS_PER_MS
from gptoss.messages import events as ev
from gptoss.messages.envelope import Event, Record
from gptoss.telemetry.logs import safe_text
from gptoss.telemetry.newest import Dated
from gptoss.telemetry.plain_text import as_lines, took
from gptoss.telemetry.request_view import RequestRow, request_id_of
from gptoss.telemetry.timeline_phases import PHASES, many, size

WIDE = 120
"""From this many columns on a list shows all it knows."""

STYLES = {
    "completed": "green",
    "failed": "red",
    "rejected": "red",
    "cancelled": "yellow",
    "queued": "yellow",
    "running": "cyan",
}
_EVENT_STYLES: dict[type[Event], str] = {
    ev.RequestCompleted: "green",
    ev.RequestFailed: "red",
    ev.RequestRejected: "red",
    ev.RequestCancelled: "yellow",
    ev.ExecutorFaulted: "red",
    ev.EngineExited: "red",
    ev.EngineStalled: "red",
    ev.EngineLoadFailed: "red",
    ev.ActorFailed: "red",
    ev.SupervisorEscalated: "red",
    ev.RunsAborted: "red",
    ev.LogDegraded: "red",
    ev.Preempted: "yellow",
    ev.ReservationRefused: "yellow",
    ev.AttemptRetried: "yellow",
    ev.DeadLettered: "yellow",
}


@dataclass(frozen=True, slots=True)
class Column:
    """A column of the list of requests."""

    title: str
    width: int
    justify: Literal["left", "right"]
    cell: Callable[[RequestRow], str | Text]


def _outcome(row: RequestRow) -> Text:
    """In one word: where it is or how it ended, and of an error which."""
    word = row.outcome if row.state in {"failed", "rejected"} else row.state
    return Text(safe_text(word), STYLES.get(row.state, ""))


def _tokens(row: RequestRow) -> str:
    return f"{row.prompt_tokens}/{row.completion_tokens}" if row.prompt_tokens or row.completion_tokens else ""


_ID_WIDTH = 28
_ABOUT_WIDTH = 15
_NARROW = (
    Column("outcome", 16, "left", _outcome),
    Column("ttft", 7, "right", lambda row: took(row.ttft_ms)),
    Column("total", 7, "right", lambda row: took(row.e2e_ms)),
    Column("in/out", 8, "right", _tokens),
)
_WIDE = (
    Column("state", 9, "left", lambda row: Text(row.state, STYLES.get(row.state, ""))),
    Column("reason", 18, "left", lambda row: Text(safe_text(row.outcome))),
    Column("queued", 7, "right", lambda row: took(row.queue_ms or None)),
    Column("ttft", 7, "right", lambda row: took(row.ttft_ms)),
    Column("total", 7, "right", lambda row: took(row.e2e_ms)),
    Column("in", 6, "right", lambda row: str(row.prompt_tokens or "")),
    Column("cached", 6, "right", lambda row: str(row.cached_tokens or "")),
    Column("out", 6, "right", lambda row: str(row.completion_tokens or "")),
    Column("tries", 5, "right", lambda row: str(row.retries + 1) if row.retries else ""),
    Column("executor", 9, "left", lambda row: safe_text(row.executor)),
)


def render_requests(rows: Sequence[RequestRow], *, width: int, color: bool, title: bool = True) -> str:
    """A line for each request.

    Args:
        rows: in the order of the lines.
        width: columns of the terminal.
        color: whether to write ANSI colours.
        title: whether the columns are named above.
    """
    columns = _WIDE if width >= WIDE else _NARROW
    is_long = width >= WIDE
    when_width = 19 if is_long else 8
    room = width - sum(column.width + 1 for column in columns) - when_width - 1
    table = Table.grid(padding=(0, 1), expand=False)
    id_width = min(max(_ID_WIDTH, room), max((len(row.request_id) for row in rows), default=_ID_WIDTH))
    table.add_column(min_width=min(_ID_WIDTH, id_width), max_width=id_width, no_wrap=True, overflow="ellipsis")
    table.add_column(min_width=when_width, max_width=when_width, no_wrap=True)
    for column in columns:
        table.add_column(
            min_width=column.width, max_width=column.width, justify=column.justify, no_wrap=True, overflow="ellipsis"
        )
    if title:
        table.add_row("request", "when", *(column.title for column in columns), style="dim")
    for row in rows:
        cells = [column.cell(row) for column in columns]
        table.add_row(safe_text(row.request_id), Text(_when(row.received_unix_s, is_long=is_long), "dim"), *cells)
    return as_lines([table], width=width, color=color)


def render_events(events: Iterable[Dated], *, width: int, color: bool) -> str:
    """A line for each event: when, what, whose, and what it says."""
    lines: list[Text] = []
    is_wide = width >= WIDE
    for record, unix_s in events:
        line = Text(_when(unix_s, is_long=True)[-12:] if unix_s else f"#{record.meta.pos}".ljust(12), "dim")
        line.append("  ")
        style = _EVENT_STYLES.get(type(record.event), "cyan" if record.meta.stream.startswith("executor/") else "")
        line.append(f"{record.meta.type:<20}", style)
        about = request_id_of(record) or record.meta.stream
        line.append(f" {_cut(safe_text(about), _ID_WIDTH if is_wide else _ABOUT_WIDTH)}")
        line.append(f"  {safe_text(describe(record))}", "" if is_wide else "dim")
        line.truncate(width, overflow="ellipsis")
        lines.append(line)
    return as_lines(lines, width=width, color=color) if lines else ""


def _cut(text: str, width: int) -> str:
    """Exactly ``width`` columns."""
    return text.ljust(width) if len(text) <= width else text[: width - 1] + "…"


def _when(unix_s: float | None, *, is_long: bool) -> str:
    if unix_s is None:
        return ""
    local = datetime.fromtimestamp(unix_s, tz=UTC).astimezone()
    return f"{local:%m-%d %H:%M:%S}.{local.microsecond // 1000:03}" if is_long else f"{local:%H:%M:%S}"


# ---------------------------------------------------------------- what an event says


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


_DESCRIPTIONS: dict[type[Event], Callable[[Any], str]] = {
    ev.StepCommitted: _step,
    ev.CommandConsumed: _command,
    ev.NodeStarted: _node,
    ev.SnapshotTaken: lambda event: f"{event.decider}: {many(len(bytes(event.state)), 'byte')}",
    ev.EngineLoaded: lambda event: f"{event.capabilities.model_name} in {took(event.load_ms)}, process {event.pid}",
    ev.RunsAborted: lambda event: f"{event.boot}: {many(len(event.request_ids), 'request')} cut off",
    ev.ClockAnchored: lambda _: "",
}
