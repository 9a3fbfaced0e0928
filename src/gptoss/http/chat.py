"""``POST /v1/chat/completions``: decode, submit, and frame what comes back.

Answers: a refusal has its own HTTP status, streamed or not, because a stream opens only once the request may run.
After the first byte an error is the last frame. A client that goes, or stalls, cancels its request.
"""

import logging

import msgspec
from aiohttp import web

from gptoss.actors.generation import GenerateRequest, Generation
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
        request[REQUEST_ID] = context.gateway.reject(
            error, endpoint=ENDPOINT, request_id=wanted_request_id(request)
        )
        raise
    generation = context.gateway.submit(generate)
    request[REQUEST_ID] = generation.request_id
    client = ClientConnection(request, context.clock, context.settings.client_stall_s)
    delivery = _Delivery(request, context, generation, client)
    try:
        has_logprobs = generate.sampling.logprobs is not None
        if generate.stream:
            return await delivery.stream(shape, has_logprobs=has_logprobs)
        return await delivery.whole(has_logprobs=has_logprobs)
    finally:
        generation.cancel()  # without effect on a request that has ended


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
    """Brings one generation to its client."""

    def __init__(
        self, request: web.Request, context: HttpContext, generation: Generation, client: ClientConnection
    ) -> None:
        self._request = request
        self._clock = context.clock
        self._timing = context.timing
        self._generation = generation
        self._client = client
        self._tick_s = min(self._timing.poll_s, self._timing.keepalive_s)

    async def whole(self, *, has_logprobs: bool) -> web.StreamResponse:
        """Answer once the request has ended."""
        generation = self._generation
        texts: list[str] = []
        logprobs: list[TokenLogprob] = []
        try:
            await wait_admitted(generation, self._tick_s, self._look)
            deltas = Deltas(generation, self._tick_s, self._look)
            while (delta := await deltas.next()) is not None:
                texts.append(delta.text)
                logprobs.extend(delta.logprobs)
        except BaseException as error:
            self._tell(error)
            raise
        assert generation.outcome is not None
        body = completion(generation, "".join(texts), logprobs if has_logprobs else None, generation.outcome)
        return json_response(body)

    async def stream(self, shape: StreamShape, *, has_logprobs: bool) -> web.StreamResponse:
        """Answer with the text as it comes."""
        stream = SseStream(self._request, self._client, self._clock, self._timing.keepalive_s)
        try:
            await wait_admitted(self._generation, self._tick_s, self._look)
            frames = ChunkFrames(self._generation, shape, has_logprobs=has_logprobs)
            await stream.open()
            await self._send_all(stream, frames)
            await stream.close()
        except BaseException as error:
            self._tell(error)
            if not stream.response.prepared or not isinstance(error, (ConnectionError, TimeoutError)):
                raise
        return stream.response

    async def _send_all(self, stream: SseStream, frames: ChunkFrames) -> None:
        await stream.send(frames.role())
        self._generation.first_byte_sent()
        deltas = Deltas(self._generation, self._tick_s, stream.idle)
        try:
            while (delta := await deltas.next()) is not None:
                if frame := frames.delta(delta):
                    await stream.send(frame)
        except GptossError as error:
            await stream.send(error_frame(error))
            return
        assert self._generation.outcome is not None
        await stream.send(frames.last(self._generation.outcome))

    async def _look(self) -> None:
        self._client.check()
