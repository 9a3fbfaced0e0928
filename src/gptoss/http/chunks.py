"""Answers as OpenAI writes them: the completion object, and a stream's chunks as ready SSE frames.

Rules:
- ``id`` is ``chatcmpl-`` and the request's id. Counts in ``usage`` are the engine's own.
- A chunk is cut out of constant bytes: only its part, and logprobs where asked for, are encoded for each delta.
- A request that somebody cancelled ends with ``finish_reason`` ``abort``, as in vLLM: ``stop`` would pass a cut answer
  off as a whole one.
"""

from collections.abc import Sequence
from typing import Any

import msgspec

from gptoss.actors.generation import Delta, Generation, Outcome, Usage
from gptoss.engine.port import TokenLogprob
from gptoss.errors import GptossError
from gptoss.http.chat_request import StreamShape
from gptoss.http.errors import error_body
from gptoss.http.headers import COMPLETION_PREFIX
from gptoss.http.parts import delta_body, message_body
from gptoss.messages.answer import Part

DONE = b"data: [DONE]\n\n"
FINISH_REASONS = {"stop": "stop", "length": "length", "tool_calls": "tool_calls", "cancelled": "abort"}
MIN_LOGPROB = -9999.0
"""JSON has no minus infinity; this is what OpenAI writes for it."""

_encode = msgspec.json.encode
_NO_LOGPROBS = b"null"
_NO_TEXT = b'{"content":""}'


def completion(
    generation: Generation, parts: Sequence[Part], logprobs: list[TokenLogprob] | None, outcome: Outcome
) -> dict[str, Any]:
    """The answer to a request without ``stream``.

    Args:
        generation: the request that has ended.
        parts: its whole answer.
        logprobs: of every token, None when not asked for.
        outcome: how it ended.
    """
    choice = {
        "index": 0,
        "message": message_body(parts),
        "logprobs": None if logprobs is None else logprobs_body(logprobs),
        "finish_reason": FINISH_REASONS[outcome.finish_reason or "stop"],
    }
    if outcome.stop_reason is not None:
        choice["stop_reason"] = outcome.stop_reason
    return {
        "id": f"{COMPLETION_PREFIX}{generation.request_id}",
        "object": "chat.completion",
        "created": generation.created_s,
        "model": generation.model,
        "choices": [choice],
        "usage": usage_body(outcome.usage),
    }


def usage_body(usage: Usage) -> dict[str, Any]:
    """Counts of a request that has ended."""
    return {
        **_running_usage(usage.prompt_tokens, usage.completion_tokens),
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
        "completion_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
    }


def logprobs_body(logprobs: tuple[TokenLogprob, ...] | list[TokenLogprob]) -> dict[str, Any]:
    """OpenAI's ``logprobs`` of a choice."""
    return {"content": [_token(token) for token in logprobs], "refusal": None}


def error_frame(error: GptossError) -> bytes:
    """The last frame of a stream that failed. No ``[DONE]`` follows: the answer is not complete."""
    return b"data: " + _encode(error_body(error)) + b"\n\n"


class ChunkFrames:
    """The chunks of one stream.

    Args:
        generation: the request that streams.
        shape: what chunks carry beside text.
        has_logprobs: whether the request asked for them.
    """

    def __init__(self, generation: Generation, shape: StreamShape, *, has_logprobs: bool) -> None:
        self._generation = generation
        self._shape = shape
        self._has_logprobs = has_logprobs
        self._completion_tokens = 0
        head = {
            "id": f"{COMPLETION_PREFIX}{generation.request_id}",
            "object": "chat.completion.chunk",
            "created": generation.created_s,
            "model": generation.model,
        }
        self._head = b"data: " + _encode(head)[:-1] + b',"choices":['
        self._delta_head = self._head + b'{"index":0,"delta":'
        self._delta_mid = b',"logprobs":'
        self._delta_tail = b',"finish_reason":null}]'

    def role(self) -> bytes:
        """The first frame: who speaks."""
        choice = b'{"index":0,"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null}'
        return self._head + choice + b"]" + self._usage_field() + b"}\n\n"

    def delta(self, delta: Delta) -> bytes:
        """The frames of what a step brought, one for each part; empty when it brought nothing to show."""
        self._completion_tokens += len(delta.token_ids)
        bodies = [delta_body(part) for part in delta.read()]
        logprobs = _NO_LOGPROBS
        if self._has_logprobs and delta.logprobs:
            logprobs = _encode(logprobs_body(delta.logprobs))
            bodies = bodies or [_NO_TEXT]
        usage = self._usage_field()
        frames: list[bytes] = []
        for body in bodies:
            frames += (self._delta_head, body, self._delta_mid, logprobs, self._delta_tail, usage, b"}\n\n")
            logprobs = _NO_LOGPROBS  # once, with the first
        return b"".join(frames)

    def last(self, outcome: Outcome) -> bytes:
        """The frames that end a stream: finish reason, usage where asked for, ``[DONE]``."""
        choice: dict[str, Any] = {
            "index": 0,
            "delta": {},
            "logprobs": None,
            "finish_reason": FINISH_REASONS[outcome.finish_reason or "stop"],
        }
        if outcome.stop_reason is not None:
            choice["stop_reason"] = outcome.stop_reason
        self._completion_tokens = outcome.usage.completion_tokens
        finish = self._head + _encode(choice) + b"]" + self._usage_field() + b"}\n\n"
        if not self._shape.include_usage:
            return finish + DONE
        return finish + self._head + b'],"usage":' + _encode(usage_body(outcome.usage)) + b"}\n\n" + DONE

    def _usage_field(self) -> bytes:
        if self._shape.continuous_usage:
            return b',"usage":' + _encode(_running_usage(self._generation.prompt_tokens, self._completion_tokens))
        return b',"usage":null' if self._shape.include_usage else b""


def _running_usage(prompt_tokens: int, completion_tokens: int) -> dict[str, Any]:
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }


def _token(token: TokenLogprob) -> dict[str, Any]:
    alternatives = [_scored(text, logprob, raw) for _, logprob, text, raw in token.top]
    return {**_scored(token.text, token.logprob, token.raw), "top_logprobs": alternatives}


def _scored(text: str, logprob: float, raw: bytes) -> dict[str, Any]:
    return {"token": text, "logprob": max(logprob, MIN_LOGPROB), "bytes": list(raw)}
