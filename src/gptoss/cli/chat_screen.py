"""How an answer appears: Markdown that grows in a terminal, plain text everywhere else.

Rules:
- A block of Markdown (a paragraph, a list, a code block) that is complete is printed for good. Only the last one, which
  still grows, is drawn again and again, and of a long one only its end: so an answer of any length scrolls as text does.
- A model's control characters never reach a terminal: they could move the cursor, rename the window or worse.
"""

import re
from collections.abc import Iterable
from typing import Literal, Protocol, TextIO

from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.markdown import Markdown
from rich.segment import Segment

REFRESH_PER_S = 12
MARGIN_LINES = 4
CODE_THEME = "ansi_dark"
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
_FENCE = re.compile(r" {0,3}(`{3,}|~{3,})")

Kind = Literal["content", "reasoning"]


class Screen(Protocol):
    """Where an answer appears."""

    def add(self, kind: Kind, text: str) -> None:
        """More of the answer."""
        ...

    def end(self) -> None:
        """The answer is over, or was cut; nothing that came is lost."""
        ...


class PlainScreen:
    """Writes what is said as it comes, and nothing else: no thoughts, no colours."""

    def __init__(self, file: TextIO) -> None:
        self._file = file
        self._last = ""

    def add(self, kind: Kind, text: str) -> None:
        """See ``Screen``."""
        if kind == "content" and text:
            self._file.write(text)
            self._file.flush()
            self._last = text

    def end(self) -> None:
        """See ``Screen``."""
        if self._last and not self._last.endswith("\n"):
            self._file.write("\n")
            self._file.flush()


class MarkdownScreen:
    """Draws Markdown in a terminal, thoughts dimmed before it."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._text = ""
        self._thinks = False
        self._live: Live | None = None

    def add(self, kind: Kind, text: str) -> None:
        """See ``Screen``."""
        text = _CONTROL.sub("", text)
        if not text:
            return
        if kind == "reasoning":
            self._settle(everything=True)
            self._thinks = True
            self._console.print(text, style="dim italic", end="", markup=False, highlight=False, soft_wrap=True)
            return
        self._stop_thinking()
        self._text += text
        self._settle(everything=False)
        if self._live is None:
            self._live = Live(console=self._console, refresh_per_second=REFRESH_PER_S, transient=True)
            self._live.start()
        self._live.update(_Tail(self._text, self._console.height - MARGIN_LINES))

    def end(self) -> None:
        """See ``Screen``."""
        self._stop_thinking()
        self._settle(everything=True)

    def _settle(self, *, everything: bool) -> None:
        """Print what is complete for good."""
        place = len(self._text) if everything else end_of_blocks(self._text)
        done, self._text = self._text[:place], self._text[place:]
        if everything and self._live is not None:
            self._live.update("")
            self._live.stop()
            self._live = None
        if done.strip():
            self._console.print(_markdown(done), "")

    def _stop_thinking(self) -> None:
        if self._thinks:
            self._thinks = False
            self._console.print("\n")


class _Tail:
    """The last lines of some Markdown."""

    def __init__(self, text: str, lines_max: int) -> None:
        self._text = text
        self._lines_max = max(1, lines_max)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        lines: Iterable[list[Segment]] = console.render_lines(_markdown(self._text), options, pad=False)
        for line in list(lines)[-self._lines_max :]:
            yield from line
            yield Segment.line()


def end_of_blocks(text: str) -> int:
    """Where the blocks of Markdown that cannot change any more end: after the last empty line outside of code."""
    end = place = 0
    fence = ""
    for line in text.splitlines(keepends=True):
        place += len(line)
        if not line.endswith("\n"):
            break
        mark = _FENCE.match(line)
        if fence:
            if mark and mark[1][0] == fence[0] and len(mark[1]) >= len(fence) and not line.strip().strip(fence[0]):
                fence = ""
                end = place
        elif mark:
            fence = mark[1]
        elif not line.strip():
            end = place
    return end


def _markdown(text: str) -> Markdown:
    return Markdown(text, code_theme=CODE_THEME)
