"""A whole server over a fake engine, and the clients' own environments.

``make test-clients`` makes the environments and says where they are in ``GPTOSS_CLIENTS``; without that the default run
leaves this folder out.
"""

import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

import gptoss
from gptoss.app import ServingSystem
from gptoss.config import Settings
from gptoss.engine.model_source import PreparedModel
from gptoss.http.server import serve
from gptoss.testing import FAKE_MODEL, FakeDriver, FakeRenderer

CLIENTS = os.environ.get("GPTOSS_CLIENTS")
collect_ignore_glob = [] if CLIENTS else ["*"]

MODEL = PreparedModel(folder="", model_name=FAKE_MODEL, source="test", max_model_len=4096)


@pytest.fixture
def clients() -> Path:
    assert CLIENTS is not None
    return Path(CLIENTS).resolve()


@pytest.fixture
async def url() -> AsyncIterator[str]:
    settings = Settings(journal="memory", devices="cpu")
    async with ServingSystem(settings, drivers=lambda _: FakeDriver(), renderer=FakeRenderer(), model=MODEL) as serving:
        await serving.ready(10.0)
        server = await serve(gptoss.make_app(serving), "127.0.0.1", 0)
        yield server.url
        await server.close()
