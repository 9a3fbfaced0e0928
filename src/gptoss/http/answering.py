"""Runs a call's choices and brings what they say to its client; every endpoint that generates answers through here.

Answers: a refusal has its own HTTP status, streamed or not, because a stream opens only once the call may run. After
the first byte an error is the last frame. A client that goes, or stalls, cancels every choice.
"""

import asyncio
from collections.abc import Sequence
from typing import Any, Protocol

import msgspec
from aiohttp import web

from gptoss.actors.generation import Delta, GenerateRequest, Generation, Outcome
from gptoss.engine.port import TokenLogprob
from gptoss.errors import GptossError
from gptoss.http.choices import Choices, Look, start_choices
from gptoss.http.context import ADMISSION, CLOSING, CONTEXT, REQUEST_ID, TRACE
from gptoss.http.errors import json_response
from gptoss.http.sse import ClientConnection, SseStream
from gptoss.messages.answer import Part


class FinishedChoice(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that one choice said, and how it ended."""

    parts: tuple[Part, ...]
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...]
    outcome: Outcome


class Answer(Protocol):
    """How an endpoint writes what its choices say: at once, or as the frames of a stream."""

    def whole(self, choices: Sequence[FinishedChoice]) -> Any:
        """The body of an answer without ``stream``."""
        ...

    def opened(self) -> bytes:
        """The first frames of a stream."""
        ...

    def delta(self, index: int, delta: Delta) -> bytes:
        """The frames of what a choice has said; empty when there is nothing to show."""
        ...

    def ended(self, index: int, outcome: Outcome) -> bytes:
        """The frames of a choice's end."""
        ...

    def closed(self) -> bytes:
        """The last frames of a stream, after every choice has ended."""
        ...

    def failed(self, error: GptossError) -> bytes:
        """The last frames of a stream that broke off."""
        ...


class AnswerMaker(Protocol):
    """Makes an answer to choices that have begun; they bear ids by then."""

    def __call__(self, generations: Sequence[Generation]) -> Answer:
        """The answer to ``generations``."""
        ...


class Call(msgspec.Struct, frozen=True, kw_only=True):
    """A call that was understood.

    Attributes:
        requests: one for each choice, in the order of their index.
        stream: whether the answer is sent as it comes.
        answer: how it is written.
    """

    requests: tuple[GenerateRequest, ...]
    stream: bool
    answer: AnswerMaker


async def answer_call(request: web.Request, call: Call) -> web.StreamResponse:
    """Run a call and answer it.

    Raises:
        GptossError: it was refused or failed while the status was still open.
        ConnectionError: the client has gone, or stalled and was dropped.
    """
    context = request.app[CONTEXT]
    generations = start_choices(context.gateway, call.requests)
    request[REQUEST_ID] = generations[0].request_id
    request[TRACE] = generations[0].trace
    client = ClientConnection(request, context.clock, context.settings.client_stall_s)
    choices = Choices(generations, min(context.timing.poll_s, context.timing.keepalive_s))
    answer = call.answer(generations)
    try:
        if call.stream:
            stream = SseStream(request, client, context.clock, context.timing.keepalive_s)
            return await _answer_as_it_comes(request, choices, answer, client, stream)
        return await _answer_whole(request, choices, answer, client)
    except asyncio.CancelledError:
        if request.app[CLOSING].is_set():
            choices.cancel("shutdown")
        else:
            _tell_disconnected(choices)
        raise
    except TimeoutError:
        for generation in choices.generations:
            generation.client_slow(client.stalled_ms)
        client.abort()
        raise ConnectionResetError("the client took nothing for too long") from None
    except ConnectionError:
        _tell_disconnected(choices)
        raise
    except Exception:
        choices.cancel("sibling_failed")  # without effect on the one whose failure this is
        raise
    finally:
        choices.close()


async def _answer_whole(
    request: web.Request, choices: Choices, answer: Answer, client: ClientConnection
) -> web.StreamResponse:
    async def look() -> None:
        client.check()

    await choices.admitted(look)
    _note_admission(request, choices)
    return json_response(await whole_answer(choices, answer, look))


async def whole_answer(choices: Choices, answer: Answer, look: Look) -> Any:
    """The body of a call that is answered at once.

    Args:
        choices: of the call.
        answer: how it is written.
        look: looks at the caller now and then.

    Raises:
        GptossError: a choice was refused or failed.
    """
    said: list[list[Delta]] = [[] for _ in choices.generations]
    outcomes = [Outcome()] * len(said)
    while (news := await choices.next(look)) is not None:
        index, found = news
        if isinstance(found, Outcome):
            outcomes[index] = found
        else:
            said[index].append(found)
    finished = [_finished(deltas, outcome) for deltas, outcome in zip(said, outcomes, strict=True)]
    return answer.whole(finished)


async def _answer_as_it_comes(
    request: web.Request, choices: Choices, answer: Answer, client: ClientConnection, stream: SseStream
) -> web.StreamResponse:
    async def look() -> None:
        client.check()

    await choices.admitted(look)
    _note_admission(request, choices)
    await stream.open()
    await stream.send(answer.opened())
    for generation in choices.generations:
        generation.first_byte_sent()
    frames: list[bytes] = []  # what is there at once leaves in one piece
    try:
        while (news := await choices.next(stream.idle)) is not None:
            index, found = news
            is_end = isinstance(found, Outcome)
            frames.append(answer.ended(index, found) if is_end else answer.delta(index, found))
            if not choices.has_news:
                await stream.send(b"".join(frames))
                frames.clear()
        frames.append(answer.closed())
    except GptossError as error:
        choices.cancel("sibling_failed")
        frames.append(answer.failed(error))
    await stream.close(b"".join(frames))
    return stream.response


def _finished(deltas: list[Delta], outcome: Outcome) -> FinishedChoice:
    return FinishedChoice(
        parts=tuple(part for delta in deltas for part in delta.parts),
        token_ids=tuple(token_id for delta in deltas for token_id in delta.token_ids),
        logprobs=tuple(logprob for delta in deltas for logprob in delta.logprobs),
        outcome=outcome,
    )


def _note_admission(request: web.Request, choices: Choices) -> None:
    """Let the answer's headers tell how the first choice was let in."""
    note = choices.generations[0].admission
    if note is not None:
        request[ADMISSION] = note


def _tell_disconnected(choices: Choices) -> None:
    for generation in choices.generations:
        generation.client_disconnected()
