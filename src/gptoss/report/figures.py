"""Geometry of the report's figures: rectangles and paths in the coordinates of an SVG that stretches to its place.

A bar is 1000 wide and 10 high. In a grid of steps a column is 1 wide, and a row 1 high.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from gptoss.clock import NS_PER_MS, NS_PER_S
from gptoss.report.facts import BootFacts
from gptoss.report.series import DECODED, PREEMPTED, PREFILLED, Column, Series, StepGrid
from gptoss.telemetry.delays import Delay
from gptoss.telemetry.plain_text import took
from gptoss.telemetry.request_view import RequestRow
from gptoss.telemetry.timeline import Phase
from gptoss.telemetry.timeline_phases import many

BAR_WIDTH = 1000
BAR_HEIGHT = 10
CHART_HEIGHT = 100
WIDTH_MIN = 2.5
GRID_ROWS_MAX = 60

_PHASE_KINDS = {
    "queued": "queue",
    "prefill": "prefill",
    "decode": "decode",
    "first token": "decode",
    "completed": "decode",
    "failed": "bad",
    "fault": "bad",
    "rejected": "bad",
    "no memory": "queue",
    "enqueued": "queue",
    "preempted": "preempted",
}


class Segment(NamedTuple):
    """A rectangle of a bar; ``kind`` names its colour."""

    kind: str
    x: float
    y: float
    width: float
    height: float


def request_segments(row: RequestRow, boot: BootFacts) -> list[Segment]:
    """A request's life on the axis of its boot; none where its time is not known."""
    span_ms = max(1e-6, (boot.last_ns - boot.origin_ns) / NS_PER_MS)
    if row.received_unix_s is None or boot.wall_offset_ns is None:
        return []
    start_ms = row.received_unix_s * 1000 - (boot.origin_ns + boot.wall_offset_ns) / NS_PER_MS
    end_ms = row.e2e_ms if row.e2e_ms is not None else max(0.0, span_ms - start_ms)
    first_ms = min(end_ms, row.ttft_ms if row.ttft_ms is not None else end_ms)
    queued_ms = min(first_ms, row.queue_ms)
    bad = row.state in {"failed", "rejected"}
    parts = (("queue", 0.0, queued_ms), ("prefill", queued_ms, first_ms), ("decode", first_ms, end_ms))
    segments = [_segment(kind, start_ms + a, start_ms + b, span_ms) for kind, a, b in parts if b > a]
    if bad:
        segments.append(_segment("bad", start_ms + end_ms, start_ms + end_ms, span_ms))
    return segments


def phase_segment(phase: Phase, total_ms: float) -> Segment:
    """A phase on the axis of its request; a moment is a low, narrow one."""
    segment = _segment(_PHASE_KINDS.get(phase.name, "other"), phase.start_ms, phase.end_ms, total_ms)
    return segment._replace(y=3.0, height=4.0) if phase.mark else segment


def delay_segment(delay: Delay, total_ms: float) -> Segment:
    """A delay on the axis of the request that it delayed."""
    kind = {"queue": "queue", "engine": "queue", "step": "prefill", "preemption": "preempted", "restart": "bad"}
    return _segment(kind[delay.kind], delay.start_ms, delay.end_ms, total_ms)


def _segment(kind: str, start_ms: float, end_ms: float, total_ms: float) -> Segment:
    scale = BAR_WIDTH / total_ms if total_ms > 0 else 0.0
    x = min(max(0.0, start_ms * scale), BAR_WIDTH - WIDTH_MIN)
    width = min(max(WIDTH_MIN, (end_ms - start_ms) * scale), BAR_WIDTH - x)
    return Segment(kind, round(x, 1), 0, round(width, 1), BAR_HEIGHT)


