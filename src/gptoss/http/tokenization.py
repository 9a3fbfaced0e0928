"""``POST /tokenize`` and ``/detokenize``, in vLLM's shapes.

A prompt of messages is rendered exactly as ``/v1/chat/completions`` would render it.
"""

import msgspec
from aiohttp import web

from gptoss.actors.generation import GenerateRequest
from gptoss.errors import ModelNotFound, RequestError
from gptoss.http.chat_request import chat_messages
from gptoss.http.context import CONTEXT
from gptoss.http.decode import BodyDecoder
from gptoss.http.errors import json_response
from gptoss.http.intake import read_wire
from gptoss.http.schema import Message, ModelName, ReasoningEffort, TokenId


class TokenizeRequest(msgspec.Struct, frozen=True, kw_only=True):
    """The body of ``POST /tokenize``: a ``prompt``, or ``messages``."""

    model: ModelName | None = None
    prompt: str | None = None
    messages: list[Message] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    reasoning_effort: ReasoningEffort | None = None
    return_token_strs: bool | None = None


class TokenizeAnswer(msgspec.Struct, frozen=True):
    """The answer of ``POST /tokenize``."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class DetokenizeRequest(msgspec.Struct, frozen=True, kw_only=True):
    """The body of ``POST /detokenize``."""

    tokens: list[TokenId]
    model: ModelName | None = None


class DetokenizeAnswer(msgspec.Struct, frozen=True):
    """The answer of ``POST /detokenize``."""

    prompt: str


TOKENIZE = BodyDecoder(TokenizeRequest)
DETOKENIZE = BodyDecoder(DetokenizeRequest)


async def tokenize(request: web.Request) -> web.StreamResponse:
    """``POST /tokenize``."""
    gateway = request.app[CONTEXT].gateway
    wire = await read_wire(request, TOKENIZE)
    _check_model(request, wire.model)
    rendering = gateway.rendering
    prompt = await rendering.prompt(
        _prompt(wire), date=rendering.today(), add_generation_prompt=wire.add_generation_prompt is not False
    )
    pieces = await rendering.pieces(prompt.token_ids) if wire.return_token_strs else None
    return json_response(
        TokenizeAnswer(
            count=len(prompt.token_ids),
            max_model_len=gateway.max_model_len,
            tokens=list(prompt.token_ids),
            token_strs=None if pieces is None else list(pieces),
        )
    )


async def detokenize(request: web.Request) -> web.StreamResponse:
    """``POST /detokenize``."""
    wire = await read_wire(request, DETOKENIZE)
    _check_model(request, wire.model)
    text = await request.app[CONTEXT].gateway.rendering.decode(tuple(wire.tokens), "tokens")
    return json_response(DetokenizeAnswer(text))


def _prompt(wire: TokenizeRequest) -> GenerateRequest:
    if (wire.prompt is None) == (wire.messages is None):
        raise RequestError("send either prompt or messages", param="prompt" if wire.prompt is None else "messages")
    if wire.messages is None:
        return GenerateRequest(prompt=wire.prompt, add_special_tokens=wire.add_special_tokens is not False)
    if wire.add_special_tokens:
        raise RequestError(
            "add_special_tokens only applies to prompt; a chat template writes its own", param="add_special_tokens"
        )
    return GenerateRequest(messages=chat_messages(wire.messages), reasoning_effort=wire.reasoning_effort or "")


def _check_model(request: web.Request, model: str | None) -> None:
    served = request.app[CONTEXT].gateway.served_model
    if model and model != served:
        raise ModelNotFound(f"the model {model!a} is not served here; this server has {served!a}", param="model")
