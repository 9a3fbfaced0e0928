"""The parts that an answer comes in."""

from typing import Literal, TypeAlias

import msgspec


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


def content_of(parts: tuple[Part, ...] | list[Part]) -> str:
    """The visible text of some parts."""
    return "".join(part.text for part in parts if isinstance(part, TextPart) and part.kind == "content")
