"""Wire -> ``GenerateRequest``: what the fields of ``POST /v1/responses`` mean here.

Rules:
- The conversation is what the earlier response had, if one is named, then the input. Instructions come first and belong
  to this response alone: they are not carried over.
- A chain of thought in the input belongs to the assistant's turn that follows it.
- Pure, as ``chat_request``, and refuses by name what cannot be honoured.
"""

from collections.abc import Callable, Sequence
from typing import TypeVar

from gptoss.actors.generation import GenerateRequest
from gptoss.engine.port import ChatMessage
from gptoss.errors import RequestError
from gptoss.http.response_schema import InputItem, InputPart, ResponsesRequest, StoredItem
from gptoss.http.sampling_fields import check_params, sampling_params

ENDPOINT = "/v1/responses"
LOGPROBS = "message.output_text.logprobs"
_NO_EFFECT_INCLUDED = frozenset(("reasoning.encrypted_content",))
_T = TypeVar("_T")
_TEXT_PARTS = frozenset(("input_text", "output_text", "text", "reasoning_text", "summary_text", "refusal"))


def generate_request(
    wire: ResponsesRequest, messages: tuple[ChatMessage, ...], *, default_temperature: float
) -> GenerateRequest:
    """What a response asks of the actor system; ids and trace context are added from the headers.

    Args:
        wire: the decoded body.
        messages: the conversation so far, the input included and the instructions not.
        default_temperature: the profile's temperature, for a request that names none.

    Raises:
        RequestError: a field has a value that cannot be honoured; ``param`` names it.
    """
    for refuse in _REFUSALS:
        refuse(wire)
    params = sampling_params(
        wire,
        default_temperature=default_temperature,
        max_tokens=wire.max_output_tokens,
        logprobs=(wire.top_logprobs or 0) if LOGPROBS in (wire.include or ()) else None,
    )
    check_params(params, {"max_tokens": "max_output_tokens", "logprobs": "top_logprobs"})
    instructions = (ChatMessage(role="system", content=wire.instructions),) if wire.instructions else ()
    return GenerateRequest(
        messages=(*instructions, *messages),
        sampling=params,
        model=wire.model or "",
        endpoint=ENDPOINT,
        stream=bool(wire.stream),
        reasoning_effort=(wire.reasoning and wire.reasoning.effort) or "",
        priority=wire.priority or 0,
        timeout_s=wire.timeout,
        cache_salt=wire.cache_salt or "",
        user=wire.user or "",
        profile=wire.profile or "",
        prompt_version=wire.prompt_version or "",
        metadata=wire.metadata or {},
    )


def without_effect(wire: ResponsesRequest, *, takes_reasoning_effort: bool) -> tuple[str, ...]:
    """Names of known fields that this request sets and that change nothing."""
    names = [name for name in ("service_tier", "max_tool_calls") if getattr(wire, name)]
    if wire.reasoning and (wire.reasoning.summary or (wire.reasoning.effort and not takes_reasoning_effort)):
        names.append("reasoning")
    return (*names, *(f"include {name}" for name in wire.include or () if name in _NO_EFFECT_INCLUDED))


def items_of(wire: ResponsesRequest) -> list[InputItem]:
    """The input as items."""
    if isinstance(wire.input, str):
        return [InputItem(role="user", content=wire.input)]
    return wire.input


def stored_items(items: Sequence[InputItem], response_id: str) -> list[StoredItem]:
    """The input as it is told again: content in parts, and an id for each item."""
    return [
        StoredItem(
            id=f"in_{index}_{response_id}",
            type=item.type,
            status="completed",
            role=item.role,
            content=_as_parts(item.content, "output_text" if item.role == "assistant" else "input_text"),
            call_id=item.call_id,
            name=item.name,
            arguments=item.arguments,
            output=_as_parts(item.output, "input_text"),
        )
        for index, item in enumerate(items)
    ]


