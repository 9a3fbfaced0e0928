"""OpenAI's own client, sync and async, against this server."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from typing import Any

import openai
import pytest
from openai.types.chat import ChatCompletionMessageParam

from gptoss.actors.generation import Delta, Generation, Outcome
from gptoss.errors import EngineLost, QueueFull

MESSAGES: list[ChatCompletionMessageParam] = [{"role": "user", "content": "Hi"}]


@pytest.fixture
async def client(house: Any) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=f"{house.url}/v1", api_key="unused", max_retries=0) as made:
        yield made


@pytest.fixture
def sync_client(house: Any) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{house.url}/v1", api_key="unused", max_retries=0) as made:
        yield made


async def test_a_whole_answer(client: openai.AsyncOpenAI) -> None:
    answer = await client.chat.completions.create(model="demo", messages=MESSAGES)
    assert answer.choices[0].message.content == "Hello world"
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None
    assert answer.usage.total_tokens == 9
    assert answer._request_id == answer.id.removeprefix("chatcmpl-")


async def test_a_stream_with_usage(client: openai.AsyncOpenAI) -> None:
    stream = await client.chat.completions.create(
        model="demo", messages=MESSAGES, stream=True, stream_options={"include_usage": True}
    )
    chunks = [chunk async for chunk in stream]
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == "Hello world"
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.prompt_tokens == 7


async def test_the_sync_client_streams_and_asks(sync_client: openai.OpenAI) -> None:
    def ask() -> tuple[str | None, str]:
        whole = sync_client.chat.completions.create(model="demo", messages=MESSAGES)
        stream = sync_client.chat.completions.create(model="demo", messages=MESSAGES, stream=True)
        return whole.choices[0].message.content, "".join(chunk.choices[0].delta.content or "" for chunk in stream)

    assert await asyncio.to_thread(ask) == ("Hello world", "Hello world")


async def test_models(house: Any, client: openai.AsyncOpenAI) -> None:
    house.gateway.served_model = "openai/gpt-oss-20b"
    listed = [model async for model in client.models.list()]
    assert listed == [await client.models.retrieve("openai/gpt-oss-20b")]
    with pytest.raises(openai.NotFoundError) as missing:
        await client.models.retrieve("other")
    assert missing.value.code == "model_not_found"


async def test_refusals_are_the_clients_own_exceptions(house: Any, client: openai.AsyncOpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as bad:
        await client.chat.completions.create(model="demo", messages=MESSAGES, temperature=3)
    assert bad.value.param == "temperature"

    async def full(generation: Generation) -> None:
        generation.end(Outcome(error=QueueFull("full", retry_after_s=2)))

    house.gateway.script = full
    with pytest.raises(openai.RateLimitError) as limited:
        await client.chat.completions.create(model="demo", messages=MESSAGES, stream=True)
    assert limited.value.response.headers["Retry-After"] == "2"


async def test_a_retry_waits_as_long_as_the_server_asked(house: Any) -> None:
    tries: list[float] = []

    async def full_once(generation: Generation) -> None:
        tries.append(asyncio.get_running_loop().time())
        if len(tries) == 1:
            generation.end(Outcome(error=QueueFull("full", retry_after_s=1.0)))
            return
        generation.put_admitted(4)
        generation.put(Delta(text="at last", token_ids=(1,)))
        generation.end(Outcome(finish_reason="stop"))

    house.gateway.script = full_once
    async with openai.AsyncOpenAI(base_url=f"{house.url}/v1", api_key="unused", max_retries=2) as client:
        answer = await client.chat.completions.create(model="demo", messages=MESSAGES)
    assert answer.choices[0].message.content == "at last"
    assert len(tries) == 2
    assert tries[1] - tries[0] >= 0.99, "Retry-After, not the client's own half a second"


async def test_the_streaming_helper_accumulates_a_chat(client: openai.AsyncOpenAI) -> None:
    async with client.chat.completions.stream(model="demo", messages=MESSAGES) as stream:
        deltas = [event.delta async for event in stream if event.type == "content.delta"]
        final = await stream.get_final_completion()
    assert "".join(deltas) == final.choices[0].message.content == "Hello world"


async def test_the_sync_client_uses_the_other_endpoints(sync_client: openai.OpenAI) -> None:
    def ask() -> tuple[str, str, int]:
        response = sync_client.responses.create(model="demo", input="Hi")
        with sync_client.responses.stream(model="demo", input="Hi") as stream:
            streamed = stream.get_final_response().output_text
        assert response.output_text == streamed
        text = sync_client.completions.create(model="demo", prompt="Hi", n=3)
        several = sync_client.chat.completions.create(model="demo", messages=MESSAGES, n=2)
        return streamed, text.choices[2].text, len(several.choices)

    assert await asyncio.to_thread(ask) == ("Hello world", "Hello world", 2)


async def test_an_error_inside_a_stream_is_raised(house: Any, client: openai.AsyncOpenAI) -> None:
    async def dies(generation: Generation) -> None:
        generation.put_admitted(4)
        generation.put(Delta(text="Half", token_ids=(1,)))
        await asyncio.sleep(0.01)
        generation.end(Outcome(error=EngineLost("the engine process died")))

    house.gateway.script = dies
    stream = await client.chat.completions.create(model="demo", messages=MESSAGES, stream=True)
    with pytest.raises(openai.APIError, match="the engine process died"):
        async for _ in stream:
            pass


async def test_closing_a_stream_cancels_the_request(house: Any, client: openai.AsyncOpenAI) -> None:
    async def endless(generation: Generation) -> None:
        generation.put_admitted(4)
        while generation.outcome is None:
            generation.put(Delta(text="x", token_ids=(1,)))
            await asyncio.sleep(0.002)

    house.gateway.script = endless
    stream = await client.chat.completions.create(model="demo", messages=MESSAGES, stream=True)
    await anext(aiter(stream))
    await stream.close()
    await asyncio.wait_for(house.gateway.over.wait(), 5)
    assert [reason for _, reason in house.gateway.cancelled] == ["disconnect"]
