"""The listening socket and the bounds of a connection."""

import asyncio
import socket
from typing import Any

import pytest
from aiohttp import web

from gptoss.errors import ConfigError
from gptoss.http.server import serve


async def test_a_port_in_use_is_named_with_the_way_out(house: Any) -> None:
    with pytest.raises(ConfigError, match=rf"port {house.port} .* in use.*--auto-port"):
        await serve(web.Application(), "127.0.0.1", house.port)


async def test_auto_port_takes_the_next_free_port(house: Any) -> None:
    server = await serve(web.Application(), "127.0.0.1", house.port, auto_port=True)
    assert house.port < server.port < house.port + 100
    await server.close()


@pytest.mark.parametrize("host", ["192.0.2.1", "no such host"])
async def test_an_address_of_another_machine_is_refused(host: str) -> None:
    with pytest.raises(ConfigError, match=host):
        await serve(web.Application(), host, 0)


async def test_closing_twice_is_closing_once(house: Any) -> None:
    await house.server.close()
    await house.server.close()
    with pytest.raises(ConnectionRefusedError):
        await asyncio.open_connection("127.0.0.1", house.port)


async def test_dripped_headers_are_cut(house: Any) -> None:
    reader, writer = await house.raw(b"GET /health/live HTTP/1.1\r\n")

    async def drip() -> None:
        while not writer.is_closing():
            writer.write(b"X: y\r\n")
            await asyncio.sleep(0.05)

    dripping = asyncio.create_task(drip())
    try:
        assert await asyncio.wait_for(reader.read(), 3) == b""
    except ConnectionResetError:
        pass  # the kernel tells it as a reset when drips were on their way
    finally:
        dripping.cancel()
        writer.close()
    await house.canary()


async def test_headers_of_a_second_request_have_the_same_deadline(house: Any) -> None:
    reader, writer = await house.raw(b"GET /health/live HTTP/1.1\r\nHost: localhost\r\n\r\n")
    await reader.readuntil(b"}")
    writer.write(b"GET /health/live HTTP/1.1\r\n")
    assert await asyncio.wait_for(reader.read(), 3) == b""
    writer.close()


async def test_a_connection_may_idle_longer_than_headers_may_take(house: Any) -> None:
    reader, writer = await house.raw(b"")
    await asyncio.sleep(0.5)
    writer.write(b"GET /health/live HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
    assert (await asyncio.wait_for(reader.read(), 3)).startswith(b"HTTP/1.1 200")
    writer.close()


@pytest.mark.parametrize(
    "data",
    [
        b"nonsense\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost localhost\r\n\r\n",
        b"GET / HTTP/1.1\r\nX: " + b"y" * 20_000 + b"\r\n\r\n",
        b"POST / HTTP/1.1\r\nContent-Length: -1\r\n\r\n",
    ],
)
async def test_what_is_no_http_gets_openais_error_body(house: Any, data: bytes) -> None:
    reader, writer = await house.raw(data)
    answer = await asyncio.wait_for(reader.read(), 3)
    writer.close()
    assert b" 400 " in answer.partition(b"\r\n")[0]
    assert b'"type":"invalid_request_error"' in answer
    await house.canary()


async def test_connections_probe_their_peers(house: Any) -> None:
    async with house.session.get("/health/live") as response:
        await response.read()
    runner: Any = house.server._runner
    connection = runner.server.connections[0]
    sock = connection.transport.get_extra_info("socket")
    assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
    options = (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT)
    assert [sock.getsockopt(socket.IPPROTO_TCP, option) for option in options] == [5, 3, 3]


def test_the_standard_librarys_http_is_not_shadowed() -> None:
    import http

    assert "gptoss" not in str(http.__file__)
    assert http.HTTPStatus.OK == 200
