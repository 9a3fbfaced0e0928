"""What a stream looks like on the wire, byte for byte."""

import asyncio
from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from gptoss.actors.generation import Delta, Generation, Outcome, Usage
from gptoss.engine.port import TokenLogprob
from gptoss.errors import EngineLost
from gptoss.http.context import HttpTiming

HEAD = b'data: {"id":"chatcmpl-req_1","object":"chat.completion.chunk","created":1700000000,"model":"demo","choices":['
ROLE = b'{"index":0,"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null}]'
LAST = b'{"index":0,"delta":{},"logprobs":null,"finish_reason":"stop"}]'
DONE = b"data: [DONE]\n\n"
USAGE = (
    b'{"prompt_tokens":7,"completion_tokens":2,"total_tokens":9,'
    b'"prompt_tokens_details":{"cached_tokens":3},"completion_tokens_details":{"reasoning_tokens":0}}'
)


def text(content: bytes) -> bytes:
    return b'{"index":0,"delta":{"content":"' + content + b'"},"logprobs":null,"finish_reason":null}]'


def frames(stream: bytes) -> list[Any]:
    return [
        msgspec.json.decode(frame.removeprefix(b"data: "))
        for frame in stream.split(b"\n\n")
        if frame.startswith(b"data: {")
    ]


async def test_a_stream_is_role_deltas_finish_done(house: Any) -> None:
    stream = await house.stream()
    chunks = (ROLE, text(b"Hello"), text(b" world"), LAST)
    assert stream == b"".join(HEAD + chunk + b"}\n\n" for chunk in chunks) + DONE
    assert house.gateway.notices == ["first_byte"]
    assert not house.gateway.cancelled


async def test_usage_is_null_on_every_chunk_and_true_on_one_more(house: Any) -> None:
    stream = await house.stream(stream_options={"include_usage": True})
    chunks = (ROLE, text(b"Hello"), text(b" world"), LAST)
    expected = b"".join(HEAD + chunk + b',"usage":null}\n\n' for chunk in chunks)
    assert stream == expected + HEAD + b'],"usage":' + USAGE + b"}\n\n" + DONE


async def test_continuous_usage_counts_up(house: Any) -> None:
    chunks = frames(await house.stream(stream_options={"continuous_usage_stats": True}))
    assert [chunk["usage"]["completion_tokens"] for chunk in chunks] == [0, 1, 2, 2, 2]
    assert {chunk["usage"]["prompt_tokens"] for chunk in chunks} == {7}
    assert chunks[-1]["choices"] == []


async def test_a_whole_answer_has_text_usage_and_its_request_id(house: Any) -> None:
    body = {"messages": [{"role": "user", "content": "Hi"}]}
    async with house.session.post("/v1/chat/completions", json=body) as response:
        assert response.headers["X-Request-ID"] == "req_1"
        assert await response.json() == {
            "id": "chatcmpl-req_1",
            "object": "chat.completion",
            "created": 1_700_000_000,
            "model": "demo",
            "choices": [
                {
                    "index": 0,
                    "message": {"role": "assistant", "content": "Hello world", "refusal": None},
                    "logprobs": None,
                    "finish_reason": "stop",
                }
            ],
            "usage": msgspec.json.decode(USAGE),
        }


async def with_logprobs(generation: Generation) -> None:
    generation.put_admitted(4)
    top = ((1, -0.5, "é", "é".encode()), (2, float("-inf"), "x", b"x"))
    generation.put(
        Delta(
            text="", token_ids=(1,), logprobs=(TokenLogprob(token_id=1, logprob=-0.5, text="", raw=b"\xc3", top=top),)
        )
    )
    generation.end(Outcome(finish_reason="length", usage=Usage(prompt_tokens=1, completion_tokens=1)))


