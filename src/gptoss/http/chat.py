"""``POST /v1/chat/completions``: decode, submit, and frame what comes back.

Answers: a refusal has its own HTTP status, streamed or not, because a stream opens only once the request may run.
After the first byte an error is the last frame. A client that goes, or stalls, cancels its request.
"""

import asyncio
import logging

import msgspec
from aiohttp import web

from gptoss.actors.generation import GenerateRequest, Generation, Outcome
from gptoss.engine.port import TokenLogprob
from gptoss.errors import GptossError, NotReady
from gptoss.http.body import MIB, read_json_body
from gptoss.http.chat_request import ENDPOINT, StreamShape, generate_request, stream_shape, without_effect
from gptoss.http.chunks import ChunkFrames, completion, error_frame
from gptoss.http.context import CONTEXT, REQUEST_ID, HttpContext
from gptoss.http.delivery import Deltas, tell_cancelled, wait_admitted
from gptoss.http.errors import json_response
from gptoss.http.headers import session_id, traceparent, wanted_request_id
from gptoss.http.schema import decode_chat
from gptoss.http.sse import ClientConnection, SseStream
from gptoss.messages.answer import Part

NAMED_FIELDS_MAX = 256
NAMED_FIELDS: web.AppKey[set[str]] = web.AppKey("named_fields", set)
"""Field names that the log has mentioned already."""

_log = logging.getLogger("gptoss.http")


async def chat_completions(request: web.Request) -> web.StreamResponse:
    """The handler."""
    context = request.app[CONTEXT]
    try:
        generate, shape = await _decode(request, context)
    except GptossError as error:
        request[REQUEST_ID] = context.gateway.reject(error, endpoint=ENDPOINT, request_id=wanted_request_id(request))
        raise
    generation = context.gateway.submit(generate)
    request[REQUEST_ID] = generation.request_id
    delivery = _Delivery(request, context, generation)
    has_logprobs = generate.sampling.logprobs is not None
    try:
        if generate.stream:
            return await delivery.stream(shape, has_logprobs=has_logprobs)
        return await delivery.whole(has_logprobs=has_logprobs)
    except asyncio.CancelledError:
        tell_cancelled(generation, request)
        raise
    except TimeoutError:
        generation.client_slow(delivery.client.stalled_ms)
        delivery.client.abort()
        raise ConnectionResetError("the client took nothing for too long") from None
    except ConnectionError:
        generation.client_disconnected()
        raise
    except Exception:
        generation.cancel()  # without effect where the error is how the request ended
        raise


async def _decode(request: web.Request, context: HttpContext) -> tuple[GenerateRequest, StreamShape]:
    if context.draining():
        raise NotReady("the server is shutting down and takes no new requests", retry_after_s=5.0)
    body = await read_json_body(
        request, limit_bytes=context.settings.body_limit_mb * MIB, timeout_s=context.timing.body_s
    )
    wire, unknown = decode_chat(body)
    generate = generate_request(wire, default_temperature=context.default_temperature)
    _name_once(request.app[NAMED_FIELDS], (*unknown, *without_effect(wire)))
    named = msgspec.structs.replace(
        generate,
        request_id=wanted_request_id(request),
        session_id=session_id(request),
        traceparent=traceparent(request),
    )
    return named, stream_shape(wire)


def _name_once(named: set[str], fields: tuple[str, ...]) -> None:
    """Tell the log of accepted fields without effect, each once; bounded, since clients choose the names."""
    for field in fields:
        short = field[:64]
        if short not in named and len(named) < NAMED_FIELDS_MAX:
            named.add(short)
            _log.info("request field %a is accepted and has no effect here", short)


class _Delivery:
    """Brings one generation to its client.

    Both ways raise ``GptossError`` while the status is still open, ``ConnectionError`` when the client has gone and
    ``TimeoutError`` when it stalls.
    """

    def __init__(self, request: web.Request, context: HttpContext, generation: Generation) -> None:
        self.client = ClientConnection(request, context.clock, context.settings.client_stall_s)
        self._request = request
        self._clock = context.clock
        self._keepalive_s = context.timing.keepalive_s
        self._tick_s = min(context.timing.poll_s, context.timing.keepalive_s)
        self._generation = generation

    async def whole(self, *, has_logprobs: bool) -> web.StreamResponse:
        """Answer once the request has ended."""
        generation = self._generation
        parts: list[Part] = []
        logprobs: list[TokenLogprob] = []
        await wait_admitted(generation, self._tick_s, self._look)
        deltas = Deltas(generation, self._tick_s, self._look)
        while (delta := await deltas.next()) is not None:
            parts.extend(delta.read())
            logprobs.extend(delta.logprobs)
        outcome = generation.outcome or Outcome()
        return json_response(completion(generation, parts, logprobs if has_logprobs else None, outcome))

    async def stream(self, shape: StreamShape, *, has_logprobs: bool) -> web.StreamResponse:
        """Answer with the text as it comes."""
        await wait_admitted(self._generation, self._tick_s, self._look)
        stream = SseStream(self._request, self.client, self._clock, self._keepalive_s)
        frames = ChunkFrames(self._generation, shape, has_logprobs=has_logprobs)
        await stream.open()
        await stream.send(frames.role())
        self._generation.first_byte_sent()
        try:
            deltas = Deltas(self._generation, self._tick_s, stream.idle)
            while (delta := await deltas.next()) is not None:
                if frame := frames.delta(delta):
                    await stream.send(frame)
        except GptossError as error:
            await stream.send(error_frame(error))
        else:
            await stream.send(frames.last(self._generation.outcome or Outcome()))
        await stream.close()
        return stream.response

    async def _look(self) -> None:
        self.client.check()
