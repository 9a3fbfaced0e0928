"""The page in a headless Chromium, in front of a whole server whose engine says what a test wants.

Every test ends with the same question: did anything go to the console, and did the policy have to stop anything?
"""

import os
import re
import shutil
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any, cast

import aiohttp
import pytest
import pytest_asyncio
from playwright.async_api import Browser, BrowserContext, ConsoleMessage, Page, async_playwright

from gptoss.app import ServingSystem
from gptoss.config import Settings
from gptoss.engine import port
from gptoss.engine.answer_port import Dialect
from gptoss.engine.dialect import TaggedDialect
from gptoss.engine.model_source import PreparedModel
from gptoss.engine.tagged_output import TagFormat
from gptoss.http.server import RunningServer, serve
from gptoss.serving_context import make_app
from gptoss.testing import FakeDriver, FakeEngine, FakeOptions, FakeRenderer, FakeSequence

CHROMIUMS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
NEEDED = "GPTOSS_NEEDS_BROWSER"
SWITCHES = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
WAIT_MS = 10_000
QUICK = FakeOptions(step_s=0.004)
_VIOLATIONS = """
window.violations = [];
addEventListener("securitypolicyviolation", (e) => violations.push(`${e.violatedDirective} ${e.blockedURI} ${e.sample}`));
"""


class ThinkingRenderer(FakeRenderer):
    """Reads thoughts between ``<think>`` and ``</think>``."""

    dialect: Dialect = TaggedDialect(TagFormat(think=("<think>", "</think>")), {})


class Talk:
    """What the engine says to the next requests, a word a step; ``None`` goes on for ever."""

    def __init__(self) -> None:
        self.says: str | None = "Hello from the engine."


class _TalkingEngine(FakeEngine):
    def __init__(self, load: port.Load, options: FakeOptions, talk: Talk) -> None:
        super().__init__(load, options)
        self._talk = talk
        self._words: dict[str, list[str]] = {}

    def produce(self, sequence: FakeSequence) -> tuple[int, str]:
        name = sequence.submit.request_id
        if name not in self._words:
            says = self._talk.says
            self._words[name] = ["on and on, "] * 4000 if says is None else re.findall(r"\S+\s*|\s+", says)
        words = self._words[name]
        if sequence.produced == len(words) - 1:
            sequence.end = "stop"
        return 1 + sequence.produced % 900, words[sequence.produced]


class TalkingDriver(FakeDriver):
    """A fake engine that talks."""

    def __init__(self, talk: Talk, options: FakeOptions) -> None:
        super().__init__(options)
        self._talk = talk

    def _make_engine(self, load: port.Load) -> FakeEngine:
        return _TalkingEngine(load, self.options, self._talk)


class Stage:
    """A server, and pages in front of it.

    Attributes:
        allowed: what the console may say, as regular expressions; browsers tell of every answer from 400 on there.
    """

    def __init__(self, serving: ServingSystem, server: RunningServer, talk: Talk) -> None:
        self.serving = serving
        self.server = server
        self.talk = talk
        self.allowed: list[str] = []
        self.heard: list[str] = []
        self.session = aiohttp.ClientSession(server.url)

    async def ask(self, name: str = "", **fields: Any) -> Any:
        """A chat completion from elsewhere."""
        body = {"messages": [{"role": "user", "content": "Hi"}], **fields}
        headers = {"X-Request-ID": name} if name else {}
        async with self.session.post("/v1/chat/completions", json=body, headers=headers) as response:
            return await response.json()

    async def close(self) -> None:
        """Close the server that stands here now; tests may have put another."""
        await self.session.close()
        await self.server.close()

    def hear(self, message: ConsoleMessage) -> None:
        if message.type in {"error", "warning"} and not any(re.search(known, message.text) for known in self.allowed):
            self.heard.append(f"{message.type}: {message.text}")


class Chromium:
    """A browser; each page has a context, and so a memory, of its own."""

    def __init__(self, browser: Browser) -> None:
        self._browser = browser
        self.contexts: list[BrowserContext] = []

    async def page(self, stage: Stage, path: str = "/", **options: Any) -> Page:
        """A page of the server, loaded."""
        chosen: dict[str, Any] = {"viewport": {"width": 1280, "height": 800}, **options}
        context = await self._browser.new_context(**chosen)
        self.contexts.append(context)
        await context.add_init_script(_VIOLATIONS)
        page = await context.new_page()
        page.set_default_timeout(WAIT_MS)
        page.on("console", stage.hear)
        page.on("pageerror", lambda error: stage.heard.append(f"thrown: {error}"))
        await page.goto(stage.server.url + path)
        return page

    async def close(self) -> list[str]:
        """Close all pages; returns what their policy had to stop."""
        found: list[str] = []
        for context in self.contexts:
            for page in context.pages:
                found += cast("list[str]", await page.evaluate("window.violations ?? []"))
            await context.close()
        self.contexts.clear()
        return found


@pytest.fixture(scope="session")
def chromium_path() -> str:
    """Where Chromium is. Where CI has installed one, its absence fails the tests."""
    found = next((path for name in CHROMIUMS if (path := shutil.which(name))), None)
    if found is None:
        told = "no Chromium on this machine: the page is not tested; apt-get install chromium"
        if os.environ.get(NEEDED):
            pytest.fail(told)
        pytest.skip(told)
    return found


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def browser(chromium_path: str) -> AsyncIterator[Browser]:
    async with async_playwright() as playwright:
        launched = await playwright.chromium.launch(executable_path=chromium_path, args=SWITCHES)
        yield launched
        await launched.close()


Open = Callable[..., Awaitable[Stage]]


@pytest_asyncio.fixture(loop_scope="session")
async def chromium(browser: Browser) -> AsyncIterator[Chromium]:
    made = Chromium(browser)
    yield made
    await made.close()


@pytest_asyncio.fixture(loop_scope="session")
async def open_stage(chromium: Chromium) -> AsyncIterator[Open]:
    """Starts servers; at the end the consoles of all pages must have been silent, and nothing blocked."""
    async with AsyncExitStack() as stack:
        stages: list[Stage] = []

        async def start(*, options: FakeOptions = QUICK, driver: Any = None, **settings: Any) -> Stage:
            talk = Talk()
            made = driver or TalkingDriver(talk, options)
            chosen: dict[str, Any] = {"journal": "memory", "devices": "cpu", "served_model_name": "talker", **settings}
            model = PreparedModel(folder="", model_name="talker", source="test", max_model_len=4096)
            serving = ServingSystem(
                Settings(**chosen), drivers=lambda _: made, renderer=ThinkingRenderer(), model=model
            )
            await stack.enter_async_context(serving)
            if driver is None:
                await serving.ready(10.0)
            stage = Stage(serving, await serve(make_app(serving), "127.0.0.1", 0), talk)
            stack.push_async_callback(stage.close)
            stages.append(stage)
            return stage

        yield start
        blocked = await chromium.close()
    assert not blocked
    assert not [line for stage in stages for line in stage.heard]


@pytest_asyncio.fixture(loop_scope="session")
async def stage(open_stage: Open) -> Stage:
    return await open_stage()


@pytest.fixture
def pictures() -> Path | None:
    """A folder for screenshots, where ``GPTOSS_PICTURES`` names one."""
    wanted = os.environ.get("GPTOSS_PICTURES")
    return Path(wanted) if wanted else None
