"""What many tests share: the demo model, prepared once, and the journal of a server that had a bad night."""

import asyncio
import os
import shutil
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec
import pytest
from aiohttp.test_utils import TestClient, TestServer

import gptoss
from gptoss.actors.generation import GenerateRequest, Generation
from gptoss.app import ServingSystem
from gptoss.config import Settings
from gptoss.engine.model_folder import no_progress
from gptoss.engine.model_source import PreparedModel, prepare_in_child
from gptoss.engine.port import ChatMessage
from gptoss.errors import GptossError
from gptoss.messages.sampling import SamplingParams
from gptoss.testing import FAKE_MODEL, FakeDriver, FakeOptions, FakeRenderer

REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def demo_cache() -> Path:
    """A cache folder that outlives the test run: dequantising the demo takes about twenty seconds the first time."""
    return Path(os.environ.get("DEMO_TEST_CACHE") or REPOSITORY / ".cache")


@pytest.fixture(scope="session")
def demo_folder(demo_cache: Path) -> str:
    """The prepared folder of the demo model in bfloat16."""
    return prepare_in_child("demo", cache_dir=demo_cache, dtype="auto", progress=no_progress).folder


@pytest.fixture
def options() -> FakeOptions:
    """Of the fake engine of ``system``."""
    return FakeOptions(step_s=0.001)


@pytest.fixture
def settings() -> Settings:
    """Of ``system``."""
    return Settings(journal="memory", devices="cpu")


@pytest.fixture
async def system(options: FakeOptions, settings: Settings) -> AsyncIterator[ServingSystem]:
    """A whole system over a fake engine."""
    model = PreparedModel(folder="", model_name=FAKE_MODEL, source="test", max_model_len=4096)
    async with ServingSystem(
        settings, drivers=lambda _: FakeDriver(options), renderer=FakeRenderer(), model=model
    ) as serving:
        await serving.ready(10.0)
        yield serving


@pytest.fixture
async def client(system: ServingSystem) -> AsyncIterator[TestClient[Any, Any]]:
    """A client of ``system`` over HTTP."""
    async with TestClient(TestServer(gptoss.make_app(system))) as made:
        yield made


CANARY = "canary-7f3a"
"""Stands in every prompt of the bad night, and may show at no content level below ``full``."""
STOP_CANARY = "canary-stop-91bc"
"""Is every request's stop string, and may show at no content level below ``tokens``."""


@pytest.fixture(scope="session")
def bad_night(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data folder: little memory, an engine that died, a cancellation, then kill -9 and a second boot."""
    live, image = tmp_path_factory.mktemp("live"), tmp_path_factory.mktemp("night") / "data"

    async def night() -> None:
        async with _server(live, FakeOptions(step_s=0.001, die_at_step=12, kv_budget_bytes=260)) as system:
            await system.ready(10.0)
            await asyncio.gather(*(_read(_ask(system, f"night-{n:02}", 10 + n % 5)) for n in range(30)))
            cancelled = _ask(system, "cancelled", 100)
            await anext(delta async for delta in cancelled if delta.token_ids)
            cancelled.cancel()
            await _read(cancelled)
            await _read(_ask(system, "shrunk", 1000))
            await _read(_ask(system, "too-large", 5, words=300))
            open_ones = [_ask(system, f"crashed-{n}", 60) for n in range(2)]
            await anext(delta async for delta in open_ones[0] if delta.token_ids)
            await asyncio.to_thread(system.journal.flush)
            await asyncio.to_thread(shutil.copytree, live, image)
        async with _server(image, FakeOptions()) as system:
            await system.ready(10.0)
            await asyncio.gather(*(_read(_ask(system, f"s{n}", 5)) for n in range(3)))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("gptoss.actors.decider.SNAPSHOT_COMMANDS_MIN", 20)
        asyncio.run(night())
    return image


def _server(folder: Path, options: FakeOptions) -> ServingSystem:
    model = PreparedModel(folder="", model_name=FAKE_MODEL, source="test", max_model_len=4096)
    drivers = iter([FakeDriver(options), FakeDriver(msgspec.structs.replace(options, die_at_step=0))])
    settings = Settings(devices="cpu", data_dir=str(folder), content="full")
    return ServingSystem(settings, drivers=lambda _: next(drivers), renderer=FakeRenderer(), model=model)


def _ask(system: ServingSystem, name: str, max_tokens: int, *, words: int = 2) -> Generation:
    message = ChatMessage(role="user", content=f"{CANARY} " * words)
    sampling = SamplingParams(max_tokens=max_tokens, seed=3, stop=(STOP_CANARY,))
    return system.submit(
        GenerateRequest(messages=(message,), sampling=sampling, request_id=name, session_id=f"session-of-{name}")
    )


async def _read(generation: Generation) -> None:
    with suppress(GptossError):
        async for _ in generation:
            pass
