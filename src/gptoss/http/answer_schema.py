"""What this server answers to requests that generate: wire types, which the OpenAPI document shows too.

Fields that may be missing are ``UNSET`` by default; ``null`` is written where OpenAI writes it.
"""

from typing import Literal, TypeAlias

import msgspec
from msgspec import UNSET, UnsetType

from gptoss.actors.generation import Outcome, Usage
from gptoss.engine.port import TokenLogprob
from gptoss.messages.model import FinishReason

FinishBody: TypeAlias = Literal["stop", "length", "tool_calls", "abort"]
FINISH_REASONS: dict[FinishReason | Literal["tool_calls"], FinishBody] = {
    "stop": "stop",
    "length": "length",
    "tool_calls": "tool_calls",
    "cancelled": "abort",
}
"""A request that somebody cancelled ends with ``abort``, as in vLLM: ``stop`` would pass a cut answer off as a whole one."""
MIN_LOGPROB = -9999.0
"""JSON has no minus infinity; this is what OpenAI writes for it."""


class PromptTokensDetails(msgspec.Struct, frozen=True):
    """Of the prompt's tokens, those that the prefix cache had."""

    cached_tokens: int


class CompletionTokensDetails(msgspec.Struct, frozen=True):
    """Of the generated tokens, those of the chain of thought."""

    reasoning_tokens: int


class UsageBody(msgspec.Struct, frozen=True):
    """Token counts. Prompts count once, however many choices they have; generated tokens are summed over choices."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails | UnsetType = UNSET
    completion_tokens_details: CompletionTokensDetails | UnsetType = UNSET


class TopLogprob(msgspec.Struct, frozen=True):
    """A token that could have stood there."""

    token: str
    logprob: float
    bytes: list[int]


class TokenLogprobBody(msgspec.Struct, frozen=True):
    """A generated token."""

    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list[TopLogprob]


class ChatLogprobs(msgspec.Struct, frozen=True):
    """Logprobs of a choice."""

    content: list[TokenLogprobBody]
    refusal: None = None


class AnswerFunction(msgspec.Struct, frozen=True):
    """The function that is to be called; ``arguments`` is what the model wrote, JSON as text."""

    name: str
    arguments: str


class AnswerCall(msgspec.Struct, frozen=True):
    """A call that the model asks for."""

    id: str
    type: Literal["function"]
    function: AnswerFunction


class AnswerMessage(msgspec.Struct, frozen=True, kw_only=True):
    """What the model said. Thoughts stand under both names that clients read."""

    role: Literal["assistant"] = "assistant"
    content: str | None
    refusal: None = None
    reasoning: str | UnsetType = UNSET
    reasoning_content: str | UnsetType = UNSET
    tool_calls: list[AnswerCall] | UnsetType = UNSET


class ChatChoice(msgspec.Struct, frozen=True):
    """One choice."""

    index: int
    message: AnswerMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishBody
    stop_reason: str | int | UnsetType = UNSET


class ChatCompletion(msgspec.Struct, frozen=True):
    """The answer of ``POST /v1/chat/completions``."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: UsageBody


class TextLogprobs(msgspec.Struct, frozen=True):
    """Logprobs in the older shape: lists that run in step, an entry a token; ``text_offset`` counts characters."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class TextChoice(msgspec.Struct, frozen=True):
    """One choice."""

    index: int
    text: str
    logprobs: TextLogprobs | None
    finish_reason: FinishBody | None
    stop_reason: str | int | UnsetType = UNSET


class TextCompletion(msgspec.Struct, frozen=True):
    """The answer of ``POST /v1/completions``, and each chunk of its stream."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[TextChoice]
    usage: UsageBody | UnsetType | None = UNSET


def running_usage(prompt_tokens: int, completion_tokens: int) -> UsageBody:
    """Counts of a request that still runs."""
    return UsageBody(prompt_tokens, completion_tokens, prompt_tokens + completion_tokens)


def final_usage(usage: Usage) -> UsageBody:
    """Counts of requests that have ended."""
    return UsageBody(
        usage.prompt_tokens,
        usage.completion_tokens,
        usage.prompt_tokens + usage.completion_tokens,
        PromptTokensDetails(usage.cached_tokens),
        CompletionTokensDetails(usage.reasoning_tokens),
    )


def summed(outcomes: list[Outcome], choices_per_prompt: int) -> Usage:
    """The counts of a call.

    Args:
        outcomes: of its choices, by prompt and then by choice.
        choices_per_prompt: every so manieth choice begins with a new prompt, whose tokens count.
    """
    firsts = [outcome.usage for outcome in outcomes[::choices_per_prompt]]
    return Usage(
        prompt_tokens=sum(usage.prompt_tokens for usage in firsts),
        completion_tokens=sum(outcome.usage.completion_tokens for outcome in outcomes),
        cached_tokens=sum(usage.cached_tokens for usage in firsts),
        reasoning_tokens=sum(outcome.usage.reasoning_tokens for outcome in outcomes),
    )


def chat_logprobs(logprobs: tuple[TokenLogprob, ...]) -> ChatLogprobs:
    """OpenAI's ``logprobs`` of a chat choice."""
    return ChatLogprobs([_token(token) for token in logprobs])


def stop_reason(outcome: Outcome) -> str | int | UnsetType:
    """The stop string or token that ended a choice, where one did."""
    return UNSET if outcome.stop_reason is None else outcome.stop_reason


def _token(token: TokenLogprob) -> TokenLogprobBody:
    top = [TopLogprob(text, max(logprob, MIN_LOGPROB), list(raw)) for _, logprob, text, raw in token.top]
    return TokenLogprobBody(token.text, max(token.logprob, MIN_LOGPROB), list(token.raw), top)
