"""Every kind of bad input gets OpenAI's error body, is recorded, and leaves the server able to serve."""

import asyncio
import io
from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from gptoss.errors import ContextLengthExceeded, MemoryExhausted, ModelNotFound, QueueFull

BODIES: list[tuple[str, bytes, str]] = [
    ("malformed JSON", b'{"messages": [', "body"),
    ("empty body", b"", "body"),
    ("trailing garbage", b'{"messages":[{"role":"user","content":"x"}]} x', "body"),
    ("an array", b"[]", "body"),
    ("NaN", b'{"messages":[{"role":"user","content":"x"}],"temperature":NaN}', "body"),
    ("BOM", b'\xef\xbb\xbf{"messages":[{"role":"user","content":"x"}]}', "body"),
    ("bad UTF-8", b'{"messages":[{"role":"user","content":"\xff"}]}', "body"),
    ("surrogate in UTF-8", b'{"messages":[{"role":"user","content":"\xed\xa0\x80"}]}', "body"),
    ("lone high surrogate", b'{"messages":[{"role":"user","content":"\\ud800 and more text"}]}', "body"),
    ("lone low surrogate", b'{"messages":[{"role":"user","content":"\\udc00 and more text"}]}', "body"),
    ("nesting of 65", b'{"messages":[{"role":"user","content":"x"}],"x":' + b"[" * 64 + b"]" * 64 + b"}", "body"),
    ("nesting of 200,000", b'{"x":' + b"[" * 200_000, "body"),
    ("no messages", b"{}", "messages"),
    ("empty messages", b'{"messages":[]}', "messages"),
    ("messages of the wrong type", b'{"messages":"x"}', "messages"),
    ("unknown role", b'{"messages":[{"role":"robot","content":"x"}]}', "messages[0].role"),
    ("missing role", b'{"messages":[{"content":"x"}]}', "messages[0].role"),
    ("number as content", b'{"messages":[{"role":"user","content":3}]}', "messages[0].content"),
    ("no content", b'{"messages":[{"role":"user"}]}', "messages[0].content"),
    (
        "image_url",
        b'{"messages":[{"role":"user","content":[{"type":"image_url","image_url":{"url":"http://x/"}}]}]}',
        "messages[0].content",
    ),
    (
        "bad tool name",
        b'{"messages":[{"role":"assistant","tool_calls":[{"id":"1","function":{"name":"a b"}}]}]}',
        "messages[0].tool_calls[0].function.name",
    ),
]

OTHER_BODIES = {
    "/v1/completions": b'"prompt":"x"',
    "/v1/responses": b'"input":"x"',
    "/tokenize": b'"prompt":"x"',
    "/detokenize": b'"tokens":[1]',
}
"""Endpoint -> what a good body of it holds."""
ANYWHERE: list[tuple[str, bytes]] = [
    ("malformed JSON", b"{%s"),
    ("empty body", b""),
    ("trailing garbage", b"{%s} x"),
    ("an array", b"[]"),
    ("NaN", b'{%s,"zeta":NaN}'),
    ("BOM", b"\xef\xbb\xbf{%s}"),
    ("bad UTF-8", b'{%s,"zeta":"\xff"}'),
    ("lone surrogate", b'{%s,"model":"\\ud800 and more text"}'),
    ("nesting of 65", b'{%s,"zeta":' + b"[" * 64 + b"]" * 64 + b"}"),
    ("nesting of 200,000", b'{%s,"zeta":' + b"[" * 200_000),
]

FIELDS: list[tuple[str, Any, str]] = [
    ("max_tokens", 0, "max_tokens"),
    ("max_tokens", -1, "max_tokens"),
    ("max_tokens", "10", "max_tokens"),
    ("max_completion_tokens", 0, "max_completion_tokens"),
    ("seed", 2**64, "seed"),
    ("seed", 10**30, "seed"),
    ("priority", 2**63, "priority"),
    ("temperature", 2.1, "temperature"),
    ("temperature", True, "temperature"),
    ("top_p", 0, "top_p"),
    ("top_k", -2, "top_k"),
    ("min_p", 1.5, "min_p"),
    ("presence_penalty", -2.5, "presence_penalty"),
    ("frequency_penalty", 3, "frequency_penalty"),
    ("repetition_penalty", 0, "repetition_penalty"),
    ("n", 17, "n"),
    ("n", 0, "n"),
    ("stop", ["x"] * 17, "stop"),
    ("stop", [""], "stop"),
    ("stop", [1], "stop[0]"),
    ("logit_bias", {str(i): 1 for i in range(1025)}, "logit_bias"),
    ("logit_bias", {"x": 1}, "logit_bias"),
    ("logit_bias", {"1": 101}, "logit_bias"),
    ("logit_bias", {"9" * 40: 1}, "logit_bias"),
    ("top_logprobs", 5, "top_logprobs"),
    ("stop_token_ids", [-1], "stop_token_ids[0]"),
    ("timeout", 0, "timeout"),
    ("stream", "yes", "stream"),
    ("stream_options", {"include_usage": True}, "stream_options"),
    ("reasoning_effort", "extreme", "reasoning_effort"),
    ("response_format", {"type": "xml"}, "response_format.type"),
    ("response_format", {"type": "json_schema"}, "response_format.json_schema.schema"),
    ("guided_grammar", "root ::= x", "guided_grammar"),
    ("structured_outputs", {}, "structured_outputs"),
    ("structured_outputs", {"grammar": "x"}, "structured_outputs.grammar"),
    ("functions", [{"name": "f"}], "functions"),
    ("function_call", {"name": "f"}, "function_call"),
    ("tools", [{"type": "function"}], "tools[0].function"),
    ("tools", [{"type": "function", "function": {"name": "a b"}}], "tools[0].function.name"),
    ("tools", [{"type": "function", "function": {"name": "f"}}] * 2, "tools"),
    ("tool_choice", "required", "tool_choice"),
    ("functions", [{}], "functions"),
    ("model", "x" * 300, "model"),
]


