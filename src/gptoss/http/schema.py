"""What a client may write in ``POST /v1/chat/completions``, and what every endpoint that generates shares.

Rules:
- A field holds JSON's type and nothing cleverer; what the values mean is ``chat_request``'s business.
- ``null`` is the same as leaving a field out, as OpenAI's clients expect.
- Every number and list is bounded, here or by ``messages.sampling.check_sampling``.
"""

from typing import Annotated, Any, Literal, TypeAlias

import msgspec
from msgspec import Meta

from gptoss.config import ProfileName, PromptVersion

ModelName = Annotated[str, Meta(max_length=256)]
Int32 = Annotated[int, Meta(ge=-(2**31), le=2**31 - 1)]
TokenId = Annotated[int, Meta(ge=0, le=2**31 - 1)]
TokenIds = Annotated[list[TokenId], Meta(max_length=1024)]
ToolName = Annotated[str, Meta(pattern=r"\A[A-Za-z0-9_-]{1,64}\Z")]
Timeout = Annotated[float, Meta(gt=0, le=86_400)]
UserName = Annotated[str, Meta(max_length=512, description="the tenant: cached prefixes and sessions are its own")]
CacheSalt = Annotated[
    str, Meta(min_length=1, max_length=256, description="cached prefixes are shared only under the same salt and user")
]
Metadata = Annotated[
    dict[Annotated[str, Meta(max_length=64)], Annotated[str, Meta(max_length=512)]], Meta(max_length=16)
]
ReasoningEffort: TypeAlias = Literal["none", "minimal", "low", "medium", "high", "xhigh"]


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


class SamplingFields(msgspec.Struct, frozen=True, kw_only=True):
    """What every endpoint that generates has in common; read by ``sampling_fields``."""

    model: ModelName | None = None
    stream: bool | None = None

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

    priority: Int32 | None = None
    timeout: Timeout | None = None
    cache_salt: CacheSalt | None = None
    user: UserName | None = None
    profile: ProfileName | None = None


class GenerationFields(SamplingFields, frozen=True, kw_only=True):
    """What chat and text completions have in common beside that."""

    stream_options: StreamOptions | None = None
    n: Int32 | None = None
    max_tokens: int | None = None


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


class ChatCompletionRequest(GenerationFields, frozen=True, kw_only=True):
    """The body of ``POST /v1/chat/completions``."""

    messages: Annotated[list[Message], Meta(min_length=1)]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    reasoning_effort: ReasoningEffort | None = None
    prompt_version: PromptVersion | None = None

    metadata: Metadata | None = None
    store: bool | None = None
    service_tier: str | None = None

    tools: list[Tool] | None = None
    tool_choice: str | NamedToolChoice | None = None
    parallel_tool_calls: bool | None = None
    response_format: ResponseFormat | None = None
    guided_json: str | dict[str, Any] | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    structured_outputs: StructuredOutputs | None = None

    # The older form of ``tools``: refused unless trivial.
    functions: list[dict[str, Any]] | None = None
    function_call: str | dict[str, Any] | None = None
