"""``/v1/responses`` as OpenAI's client sees it, and its events one by one."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, Literal

import msgspec
import openai
import pytest

from gptoss.actors.generation import Delta, Generation, Outcome
from gptoss.config import Settings
from gptoss.engine.port import ChatMessage, TokenLogprob
from gptoss.errors import EngineLost, RequestError
from gptoss.http.response_answer import ResponseAnswer
from gptoss.http.response_schema import ReasoningOptions, ResponseBody
from gptoss.http.response_store import ResponseStore, StoredResponse
from gptoss.messages.answer import CallPart, Part, TextPart

PATH = "/v1/responses"
LOOK: dict[str, Any] = {"type": "function", "name": "look", "parameters": {"type": "object"}, "strict": True}


async def hello(generation: Generation) -> None:
    generation.put_admitted(16)
    generation.put(Delta(text="Hello world", token_ids=(1, 2)))
    generation.end(Outcome(finish_reason="stop"))


@pytest.fixture
async def client(house: Any) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=f"{house.url}/v1", api_key="unused", max_retries=0) as made:
        yield made


def events_of(stream: bytes) -> list[Any]:
    events: list[Any] = []
    for frame in stream.removesuffix(b"\n\n").split(b"\n\n"):
        kind, _, data = frame.partition(b"\n")
        event = msgspec.json.decode(data.removeprefix(b"data: "))
        assert kind == b"event: " + event["type"].encode()
        events.append(event)
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    return events


async def test_a_whole_response(house: Any, client: openai.AsyncOpenAI) -> None:
    response = await client.responses.create(model="demo", input="Hi", instructions="Be kind.", metadata={"a": "b"})
    assert response.output_text == "Hello world"
    assert (response.id, response.status, response.instructions) == ("resp_req_1", "completed", "Be kind.")
    assert response.usage is not None
    assert (response.usage.input_tokens, response.usage.output_tokens) == (7, 2)
    assert response.usage.input_tokens_details.cached_tokens == 3
    assert response.metadata == {"a": "b"}
    submitted = house.gateway.submitted[0]
    assert [(m.role, m.content) for m in submitted.messages] == [("system", "Be kind."), ("user", "Hi")]
    assert (submitted.endpoint, submitted.metadata) == (PATH, {"a": "b"})


async def test_the_events_of_a_stream_in_their_order(house: Any) -> None:
    events = events_of(await house.stream_of(PATH, input="Hi"))
    assert [event["type"] for event in events] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        "response.output_text.delta",
        "response.output_text.delta",
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.completed",
    ]
    assert events[0]["response"]["status"] == "in_progress"
    assert [event["delta"] for event in events[4:6]] == ["Hello", " world"]
    assert events[6]["text"] == "Hello world"
    assert events[8]["item"] == events[9]["response"]["output"][0]


async def test_the_clients_streaming_helper_accumulates_the_same_response(client: openai.AsyncOpenAI) -> None:
    async with client.responses.stream(model="demo", input="Hi") as stream:
        texts = [event.delta async for event in stream if event.type == "response.output_text.delta"]
        final = await stream.get_final_response()
    assert "".join(texts) == final.output_text == "Hello world"
    kept = await client.responses.retrieve(final.id)
    assert kept.output_text == "Hello world"
    assert kept.usage == final.usage


async def test_a_conversation_goes_on_from_a_stored_response(house: Any, client: openai.AsyncOpenAI) -> None:
    first = await client.responses.create(model="demo", input="One", instructions="Only now.")
    second = await client.responses.create(model="demo", input="Two", previous_response_id=first.id)
    await client.responses.create(model="demo", input="Three", previous_response_id=second.id)
    said = [(message.role, message.content) for message in house.gateway.submitted[-1].messages]
    answer = ("assistant", "Hello world")
    assert said == [("user", "One"), answer, ("user", "Two"), answer, ("user", "Three")]


async def test_what_is_stored_can_be_listed_and_deleted(client: openai.AsyncOpenAI) -> None:
    created = await client.responses.create(
        model="demo",
        input=[
            {"role": "user", "content": "One"},
            {"role": "assistant", "content": "Two"},
            {"role": "user", "content": [{"type": "input_text", "text": "Three"}]},
        ],
    )
    listed = await client.responses.input_items.list(created.id, order="asc", limit=2)
    assert [item.id for item in listed.data] == [f"in_0_{created.id}", f"in_1_{created.id}"]
    assert listed.has_more
    rest = await client.responses.input_items.list(created.id, order="asc", after=listed.data[-1].id)
    assert [item.to_dict()["content"] for item in rest.data] == [[{"type": "input_text", "text": "Three"}]]
    newest = await client.responses.input_items.list(created.id)
    assert newest.data[0].id == f"in_2_{created.id}"
    await client.responses.delete(created.id)
    for call in (client.responses.retrieve(created.id), client.responses.delete(created.id)):
        with pytest.raises(openai.NotFoundError) as missing:
            await call
        assert missing.value.code == "response_not_found"


async def test_what_is_not_to_be_stored_is_not(client: openai.AsyncOpenAI) -> None:
    created = await client.responses.create(model="demo", input="One", store=False)
    with pytest.raises(openai.NotFoundError) as missing:
        await client.responses.create(model="demo", input="Two", previous_response_id=created.id)
    assert missing.value.param == "previous_response_id"


async def test_a_request_id_that_is_used_again_does_not_replace_a_stored_response(house: Any) -> None:
    for expected in ("resp_mine", "resp_req_1"):
        body = msgspec.json.encode({"input": "x"})
        status, answer = await house.post(body, path=PATH, headers={"X-Request-ID": "mine"})
        assert (status, answer["id"]) == (200, expected)


async def test_items_become_the_conversation_that_they_stand_for(house: Any) -> None:
    items = [
        {"role": "developer", "content": "Rules"},
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"type": "reasoning", "id": "rs_1", "summary": [], "content": [{"type": "reasoning_text", "text": "Hm"}]},
        {"type": "function_call", "call_id": "c1", "name": "look", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c1", "output": "seen"},
        {"role": "assistant", "content": [{"type": "output_text", "text": "Done"}], "id": "msg_1", "status": "completed"},
    ]  # fmt: skip
    assert (await house.ask(PATH, input=items))[0] == 200
    call = {"id": "c1", "type": "function", "function": {"name": "look", "arguments": "{}"}}
    assert house.gateway.submitted[0].messages == (
        ChatMessage(role="system", content="Rules"),
        ChatMessage(role="user", content="a\nb"),
        ChatMessage(role="assistant", reasoning="Hm", tool_calls=(call,)),
        ChatMessage(role="tool", content="seen", tool_call_id="c1"),
        ChatMessage(role="assistant", content="Done"),
    )


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({}, "input"),
        ({"input": []}, "input"),
        ({"input": [{"role": "robot", "content": "x"}]}, "input[0].role"),
        ({"input": [{"content": "x"}]}, "input[0].role"),
        ({"input": [{"role": "user"}]}, "input[0].content"),
        ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "http://x/"}]}]}, "input[0].content"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0].type"),
        ({"input": [{"type": "function_call", "call_id": "c", "name": "a b"}]}, "input[0].name"),
        ({"input": "x", "max_output_tokens": 0}, "max_output_tokens"),
        ({"input": "x", "temperature": 3}, "temperature"),
        ({"input": "x", "background": True}, "background"),
        ({"input": "x", "truncation": "auto"}, "truncation"),
        ({"input": "x", "tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"input": "x", "tools": [{"type": "function"}]}, "tools[0].name"),
        ({"input": "x", "tools": [{"type": "function", "name": "a b"}]}, "tools[0].name"),
        ({"input": "x", "tools": [{"type": "function", "name": "a"}] * 2}, "tools"),
        ({"input": "x", "tool_choice": "required"}, "tool_choice"),
        ({"input": "x", "tools": [LOOK], "tool_choice": {"type": "function", "name": "b"}}, "tool_choice"),
        ({"input": "x", "tools": [LOOK], "tool_choice": {"type": "allowed_tools"}}, "tool_choice"),
        ({"input": "x", "text": {"format": {"type": "grammar"}}}, "text.format.type"),
        ({"input": "x", "text": {"format": {"type": "json_schema", "name": "n"}}}, "text.format.schema"),
        ({"input": [{"type": "function_call_output", "call_id": "c", "output": "x"}]}, "input"),
        ({"input": "x", "conversation": "c"}, "conversation"),
        ({"input": "x", "prompt": {"id": "p"}}, "prompt"),
        ({"input": "x", "include": ["file_search_call.results"]}, "include"),
        ({"input": "x", "top_logprobs": 3}, "top_logprobs"),
        ({"input": "x", "include": ["message.output_text.logprobs"], "top_logprobs": 21}, "top_logprobs"),
        ({"input": "x", "metadata": {"k": "v" * 513}}, "metadata"),
        ({"input": "x", "metadata": {str(i): "v" for i in range(17)}}, "metadata"),
    ],
)  # fmt: skip
async def test_what_cannot_be_served_is_refused_by_name(house: Any, fields: dict[str, Any], param: str) -> None:
    status, answer = await house.ask(PATH, **fields)
    assert (status, answer["error"]["param"]) == (400, param)
    assert house.gateway.rejected[0][:2] == ("invalid_request", PATH)
    await house.canary()


@pytest.mark.parametrize("query", ["limit=0", "limit=101", "limit=x", "order=up", "after=nothing"])
async def test_a_bad_page_is_refused_by_name(house: Any, query: str) -> None:
    _, created = await house.ask(PATH, input="x")
    async with house.session.get(f"{PATH}/{created['id']}/input_items?{query}") as response:
        assert response.status == 400
        assert (await response.json())["error"]["param"] == query.partition("=")[0]


@pytest.mark.parametrize(
    ("reason", "status", "details", "last"),
    [
        ("length", "incomplete", {"reason": "max_output_tokens"}, "response.incomplete"),
        ("cancelled", "cancelled", None, "response.incomplete"),
    ],
)
async def test_a_cut_response_says_so(house: Any, reason: Any, status: str, details: Any, last: str) -> None:
    async def cut(generation: Generation) -> None:
        generation.put_admitted(4)
        generation.put(Delta(text="Half", token_ids=(1,)))
        generation.end(Outcome(finish_reason=reason))

    house.gateway.script = cut
    _, answer = await house.ask(PATH, input="x")
    assert (answer["status"], answer["incomplete_details"]) == (status, details)
    assert answer["output"][0]["status"] == "incomplete"
    event = events_of(await house.stream_of(PATH, input="x"))[-1]
    assert (event["type"], event["response"]["status"]) == (last, status)


async def test_a_response_that_fails_says_so_and_keeps_what_it_had(house: Any, client: openai.AsyncOpenAI) -> None:
    async def dies(generation: Generation) -> None:
        generation.put_admitted(4)
        generation.put(Delta(text="Half", token_ids=(1,)))
        await asyncio.sleep(0.01)
        generation.end(Outcome(error=EngineLost("the engine process died")))

    house.gateway.script = dies
    last = events_of(await house.stream_of(PATH, input="x"))[-1]
    assert last["type"] == "response.failed"
    assert last["response"]["error"] == {"code": "engine_lost", "message": "the engine process died"}
    assert (await client.responses.retrieve(last["response"]["id"])).output_text == "Half"
    status, answer = await house.ask(PATH, input="x")
    assert (status, answer["error"]["code"]) == (500, "engine_lost")


async def test_logprobs_come_with_the_text_they_are_of(house: Any) -> None:
    async def scored(generation: Generation) -> None:
        generation.put_admitted(4)
        logprob = TokenLogprob(token_id=1, logprob=-0.5, text="x", raw=b"x")
        generation.put(Delta(text="x", token_ids=(1,), logprobs=(logprob,)))
        generation.end(Outcome(finish_reason="stop"))

    house.gateway.script = scored
    expected = [{"token": "x", "logprob": -0.5, "bytes": [120], "top_logprobs": []}]
    include = ["message.output_text.logprobs"]
    _, answer = await house.ask(PATH, input="x", include=include)
    assert answer["output"][0]["content"][0]["logprobs"] == expected
    events = events_of(await house.stream_of(PATH, input="x", include=include))
    assert next(event for event in events if event["type"] == "response.output_text.delta")["logprobs"] == expected


PARTS: tuple[Part, ...] = (
    TextPart("reasoning", "Hm"),
    TextPart("reasoning", "m"),
    TextPart("content", "Let me look."),
    CallPart(0, "", "look", "c1"),
    CallPart(0, '{"at":'),
    CallPart(0, "1}"),
    CallPart(1, "{}", "wait", "c2"),
    TextPart("content", "Done"),
)


class _PartsDelta(Delta, frozen=True, kw_only=True):
    said: tuple[Part, ...] = ()

    @property
    def parts(self) -> tuple[Part, ...]:
        return self.said


def answer_of(kept: list[ResponseBody]) -> ResponseAnswer:
    generation = Generation(
        request_id="r", model="m", created_s=1, on_cancel=lambda _: None, on_notice=lambda _notice, _ms: None
    )
    body = ResponseBody(
        id="resp_r", created_at=1, status="in_progress", instructions=None, max_output_tokens=None, model="m",
        previous_response_id=None, reasoning=ReasoningOptions(), store=True, temperature=1.0, top_logprobs=0, top_p=1.0,
        user=None, metadata={},
    )  # fmt: skip
    return ResponseAnswer(generation, body, kept.append)


def test_parts_of_every_kind_become_items_and_the_stream_says_what_the_object_holds() -> None:
    kept: list[ResponseBody] = []
    answer = answer_of(kept)
    stream = answer.opened()
    for part in PARTS:
        stream += answer.delta(0, _PartsDelta(said=(part,)))
    stream += answer.ended(0, Outcome(finish_reason="stop")) + answer.closed()
    events = events_of(stream)
    output = events[-1]["response"]["output"]
    assert [item["type"] for item in output] == ["reasoning", "message", "function_call", "function_call", "message"]
    assert output[0]["content"] == [{"type": "reasoning_text", "text": "Hmm"}]
    assert (output[2]["name"], output[2]["arguments"], output[2]["call_id"]) == ("look", '{"at":1}', "c1")
    assert output == [event["item"] for event in events if event["type"] == "response.output_item.done"]
    assert [e["output_index"] for e in events if e["type"] == "response.output_item.added"] == [0, 1, 2, 3, 4]
    deltas = [e["delta"] for e in events if e["type"] == "response.function_call_arguments.delta"]
    assert deltas == ['{"at":', "1}", "{}"]
    assert msgspec.to_builtins(kept[0].output) == output


def stored(name: str, size: int = 0) -> StoredResponse:
    body = msgspec.structs.replace(answer_of([])._body, id=name, instructions="x" * size)
    return StoredResponse(body, [], ())


def test_the_store_forgets_the_longest_unused_and_never_grows_beyond_its_bounds() -> None:
    store = ResponseStore(max_responses=2)
    store.keep(stored("a"))
    store.keep(stored("b"))
    store.get("a", param="x")
    store.keep(stored("c"))
    assert [name in store for name in "abc"] == [True, False, True]
    store.delete("a")
    with pytest.raises(RequestError) as gone:
        store.get("a", param="x")
    assert gone.value.param == "x"


def test_the_store_is_bounded_in_bytes_too() -> None:
    store = ResponseStore(max_bytes=10_000)
    for name in "abcdef":
        store.keep(stored(name, 3000))
    assert [name in store for name in "abcdef"] == [False] * 4 + [True] * 2
    store.keep(stored("huge", 20_000))
    assert "huge" not in store
    store.keep(stored("f", 3000))
    store.close()


def test_the_store_outlives_the_process_and_forgets_for_good_what_is_deleted(tmp_path: Path) -> None:
    path = tmp_path / "data" / "responses.sqlite"
    store = ResponseStore(path)
    store.keep(stored("kept"))
    store.keep(stored("gone", 5000))
    store.delete("gone")
    again = ResponseStore(path)  # while the first still has the file, as after kill -9
    assert again.get("kept", param="x") == stored("kept")
    assert "gone" not in again
    assert not any(b"xxxxxxxxxx" in file.read_bytes() for file in path.parent.iterdir())
    assert path.stat().st_mode & 0o777 == 0o600
    again.close()
    store.close()


def test_a_file_that_is_no_store_is_put_aside_and_not_believed(tmp_path: Path) -> None:
    path = tmp_path / "responses.sqlite"
    path.write_bytes(b"no database at all" * 100)
    store = ResponseStore(path)
    store.keep(stored("a"))
    assert "a" in store
    assert (tmp_path / "responses.sqlite.broken").read_bytes().startswith(b"no database")
    store.close()


async def test_responses_are_kept_in_the_data_folder_unless_the_log_keeps_no_content(
    open_house: Any, tmp_path: Path
) -> None:
    cases: tuple[tuple[Literal["none", "tokens"], bool], ...] = (("none", False), ("tokens", True))
    for content, is_kept in cases:
        house = await open_house(data_folder=tmp_path, settings=Settings(content=content))
        _, created = await house.ask(PATH, input="x")
        again = await open_house(data_folder=tmp_path, settings=Settings(content=content))
        async with again.session.get(f"{PATH}/{created['id']}") as response:
            assert response.status == (200 if is_kept else 404)


# ---------------------------------------------------------------- tools and forms


async def calls_look(generation: Generation) -> None:
    generation.put_admitted(9)
    for part in (CallPart(0, "", "look", "call_1"), CallPart(0, '{"at":'), CallPart(0, "1}")):
        generation.put(Delta(token_ids=(1,), found=(part,)))
        await asyncio.sleep(0.001)
    generation.end(Outcome(finish_reason="tool_calls"))


async def test_a_function_is_called_and_its_output_goes_on_with_the_conversation(
    house: Any, client: openai.AsyncOpenAI
) -> None:
    house.gateway.script = calls_look
    tools: Any = [LOOK]
    first = await client.responses.create(model="demo", input="Where?", tools=tools, tool_choice="required")
    assert first.status == "completed"
    call: Any = first.output[0]
    assert (call.type, call.name, call.arguments, call.call_id) == ("function_call", "look", '{"at":1}', "call_1")
    assert first.tools[0].to_dict()["name"] == "look"
    submitted = house.gateway.submitted[0]
    assert submitted.tools[0]["function"] == {"name": "look", "parameters": {"type": "object"}, "strict": True}
    assert submitted.shape.tool_choice == "required"
    house.gateway.script = hello
    output: Any = {"type": "function_call_output", "call_id": "call_1", "output": "here"}
    by_id = await client.responses.create(model="demo", input=[output], previous_response_id=first.id, tools=tools)
    assert by_id.output_text == "Hello world"
    items: Any = [{"role": "user", "content": "Where?"}, *(item.to_dict() for item in first.output), output]
    await client.responses.create(model="demo", input=items, tools=tools)
    told = [(m.role, m.content, len(m.tool_calls), m.tool_call_id) for m in house.gateway.submitted[2].messages]
    assert told[0] == ("user", "Where?", 0, None)
    assert told[1][2] == 1
    assert told[2] == ("tool", "here", 0, "call_1")


async def test_a_streamed_call_comes_in_the_clients_own_events(house: Any, client: openai.AsyncOpenAI) -> None:
    house.gateway.script = calls_look
    tools: Any = [LOOK]
    async with client.responses.stream(model="demo", input="Where?", tools=tools) as stream:
        types = [event.type async for event in stream]
        final = await stream.get_final_response()
    assert types == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.function_call_arguments.delta",
        "response.function_call_arguments.delta",
        "response.function_call_arguments.done",
        "response.output_item.done",
        "response.completed",
    ]
    assert [item.type for item in final.output] == ["function_call"]


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        (None, ("auto", "")),
        ("auto", ("auto", "")),
        ("none", ("none", "")),
        ("required", ("required", "")),
        ({"type": "function", "name": "look"}, ("named", "look")),
    ],
)
async def test_tool_choices(house: Any, choice: Any, expected: tuple[str, str]) -> None:
    _, answer = await house.ask(PATH, input="x", tools=[LOOK], tool_choice=choice, parallel_tool_calls=False)
    shape = house.gateway.submitted[0].shape
    assert (shape.tool_choice, shape.tool_name, shape.parallel_calls) == (*expected, False)
    assert answer["tool_choice"] == (choice or "auto")
    assert answer["parallel_tool_calls"] is False


async def test_calls_of_one_turn_are_one_turn_again(house: Any) -> None:
    items = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "Looking."},
        {"type": "function_call", "call_id": "c1", "name": "look", "arguments": "{}"},
        {"type": "function_call", "call_id": "c2", "name": "look", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c1", "output": "1"},
        {"type": "function_call_output", "call_id": "c2", "output": "2"},
    ]
    assert (await house.ask(PATH, input=items))[0] == 200
    told = [(m.role, [call["id"] for call in m.tool_calls]) for m in house.gateway.submitted[0].messages]
    assert told == [("user", []), ("assistant", ["c1", "c2"]), ("tool", []), ("tool", [])]


async def test_the_text_can_be_bound_to_a_schema(house: Any, client: openai.AsyncOpenAI) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    form: Any = {"format": {"type": "json_schema", "name": "n", "schema": schema, "strict": True}}
    answer = await client.responses.create(model="demo", input="x", text=form)
    assert answer.text is not None
    assert answer.text.to_dict()["format"] == form["format"]
    bound = house.gateway.submitted[0].shape.format
    assert (bound.kind, msgspec.json.decode(bound.text), bound.param) == ("json", schema, "text.format")
    await house.ask(PATH, input="x", text={"format": {"type": "json_object"}})
    assert house.gateway.submitted[1].shape.format.text == '{"type":"object"}'
    await house.ask(PATH, input="x", text={"format": {"type": "text"}, "verbosity": "low"})
    assert house.gateway.submitted[2].shape.format is None


async def test_errors_name_the_fields_of_this_endpoint(house: Any) -> None:
    await house.ask(PATH, input="x")
    assert (house.gateway.submitted[0].prompt_field, house.gateway.submitted[0].length_field) == (
        "input",
        "max_output_tokens",
    )
