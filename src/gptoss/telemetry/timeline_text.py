"""A timeline as text: an aligned waterfall that reads well at 80 columns, with or without colour."""

from io import StringIO

from rich.console import Console
from rich.table import Table
from rich.text import Text

from gptoss.telemetry.logs import safe_text
from gptoss.telemetry.timeline import Phase, Timeline

WIDTH_MIN = 60
BAR_MIN = 12
BAR_MAX = 40
NAME_WIDTH = 12
TIME_WIDTH = 9

_GOOD = {"completed": "green", "prefill": "cyan", "decode": "green", "queued": "yellow"}
_BAD = {"failed": "red", "fault": "red", "rejected": "red", "cancelled": "yellow", "no memory": "yellow"}
STYLES = _GOOD | _BAD


def render_text(timeline: Timeline, *, width: int = 80, color: bool = False) -> str:
    """The timeline as lines of at most ``width`` columns (at least ``WIDTH_MIN``).

    Args:
        timeline: of one request.
        width: columns of the terminal.
        color: whether to write ANSI colours.
    """
    width = max(WIDTH_MIN, width)
    room = width - NAME_WIDTH - 2 * TIME_WIDTH - 4  # four gaps between five columns
    bar = min(BAR_MAX, max(BAR_MIN, room * 2 // 5))
    table = Table.grid(padding=(0, 1), expand=False)
    table.add_column(min_width=NAME_WIDTH, max_width=NAME_WIDTH, no_wrap=True)
    table.add_column(min_width=TIME_WIDTH, max_width=TIME_WIDTH, justify="right", no_wrap=True)
    table.add_column(min_width=TIME_WIDTH, max_width=TIME_WIDTH, justify="right", no_wrap=True)
    table.add_column(min_width=bar, max_width=bar, no_wrap=True)
    table.add_column(max_width=room - bar, no_wrap=True, overflow="ellipsis")
    table.add_row("phase", "at ms", "took ms", "", "", style="dim")
    for phase in timeline.phases:
        style = STYLES.get(phase.name, "dim" if phase.mark else "blue")
        took = "" if phase.mark else f"{phase.end_ms - phase.start_ms:.1f}"
        cells = (Text(phase.name, style), f"{phase.start_ms:.1f}", took, Text(_bar(phase, timeline, bar), style))
        table.add_row(*cells, Text(safe_text(phase.detail)))
    out = StringIO()
    console = Console(
        file=out,
        width=width,
        height=1000,
        color_system="standard" if color else None,
        force_terminal=color,
        force_interactive=False,
        legacy_windows=False,
        no_color=not color,
        highlight=False,
        emoji=False,
        markup=False,
    )
    for line in _header(timeline):
        console.print(line, overflow="ellipsis", no_wrap=True)
    console.print(table)
    lines = (line.rstrip() for line in out.getvalue().splitlines())
    return "\n".join(lines) + "\n"


def _header(timeline: Timeline) -> list[Text]:
    first = Text(safe_text(timeline.request_id), "bold")
    first.append(f"  {timeline.outcome}", STYLES.get(timeline.outcome, "yellow"))
    first.append(safe_text(f"  {timeline.model}  {timeline.endpoint}"))
    facts = [f"{timeline.total_ms:.1f} ms in all"]
    if timeline.ttft_ms is not None:
        facts.append(f"first token after {timeline.ttft_ms:.1f} ms")
    if timeline.decode is not None:
        facts.append(f"{timeline.decode.tokens} tokens in {timeline.decode.steps} steps")
        if timeline.decode.others_max:
            facts.append(f"shared with up to {timeline.decode.others_max}")
    if timeline.attempts > 1:
        facts.append(f"{timeline.attempts} attempts")
    return [first, Text(", ".join(facts), "dim")]


def _bar(phase: Phase, timeline: Timeline, cells: int) -> str:
    scale = cells / timeline.total_ms if timeline.total_ms else 0.0
    start = min(cells - 1, int(phase.start_ms * scale))
    if phase.mark:
        return " " * start + "·"
    length = round(phase.end_ms * scale) - start
    return " " * start + ("━" * length if length > 0 else "╴")
