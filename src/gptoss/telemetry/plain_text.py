"""Rich's tables as plain lines of a given width, with or without colour, and the units that people read."""

from collections.abc import Iterable
from io import StringIO

from rich.console import Console, RenderableType

WIDTH_MIN = 60
_MS_PER_S = 1000.0
_WHOLE_MS = 100.0


def as_lines(parts: Iterable[RenderableType], *, width: int, color: bool) -> str:
    """The parts below each other, in lines of at most ``width`` columns (at least ``WIDTH_MIN``) without trailing blanks."""
    out = StringIO()
    console = Console(
        file=out,
        width=max(WIDTH_MIN, width),
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
    for part in parts:
        console.print(part, overflow="ellipsis", no_wrap=True, crop=True)
    lines = (line.rstrip() for line in out.getvalue().splitlines())
    return "\n".join(lines) + "\n"


def took(milliseconds: float | None) -> str:
    """A duration in three digits or so: ``4.2 ms``, ``812 ms``, ``1.25 s``, ``95.1 s``; empty for None."""
    if milliseconds is None:
        return ""
    if milliseconds < _WHOLE_MS:
        return f"{milliseconds:.1f} ms"
    if milliseconds < _MS_PER_S:
        return f"{milliseconds:.0f} ms"
    seconds = milliseconds / _MS_PER_S
    return f"{seconds:.2f} s" if seconds < 10 else f"{seconds:.1f} s"  # noqa: PLR2004 - three digits
