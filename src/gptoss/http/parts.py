"""The parts of an answer as OpenAI writes them: a whole message, or the ``delta`` of each chunk.

Rules:
- A call's first delta has its index, id, type and name, and empty arguments; the later ones its index and a fragment.
- Thoughts stand under both names that clients read, ``reasoning`` (vLLM, OpenRouter) and ``reasoning_content``
  (DeepSeek); a message without thoughts has neither.
- ``content`` is null only in a message that calls tools and says nothing.
"""

from collections.abc import Sequence
from typing import Any

import msgspec
from msgspec import UNSET

from gptoss.http.answer_schema import AnswerCall, AnswerFunction, AnswerMessage
from gptoss.messages.answer import CallPart, Part, TextPart, content_of

_encode = msgspec.json.encode


def answer_message(parts: Sequence[Part]) -> AnswerMessage:
    """The ``message`` of a choice."""
    content = content_of(parts)
    reasoning = "".join(part.text for part in parts if isinstance(part, TextPart) and part.kind == "reasoning")
    calls = tool_calls(parts)
    return AnswerMessage(
        content=content or ("" if not calls else None),
        reasoning=reasoning or UNSET,
        reasoning_content=reasoning or UNSET,
        tool_calls=calls or UNSET,
    )


def tool_calls(parts: Sequence[Part]) -> list[AnswerCall]:
    """The calls of an answer, in order."""
    firsts: dict[int, CallPart] = {}
    arguments: dict[int, list[str]] = {}
    for part in parts:
        if isinstance(part, CallPart):
            firsts.setdefault(part.index, part)
            arguments.setdefault(part.index, []).append(part.arguments)
    return [
        AnswerCall(first.call_id, "function", AnswerFunction(first.name, "".join(arguments[index])))
        for index, first in firsts.items()
    ]


def delta_body(part: Part) -> bytes:
    """The ``delta`` of a chunk that brings ``part``, as JSON."""
    if isinstance(part, TextPart):
        text = _encode(part.text)
        if part.kind == "content":
            return b'{"content":' + text + b"}"
        return b'{"reasoning":' + text + b',"reasoning_content":' + text + b"}"
    call: dict[str, Any] = {"index": part.index}
    if part.name:
        call |= {"id": part.call_id, "type": "function", "function": {"name": part.name, "arguments": ""}}
    else:
        call["function"] = {"arguments": part.arguments}
    return _encode({"tool_calls": [call]})
