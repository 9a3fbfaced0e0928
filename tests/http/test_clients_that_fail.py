"""Clients that leave or stop reading: their request is cancelled and nothing else suffers."""

import asyncio
import socket
from collections.abc import Callable
from typing import Any

import pytest
from aiohttp import web

from gptoss.actors.generation import Delta, Generation, Outcome
from gptoss.http.routes import make_app

WAIT_S = 5.0


async def queued_forever(generation: Generation) -> None:
    while generation.outcome is None:
        await asyncio.sleep(0.005)


async def silent_forever(generation: Generation) -> None:
    generation.put_admitted(4)
    generation.put(Delta(text="Half", token_ids=(1,)))
    await queued_forever(generation)


async def flows_forever(generation: Generation) -> None:
    generation.put_admitted(4)
    while generation.outcome is None:
        generation.put(Delta(text="x" * 200, token_ids=(1,)))
        await asyncio.sleep(0.001)


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("script", [queued_forever, silent_forever, flows_forever])
async def test_a_client_that_leaves_cancels_its_request(
    house: Any, chat_bytes: Callable[..., bytes], script: Any, stream: bool
) -> None:
    house.gateway.script = script
    _, writer = await house.raw(chat_bytes(stream=stream))
    while not house.gateway.running:
        await asyncio.sleep(0.005)
    await asyncio.sleep(0.02)
    writer.transport.abort()
    await asyncio.wait_for(house.gateway.over.wait(), WAIT_S)
    assert [reason for _, reason in house.gateway.cancelled] == ["disconnect"]
    house.gateway.script = type(house.gateway)().script
    await house.canary()


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("script", [queued_forever, silent_forever])
async def test_an_embedders_server_that_cancels_no_handlers_still_notices(
    house: Any, chat_bytes: Callable[..., bytes], script: Any, stream: bool
) -> None:
    house.gateway.script = script
    parent = web.Application()
    parent.add_subapp("/llm", make_app(house.context))
    runner = web.AppRunner(parent, handler_cancellation=False)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    _, writer = await asyncio.open_connection("127.0.0.1", site.port)
    writer.write(chat_bytes(stream=stream).replace(b"POST /v1", b"POST /llm/v1"))
    while not house.gateway.running:
        await asyncio.sleep(0.005)
    writer.transport.abort()
    await asyncio.wait_for(house.gateway.over.wait(), WAIT_S)
    await runner.cleanup()
    assert [reason for _, reason in house.gateway.cancelled] == ["disconnect"]


async def narrow_client(house: Any) -> socket.socket:
    """A connection whose kernel takes next to nothing before its program reads."""
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2304)
    client.setblocking(False)
    await asyncio.get_running_loop().sock_connect(client, ("127.0.0.1", house.port))
    return client


@pytest.mark.parametrize("text_bytes", [200, 20_000])
async def test_a_client_that_does_not_read_is_dropped(
    house: Any, chat_bytes: Callable[..., bytes], text_bytes: int
) -> None:
    """A thin stream that fits into kernel buffers stalls as visibly as a fat one that blocks the writer."""

    async def flows(generation: Generation) -> None:
        generation.put_admitted(4)
        while generation.outcome is None:
            generation.put(Delta(text="x" * text_bytes, token_ids=(1,)))
            await asyncio.sleep(0.002)

    house.gateway.script = flows
    client = await narrow_client(house)
    await asyncio.get_running_loop().sock_sendall(client, chat_bytes(stream=True))
    await asyncio.wait_for(house.gateway.over.wait(), WAIT_S)
    client.close()
    assert house.gateway.notices == ["first_byte", "slow"]
    assert house.gateway.stalled_ms >= 400
    house.gateway.script = type(house.gateway)().script
    await house.canary()


async def test_a_slow_client_that_does_read_is_kept(house: Any, chat_bytes: Callable[..., bytes]) -> None:
    async def floods(generation: Generation) -> None:
        generation.put_admitted(4)
        generation.put(Delta(text="x" * 500_000, token_ids=(1,)))
        await queued_forever(generation)

    house.gateway.script = floods
    loop = asyncio.get_running_loop()
    client = await narrow_client(house)
    await loop.sock_sendall(client, chat_bytes(stream=True))
    for _ in range(60):  # three times the stall limit, always reading a little
        assert await loop.sock_recv(client, 1000)
        await asyncio.sleep(0.02)
    assert house.gateway.notices == ["first_byte"]
    client.close()
    await asyncio.wait_for(house.gateway.over.wait(), WAIT_S)
    assert house.gateway.notices == ["first_byte", "disconnect"]


async def test_the_end_of_a_long_answer_waits_for_a_slow_client(house: Any, chat_bytes: Callable[..., bytes]) -> None:
    async def ends_at_once(generation: Generation) -> None:
        generation.put_admitted(4)
        generation.put(Delta(text="x" * 200_000, token_ids=(1,)))
        generation.end(Outcome(finish_reason="stop"))

    house.gateway.script = ends_at_once
    loop = asyncio.get_running_loop()
    client = await narrow_client(house)
    await loop.sock_sendall(client, chat_bytes(stream=True))
    received = b""
    while not received.endswith(b"0\r\n\r\n"):
        received += await loop.sock_recv(client, 4000)
        await asyncio.sleep(0.005)
    client.close()
    assert received.count(b"x") >= 200_000
    assert b"data: [DONE]" in received


async def test_a_stream_that_waits_for_its_tokens_is_no_stall(house: Any, chat_bytes: Callable[..., bytes]) -> None:
    house.gateway.script = silent_forever
    reader, writer = await house.raw(chat_bytes(stream=True))
    await reader.readuntil(b"Half")
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(house.gateway.over.wait(), 0.9)
    writer.transport.abort()
    await asyncio.wait_for(house.gateway.over.wait(), WAIT_S)
    assert house.gateway.notices == ["first_byte", "disconnect"]


async def test_a_client_that_leaves_during_its_upload_leaves_no_request(house: Any) -> None:
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    _, writer = await house.raw(head + b'Content-Length: 500\r\n\r\n{"messages":')
    await asyncio.sleep(0.02)
    writer.transport.abort()
    await house.canary()
    assert len(house.gateway.submitted) == 1


async def test_closing_the_server_cancels_as_shutdown(house: Any, chat_bytes: Callable[..., bytes]) -> None:
    house.gateway.script = silent_forever
    reader, writer = await house.raw(chat_bytes(stream=True))
    await reader.readuntil(b"Half")
    await house.server.close()
    await asyncio.wait_for(house.gateway.over.wait(), WAIT_S)
    assert [reason for _, reason in house.gateway.cancelled] == ["shutdown"]
    writer.close()
