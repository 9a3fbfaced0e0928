"""A server that has seen every kind of end, its metrics as Prometheus gets them, and the tools that check files.

``make check-deploy`` installs the tools and says where they are in ``DEPLOY_TOOLS``; without that, tests that need one
are left out. (Its name has no ``GPTOSS_``: that would be a setting to the servers that tests start.)
"""

import asyncio
import os
import shutil
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest

import gptoss
from gptoss.app import ServingSystem
from gptoss.config import Settings
from gptoss.engine.model_source import PreparedModel
from gptoss.engine.port import ChatMessage, RenderedPrompt
from gptoss.http.server import RunningServer, serve
from gptoss.testing import FAKE_MODEL, FakeDriver, FakeOptions, FakeRenderer, run_until_idle

TOOLS = os.environ.get("DEPLOY_TOOLS")
MODEL = PreparedModel(folder="", model_name=FAKE_MODEL, source="test", max_model_len=4096)
UNRENDERABLE = "unrenderable"


class BrittleRenderer(FakeRenderer):
    """Breaks on one word, so that a request fails."""

    def render_chat(self, messages: tuple[ChatMessage, ...], **options: Any) -> RenderedPrompt:
        if any(message.content == UNRENDERABLE for message in messages):
            raise ValueError("as planned")
        return super().render_chat(messages, **options)


@asynccontextmanager
async def eventful_server() -> AsyncGenerator[RunningServer]:
    """A server on a loopback port that has completed, refused, cancelled and failed requests, and has lost an engine."""
    drivers = iter([FakeDriver(_options(die_at_step=6)), FakeDriver(_options())])
    settings = Settings(journal="memory", devices="cpu", max_queue=2)
    async with ServingSystem(
        settings, drivers=lambda _: next(drivers), renderer=BrittleRenderer(), model=MODEL
    ) as system:
        await system.ready(10.0)
        server = await serve(gptoss.make_app(system), "127.0.0.1", 0)
        try:
            async with aiohttp.ClientSession(server.url) as session:
                await _serve_everything(session)
            await run_until_idle(system.system)
            yield server
        finally:
            await server.close()


def _options(**changes: Any) -> FakeOptions:
    return FakeOptions(step_s=0.002, max_batch_size=2, kv_budget_bytes=2000, **changes)


async def _serve_everything(session: aiohttp.ClientSession) -> None:
    async def chat(text: str, *, name: str = "", **fields: Any) -> int:
        body = {"messages": [{"role": "user", "content": text}], "max_tokens": 8, **fields}
        async with session.post("/v1/chat/completions", json=body, headers={"X-Request-ID": name}) as response:
            await response.read()
            return response.status

    assert await chat("hello there") == 200
    assert await chat("hello there") == 200
    assert await chat(UNRENDERABLE) == 500
    assert await chat("word " * 1500) == 503
    assert await chat("hello", temperature=-1) == 400
    crowd = await asyncio.gather(*(chat("one of many", max_tokens=40) for _ in range(12)))
    assert set(crowd) == {200, 429}
    cancelled = asyncio.ensure_future(chat("a long story", name="long", max_tokens=900))
    async with asyncio.timeout(10.0):
        while (await session.post("/cancel/long")).status != 200:
            await asyncio.sleep(0.005)
        assert await cancelled == 200


@pytest.fixture(scope="session")
def scrape() -> str:
    """``/metrics`` of the eventful server."""

    async def fetch() -> str:
        async with eventful_server() as server, aiohttp.ClientSession(server.url) as session:
            return await (await session.get("/metrics")).text()

    return asyncio.run(fetch())


@pytest.fixture
async def eventful_url() -> AsyncIterator[str]:
    """The address of such a server."""
    async with eventful_server() as server:
        yield server.url


@pytest.fixture
def tool() -> Callable[[str], str]:
    """Finds a tool by name, in the environment of the tools or on this machine; leaves the test out where it is in neither."""

    def find(name: str) -> str:
        if TOOLS is None:
            pytest.skip("the tools come with make check-deploy")
        found = shutil.which(name, path=f"{Path(TOOLS).resolve() / 'bin'}{os.pathsep}{os.environ['PATH']}")
        if found is None:
            pytest.skip(f"{name} is not on this machine")
        return found

    return find
