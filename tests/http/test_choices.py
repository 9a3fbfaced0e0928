"""Several choices of one call: one answer, true counts, and one fate."""

import asyncio
from typing import Any

import msgspec
import pytest

from gptoss.actors.generation import Delta, Generation, Outcome, Usage
from gptoss.errors import EngineLost, QueueFull


def index_of(generation: Generation) -> int:
    return int(generation.request_id.partition("-")[2] or 0)


async def numbered(generation: Generation) -> None:
    """Says its own index, later the smaller it is."""
    index = index_of(generation)
    generation.prompt_tokens = 7
    generation.put_admitted(16)
    await asyncio.sleep(0.6 - 0.2 * index)  # far enough apart for a busy machine
    generation.put(Delta(text=f"choice {index}", token_ids=(index, index)))
    await asyncio.sleep(0.01)
    usage = Usage(prompt_tokens=7, completion_tokens=2 + index, cached_tokens=3 * (index > 0))
    generation.end(Outcome(finish_reason="length" if index else "stop", usage=usage))


def chunks_of(stream: bytes) -> list[Any]:
    return [
        msgspec.json.decode(frame.removeprefix(b"data: "))
        for frame in stream.split(b"\n\n")
        if frame.startswith(b"data: {")
    ]


async def test_choices_stand_in_order_and_their_tokens_are_summed(house: Any) -> None:
    house.gateway.script = numbered
    status, answer = await house.chat(n=3, seed=5)
    assert status == 200
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2]
    assert [choice["message"]["content"] for choice in answer["choices"]] == ["choice 0", "choice 1", "choice 2"]
    assert [choice["finish_reason"] for choice in answer["choices"]] == ["stop", "length", "length"]
    usage = answer["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"], usage["total_tokens"]) == (7, 2 + 3 + 4, 16)
    assert usage["prompt_tokens_details"]["cached_tokens"] == 0, "what the first choice had; the prompt counts once"
    assert [request.sampling.seed for request in house.gateway.submitted] == [5, 6, 7]


async def test_further_choices_bear_the_name_of_the_first_and_say_so(house: Any) -> None:
    house.gateway.script = numbered
    status, answer = await house.chat(n=3, headers={"X-Request-ID": "mine"})
    assert (status, answer["id"]) == (200, "chatcmpl-mine")
    named = [(request.request_id, request.parent_id) for request in house.gateway.submitted]
    assert named == [("mine", ""), ("mine-1", "mine"), ("mine-2", "mine")]


async def test_a_stream_interleaves_choices_by_index(house: Any) -> None:
    house.gateway.script = numbered
    stream = await house.stream(n=3, stream_options={"include_usage": True})
    chunks = chunks_of(stream)
    roles, rest = chunks[:3], chunks[3:-1]
    assert [chunk["choices"][0]["index"] for chunk in roles] == [0, 1, 2]
    assert all(chunk["choices"][0]["delta"]["role"] == "assistant" for chunk in roles)
    said = [chunk["choices"][0]["index"] for chunk in rest if chunk["choices"][0]["delta"]]
    assert said == [2, 1, 0], "as they come"
    ends = {chunk["choices"][0]["index"]: chunk["choices"][0]["finish_reason"] for chunk in rest}
    assert ends == {0: "stop", 1: "length", 2: "length"}
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["completion_tokens"] == 9
    assert stream.endswith(b"data: [DONE]\n\n")
    assert house.gateway.notices == ["first_byte"] * 3


async def test_continuous_usage_counts_all_choices(house: Any) -> None:
    house.gateway.script = numbered
    chunks = chunks_of(await house.stream(n=2, stream_options={"continuous_usage_stats": True}))
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert counts == sorted(counts)
    assert counts[-1] == 5


async def second_fails(generation: Generation) -> None:
    generation.put_admitted(16)
    generation.put(Delta(text="x", token_ids=(1,)))
    await asyncio.sleep(0.01)
    if index_of(generation) == 1:
        generation.end(Outcome(error=EngineLost("the engine process died")))
    while generation.outcome is None:
        await asyncio.sleep(0.005)


@pytest.mark.parametrize("stream", [False, True])
async def test_one_choice_that_fails_fails_the_call_and_cancels_the_others(house: Any, stream: bool) -> None:
    house.gateway.script = second_fails
    if stream:
        frames = await house.stream(n=3)
        assert frames.endswith(b'"code":"engine_lost"}}\n\n')
    else:
        status, answer = await house.chat(n=3)
        assert (status, answer["error"]["code"]) == (500, "engine_lost")
    assert sorted(reason for _, reason in house.gateway.cancelled) == ["sibling_failed"] * 2
    house.gateway.script = numbered
    assert (await house.chat(n=2))[0] == 200


async def test_a_choice_refused_before_the_first_byte_gives_the_call_its_status(house: Any) -> None:
    async def full(generation: Generation) -> None:
        if index_of(generation) == 1:
            generation.end(Outcome(error=QueueFull("full", retry_after_s=2)))
            return
        await asyncio.sleep(0.02)
        generation.put_admitted(4)
        while generation.outcome is None:
            await asyncio.sleep(0.005)

    house.gateway.script = full
    body = {"messages": [{"role": "user", "content": "x"}], "stream": True, "n": 2}
    async with house.session.post("/v1/chat/completions", json=body) as response:
        assert response.status == 429
        assert response.headers["Retry-After"] == "2"
    assert [reason for _, reason in house.gateway.cancelled] == ["sibling_failed"]


async def test_a_client_that_goes_cancels_every_choice(house: Any, chat_bytes: Any) -> None:
    async def endless(generation: Generation) -> None:
        generation.put_admitted(4)
        while generation.outcome is None:
            generation.put(Delta(text="x", token_ids=(1,)))
            await asyncio.sleep(0.005)

    house.gateway.script = endless
    reader, writer = await house.raw(chat_bytes(n=3, stream=True))
    await reader.readuntil(b"data: ")
    writer.close()
    async with asyncio.timeout(5):
        while len(house.gateway.cancelled) < 3:
            await asyncio.sleep(0.01)
    assert {reason for _, reason in house.gateway.cancelled} == {"disconnect"}