async def test_logprobs_have_openais_shape_streamed_and_whole(house: Any) -> None:
    house.gateway.script = with_logprobs
    expected = {
        "content": [
            {
                "token": "",
                "logprob": -0.5,
                "bytes": [0xC3],
                "top_logprobs": [
                    {"token": "é", "logprob": -0.5, "bytes": [0xC3, 0xA9]},
                    {"token": "x", "logprob": -9999.0, "bytes": [120]},
                ],
            }
        ],
        "refusal": None,
    }
    _, answer = await house.chat(logprobs=True, top_logprobs=2)
    assert answer["choices"][0]["logprobs"] == expected
    assert answer["choices"][0]["finish_reason"] == "length"
    chunks = frames(await house.stream(logprobs=True, top_logprobs=2))
    assert chunks[1]["choices"][0]["logprobs"] == expected


async def test_logprobs_that_nobody_asked_for_are_left_out(house: Any) -> None:
    house.gateway.script = with_logprobs
    _, answer = await house.chat()
    assert answer["choices"][0]["logprobs"] is None
    assert len(frames(await house.stream())) == 2, "a delta without text makes no chunk"


async def fails_late(generation: Generation) -> None:
    generation.put_admitted(4)
    generation.put(Delta(text="Half", token_ids=(1,)))
    await asyncio.sleep(0.01)
    generation.end(Outcome(error=EngineLost("the engine process died")))


async def test_an_error_after_the_first_byte_is_the_last_frame(house: Any) -> None:
    house.gateway.script = fails_late
    stream = await house.stream()
    assert stream.endswith(
        text(b"Half") + b"}\n\n"
        b'data: {"error":{"message":"the engine process died","type":"server_error","param":null,"code":"engine_lost"}}'
        b"\n\n"
    )


async def http_chunks(house: Any) -> list[bytes]:
    """The body of a stream as the server cut it."""
    body = {"stream": True, "messages": [{"role": "user", "content": "Hi"}]}
    found = [b""]
    async with house.session.post("/v1/chat/completions", json=body) as response:
        async for data, is_end in response.content.iter_chunks():
            found[-1] += data
            if is_end:
                found.append(b"")
    return [chunk for chunk in found if chunk]


async def test_what_is_there_at_once_leaves_in_one_piece(house: Any) -> None:
    async def says_all_at_once(generation: Generation) -> None:
        generation.put_admitted(4)
        await asyncio.sleep(0.05)
        generation.put(Delta(text="Hello", token_ids=(1,)))
        generation.end(Outcome(finish_reason="stop"))

    house.gateway.script = says_all_at_once
    opened, rest = await http_chunks(house)
    assert opened == HEAD + ROLE + b"}\n\n"
    assert rest == HEAD + text(b"Hello") + b"}\n\n" + HEAD + LAST + b"}\n\n" + DONE


async def test_what_was_said_before_an_error_comes_before_it(house: Any) -> None:
    async def fails_with_its_last_words(generation: Generation) -> None:
        generation.put_admitted(4)
        await asyncio.sleep(0.05)
        generation.put(Delta(text="Half", token_ids=(1,)))
        generation.end(Outcome(error=EngineLost("the engine process died")))

    house.gateway.script = fails_with_its_last_words
    _, rest = await http_chunks(house)
    half, error = frames(rest)
    assert half["choices"][0]["delta"] == {"content": "Half"}
    assert error["error"]["code"] == "engine_lost"


async def test_an_error_of_a_whole_answer_has_its_status(house: Any) -> None:
    house.gateway.script = fails_late
    status, answer = await house.chat()
    assert (status, answer["error"]["code"]) == (500, "engine_lost")


async def until_cancelled(generation: Generation) -> None:
    generation.put_admitted(4)
    generation.put(Delta(text="Half", token_ids=(1,)))
    while generation.outcome is None:
        await asyncio.sleep(0.005)


