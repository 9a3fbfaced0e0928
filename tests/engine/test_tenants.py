"""Tenants and the prefix cache, over HTTP into a real engine: nobody computes less because another tenant asked before."""

from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
import pytest_asyncio
from aiohttp.test_utils import TestClient, TestServer

import gptoss
from gptoss.app import ServingSystem
from gptoss.config import Settings
from gptoss.engine.inprocess import InProcessDriver
from gptoss.engine.model_source import PreparedModel
from gptoss.testing import FakeRenderer

pytestmark = pytest.mark.asyncio(loop_scope="module")

PROMPT = " ".join("x" * (1 + n % 50) for n in range(300))
CACHED = 256
"""Of the prompt's 300 tokens, those of whole blocks: 256 long where bits depend on how a prompt is cut."""
BODIES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": [{"role": "user", "content": PROMPT}], "max_tokens": 2},
    "/v1/completions": {"prompt": PROMPT, "max_tokens": 2},
    "/v1/responses": {"input": PROMPT, "max_output_tokens": 2, "store": False},
}


@pytest_asyncio.fixture(scope="module", loop_scope="module", params=["slots", "paged"])
async def client(
    request: pytest.FixtureRequest, tiny_folder: Callable[[str], str]
) -> AsyncIterator[TestClient[Any, Any]]:
    """A server with a tiny model; each test has prefixes of its own, by its salts and users."""
    model = PreparedModel(folder=tiny_folder("llama"), model_name="tiny", source="test", max_model_len=512)
    settings = Settings(journal="memory", devices="cpu", num_threads=1, dtype="float32", kv_layout=request.param)
    async with ServingSystem(settings, drivers=InProcessDriver, renderer=FakeRenderer(), model=model) as system:
        await system.ready(60.0)
        async with TestClient(TestServer(gptoss.make_app(system))) as made:
            yield made


async def cached(client: TestClient[Any, Any], path: str, **fields: Any) -> int:
    """How many tokens of the prompt the cache had."""
    async with client.post(path, json=BODIES[path] | fields) as response:
        assert response.status == 200, await response.text()
        usage = (await response.json())["usage"]
    details = usage.get("prompt_tokens_details") or usage.get("input_tokens_details")
    found: int = details["cached_tokens"]
    return found


@pytest.mark.parametrize("path", BODIES)
async def test_a_tenant_finds_its_own_beginnings_and_nobody_elses(client: TestClient[Any, Any], path: str) -> None:
    tenants = [f"{name} of {path}" for name in ("a", "b", "c")]
    assert [await cached(client, path, user=user) for user in tenants] == [0, 0, 0]
    assert [await cached(client, path, user=user) for user in tenants] == [CACHED] * 3


async def test_endpoints_share_what_is_one_tenants(client: TestClient[Any, Any]) -> None:
    found = [await cached(client, path, user="everywhere") for path in BODIES]
    assert found == [0, CACHED, CACHED]


@pytest.mark.parametrize("path", BODIES)
async def test_a_salt_parts_the_requests_of_one_tenant_and_joins_no_two(
    client: TestClient[Any, Any], path: str
) -> None:
    for who in ({}, {"user": f"first by {path}"}, {"user": f"second by {path}"}):
        assert await cached(client, path, **who, cache_salt=f"one by {path}") == 0
        assert await cached(client, path, **who, cache_salt=f"two by {path}") == 0
        assert await cached(client, path, **who, cache_salt=f"one by {path}") == CACHED


async def test_requests_of_no_tenant_share(client: TestClient[Any, Any]) -> None:
    first = await cached(client, "/v1/completions")
    assert first in {0, CACHED}
    assert await cached(client, "/v1/completions") == CACHED
    assert await cached(client, "/v1/completions", user="somebody") == 0


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize("salt", ["", "x" * 257, 7, ["x"]])
async def test_a_salt_that_is_no_short_text_is_refused_by_name(
    client: TestClient[Any, Any], path: str, salt: Any
) -> None:
    async with client.post(path, json=BODIES[path] | {"cache_salt": salt}) as response:
        assert response.status == 400
        assert (await response.json())["error"]["param"] == "cache_salt"
