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

from gptoss.messages.answer import CallPart, Part, TextPart, content_of

_encode = msgspec.json.encode


def message_body(parts: Sequence[Part]) -> dict[str, Any]:
    """The ``message`` of a choice."""
    content = content_of(parts)
    reasoning = "".join(part.text for part in parts if isinstance(part, TextPart) and part.kind == "reasoning")
    calls = tool_calls(parts)
    body: dict[str, Any] = {"role": "assistant", "content": content or ("" if not calls else None), "refusal": None}
    if reasoning:
        body |= {"reasoning": reasoning, "reasoning_content": reasoning}
    if calls:
        body["tool_calls"] = calls
    return body


def tool_calls(parts: Sequence[Part]) -> list[dict[str, Any]]:
    """The calls of an answer, in order."""
    names: dict[int, CallPart] = {}
    arguments: dict[int, list[str]] = {}
    for part in parts:
        if isinstance(part, CallPart):
            names.setdefault(part.index, part)
            arguments.setdefault(part.index, []).append(part.arguments)
    return [
        {
            "id": first.call_id,
            "type": "function",
            "function": {"name": first.name, "arguments": "".join(arguments[index])},
        }
        for index, first in names.items()
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
