"""A timeline as text: an aligned waterfall that reads well at 80 columns, with or without colour."""

from collections.abc import Iterable

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from gptoss.telemetry.delays import RECORDS_MAX, DelayKind, Story
from gptoss.telemetry.logs import safe_text
from gptoss.telemetry.plain_text import WIDTH_MIN, as_lines
from gptoss.telemetry.timeline import Phase, Timeline
from gptoss.telemetry.timeline_phases import many

BAR_MIN = 12
BAR_MAX = 40
NAME_WIDTH = 12
TIME_WIDTH = 9
SHARE_WIDTH = 5
WHO_WIDTH_MIN = 20
DELAYS_SHOWN = 5

DELAYS: dict[DelayKind, tuple[str, str]] = {
    "queue": ("queued", "yellow"),
    "engine": ("engine line", "yellow"),
    "step": ("prefill", "cyan"),
    "preemption": ("preempted", "red"),
    "restart": ("restart", "red"),
}

_GOOD = {"completed": "green", "prefill": "cyan", "decode": "green", "queued": "yellow"}
_BAD = {"failed": "red", "fault": "red", "rejected": "red", "cancelled": "yellow", "no memory": "yellow"}
STYLES = _GOOD | _BAD


def render_text(
    timeline: Timeline, *, width: int = 80, color: bool = False, parts: Iterable[RenderableType] = ()
) -> str:
    """The timeline as lines of at most ``width`` columns (at least ``WIDTH_MIN``).

    Args:
        timeline: of one request.
        width: columns of the terminal.
        color: whether to write ANSI colours.
        parts: what stands below it.
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
    return as_lines([*_header(timeline), table, *parts], width=width, color=color)


def render_story(story: Story, *, width: int = 80, color: bool = False) -> str:
    """The timeline and, below it, what delayed the request; see ``render_text``."""
    parts: list[RenderableType] = []
    if story.delays:
        parts += [Text(""), Text("what it waited for", "bold"), _delay_table(story, max(WIDTH_MIN, width))]
    if story.is_cut:
        parts.append(Text(f"only the first {RECORDS_MAX} records of its life were looked at", "dim"))
    return render_text(story.timeline, width=width, color=color, parts=parts)


def _delay_table(story: Story, width: int) -> Table:
    longest = max(len(safe_text(delay.who)) for delay in story.delays)
    who = min(max(WHO_WIDTH_MIN, longest), max(WHO_WIDTH_MIN, width // 3))
    room = width - NAME_WIDTH - 2 * TIME_WIDTH - who - SHARE_WIDTH - 5  # five gaps between six columns
    table = Table.grid(padding=(0, 1), expand=False)
    table.add_column(min_width=NAME_WIDTH, max_width=NAME_WIDTH, no_wrap=True)
    table.add_column(min_width=TIME_WIDTH, max_width=TIME_WIDTH, justify="right", no_wrap=True)
    table.add_column(min_width=TIME_WIDTH, max_width=TIME_WIDTH, justify="right", no_wrap=True)
    table.add_column(min_width=SHARE_WIDTH, max_width=SHARE_WIDTH, justify="right", no_wrap=True)
    table.add_column(min_width=who, max_width=who, no_wrap=True, overflow="ellipsis")
    table.add_column(max_width=room, no_wrap=True, overflow="ellipsis")
    table.add_row("", "at ms", "took ms", "share", "because of", "", style="dim")
    for kind, (label, style) in DELAYS.items():
        dearest = [delay for delay in story.delays if delay.kind == kind]
        for index, delay in enumerate(dearest[:DELAYS_SHOWN]):
            cells = (f"{delay.start_ms:.1f}", f"{delay.took_ms:.1f}", f"{delay.share:.0%}")
            what = Text(safe_text(delay.detail))
            table.add_row(Text("" if index else label, style), *cells, Text(safe_text(delay.who)), what)
        if rest := dearest[DELAYS_SHOWN:]:  # Side by side with the others: a share of theirs would mislead.
            took = f"{sum(delay.took_ms for delay in rest):.1f}"
            table.add_row("", "", Text(took, "dim"), "", Text(f"and {many(len(rest), 'other')}", "dim"), "")
    return table


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