def conversation(items: Sequence[InputItem]) -> tuple[ChatMessage, ...]:
    """The messages that items stand for.

    Raises:
        RequestError: an item or a part is not text, or lacks what its type needs.
    """
    messages: list[ChatMessage] = []
    reasoning: str | None = None
    for index, item in enumerate(items):
        where = f"input[{index}]"
        if item.type == "reasoning":
            reasoning = _text(item.content, f"{where}.content") or None
            continue
        messages.append(_message(item, where, reasoning))
        reasoning = None
    return tuple(messages)


def _message(item: InputItem, where: str, reasoning: str | None) -> ChatMessage:
    match item.type:
        case "message":
            role = _needed(item.role, f"{where}.role")
            content = _text(_needed(item.content, f"{where}.content"), f"{where}.content")
            if role == "developer":
                role = "system"
            return ChatMessage(role=role, content=content, reasoning=reasoning if role == "assistant" else None)
        case "function_call":
            function = {"name": _needed(item.name, f"{where}.name"), "arguments": item.arguments or ""}
            call = {"id": _needed(item.call_id, f"{where}.call_id"), "type": "function", "function": function}
            return ChatMessage(role="assistant", reasoning=reasoning, tool_calls=(call,))
        case "function_call_output":
            output = _text(_needed(item.output, f"{where}.output"), f"{where}.output")
            return ChatMessage(role="tool", content=output, tool_call_id=_needed(item.call_id, f"{where}.call_id"))
        case _:
            raise RequestError(
                f"{where}.type is {item.type[:64]!a}; messages, reasoning and function calls can be served",
                param=f"{where}.type",
            )


def _text(content: str | list[InputPart] | None, where: str) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    for part in content:
        if part.type not in _TEXT_PARTS or part.text is None:
            raise RequestError(
                f"{where} has a part of type {part.type[:64]!a}; only text can be served, and no URL is ever fetched",
                param=where,
            )
    return "\n".join(part.text or "" for part in content)


def _as_parts(content: str | list[InputPart] | None, kind: str) -> list[InputPart] | None:
    return [InputPart(type=kind, text=content)] if isinstance(content, str) else content


def _needed(value: _T | None, where: str) -> _T:
    if value is None:
        raise RequestError(f"{where}: this field is required", param=where)
    return value


# ---------------------------------------------------------------- what cannot be honoured


def _refuse_states(wire: ResponsesRequest) -> None:
    for name in ("background", "conversation", "prompt"):
        if getattr(wire, name):
            raise RequestError(f"{name} is not supported; send the input itself and wait for the answer", param=name)
    if wire.truncation not in (None, "disabled"):
        raise RequestError("truncation: no input is cut in silence; send a shorter one", param="truncation")


def _refuse_formats(wire: ResponsesRequest) -> None:
    if wire.text is not None and wire.text.format is not None and wire.text.format.type != "text":
        raise RequestError(
            f"text.format {wire.text.format.type[:64]!a} is not supported yet; leave it out or use 'text'",
            param="text.format",
        )


def _refuse_tools(wire: ResponsesRequest) -> None:
    if wire.tools:
        raise RequestError("tools: calling tools is not supported yet", param="tools")
    if wire.tool_choice not in (None, "none", "auto"):
        raise RequestError("tool_choice asks for a tool; calling tools is not supported yet", param="tool_choice")


def _refuse_includes(wire: ResponsesRequest) -> None:
    for name in wire.include or ():
        if name != LOGPROBS and name not in _NO_EFFECT_INCLUDED:
            raise RequestError(f"include {name[:64]!a} is not something that can be told here", param="include")
    if wire.top_logprobs and LOGPROBS not in (wire.include or ()):
        raise RequestError(f"top_logprobs needs {LOGPROBS!r} in include", param="top_logprobs")


_REFUSALS: tuple[Callable[[ResponsesRequest], None], ...] = (
    _refuse_states,
    _refuse_formats,
    _refuse_tools,
    _refuse_includes,
)
