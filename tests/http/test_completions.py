"""``POST /v1/completions``: every way to write a prompt, and the older shapes of answers."""

from typing import Any

import msgspec
import openai
import pytest

from gptoss.actors.generation import Delta, Generation, Outcome, Usage
from gptoss.engine.port import TokenLogprob

PATH = "/v1/completions"


def chunks_of(stream: bytes) -> list[Any]:
    return [
        msgspec.json.decode(frame.removeprefix(b"data: "))
        for frame in stream.split(b"\n\n")
        if frame.startswith(b"data: {")
    ]


async def test_a_whole_answer_has_the_older_shape(house: Any) -> None:
    status, answer = await house.ask(PATH, prompt="Once", model="demo")
    assert status == 200
    assert answer["choices"] == [{"index": 0, "text": "Hello world", "logprobs": None, "finish_reason": "stop"}]
    assert (answer["id"], answer["object"]) == ("cmpl-req_1", "text_completion")
    assert answer["usage"]["total_tokens"] == 9
    request = house.gateway.submitted[0]
    assert (request.prompt, request.endpoint, request.sampling.max_tokens) == ("Once", PATH, 16)


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("a text", ["a text"]),
        (["one", "two"], ["one", "two"]),
        ([1, 2, 3], [(1, 2, 3)]),
        ([[1, 2], [3]], [(1, 2), (3,)]),
    ],
)
async def test_a_prompt_is_text_or_ids_one_or_several(house: Any, prompt: Any, expected: list[Any]) -> None:
    status, answer = await house.ask(PATH, prompt=prompt)
    assert status == 200
    assert [request.prompt for request in house.gateway.submitted] == expected
    assert len(answer["choices"]) == len(expected)


async def test_n_choices_of_several_prompts_stand_by_prompt_and_prompts_count_once(house: Any) -> None:
    status, answer = await house.ask(PATH, prompt=["one", "two"], n=2, seed=1, echo=True)
    assert status == 200
    texts = [choice["text"] for choice in answer["choices"]]
    assert texts == ["oneHello world"] * 2 + ["twoHello world"] * 2
    assert (answer["usage"]["prompt_tokens"], answer["usage"]["completion_tokens"]) == (14, 8)
    assert [request.sampling.seed for request in house.gateway.submitted] == [1, 2, 1, 2]


async def test_echo_of_ids_is_their_text_and_the_first_chunk_of_a_stream(house: Any) -> None:
    chunks = chunks_of(await house.stream_of(PATH, prompt=[5, 6], echo=True))
    assert [chunk["choices"][0]["text"] for chunk in chunks] == ["t5 t6 ", "Hello", " world", ""]
    assert chunks[-1]["choices"][0]["finish_reason"] == "stop"


async def test_a_stream_carries_usage_as_chat_does(house: Any) -> None:
    chunks = chunks_of(await house.stream_of(PATH, prompt="x", stream_options={"include_usage": True}))
    assert [chunk["usage"] for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["completion_tokens"] == 2
    running = chunks_of(await house.stream_of(PATH, prompt="x", stream_options={"continuous_usage_stats": True}))
    assert [chunk["usage"]["completion_tokens"] for chunk in running] == [1, 2, 2, 2]
    assert "usage" not in chunks_of(await house.stream_of(PATH, prompt="x"))[0]


async def split_character(generation: Generation) -> None:
    """Three tokens: a plain one, and a character cut in two."""
    top = ((9, -1.0, "x", b"x"),)
    generation.put_admitted(4)
    tokens = ((1, b"ab"), (2, b"\xc3"), (3, b"\xa9"), (4, b"!"))
    logprobs = tuple(
        TokenLogprob(token_id=token_id, logprob=-0.5, text=raw.decode(errors="replace"), raw=raw, top=top)
        for token_id, raw in tokens
    )
    generation.put(Delta(text="abé!", token_ids=(1, 2, 3, 4), logprobs=logprobs))
    generation.end(Outcome(finish_reason="length", usage=Usage(prompt_tokens=1, completion_tokens=4)))


@pytest.mark.parametrize("stream", [False, True])
async def test_logprobs_have_the_older_shape_and_true_offsets(house: Any, stream: bool) -> None:
    house.gateway.script = split_character
    if stream:
        answer = chunks_of(await house.stream_of(PATH, prompt="x", logprobs=1))[0]
    else:
        _, answer = await house.ask(PATH, prompt="x", logprobs=1)
    logprobs = answer["choices"][0]["logprobs"]
    assert logprobs["tokens"] == ["ab", "bytes:\\xc3", "bytes:\\xa9", "!"]
    assert logprobs["token_logprobs"] == [-0.5] * 4
    assert logprobs["top_logprobs"][0] == {"x": -1.0, "ab": -0.5}
    assert logprobs["text_offset"] == [0, 2, 2, 3]
    assert house.gateway.submitted[0].sampling.logprobs == 1


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": ["a", 1]}, "prompt"),
        ({"prompt": ["a", [1]]}, "prompt"),
        ({"prompt": [-1]}, "prompt[0]"),
        ({"prompt": ["x"] * 129}, "prompt"),
        ({"prompt": ["x"] * 10, "n": 16}, "prompt"),
        ({"prompt": [[1000]], "echo": True}, "prompt"),
        ({"prompt": "x", "suffix": "end"}, "suffix"),
        ({"prompt": "x", "best_of": 3}, "best_of"),
        ({"prompt": "x", "logprobs": 21}, "logprobs"),
        ({"prompt": "x", "logprobs": -1}, "logprobs"),
        ({"prompt": "x", "logprobs": 1, "echo": True}, "logprobs"),
        ({"prompt": "x", "max_tokens": 0}, "max_tokens"),
        ({"prompt": "x", "n": 17}, "n"),
        ({"prompt": "x", "stream_options": {}}, "stream_options"),
        ({"prompt": "x", "use_beam_search": True}, "use_beam_search"),
        ({"prompt": "x", "truncate_prompt_tokens": 5}, "truncate_prompt_tokens"),
    ],
)
async def test_what_cannot_be_served_is_refused_by_name(house: Any, fields: dict[str, Any], param: str) -> None:
    status, answer = await house.ask(PATH, **fields)
    assert (status, answer["error"]["param"]) == (400, param)
    assert house.gateway.rejected[0][:2] == ("invalid_request", PATH)
    assert not house.gateway.submitted
    await house.canary()


async def test_best_of_as_many_as_n_is_no_wish_at_all(house: Any) -> None:
    assert (await house.ask(PATH, prompt="x", n=2, best_of=2))[0] == 200


async def test_openais_client_completes_and_streams(house: Any) -> None:
    async with openai.AsyncOpenAI(base_url=f"{house.url}/v1", api_key="unused", max_retries=0) as client:
        whole = await client.completions.create(model="demo", prompt="Once")
        assert whole.choices[0].text == "Hello world"
        stream = await client.completions.create(model="demo", prompt="Once", stream=True)
        assert "".join([chunk.choices[0].text async for chunk in stream]) == "Hello world"
        with pytest.raises(openai.BadRequestError) as refused:
            await client.embeddings.create(model="demo", input="x")
    assert "embedding" in str(refused.value)