@pytest.mark.parametrize("name", ["mine", "chatcmpl-mine"])
async def test_a_cancelled_stream_ends_in_order_and_says_so(house: Any, name: str) -> None:
    house.gateway.script = until_cancelled
    body = {"messages": [{"role": "user", "content": "x"}], "stream": True}
    async with house.session.post("/v1/chat/completions", json=body, headers={"X-Request-ID": "mine"}) as response:
        async with house.session.post(f"/cancel/{name}") as cancelled:
            assert cancelled.status == 200
            assert (await cancelled.json())["id"] == "mine"
        stream = await response.read()
    assert stream.endswith(DONE)
    assert frames(stream)[-1]["choices"][0]["finish_reason"] == "abort"
    async with house.session.post(f"/cancel/{name}") as again:
        assert again.status == 404
        assert (await again.json())["error"]["code"] == "request_not_found"


async def test_a_matched_stop_is_told(house: Any) -> None:
    async def stops(generation: Generation) -> None:
        generation.put_admitted(4)
        generation.end(Outcome(finish_reason="stop", stop_reason="###"))

    house.gateway.script = stops
    assert frames(await house.stream())[-1]["choices"][0]["stop_reason"] == "###"


@pytest.mark.parametrize("content", ["👩‍👩‍👧 \u202e\x00", 'quote " slash \\ line \n\r\u2028 end', "<|end|>"])
async def test_odd_text_round_trips(house: Any, content: str) -> None:
    async def odd(generation: Generation) -> None:
        generation.put_admitted(4)
        generation.put(Delta(text=content, token_ids=(1,)))
        generation.end(Outcome(finish_reason="stop"))

    house.gateway.script = odd
    stream = await house.stream()
    assert frames(stream)[1]["choices"][0]["delta"]["content"] == content
    assert stream.count(b"\n") == 2 * stream.count(b"data: "), "a line break inside a frame would split it"


async def test_silence_is_broken_by_comments(open_house: Callable[..., Any]) -> None:
    async def pauses(generation: Generation) -> None:
        generation.put_admitted(4)
        await asyncio.sleep(0.2)
        generation.put(Delta(text="late", token_ids=(1,)))
        generation.end(Outcome(finish_reason="stop"))

    house = await open_house(timing=HttpTiming(keepalive_s=0.03, poll_s=0.5))
    house.gateway.script = pauses
    stream = await house.stream()
    assert stream.count(b": keepalive\n\n") >= 2
    assert [chunk["choices"][0]["delta"].get("content") for chunk in frames(stream)] == ["", "late", None]


async def test_headers_name_the_request_its_session_and_its_trace(house: Any) -> None:
    trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    await house.chat(headers={"X-Request-ID": "my.id-1", "X-Session-ID": "s_1", "traceparent": trace}, timeout=2.5)
    request = house.gateway.submitted[0]
    assert (request.request_id, request.session_id, request.traceparent) == ("my.id-1", "s_1", trace)
    assert (request.endpoint, request.timeout_s, request.stream) == ("/v1/chat/completions", 2.5, False)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("X-Request-ID", "a b"),
        ("X-Request-ID", "x" * 129),
        ("X-Request-ID", "é"),
        ("X-Session-ID", "../etc"),
        ("traceparent", "00-00000000000000000000000000000000-b7ad6b7169203331-01"),
        ("traceparent", "ff-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"),
        ("traceparent", "nonsense"),
    ],
)
async def test_bad_names_are_replaced_and_served(house: Any, name: str, value: str) -> None:
    body = {"messages": [{"role": "user", "content": "x"}]}
    async with house.session.post("/v1/chat/completions", json=body, headers={name: value}) as response:
        assert response.status == 200
        assert response.headers["X-Request-ID"] == "req_1"
    request = house.gateway.submitted[0]
    assert (request.request_id, request.session_id, request.traceparent) == ("", "", "")


async def test_fields_without_effect_are_named_once_in_the_log(house: Any, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger="gptoss.http"):
        for _ in range(2):
            status, _ = await house.chat(verbosity=3, **{"evil\nname": 1}, store=True, reasoning_effort="low")
            assert status == 200
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 4
    assert any("'verbosity'" in line for line in lines)
    assert any("'evil\\nname'" in line for line in lines)
