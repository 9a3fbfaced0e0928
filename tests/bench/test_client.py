"""The client of load tests, against servers that answer oddly."""

import aiohttp
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from gptoss.bench.client import ChatClient, Timed
from gptoss.clock import SystemClock


async def asked(status: int, body: str, **headers: str) -> Timed:
    """What the client says of a server that always answers this."""

    async def answer(_: web.Request) -> web.Response:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        return web.Response(status=status, text=body, headers=named)

    app = web.Application()
    app.router.add_post("/v1/chat/completions", answer)
    async with TestServer(app) as server, aiohttp.ClientSession() as session:
        return await ChatClient(session, str(server.make_url("/v1")), SystemClock()).ask({})


async def test_a_refusal_has_its_code_and_when_to_come_again() -> None:
    timed = await asked(429, '{"error": {"code": "queue_full"}}', Retry_After="3")
    assert (timed.status, timed.error, timed.retry_after_s) == (429, "429 queue_full", 3.0)


@pytest.mark.parametrize("retry_after", ["", "Mon, 30 Nov 2026 10:00:00 GMT", "-1", "1e9"])
async def test_anything_but_seconds_is_no_time_to_come_again(retry_after: str) -> None:
    timed = await asked(503, "not JSON", Retry_After=retry_after)
    assert (timed.status, timed.error, timed.retry_after_s) == (503, "503", 0.0)


async def test_a_stream_that_breaks_off_is_no_success() -> None:
    timed = await asked(200, 'data: {"choices": [{"delta": {"content": "Hello"}}]}\n\n')
    assert (timed.status, timed.text) == (200, "Hello")
    assert timed.error
