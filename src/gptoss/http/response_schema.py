"""What a client may write in ``POST /v1/responses``, and the objects that the responses endpoints answer with."""

from typing import Annotated, Any, Literal, TypeAlias

import msgspec
from msgspec import Meta

from gptoss.config import PromptVersion
from gptoss.http.answer_schema import TokenLogprobBody
from gptoss.http.schema import Metadata, ReasoningEffort, SamplingFields, ToolName

Status: TypeAlias = Literal["in_progress", "completed", "incomplete", "failed", "cancelled"]
ItemStatus: TypeAlias = Literal["in_progress", "completed", "incomplete"]


class InputPart(msgspec.Struct, frozen=True, kw_only=True):
    """One part of an item's content; only text can be served."""

    type: str
    text: str | None = None


class InputItem(msgspec.Struct, frozen=True, kw_only=True):
    """One item of the input: a message, or something that an earlier response had in its output.

    ``type`` says which fields count: ``message`` has role and content, ``reasoning`` content, ``function_call`` call_id,
    name and arguments, ``function_call_output`` call_id and output.
    """

    type: str = "message"
    role: Literal["user", "assistant", "system", "developer"] | None = None
    content: str | list[InputPart] | None = None
    call_id: str | None = None
    name: ToolName | None = None
    arguments: str | None = None
    output: str | list[InputPart] | None = None


class ReasoningOptions(msgspec.Struct, frozen=True, kw_only=True):
    """How the model thinks. ``summary`` has no effect: the chain of thought is given whole."""

    effort: ReasoningEffort | None = None
    summary: str | None = None


class TextFormat(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The form of the text: ``text``, ``json_object``, or ``json_schema`` with a schema, which is always enforced."""

    type: str
    name: Annotated[str, Meta(max_length=64)] | None = None
    description: str | None = None
    schema_: dict[str, Any] | None = msgspec.field(default=None, name="schema")
    strict: bool | None = None


class TextOptions(msgspec.Struct, frozen=True, kw_only=True):
    """The shape of the text. ``verbosity`` has no effect."""

    format: TextFormat | None = None
    verbosity: str | None = None


class ResponseTool(msgspec.Struct, frozen=True, kw_only=True):
    """A tool that the model may call; only functions can be served."""

    type: str
    name: ToolName | None = None
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class ResponseToolChoice(msgspec.Struct, frozen=True, kw_only=True):
    """The one function that must be called."""

    type: str
    name: ToolName | None = None


class ResponsesRequest(SamplingFields, frozen=True, kw_only=True):
    """The body of ``POST /v1/responses``."""

    input: str | Annotated[list[InputItem], Meta(min_length=1)]
    instructions: str | None = None
    max_output_tokens: int | None = None
    previous_response_id: Annotated[str, Meta(max_length=256)] | None = None
    store: bool | None = None
    metadata: Metadata | None = None
    include: Annotated[list[str], Meta(max_length=16)] | None = None
    top_logprobs: int | None = None
    reasoning: ReasoningOptions | None = None
    prompt_version: PromptVersion | None = None
    service_tier: str | None = None

    text: TextOptions | None = None
    tools: list[ResponseTool] | None = None
    tool_choice: str | ResponseToolChoice | None = None
    parallel_tool_calls: bool | None = None

    # Refused by ``response_request`` unless trivial.
    max_tool_calls: int | None = None
    background: bool | None = None
    conversation: str | dict[str, Any] | None = None
    prompt: dict[str, Any] | None = None
    truncation: str | None = None


class OutputText(msgspec.Struct, frozen=True, tag_field="type", tag="output_text"):
    """Visible text."""

    text: str
    annotations: list[str] = []
    logprobs: list[TokenLogprobBody] = []


class ReasoningText(msgspec.Struct, frozen=True, tag_field="type", tag="reasoning_text"):
    """Chain of thought."""

    text: str


class MessageItem(msgspec.Struct, frozen=True, tag_field="type", tag="message"):
    """What the model said."""

    id: str
    status: ItemStatus
    content: list[OutputText]
    role: Literal["assistant"] = "assistant"


class ReasoningItem(msgspec.Struct, frozen=True, tag_field="type", tag="reasoning"):
    """What the model thought."""

    id: str
    status: ItemStatus
    content: list[ReasoningText]
    summary: list[str] = []


class FunctionCallItem(msgspec.Struct, frozen=True, tag_field="type", tag="function_call"):
    """A call that the model makes; ``arguments`` is JSON as text."""

    id: str
    status: ItemStatus
    call_id: str
    name: str
    arguments: str


OutputItem: TypeAlias = MessageItem | ReasoningItem | FunctionCallItem


class InputTokensDetails(msgspec.Struct, frozen=True):
    """Of the input's tokens, those that the prefix cache had."""

    cached_tokens: int


class OutputTokensDetails(msgspec.Struct, frozen=True):
    """Of the generated tokens, those of the chain of thought."""

    reasoning_tokens: int


class ResponseUsage(msgspec.Struct, frozen=True):
    """Token counts."""

    input_tokens: int
    output_tokens: int
    total_tokens: int
    input_tokens_details: InputTokensDetails
    output_tokens_details: OutputTokensDetails


class ResponseFault(msgspec.Struct, frozen=True):
    """Why a response failed."""

    code: str
    message: str


class IncompleteDetails(msgspec.Struct, frozen=True):
    """Why a response is not whole."""

    reason: str


class ResponseBody(msgspec.Struct, frozen=True, kw_only=True):
    """A response."""

    id: str
    object: Literal["response"] = "response"
    created_at: int
    status: Status
    background: bool = False
    error: ResponseFault | None = None
    incomplete_details: IncompleteDetails | None = None
    instructions: str | None
    max_output_tokens: int | None
    model: str
    output: list[OutputItem] = []
    parallel_tool_calls: bool = True
    previous_response_id: str | None
    reasoning: ReasoningOptions
    store: bool
    temperature: float
    text: TextOptions = TextOptions(format=TextFormat(type="text"))
    tool_choice: str | ResponseToolChoice = "auto"
    tools: list[ResponseTool] = []
    top_logprobs: int
    top_p: float
    truncation: str = "disabled"
    usage: ResponseUsage | None = None
    user: str | None
    metadata: dict[str, str]


class StoredItem(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """An item of a stored response's input, under an id of its own."""

    id: str
    type: str
    status: ItemStatus
    role: str | None = None
    content: list[InputPart] | None = None
    call_id: str | None = None
    name: str | None = None
    arguments: str | None = None
    output: list[InputPart] | None = None


class ItemList(msgspec.Struct, frozen=True):
    """The answer of ``GET /v1/responses/{id}/input_items``."""

    object: Literal["list"]
    data: list[StoredItem]
    first_id: str | None
    last_id: str | None
    has_more: bool


class ResponseDeleted(msgspec.Struct, frozen=True):
    """The answer of ``DELETE /v1/responses/{id}``."""

    id: str
    object: Literal["response"] = "response"
    deleted: bool = True
