"""Wire -> ``GenerateRequest``: what the fields of a chat completion request mean here.

Rules:
- Nothing that would change the answer is ignored in silence: it is honoured, refused by name, or (a field without
  effect) named once in the log.
- Pure: no I/O, no clock. URLs inside messages are refused and never fetched.
"""

import msgspec

from gptoss.actors.generation import GenerateRequest
from gptoss.engine.port import ChatMessage
from gptoss.errors import RequestError
from gptoss.http.answer_shape import answer_shape, wanted_tools
from gptoss.http.sampling_fields import check_params, sampling_params
from gptoss.http.schema import ChatCompletionRequest, ContentPart, Message

ENDPOINT = "/v1/chat/completions"


def generate_request(wire: ChatCompletionRequest, *, default_temperature: float) -> GenerateRequest:
    """What each choice asks of the actor system; ids and trace context are added from the headers.

    Args:
        wire: the decoded body.
        default_temperature: the profile's temperature, for a request that names none.

    Raises:
        RequestError: a field has a value that cannot be honoured; ``param`` names it.
    """
    _refuse_conflicts(wire)
    params = sampling_params(
        wire,
        default_temperature=default_temperature,
        max_tokens=wire.max_tokens if wire.max_completion_tokens is None else wire.max_completion_tokens,
        logprobs=(wire.top_logprobs or 0) if wire.logprobs else None,
    )
    written = {"logprobs": "top_logprobs"}
    if wire.max_completion_tokens is not None:
        written["max_tokens"] = "max_completion_tokens"
    check_params(params, written)
    return GenerateRequest(
        messages=chat_messages(wire.messages),
        sampling=params,
        model=wire.model or "",
        endpoint=ENDPOINT,
        stream=bool(wire.stream),
        tools=wanted_tools(wire),
        shape=answer_shape(wire),
        reasoning_effort=wire.reasoning_effort or "",
        priority=wire.priority or 0,
        timeout_s=wire.timeout,
        cache_salt=wire.cache_salt or "",
        user=wire.user or "",
        profile=wire.profile or "",
        prompt_version=wire.prompt_version or "",
        metadata=wire.metadata or {},
        length_field=written.get("max_tokens", "max_tokens"),
    )


def without_effect(wire: ChatCompletionRequest, *, takes_reasoning_effort: bool) -> tuple[str, ...]:
    """Names of known fields that this request sets and that change nothing: nothing is stored, all tiers are one."""
    names = ("store", "service_tier") if takes_reasoning_effort else ("store", "service_tier", "reasoning_effort")
    return tuple(name for name in names if getattr(wire, name))


# ---------------------------------------------------------------- messages


def chat_messages(messages: list[Message]) -> tuple[ChatMessage, ...]:
    """The conversation as chat templates expect it. Raises ``RequestError`` for what is not text."""
    return tuple(_message(message, index) for index, message in enumerate(messages))


def _message(message: Message, index: int) -> ChatMessage:
    where = f"messages[{index}]"
    content = _text(message.content, f"{where}.content")
    if content is None and not message.tool_calls:
        raise RequestError(f"{where}.content is missing; a {message.role} message needs one", param=f"{where}.content")
    return ChatMessage(
        role="system" if message.role == "developer" else message.role,
        content=content,
        name=message.name,
        reasoning=message.reasoning if message.reasoning is not None else message.reasoning_content,
        tool_calls=tuple(msgspec.to_builtins(call) for call in message.tool_calls or ()),
        tool_call_id=message.tool_call_id,
    )


def _text(content: str | list[ContentPart] | None, where: str) -> str | None:
    if content is None or isinstance(content, str):
        return content
    texts: list[str] = []
    for part in content:
        if part.type != "text":
            raise RequestError(
                f"{where} has a part of type {part.type[:64]!r}; only text can be served, and no URL is ever fetched",
                param=where,
            )
        if part.text is None:
            raise RequestError(f"{where} has a text part without its text", param=where)
        texts.append(part.text)
    # Newline as vLLM joins parts for templates that take plain text.
    return "\n".join(texts)


# ---------------------------------------------------------------- what cannot be honoured


def _refuse_conflicts(wire: ChatCompletionRequest) -> None:
    if None not in (wire.max_tokens, wire.max_completion_tokens) and wire.max_tokens != wire.max_completion_tokens:
        raise RequestError(
            f"max_tokens is {wire.max_tokens} but max_completion_tokens is {wire.max_completion_tokens}; send one",
            param="max_completion_tokens",
        )
    if wire.top_logprobs and not wire.logprobs:
        raise RequestError("top_logprobs needs logprobs to be true", param="top_logprobs")