def chart_of(
    title: str,
    boot: BootFacts,
    lines: Mapping[str, tuple[str, Series]],
    *,
    level: float = 0,
    unit: Callable[[int], str] = str,
) -> dict[str, Any]:
    """Step lines over a boot's time.

    Args:
        title: of the chart.
        boot: gives the axis.
        lines: name -> (colour, values).
        level: a constant to compare them with; 0 for none.
        unit: writes a value.
    """
    drawn = {name: (kind, series) for name, (kind, series) in lines.items() if series.points}
    top = max([series.top for _, series in drawn.values()], default=0.0)
    top = max(top, level) or 1.0
    paths = [
        {"kind": kind, "text": f"{name}, at most {unit(int(series.top))}", "d": _step_line(series, boot, top)}
        for name, (kind, series) in drawn.items()
    ]
    if level and paths:
        y = _y(level, top)
        paths.append({"kind": "bad", "text": f"budget {unit(int(level))}", "d": f"M0 {y}H{BAR_WIDTH}"})
    said = ", ".join(str(path["text"]) for path in paths)
    return {"title": title, "top": unit(int(top)), "lines": paths, "label": f"{title}: {said}"}


def _step_line(series: Series, boot: BootFacts, top: float) -> str:
    span_ns = max(1, boot.last_ns - boot.origin_ns)
    parts = [f"M0 {_y(0, top)}"]
    for at_ns, value in series.points:
        x = round(BAR_WIDTH * min(1.0, max(0.0, (at_ns - boot.origin_ns) / span_ns)), 1)
        parts.append(f"H{x}V{_y(value, top)}")
    return "".join([*parts, f"H{BAR_WIDTH}"])


def _y(value: float, top: float) -> float:
    """Room is left above and below, so that no line is cut."""
    return round(CHART_HEIGHT - 3 - (CHART_HEIGHT - 8) * value / top, 1)


def grid_of(grid: StepGrid, order: Sequence[str]) -> dict[str, Any]:
    """Requests by steps.

    Args:
        grid: of one executor.
        order: requests as they are shown elsewhere; those that are not in it come last.
    """
    columns = grid.columns
    seen = dict.fromkeys(request_id for column in columns for request_id in column.cells)
    names = [name for name in order if name in seen]
    names += [name for name in seen if name not in set(names)] if len(names) < GRID_ROWS_MAX else []
    longest = max((column.longest_ns for column in columns), default=0)
    tokens = sum(column.tokens for column in columns)
    prefilled = sum(column.prefilled for column in columns)
    each = "" if grid.steps_per_column == 1 else f"; a column is {grid.steps_per_column} steps"
    span_s = (columns[-1].ended_ns - columns[0].started_ns) / NS_PER_S if columns else 0.0
    return {
        "columns": len(columns),
        "text": f"{many(grid.num_steps, 'step')} in {span_s:.1f} s, {many(tokens, 'token')} out, {prefilled} prefilled, "
        f"up to {max((column.rows_max for column in columns), default=0)} requests at once{each}",
        "first": columns[0].first_step if columns else 0,
        "last": columns[-1].last_step if columns else 0,
        "longest": f"up to {took(longest / NS_PER_MS)} a step",
        "durations": "".join(
            f"M{x} 100v-{max(1.0, 100 * column.longest_ns / longest):.3g}h1V100z"
            for x, column in enumerate(columns)
            if longest
        ),
        "rows": [_grid_row(name, columns) for name in names[:GRID_ROWS_MAX]],
        "left_out": max(0, len(seen) - GRID_ROWS_MAX),
    }


def _grid_row(name: str, columns: Sequence[Column]) -> dict[str, Any]:
    kinds = ["" for _ in columns]
    for x, column in enumerate(columns):
        did = column.cells.get(name, 0)
        kinds[x] = (
            "preempted" if did & PREEMPTED else "prefill" if did & PREFILLED else "decode" if did & DECODED else ""
        )
    paths: dict[str, list[str]] = {}
    begin = 0
    for x in range(1, len(kinds) + 1):
        if x == len(kinds) or kinds[x] != kinds[begin]:
            if kinds[begin]:
                paths.setdefault(kinds[begin], []).append(f"M{begin} 0h{x - begin}v1h-{x - begin}z")
            begin = x
    counts = {kind: sum(one == kind for one in kinds) for kind in paths}
    said = ", ".join(f"{kind} in {many(count, 'column')}" for kind, count in counts.items())
    return {"id": name, "label": said or "no row", "paths": [(kind, "".join(d)) for kind, d in paths.items()]}
