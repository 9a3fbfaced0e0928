"""Wire -> ``GenerateRequest``: what the fields of ``POST /v1/responses`` mean here.

Rules:
- The conversation is what the earlier response had, if one is named, then the input. Instructions come first and belong
  to this response alone: they are not carried over.
- A chain of thought in the input belongs to the assistant's turn that follows it.
- Pure, as ``chat_request``, and refuses by name what cannot be honoured.
"""

from collections.abc import Callable, Sequence
from typing import TypeVar

import msgspec

from gptoss.actors.generation import GenerateRequest
from gptoss.engine.port import ChatMessage
from gptoss.errors import RequestError
from gptoss.http.answer_shape import checked_tools, json_format, tool_choice_of
from gptoss.http.response_schema import InputItem, InputPart, ResponsesRequest, ResponseToolChoice, StoredItem
from gptoss.http.sampling_fields import check_params, sampling_params
from gptoss.http.schema import FunctionDefinition, NamedFunction, NamedToolChoice, Tool
from gptoss.messages.answer import AnswerShape

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
        tools=checked_tools(_functions(wire)),
        shape=_shape(wire),
        prompt_field="input",
        length_field="max_output_tokens",
        reasoning_effort=(wire.reasoning and wire.reasoning.effort) or "",
        priority=wire.priority or 0,
        timeout_s=wire.timeout,
        cache_salt=wire.cache_salt or "",
        user=wire.user or "",
        profile=wire.profile or "",
        prompt_version=wire.prompt_version or "",
        metadata=wire.metadata or {},
    )


def _functions(wire: ResponsesRequest) -> list[Tool]:
    """The tools of a request as chat has them."""
    found: list[Tool] = []
    for index, tool in enumerate(wire.tools or ()):
        where = f"tools[{index}]"
        if tool.type != "function":
            raise RequestError(
                f"{where}.type is {tool.type[:64]!a}; only functions can be served", param=f"{where}.type"
            )
        function = FunctionDefinition(
            name=_needed(tool.name, f"{where}.name"),
            description=tool.description,
            parameters=tool.parameters,
            strict=tool.strict,
        )
        found.append(Tool(type="function", function=function))
    return found


def _shape(wire: ResponsesRequest) -> AnswerShape:
    """What the answer may be made of."""
    choice = wire.tool_choice
    if isinstance(choice, ResponseToolChoice):
        named = None if choice.name is None else NamedFunction(name=choice.name)
        choice = NamedToolChoice(type=choice.type, function=named)
    kind, name = tool_choice_of(choice, [tool.name or "" for tool in wire.tools or ()])
    wanted = wire.text and wire.text.format
    return AnswerShape(
        tool_choice=kind,
        tool_name=name,
        parallel_calls=wire.parallel_tool_calls is not False,
        format=json_format(wanted.type, wanted.schema_, "text.format", "text.format.schema")
        if wanted and wanted.type != "text"
        else None,
    )


def without_effect(wire: ResponsesRequest, *, takes_reasoning_effort: bool) -> tuple[str, ...]:
    """Names of known fields that this request sets and that change nothing."""
    names = [name for name in ("service_tier", "max_tool_calls") if getattr(wire, name)]
    if wire.text and wire.text.verbosity:
        names.append("text.verbosity")
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
        message = _message(item, where, reasoning)
        if item.type == "function_call" and messages and messages[-1].role == "assistant" and reasoning is None:
            # Calls belong to the turn that made them: a template shows one turn for all.
            messages[-1] = msgspec.structs.replace(
                messages[-1], tool_calls=(*messages[-1].tool_calls, *message.tool_calls)
            )
        else:
            messages.append(message)
        reasoning = None
    return tuple(messages)


def check_outputs(messages: Sequence[ChatMessage]) -> None:
    """Refuse outputs of functions that nobody called.

    Raises:
        RequestError: an output names a call that is not in the conversation before it.
    """
    called: set[str] = set()
    for message in messages:
        called.update(call["id"] for call in message.tool_calls)
        if message.role == "tool" and message.tool_call_id not in called:
            raise RequestError("input has the output of a function call that is not in the conversation", param="input")


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


def _refuse_includes(wire: ResponsesRequest) -> None:
    for name in wire.include or ():
        if name != LOGPROBS and name not in _NO_EFFECT_INCLUDED:
            raise RequestError(f"include {name[:64]!a} is not something that can be told here", param="include")
    if wire.top_logprobs and LOGPROBS not in (wire.include or ()):
        raise RequestError(f"top_logprobs needs {LOGPROBS!r} in include", param="top_logprobs")


_REFUSALS: tuple[Callable[[ResponsesRequest], None], ...] = (
    _refuse_states,
    _refuse_includes,
)
