"""What a client may write in ``POST /v1/chat/completions``: wire types, and bytes -> wire.

Rules:
- A field holds JSON's type and nothing cleverer; what the values mean is ``chat_request``'s business.
- ``null`` is the same as leaving a field out, as OpenAI's clients expect.
- Every number and list is bounded, here or by ``messages.sampling.check_sampling``.
- A field that is not listed is accepted and reported by name, never refused: clients are newer than servers.
"""

import re
from typing import Annotated, Any, Literal, TypeVar

import msgspec
from msgspec import Meta

from gptoss.errors import RequestError

MAX_DEPTH = 64
MAX_CONTAINERS = 20_000
"""Arrays and objects in one body; bounds the time of the depth check."""

ModelName = Annotated[str, Meta(max_length=256)]
Int32 = Annotated[int, Meta(ge=-(2**31), le=2**31 - 1)]
TokenId = Annotated[int, Meta(ge=0, le=2**31 - 1)]
TokenIds = Annotated[list[TokenId], Meta(max_length=1024)]
ToolName = Annotated[str, Meta(pattern=r"\A[A-Za-z0-9_-]{1,64}\Z")]
Timeout = Annotated[float, Meta(gt=0, le=86_400)]


class ContentPart(msgspec.Struct, frozen=True, kw_only=True):
    """One part of a message's content; only ``text`` parts can be served."""

    type: str
    text: str | None = None


class CalledFunction(msgspec.Struct, frozen=True, kw_only=True):
    """The function that an earlier assistant turn called; ``arguments`` is JSON as text."""

    name: ToolName
    arguments: str = ""


class ToolCall(msgspec.Struct, frozen=True, kw_only=True):
    """A call that an earlier assistant turn made."""

    id: str
    type: Literal["function"] = "function"
    function: CalledFunction


class Message(msgspec.Struct, frozen=True, kw_only=True):
    """One message of the conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[ContentPart] | None = None
    name: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None


class StreamOptions(msgspec.Struct, frozen=True, kw_only=True):
    """What a stream carries beside its text."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class JsonSchemaFormat(msgspec.Struct, frozen=True, kw_only=True):
    """A schema for the answer. ``strict`` changes nothing here: a schema is always enforced."""

    name: Annotated[str, Meta(max_length=64)] | None = None
    description: str | None = None
    schema_: dict[str, Any] | None = msgspec.field(default=None, name="schema")
    strict: bool | None = None


class ResponseFormat(msgspec.Struct, frozen=True, kw_only=True):
    """The form of the answer."""

    type: str
    json_schema: JsonSchemaFormat | None = None


class StructuredOutputs(msgspec.Struct, frozen=True, kw_only=True):
    """The form of the answer as vLLM has it."""

    json: str | dict[str, Any] | None = None
    json_object: bool | None = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    structural_tag: str | None = None


class FunctionDefinition(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A function that the model may call; ``parameters`` is the JSON schema of its arguments."""

    name: ToolName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(msgspec.Struct, frozen=True, kw_only=True):
    """A tool that the model may call."""

    type: Literal["function"]
    function: FunctionDefinition


class NamedFunction(msgspec.Struct, frozen=True, kw_only=True):
    """A function by its name."""

    name: ToolName


class NamedToolChoice(msgspec.Struct, frozen=True, kw_only=True):
    """The one tool that must be called."""

    type: str
    function: NamedFunction | None = None


class ChatCompletionRequest(msgspec.Struct, frozen=True, kw_only=True):
    """The body of ``POST /v1/chat/completions``."""

    messages: Annotated[list[Message], Meta(min_length=1)]
    model: ModelName | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    min_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: TokenIds | None = None
    ignore_eos: bool | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: dict[TokenId, float] | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None

    priority: Int32 | None = None
    timeout: Timeout | None = None
    user: str | None = None
    metadata: dict[str, str] | None = None
    store: bool | None = None
    service_tier: str | None = None
    reasoning_effort: Literal["low", "medium", "high"] | None = None

    tools: list[Tool] | None = None
    tool_choice: str | NamedToolChoice | None = None
    parallel_tool_calls: bool | None = None
    response_format: ResponseFormat | None = None
    guided_json: str | dict[str, Any] | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    structured_outputs: StructuredOutputs | None = None

    # Refused unless trivial: these would change the answer and cannot be honoured.
    n: Int32 | None = None
    guided_grammar: str | None = None
    functions: list[dict[str, Any]] | None = None
    function_call: str | dict[str, Any] | None = None


_BODY_PARAM = "body"
_PATH = re.compile(r"(?P<reason>.*) - at (?:`key` in )?`\$\.?(?P<path>[^`]*)`\Z", re.DOTALL)
_MISSING = re.compile(r"Object missing required field `(?P<field>\w+)`\Z")
# One match goes from a bracket to the next; strings are stepped over whole. Possessive, so that it cannot backtrack.
_NEXT_BRACKET = re.compile(rb'[^"\[\]{}]*+(?:"[^"\\]*+(?:\\.[^"\\]*+)*+"[^"\[\]{}]*+)*+([\[\]{}])', re.DOTALL)

_Wire = TypeVar("_Wire")
_chat_decoder = msgspec.json.Decoder(ChatCompletionRequest)
_fields_decoder = msgspec.json.Decoder(dict[str, msgspec.Raw])


def decode_chat(body: bytes) -> tuple[ChatCompletionRequest, tuple[str, ...]]:
    """Read a chat completion request.

    Returns:
        The request, and the names of top-level fields that it has and this server does not know.

    Raises:
        RequestError: the body is not JSON of that shape; ``param`` names the field at fault, such as
            ``messages[0].role``, or is ``body`` when the fault lies in no field.
    """
    check_depth(body)
    wire = _decode(_chat_decoder, body)
    unknown = _decode(_fields_decoder, body).keys() - set(ChatCompletionRequest.__struct_fields__)
    return wire, tuple(sorted(unknown))


def check_depth(body: bytes) -> None:
    """Refuse deep nesting before a recursive parser sees it.

    Raises:
        RequestError: arrays and objects nest more than ``MAX_DEPTH`` deep, or there are over ``MAX_CONTAINERS``.
    """
    if body.count(b"[") + body.count(b"{") <= MAX_DEPTH:
        return
    depth = count = 0
    for match in _NEXT_BRACKET.finditer(body):
        if match[1] in b"]}":
            depth -= 1
            continue
        depth += 1
        count += 1
        if depth > MAX_DEPTH:
            raise RequestError(f"the body nests more than {MAX_DEPTH} levels deep", param=_BODY_PARAM)
        if count > MAX_CONTAINERS:
            raise RequestError(f"the body holds more than {MAX_CONTAINERS} arrays and objects", param=_BODY_PARAM)


def _decode(decoder: msgspec.json.Decoder[_Wire], body: bytes) -> _Wire:
    try:
        return decoder.decode(body)
    except msgspec.ValidationError as error:
        raise _explain(str(error)) from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise RequestError(f"the body is not valid JSON in UTF-8: {error}", param=_BODY_PARAM) from None


def _explain(message: str) -> RequestError:
    """Turn "Expected `str`, got `int` - at `$.messages[0].role`" into an error whose ``param`` is the field."""
    located = _PATH.match(message)
    reason = located["reason"] if located else message
    path = located["path"].removesuffix("[...]") if located else ""
    if missing := _MISSING.match(reason):
        path = f"{path}.{missing['field']}".lstrip(".")
        reason = "this field is required"
    if not path:
        return RequestError(f"the body does not fit: {reason}", param=_BODY_PARAM)
    return RequestError(f"{path}: {reason}", param=path)
