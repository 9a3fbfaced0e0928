"""``POST /v1/chat/completions``."""

from collections.abc import Sequence

from gptoss.actors.generation import Generation
from gptoss.http.answering import Answer, Call
from gptoss.http.chat_request import ENDPOINT, generate_request, without_effect
from gptoss.http.chunks import ChatAnswer
from gptoss.http.decode import BodyDecoder
from gptoss.http.endpoint import Endpoint
from gptoss.http.intake import Caller
from gptoss.http.sampling_fields import as_choices, num_choices, stream_shape
from gptoss.http.schema import ChatCompletionRequest


async def _call_of(wire: ChatCompletionRequest, caller: Caller) -> Call:
    context = caller.context
    generate = generate_request(wire, default_temperature=context.default_temperature)
    shape = stream_shape(wire.stream, wire.stream_options)
    count = num_choices(wire)
    takes_effort = context.gateway.rendering.takes_reasoning_effort
    caller.name_once(without_effect(wire, takes_reasoning_effort=takes_effort))

    def answer(generations: Sequence[Generation]) -> Answer:
        return ChatAnswer(generations, shape, has_logprobs=generate.sampling.logprobs is not None)

    return Call(requests=as_choices(caller.sign(generate), count), stream=generate.stream, answer=answer)


CHAT = Endpoint(ENDPOINT, BodyDecoder(ChatCompletionRequest), _call_of)
