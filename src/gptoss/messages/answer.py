"""What an answer may be made of, as the caller asked, and the parts that one comes in.

These types cross every layer: HTTP fills a shape and frames parts; the engine's dialect of the model turns a shape into a
grammar and tokens into parts.
"""

from collections.abc import Sequence
from typing import Literal, TypeAlias

import msgspec

ToolChoice: TypeAlias = Literal["auto", "none", "required", "named"]


class AnswerFormat(msgspec.Struct, frozen=True, kw_only=True):
    """What the visible text of the answer must match.

    Attributes:
        kind: ``json`` (``text`` is a JSON schema), ``regex`` (``text`` is a regular expression) or ``choice``.
        choices: the answers that are allowed, for ``choice``.
        param: the field of the request that asked for it, for errors.
    """

    kind: Literal["json", "regex", "choice"]
    text: str = ""
    choices: tuple[str, ...] = ()
    param: str = "response_format"


class AnswerShape(msgspec.Struct, frozen=True, kw_only=True):
    """What an answer may be made of.

    Attributes:
        tool_choice: whether tools may or must be called; ``named`` is the one in ``tool_name``.
        parallel_calls: whether one answer may hold several calls.
        format: bound on the visible text; None leaves it free.
    """

    tool_choice: ToolChoice = "auto"
    tool_name: str = ""
    parallel_calls: bool = True
    format: AnswerFormat | None = None


class TextPart(msgspec.Struct, frozen=True):
    """More of the visible text, or of the chain of thought."""

    kind: Literal["content", "reasoning"]
    text: str


class CallPart(msgspec.Struct, frozen=True):
    """More of a tool call. Its first part has the name and the id, and no arguments; later ones only arguments."""

    index: int
    arguments: str = ""
    name: str = ""
    call_id: str = ""


Part: TypeAlias = TextPart | CallPart


def joined(parts: list[Part]) -> list[Part]:
    """``parts`` with neighbours of one kind put together, so that many small ones cost no more than a large one."""
    found: list[Part] = []
    runs: list[list[str]] = []
    for part in parts:
        last = found[-1] if found else None
        if isinstance(part, TextPart):
            if isinstance(last, TextPart) and last.kind == part.kind:
                runs[-1].append(part.text)
                continue
            runs.append([part.text])
        elif isinstance(last, CallPart) and last.index == part.index and not part.name and not last.name:
            runs[-1].append(part.arguments)
            continue
        else:
            runs.append([part.arguments])
        found.append(part)
    return [_with_text(part, "".join(run)) for part, run in zip(found, runs, strict=True)]


def _with_text(part: Part, text: str) -> Part:
    if isinstance(part, TextPart):
        return TextPart(part.kind, text)
    return CallPart(part.index, text, part.name, part.call_id)


def content_of(parts: Sequence[Part]) -> str:
    """The visible text of some parts."""
    return "".join(part.text for part in parts if isinstance(part, TextPart) and part.kind == "content")
