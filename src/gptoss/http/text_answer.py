r"""Text completions as OpenAI wrote them before chat: the completion object, and a stream's chunks.

Rules:
- ``id`` is ``cmpl-`` and the id of the first choice's request.
- ``text_offset`` is where a token's first character begins in ``text``, the repeated prompt included. A token that is
  not whole UTF-8 is named by its bytes, ``bytes:\xe2\x80``, so that different tokens have different names.
"""

import codecs
from collections.abc import Sequence

import msgspec

from gptoss.actors.generation import Delta, Generation, Outcome
from gptoss.engine.port import TokenLogprob
from gptoss.errors import GptossError
from gptoss.http.answer_schema import (
    FINISH_REASONS,
    MIN_LOGPROB,
    TextChoice,
    TextCompletion,
    TextLogprobs,
    UsageBody,
    final_usage,
    running_usage,
    stop_reason,
    summed,
)
from gptoss.http.answering import FinishedChoice
from gptoss.http.chunks import DONE, error_frame
from gptoss.http.headers import TEXT_PREFIX
from gptoss.http.sampling_fields import StreamShape
from gptoss.messages.answer import content_of


class TextAnswer:
    """``Answer`` of text completions.

    Args:
        generations: one for each choice.
        shape: what chunks carry beside text.
        echoes: the text that each choice begins with; empty where the prompt is not repeated.
        choices_per_prompt: how many choices each prompt has.
        logprobs: how many alternatives of each token are told; None tells no logprobs at all.
    """

    def __init__(
        self,
        generations: Sequence[Generation],
        shape: StreamShape,
        *,
        echoes: Sequence[str],
        choices_per_prompt: int,
        logprobs: int | None,
    ) -> None:
        self._generations = generations
        self._shape = shape
        self._echoes = echoes
        self._choices_per_prompt = choices_per_prompt
        self._has_logprobs = logprobs is not None
        self._completion_tokens = 0
        self._outcomes = [Outcome() for _ in generations]
        self._offsets = [_Offsets(len(echo)) for echo in echoes]

    def whole(self, choices: Sequence[FinishedChoice]) -> TextCompletion:
        """See ``Answer``."""
        outcomes = [choice.outcome for choice in choices]
        bodies = [
            TextChoice(
                index=index,
                text=self._echoes[index] + content_of(choice.parts),
                logprobs=self._logprobs(index, choice.logprobs),
                finish_reason=FINISH_REASONS[choice.outcome.finish_reason or "stop"],
                stop_reason=stop_reason(choice.outcome),
            )
            for index, choice in enumerate(choices)
        ]
        return self._completion(bodies, final_usage(summed(outcomes, self._choices_per_prompt)))

    def opened(self) -> bytes:
        """See ``Answer``: the prompts, where they are repeated."""
        return b"".join(
            self._chunk(TextChoice(index, echo, None, None)) for index, echo in enumerate(self._echoes) if echo
        )

    def delta(self, index: int, delta: Delta) -> bytes:
        """See ``Answer``."""
        self._completion_tokens += len(delta.token_ids)
        text = content_of(delta.parts)
        logprobs = self._logprobs(index, delta.logprobs) if delta.logprobs else None
        if not text and logprobs is None:
            return b""
        return self._chunk(TextChoice(index, text, logprobs, None))

    def ended(self, index: int, outcome: Outcome) -> bytes:
        """See ``Answer``: the finish reason."""
        self._outcomes[index] = outcome
        reason = FINISH_REASONS[outcome.finish_reason or "stop"]
        return self._chunk(TextChoice(index, "", None, reason, stop_reason(outcome)))

    def closed(self) -> bytes:
        """See ``Answer``: usage where asked for, and ``[DONE]``."""
        if not self._shape.include_usage:
            return DONE
        usage = final_usage(summed(self._outcomes, self._choices_per_prompt))
        return _frame(self._completion([], usage)) + DONE

    def failed(self, error: GptossError) -> bytes:
        """See ``Answer``."""
        return error_frame(error)

    def _chunk(self, choice: TextChoice) -> bytes:
        usage: UsageBody | msgspec.UnsetType | None = None if self._shape.include_usage else msgspec.UNSET
        if self._shape.continuous_usage:
            firsts = self._generations[:: self._choices_per_prompt]
            usage = running_usage(sum(first.prompt_tokens for first in firsts), self._completion_tokens)
        return _frame(self._completion([choice], usage))

    def _completion(self, choices: list[TextChoice], usage: UsageBody | msgspec.UnsetType | None) -> TextCompletion:
        first = self._generations[0]
        return TextCompletion(
            id=f"{TEXT_PREFIX}{first.request_id}",
            object="text_completion",
            created=first.created_s,
            model=first.model,
            choices=choices,
            usage=usage,
        )

    def _logprobs(self, index: int, tokens: Sequence[TokenLogprob]) -> TextLogprobs | None:
        if not self._has_logprobs:
            return None
        offsets = self._offsets[index]
        return TextLogprobs(
            tokens=[_name(token.raw) for token in tokens],
            token_logprobs=[max(token.logprob, MIN_LOGPROB) for token in tokens],
            top_logprobs=[_top(token) for token in tokens],
            text_offset=[offsets.next(token.raw) for token in tokens],
        )


class _Offsets:
    """Where tokens begin in a text, in characters."""

    def __init__(self, start: int) -> None:
        self._chars = start
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def next(self, raw: bytes) -> int:
        offset = self._chars
        self._chars += len(self._decoder.decode(raw))
        return offset


def _top(token: TokenLogprob) -> dict[str, float]:
    """The alternatives by name, and the token that was chosen."""
    named = {_name(raw): max(logprob, MIN_LOGPROB) for _, logprob, _, raw in token.top}
    return named | {_name(token.raw): max(token.logprob, MIN_LOGPROB)}


def _name(raw: bytes) -> str:
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


def _frame(chunk: TextCompletion) -> bytes:
    return b"data: " + msgspec.json.encode(chunk) + b"\n\n"
