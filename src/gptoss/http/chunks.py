"""Chat answers as OpenAI writes them: the completion object, and a stream's chunks as ready SSE frames.

Rules:
- ``id`` is ``chatcmpl-`` and the id of the first choice's request. Counts in ``usage`` are the engine's own.
- A chunk is cut out of constant bytes: only its part, and logprobs where asked for, are encoded for each delta.
"""

from collections.abc import Sequence
from typing import Any

import msgspec

from gptoss.actors.generation import Delta, Generation, Outcome
from gptoss.errors import GptossError
from gptoss.http.answer_schema import (
    FINISH_REASONS,
    ChatChoice,
    ChatCompletion,
    chat_logprobs,
    final_usage,
    running_usage,
    stop_reason,
    summed,
)
from gptoss.http.answering import FinishedChoice
from gptoss.http.errors import error_body
from gptoss.http.headers import CHAT_PREFIX
from gptoss.http.parts import answer_message, delta_body
from gptoss.http.sampling_fields import StreamShape

DONE = b"data: [DONE]\n\n"

_encode = msgspec.json.encode
_NO_LOGPROBS = b"null"
_NO_TEXT = b'{"content":""}'


def error_frame(error: GptossError) -> bytes:
    """The last frame of a stream that failed. No ``[DONE]`` follows: the answer is not complete."""
    return b"data: " + _encode(error_body(error)) + b"\n\n"


class ChatAnswer:
    """``Answer`` of chat completions.

    Args:
        generations: one for each choice.
        shape: what chunks carry beside text.
        has_logprobs: whether the request asked for them.
    """

    def __init__(self, generations: Sequence[Generation], shape: StreamShape, *, has_logprobs: bool) -> None:
        first = generations[0]
        self._first = first
        self._shape = shape
        self._has_logprobs = has_logprobs
        self._completion_tokens = 0
        self._outcomes = [Outcome() for _ in generations]
        head = {
            "id": f"{CHAT_PREFIX}{first.request_id}",
            "object": "chat.completion.chunk",
            "created": first.created_s,
            "model": first.model,
        }
        self._head = b"data: " + _encode(head)[:-1] + b',"choices":['
        self._delta_heads = [self._head + b'{"index":%d,"delta":' % index for index in range(len(generations))]
        self._delta_mid = b',"logprobs":'
        self._delta_tail = b',"finish_reason":null}]'

    def whole(self, choices: Sequence[FinishedChoice]) -> ChatCompletion:
        """See ``Answer``."""
        outcomes = [choice.outcome for choice in choices]
        return ChatCompletion(
            id=f"{CHAT_PREFIX}{self._first.request_id}",
            object="chat.completion",
            created=self._first.created_s,
            model=self._first.model,
            choices=[self._choice(index, choice) for index, choice in enumerate(choices)],
            usage=final_usage(summed(outcomes, len(outcomes))),
        )

    def opened(self) -> bytes:
        """See ``Answer``: who speaks, for each choice."""
        roles = (
            b'{"index":%d,"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null}' % index
            for index in range(len(self._outcomes))
        )
        return b"".join(self._head + role + b"]" + self._usage_field() + b"}\n\n" for role in roles)

    def delta(self, index: int, delta: Delta) -> bytes:
        """See ``Answer``: a frame for each part."""
        self._completion_tokens += len(delta.token_ids)
        bodies = [delta_body(part) for part in delta.parts]
        logprobs = _NO_LOGPROBS
        if self._has_logprobs and delta.logprobs:
            logprobs = _encode(chat_logprobs(delta.logprobs))
            bodies = bodies or [_NO_TEXT]
        usage = self._usage_field()
        frames: list[bytes] = []
        for body in bodies:
            frames += (self._delta_heads[index], body, self._delta_mid, logprobs, self._delta_tail, usage, b"}\n\n")
            logprobs = _NO_LOGPROBS  # once, with the first
        return b"".join(frames)

    def ended(self, index: int, outcome: Outcome) -> bytes:
        """See ``Answer``: the finish reason."""
        self._outcomes[index] = outcome
        choice: dict[str, Any] = {
            "index": index,
            "delta": {},
            "logprobs": None,
            "finish_reason": FINISH_REASONS[outcome.finish_reason or "stop"],
        }
        if outcome.stop_reason is not None:
            choice["stop_reason"] = outcome.stop_reason
        return self._head + _encode(choice) + b"]" + self._usage_field() + b"}\n\n"

    def closed(self) -> bytes:
        """See ``Answer``: usage where asked for, and ``[DONE]``."""
        if not self._shape.include_usage:
            return DONE
        usage = final_usage(summed(self._outcomes, len(self._outcomes)))
        return self._head + b'],"usage":' + _encode(usage) + b"}\n\n" + DONE

    def failed(self, error: GptossError) -> bytes:
        """See ``Answer``."""
        return error_frame(error)

    def _choice(self, index: int, choice: FinishedChoice) -> ChatChoice:
        return ChatChoice(
            index=index,
            message=answer_message(choice.parts),
            logprobs=chat_logprobs(choice.logprobs) if self._has_logprobs else None,
            finish_reason=FINISH_REASONS[choice.outcome.finish_reason or "stop"],
            stop_reason=stop_reason(choice.outcome),
        )

    def _usage_field(self) -> bytes:
        if self._shape.continuous_usage:
            return b',"usage":' + _encode(running_usage(self._first.prompt_tokens, self._completion_tokens))
        return b',"usage":null' if self._shape.include_usage else b""
