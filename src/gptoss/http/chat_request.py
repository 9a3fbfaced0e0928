"""Wire -> ``GenerateRequest``: what the fields of a chat completion request mean here.

Rules:
- Nothing that would change the answer is ignored in silence: it is honoured, refused by name, or (a field without
  effect) named once in the log.
- Ranges of sampling settings have one home, ``messages.sampling``; errors are only renamed to what the client wrote.
- Pure: no I/O, no clock. URLs inside messages are refused and never fetched.
"""

from collections.abc import Callable

import msgspec

from gptoss.actors.generation import GenerateRequest
from gptoss.engine.port import ChatMessage
from gptoss.errors import RequestError
from gptoss.http.answer_shape import answer_shape, wanted_tools
from gptoss.http.schema import ChatCompletionRequest, ContentPart, Message
from gptoss.messages.sampling import SamplingParams, check_sampling

ENDPOINT = "/v1/chat/completions"
MAX_CHOICES = 16


class StreamShape(msgspec.Struct, frozen=True, kw_only=True):
    """What each chunk of a stream carries beside its text."""

    include_usage: bool = False
    continuous_usage: bool = False


def generate_request(wire: ChatCompletionRequest, *, default_temperature: float) -> GenerateRequest:
    """What the actor system is asked to do; ids and trace context are added from the headers.

    Args:
        wire: the decoded body.
        default_temperature: the profile's temperature, for a request that names none.

    Raises:
        RequestError: a field has a value that cannot be honoured; ``param`` names it.
    """
    for refuse in _REFUSALS:
        refuse(wire)
    return GenerateRequest(
        messages=tuple(_message(message, index) for index, message in enumerate(wire.messages)),
        sampling=_sampling(wire, default_temperature),
        model=wire.model or "",
        endpoint=ENDPOINT,
        stream=bool(wire.stream),
        tools=wanted_tools(wire),
        reasoning_effort=wire.reasoning_effort or "",
        shape=answer_shape(wire),
        priority=wire.priority or 0,
        timeout_s=wire.timeout,
    )


def stream_shape(wire: ChatCompletionRequest) -> StreamShape:
    """What the stream's chunks carry. ``continuous_usage_stats`` implies usage, as it does in vLLM."""
    if wire.stream_options is None:
        return StreamShape()
    continuous = bool(wire.stream_options.continuous_usage_stats)
    return StreamShape(include_usage=continuous or bool(wire.stream_options.include_usage), continuous_usage=continuous)


def without_effect(wire: ChatCompletionRequest) -> tuple[str, ...]:
    """Names of known fields that this request sets and that change nothing yet."""
    return tuple(name for name in ("metadata", "user", "store") if getattr(wire, name))


# ---------------------------------------------------------------- messages


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


# ---------------------------------------------------------------- sampling


def _sampling(wire: ChatCompletionRequest, default_temperature: float) -> SamplingParams:
    defaults = SamplingParams(temperature=default_temperature)
    given = {
        "max_tokens": wire.max_tokens if wire.max_completion_tokens is None else wire.max_completion_tokens,
        "min_tokens": wire.min_tokens,
        "temperature": wire.temperature,
        "top_p": wire.top_p,
        # -1 is vLLM's way to say that every token is kept.
        "top_k": 0 if wire.top_k == -1 else wire.top_k,
        "min_p": wire.min_p,
        "presence_penalty": wire.presence_penalty,
        "frequency_penalty": wire.frequency_penalty,
        "repetition_penalty": wire.repetition_penalty,
        "seed": wire.seed,
        "stop": (wire.stop,) if isinstance(wire.stop, str) else wire.stop and tuple(wire.stop),
        "stop_token_ids": wire.stop_token_ids and tuple(wire.stop_token_ids),
        "ignore_eos": wire.ignore_eos,
        "logit_bias": wire.logit_bias,
        "logprobs": (wire.top_logprobs or 0) if wire.logprobs else None,
    }
    params = msgspec.structs.replace(defaults, **{name: value for name, value in given.items() if value is not None})
    renamed = {"logprobs": "top_logprobs"}
    if wire.max_completion_tokens is not None:
        renamed["max_tokens"] = "max_completion_tokens"
    try:
        check_sampling(params)
    except RequestError as error:
        name = error.param or ""
        written = renamed.get(name, name)
        raise RequestError(error.message.replace(f"{name} ", f"{written} ", 1), param=written) from None
    return params


# ---------------------------------------------------------------- what cannot be honoured


def _refuse_conflicts(wire: ChatCompletionRequest) -> None:
    if None not in (wire.max_tokens, wire.max_completion_tokens) and wire.max_tokens != wire.max_completion_tokens:
        raise RequestError(
            f"max_tokens is {wire.max_tokens} but max_completion_tokens is {wire.max_completion_tokens}; send one",
            param="max_completion_tokens",
        )
    if wire.top_logprobs and not wire.logprobs:
        raise RequestError("top_logprobs needs logprobs to be true", param="top_logprobs")
    if wire.stream_options is not None and not wire.stream:
        raise RequestError("stream_options is only allowed when stream is true", param="stream_options")


def _refuse_choices(wire: ChatCompletionRequest) -> None:
    if wire.n is not None and not 1 <= wire.n <= MAX_CHOICES:
        raise RequestError(f"n is {wire.n}; it must be between 1 and {MAX_CHOICES}", param="n")
    if wire.n not in (None, 1):
        raise RequestError(f"n is {wire.n}; more than one choice is not supported yet", param="n")


_REFUSALS: tuple[Callable[[ChatCompletionRequest], None], ...] = (
    _refuse_conflicts,
    _refuse_choices,
)
