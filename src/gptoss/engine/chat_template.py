"""A model's chat template: finding it, compiling it in a sandbox, and rendering it within bounds.

Rules:
- The environment is the one that Hugging Face templates are written for (trim_blocks, lstrip_blocks, loop controls,
  an HTML-free ``tojson``, ``raise_exception``, ``strftime_now``, an inert ``generation`` tag); no transformers import.
- Templates come from the model's folder only, never from a request, and run in Jinja's immutable sandbox.
- Rendering is a pure function of its arguments: ``strftime_now`` formats the date it is given, never the clock.
- Work is bounded: loop iterations and calls over the whole rendering (a macro can call itself twice without any loop),
  output characters, and Jinja's own limit on ``range``.
  What the sandbox cannot bound is a single huge expression such as a string times a large number, so templates are
  rendered off the event loop and the request's deadline covers the rest.
"""

import datetime
import json
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any, cast

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

from gptoss.errors import ModelLoadError

MAX_OUTPUT_CHARS = 16 * 1024 * 1024
MAX_STEPS = 1_000_000
"""Loop iterations, and calls by ``STEPS_PER_CALL``: about two seconds of rendering."""
STEPS_PER_CALL = 10

PRIVATE_FIRST = "\U000f0000"
"""First code point of the private-use area that ``tojson`` never escapes, so that marks set by the caller survive."""
PRIVATE_LAST = "\U000f00ff"

_STEPS = "_steps_left"
_ESCAPED = re.compile(f"[^\x00-\x7f{PRIVATE_FIRST}-{PRIVATE_LAST}]")


class TemplateRefused(Exception):
    """The template raised, or ran out of bounds; the text is fit to be shown to the caller."""


class ChatTemplate:
    """A compiled template.

    Attributes:
        uses_tools: the template reads ``tools``.
        uses_reasoning_effort: it reads ``reasoning_effort``.
    """

    def __init__(self, source: str) -> None:
        environment = _Environment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, loopcontrols], autoescape=False
        )
        cast("dict[str, Any]", environment.filters).update({"tojson": _tojson, _STEPS: _counted})
        cast("dict[str, Any]", environment.globals)["raise_exception"] = _raise_exception
        self.source = source
        self.uses_tools = re.search(r"\btools\b", source) is not None
        self.uses_reasoning_effort = re.search(r"\breasoning_effort\b", source) is not None
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise ModelLoadError(f"the model's chat template does not compile: {error}") from None

    def render(self, variables: dict[str, Any], *, date: str) -> str:
        """The prompt as text.

        Args:
            variables: what the template sees: ``messages``, ``tools``, ``bos_token`` and so on.
            date: ``YYYY-MM-DD``, what ``strftime_now`` formats.

        Raises:
            TemplateRefused: the template raised, or exceeded a bound.
        """
        steps = [MAX_STEPS]
        pieces: list[str] = []
        num_chars = 0
        try:
            for piece in self._template.generate(variables, strftime_now=_strftime(date), **{_STEPS: steps}):
                num_chars += len(piece)
                if num_chars > MAX_OUTPUT_CHARS:
                    raise TemplateRefused(f"the prompt grew beyond {MAX_OUTPUT_CHARS} characters")  # noqa: TRY301
                pieces.append(piece)
        except TemplateRefused:
            raise
        except Exception as error:  # noqa: BLE001 - the edge to foreign code: a template can raise anything
            raise TemplateRefused(str(error)[:300] or type(error).__name__) from None
        return "".join(pieces)


class _Environment(ImmutableSandboxedEnvironment):
    """Jinja's sandbox with every ``for`` and every call counted: loops and macros multiply without end."""

    def call(self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        _count(__context.parent[_STEPS], STEPS_PER_CALL)
        return super().call(__context, __obj, *args, **kwargs)

    def _generate(
        self, source: nodes.Template, name: str | None, filename: str | None, defer_init: bool = False
    ) -> str:
        for loop in source.find_all(nodes.For):
            loop.iter = nodes.Filter(loop.iter, _STEPS, [], [], None, None, lineno=loop.lineno)
        return super()._generate(source, name, filename, defer_init)


class _GenerationTag(Extension):
    """``{% generation %}`` marks assistant text for training masks; here its body is simply rendered."""

    tags = {"generation"}  # noqa: RUF012 - Jinja's own interface

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


@jinja2.pass_context
def _counted(context: Context, items: Iterable[Any]) -> Iterable[Any]:
    """``items``, each counted against the rendering's budget; sized where ``items`` is, as ``loop.length`` needs."""
    return _Counted(items, context.parent[_STEPS])


class _Counted:
    def __init__(self, items: Iterable[Any], steps: list[int]) -> None:
        self._items = items
        self._steps = steps

    def __iter__(self) -> Iterator[Any]:
        for item in self._items:
            _count(self._steps, 1)
            yield item

    def __len__(self) -> int:
        return len(self._items)  # pyright: ignore[reportArgumentType] - TypeError is what Jinja expects of an iterator


def _count(steps: list[int], num: int) -> None:
    steps[0] -= num
    if steps[0] < 0:
        raise TemplateRefused(f"the chat template took more than {MAX_STEPS} steps")


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    text = json.dumps(value, ensure_ascii=False, indent=indent, separators=separators, sort_keys=sort_keys)
    return _ESCAPED.sub(lambda match: json.dumps(match[0])[1:-1], text) if ensure_ascii else text


def _raise_exception(message: str) -> None:
    raise TemplateRefused(str(message)[:300])


def _strftime(date: str) -> Callable[[str], str]:
    return datetime.date.fromisoformat(date).strftime
