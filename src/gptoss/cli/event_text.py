"""Lists of requests and events as lines for a terminal: aligned at any width, with or without colour.

Strings of a record were written by clients or by whoever made a bundle: they are escaped before they reach a terminal.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Literal

from rich.table import Table
from rich.text import Text

from gptoss.actors.directory import EXECUTOR_PREFIX
from gptoss.telemetry.event_words import Tone, describe, tone_of
from gptoss.telemetry.logs import safe_text
from gptoss.telemetry.newest import Dated
from gptoss.telemetry.plain_text import as_lines, took
from gptoss.telemetry.request_view import RequestRow, request_id_of

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
_TONE_STYLES: dict[Tone, str] = {"good": "green", "bad": "red", "warn": "yellow", "": ""}


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
        style = _TONE_STYLES[tone_of(record.event)] or (
            "cyan" if record.meta.stream.startswith(EXECUTOR_PREFIX) else ""
        )
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