@pytest.mark.parametrize(("body", "param"), [row[1:] for row in BODIES], ids=[row[0] for row in BODIES])
async def test_a_bad_body_is_answered_with_400_and_its_param(house: Any, body: bytes, param: str) -> None:
    status, answer = await house.post(body)
    assert status == 400
    error = answer["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    assert error["param"] == param
    assert house.gateway.rejected == [("invalid_request", "/v1/chat/completions", "req_1")]
    assert not house.gateway.submitted
    await house.canary()


@pytest.mark.parametrize("path", OTHER_BODIES)
@pytest.mark.parametrize("body", [row[1] for row in ANYWHERE], ids=[row[0] for row in ANYWHERE])
async def test_a_bad_body_is_refused_at_every_endpoint(house: Any, path: str, body: bytes) -> None:
    status, answer = await house.post(body.replace(b"%s", OTHER_BODIES[path]), path=path)
    assert status == 400
    assert answer["error"]["type"] == "invalid_request_error"
    assert answer["error"]["param"] in {"body", "zeta", "model"}
    assert not house.gateway.submitted
    await house.canary()


@pytest.mark.parametrize("path", OTHER_BODIES)
async def test_sizes_types_and_encodings_are_checked_at_every_endpoint(house: Any, path: str) -> None:
    good = b"{%s}" % OTHER_BODIES[path]
    big = b'{%s,"zeta":"' % OTHER_BODIES[path] + b"x" * (10 << 20) + b'"}'
    assert (await house.post(good, path=path))[0] == 200
    assert (await house.post(io.BytesIO(big), path=path))[0] == 413
    assert (await house.post(good, path=path, headers={"Content-Type": "text/plain"}))[0] == 415
    assert (await house.post(good, path=path, headers={"Content-Encoding": "gzip"}))[0] == 415
    async with house.session.get(path) as response:
        assert response.status == 405
    await house.canary()


SHARED_FIELDS = {
    "max_tokens", "seed", "priority", "temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty",
    "repetition_penalty", "stop", "logit_bias", "stop_token_ids", "timeout", "stream", "model",
}  # fmt: skip


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/responses"])
@pytest.mark.parametrize(
    ("field", "value", "param"),
    [row for row in FIELDS if row[0] in SHARED_FIELDS],
    ids=[f"{row[0]}={str(row[1])[:24]}" for row in FIELDS if row[0] in SHARED_FIELDS],
)
async def test_a_shared_field_is_checked_at_every_endpoint(
    house: Any, path: str, field: str, value: Any, param: str
) -> None:
    if path == "/v1/responses" and field == "max_tokens":
        field, param = "max_output_tokens", "max_output_tokens"
    text = str(value) if type(value) is int else msgspec.json.encode(value).decode()
    body = b'{%s,"%s":%s}' % (OTHER_BODIES[path], field.encode(), text.encode())
    status, answer = await house.post(body, path=path)
    assert (status, answer["error"]["param"]) == (400, param)
    await house.canary()


@pytest.mark.parametrize(("field", "value", "param"), FIELDS, ids=[f"{row[0]}={str(row[1])[:24]}" for row in FIELDS])
async def test_a_bad_field_is_answered_with_400_and_its_name(house: Any, field: str, value: Any, param: str) -> None:
    # msgspec refuses to write integers beyond 64 bits; a client may write them.
    text = str(value) if type(value) is int else msgspec.json.encode(value).decode()
    status, answer = await house.post(f'{{"messages":[{{"role":"user","content":"x"}}],"{field}":{text}}}'.encode())
    assert (status, answer["error"]["param"]) == (400, param)
    assert param.partition("[")[0] in answer["error"]["message"]
    await house.canary()


async def test_two_different_token_limits_are_refused(house: Any) -> None:
    status, answer = await house.chat(max_tokens=5, max_completion_tokens=6)
    assert (status, answer["error"]["param"]) == (400, "max_completion_tokens")


async def test_top_logprobs_over_20_is_refused_by_the_name_that_was_written(house: Any) -> None:
    status, answer = await house.chat(logprobs=True, top_logprobs=21)
    assert (status, answer["error"]["param"]) == (400, "top_logprobs")
    assert answer["error"]["message"].startswith("top_logprobs is 21")


@pytest.mark.parametrize(
    "headers",
    [
        {"Content-Type": "text/plain"},
        {"Content-Type": "multipart/form-data"},
        {"Content-Encoding": "gzip"},
        {"Content-Encoding": "br"},
    ],
)
async def test_other_content_types_and_encodings_are_415(house: Any, headers: dict[str, str]) -> None:
    status, answer = await house.chat(headers=headers)
    assert (status, answer["error"]["code"]) == (415, "unsupported_media_type")
    await house.canary()


async def test_a_body_over_the_limit_is_413_announced_or_not(house: Any) -> None:
    big = b'{"x":"' + b"x" * (10 << 20) + b'"}'

    async def dripped() -> Any:
        for start in range(0, len(big), 1 << 20):
            yield big[start : start + (1 << 20)]

    for data in (io.BytesIO(big), dripped()):
        async with house.session.post(
            "/v1/chat/completions", data=data, headers={"Content-Type": "application/json"}
        ) as response:
            assert response.status == 413
            assert (await response.json())["error"]["code"] == "body_too_large"
    await house.canary()


async def test_a_dripped_body_is_408_when_its_time_is_up(house: Any) -> None:
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    reader, writer = await house.raw(head + b"Content-Length: 1000\r\n\r\n")

    async def drip() -> None:
        while not writer.is_closing():
            writer.write(b" ")
            await asyncio.sleep(0.05)

    dripping = asyncio.create_task(drip())
    answer = await asyncio.wait_for(reader.readuntil(b"}}"), 5)
    dripping.cancel()
    writer.close()
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert b'"code":"body_timeout"' in answer
    await house.canary()


async def test_a_broken_chunked_body_is_400(house: Any) -> None:
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    reader, writer = await house.raw(head + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n")
    answer = await asyncio.wait_for(reader.readuntil(b"}}"), 5)
    writer.close()
    assert b" 400 " in answer.partition(b"\r\n")[0]
    await house.canary()


@pytest.mark.parametrize(
    ("error", "status", "kind", "retry_after"),
    [
        (ModelNotFound("no such model", param="model"), 404, "invalid_request_error", None),
        (ContextLengthExceeded("too long", param="messages"), 400, "invalid_request_error", None),
        (QueueFull("full", retry_after_s=2.2), 429, "rate_limit_error", "3"),
        (MemoryExhausted("full", retry_after_s=0.1), 503, "server_error", "1"),
    ],
)
@pytest.mark.parametrize("stream", [True, False])
async def test_a_refusal_keeps_its_own_status(
    house: Any, error: Any, status: int, kind: str, retry_after: str | None, stream: bool
) -> None:
    from gptoss.actors.generation import Generation, Outcome

    async def refuse(generation: Generation) -> None:
        generation.end(Outcome(error=error))

    house.gateway.script = refuse
    body = {"messages": [{"role": "user", "content": "x"}], "stream": stream}
    async with house.session.post("/v1/chat/completions", json=body) as response:
        assert response.status == status
        assert response.headers.get("Retry-After") == retry_after
        answer = (await response.json())["error"]
    assert (answer["type"], answer["code"]) == (kind, error.code)
    assert not house.gateway.rejected, "a submitted request is recorded by its own actor"


@pytest.mark.parametrize(
    "path", ["/nothing", "/v1/models/..%2f..%2fetc", "/v1/models/%00", "//", "/v1//models", "/%ff"]
)
async def test_unknown_and_encoded_paths_are_404(house: Any, path: str) -> None:
    reader, writer = await house.raw(f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
    answer = await asyncio.wait_for(reader.read(), 5)
    writer.close()
    assert answer.startswith(b"HTTP/1.1 404 ")
    assert b'"type":"invalid_request_error"' in answer
    await house.canary()


async def test_a_wrong_method_is_405_and_names_the_right_one(house: Any) -> None:
    async with house.session.get("/v1/chat/completions") as response:
        assert response.status == 405
        assert response.headers["Allow"] == "POST"
        assert (await response.json())["error"]["code"] == "method_not_allowed"


async def test_a_fault_of_the_server_is_an_envelope_without_its_cause(open_house: Callable[..., Any]) -> None:
    def broken() -> dict[str, Any]:
        raise RuntimeError("secret detail")

    house = await open_house(stats=broken)
    async with house.session.get("/stats") as response:
        assert response.status == 500
        answer = await response.json()
    assert answer["error"]["code"] == "internal_error"
    assert "secret" not in str(answer)


async def test_new_requests_are_503_while_draining(open_house: Callable[..., Any]) -> None:
    house = await open_house(draining=lambda: True)
    status, answer = await house.chat()
    assert (status, answer["error"]["code"]) == (503, "not_ready")
    assert house.gateway.rejected[0][0] == "not_ready"
    reader, writer = await house.raw(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
    answer = await asyncio.wait_for(reader.read(), 5)
    writer.close()
    assert b"\r\nConnection: close\r\n" in answer, "clients should go elsewhere with their next request"
