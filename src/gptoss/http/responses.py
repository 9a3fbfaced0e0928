"""``/v1/responses``: create, retrieve and delete a response, and list what it was made from.

A response is kept unless the caller says ``store: false``; see ``response_store`` for how long.
"""

from collections.abc import Sequence

import msgspec
from aiohttp import web

from gptoss.actors.generation import Generation
from gptoss.engine.port import ChatMessage
from gptoss.errors import RequestError
from gptoss.http.answering import Answer, Call
from gptoss.http.decode import BodyDecoder
from gptoss.http.endpoint import Endpoint
from gptoss.http.errors import json_response
from gptoss.http.headers import RESPONSE_PREFIX
from gptoss.http.intake import Caller
from gptoss.http.paging import page_of
from gptoss.http.response_answer import ResponseAnswer
from gptoss.http.response_request import (
    ENDPOINT,
    check_outputs,
    conversation,
    generate_request,
    items_of,
    stored_items,
    without_effect,
)
from gptoss.http.response_schema import (
    FunctionCallItem,
    ItemList,
    MessageItem,
    OutputItem,
    ReasoningItem,
    ReasoningOptions,
    ResponseBody,
    ResponseDeleted,
    ResponsesRequest,
    TextFormat,
    TextOptions,
)
from gptoss.http.response_store import ResponseStore, StoredResponse

STORE: web.AppKey[ResponseStore] = web.AppKey("responses", ResponseStore)
ITEMS_DEFAULT = 20
ITEMS_MAX = 100


async def retrieve(request: web.Request) -> web.StreamResponse:
    """``GET /v1/responses/{response_id}``."""
    if request.query.get("stream", "false") != "false":
        raise RequestError("stream: a response that has ended is not streamed again", param="stream")
    return json_response(_stored(request).body)


async def delete(request: web.Request) -> web.StreamResponse:
    """``DELETE /v1/responses/{response_id}``."""
    response_id = request.match_info["response_id"]
    request.app[STORE].delete(response_id)
    return json_response(ResponseDeleted(response_id))


async def input_items(request: web.Request) -> web.StreamResponse:
    """``GET /v1/responses/{response_id}/input_items?limit=N&order=asc|desc&after=ID``."""
    items = _stored(request).items
    page = page_of(request.query, items, lambda item: item.id, limit_max=ITEMS_MAX, limit_default=ITEMS_DEFAULT)
    return json_response(ItemList("list", page.entries, page.first_id, page.last_id, page.has_more))


async def _call_of(wire: ResponsesRequest, caller: Caller) -> Call:
    store = caller.app[STORE]
    earlier: tuple[ChatMessage, ...] = ()
    if wire.previous_response_id:
        earlier = store.get(wire.previous_response_id, param="previous_response_id").messages
    items = items_of(wire)
    messages = (*earlier, *conversation(items))
    check_outputs(messages)
    context = caller.context
    generate = caller.sign(generate_request(wire, messages, default_temperature=context.default_temperature))
    if RESPONSE_PREFIX + generate.request_id in store:
        # The caller uses a request id again; the response that bears it stays what it is.
        generate = msgspec.structs.replace(generate, request_id="")
    takes_effort = context.gateway.rendering.takes_reasoning_effort
    caller.name_once(without_effect(wire, takes_reasoning_effort=takes_effort))
    is_stored = wire.store is not False

    def answer(generations: Sequence[Generation]) -> Answer:
        (generation,) = generations

        def keep(body: ResponseBody) -> None:
            if is_stored:
                said = (_as_message(body.output),) if body.output else ()
                store.keep(StoredResponse(body, stored_items(items, body.id), (*messages, *said)))

        body = ResponseBody(
            id=RESPONSE_PREFIX + generation.request_id,
            created_at=generation.created_s,
            status="in_progress",
            instructions=wire.instructions,
            max_output_tokens=wire.max_output_tokens,
            model=generation.model,
            parallel_tool_calls=wire.parallel_tool_calls is not False,
            text=TextOptions(format=(wire.text and wire.text.format) or TextFormat(type="text")),
            tool_choice=wire.tool_choice or "auto",
            tools=wire.tools or [],
            previous_response_id=wire.previous_response_id,
            reasoning=wire.reasoning or ReasoningOptions(),
            store=is_stored,
            temperature=generate.sampling.temperature,
            top_logprobs=wire.top_logprobs or 0,
            top_p=generate.sampling.top_p,
            user=wire.user,
            metadata=wire.metadata or {},
        )
        return ResponseAnswer(generation, body, keep)

    return Call(requests=(generate,), stream=generate.stream, answer=answer)


def _stored(request: web.Request) -> StoredResponse:
    return request.app[STORE].get(request.match_info["response_id"], param="response_id")


def _as_message(output: list[OutputItem]) -> ChatMessage:
    """The output as the assistant's turn that a later response goes on from."""
    thoughts = [part.text for item in output if isinstance(item, ReasoningItem) for part in item.content]
    return ChatMessage(
        role="assistant",
        content="".join(part.text for item in output if isinstance(item, MessageItem) for part in item.content),
        reasoning="".join(thoughts) or None,
        tool_calls=tuple(
            {"id": item.call_id, "type": "function", "function": {"name": item.name, "arguments": item.arguments}}
            for item in output
            if isinstance(item, FunctionCallItem)
        ),
    )


RESPONSES = Endpoint(ENDPOINT, BodyDecoder(ResponsesRequest), _call_of)
