"""``POST /v1/chat/completions``."""

from collections.abc import Sequence

from aiohttp import web

from gptoss.actors.generation import Generation
from gptoss.http.answering import Answer, Call, answer_call
from gptoss.http.chat_request import ENDPOINT, generate_request, without_effect
from gptoss.http.chunks import ChatAnswer
from gptoss.http.context import CONTEXT
from gptoss.http.decode import BodyDecoder
from gptoss.http.intake import name_once, read_wire, take, with_headers
from gptoss.http.sampling_fields import as_choices, num_choices, stream_shape
from gptoss.http.schema import ChatCompletionRequest

DECODER = BodyDecoder(ChatCompletionRequest)


async def chat_completions(request: web.Request) -> web.StreamResponse:
    """The handler."""
    return await answer_call(request, await take(request, ENDPOINT, _read))


async def _read(request: web.Request) -> Call:
    wire = await read_wire(request, DECODER)
    context = request.app[CONTEXT]
    generate = generate_request(wire, default_temperature=context.default_temperature)
    shape = stream_shape(wire.stream, wire.stream_options)
    count = num_choices(wire)
    takes_effort = context.gateway.rendering.takes_reasoning_effort
    name_once(request, without_effect(wire, takes_reasoning_effort=takes_effort))

    def answer(generations: Sequence[Generation]) -> Answer:
        return ChatAnswer(generations, shape, has_logprobs=generate.sampling.logprobs is not None)

    return Call(requests=as_choices(with_headers(generate, request), count), stream=generate.stream, answer=answer)
