"""A whole request through the server, HTTP to engine processes and back, for each way of using two devices."""

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from aiohttp.test_utils import TestClient, TestServer

import gptoss
from gptoss.app import ServingSystem
from gptoss.config import Settings
from gptoss.messages import events as ev
from gptoss.replay.verify import verify
from gptoss.telemetry.recording import LiveRecording
from gptoss.testing import run_until_idle

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

PROMPT = "Two devices, one answer: " * 4


async def answer(
    folder: str, data: Path, *, engines: int = 1, **settings: Any
) -> tuple[str, dict[str, Any], ServingSystem]:
    values: dict[str, Any] = {"model": folder, "journal": "memory", "dtype": "float32", "num_threads": 1, **settings}
    serving = ServingSystem(Settings(data_dir=str(data), cache_dir=str(data), **values))
    async with serving:
        await serving.ready(240.0)
        async with asyncio.timeout(60.0):
            while len(loaded_of(serving)) < engines:
                await asyncio.sleep(0.02)
        async with TestClient(TestServer(gptoss.make_app(serving))) as client:
            body = {"prompt": PROMPT, "max_tokens": 16, "temperature": 0, "logprobs": 1, "ignore_eos": True}
            reply = await client.post("/v1/completions", json=body)
            assert reply.status == 200, await reply.text()
            choice = (await reply.json())["choices"][0]
            memory = await (await client.get("/memory_stats")).json()
        await run_until_idle(serving.system)
        assert verify(LiveRecording(serving.journal)).same
    return json.dumps(choice["logprobs"]["tokens"]), memory, serving


async def test_single_pipeline_and_tensor_give_the_same_answer(
    tiny_folder: Callable[[str], str], tmp_path: Path
) -> None:
    folder = tiny_folder("llama")
    single, _, alone = await answer(folder, tmp_path, devices="cpu:2", gpu_mode="single", kernels="torch", engines=2)
    assert sorted(loaded_of(alone)) == ["cpu:0", "cpu:1"]
    for mode in ("pipeline", "tensor"):
        found, memory, serving = await answer(folder, tmp_path, devices="cpu:2", gpu_mode=mode)
        assert found == single
        ((name, capabilities),) = loaded_of(serving).items()
        assert name == "cpu:0+cpu:1"
        assert capabilities.multi_device
        assert len(capabilities.shares) == 2
        assert sum(share.kv_budget_bytes for share in capabilities.shares) <= capabilities.kv_budget_bytes
        assert memory["executors"][name]["kv_budget_bytes"] == capabilities.kv_budget_bytes


def loaded_of(serving: ServingSystem) -> dict[str, Any]:
    events = [record.event for record in serving.journal.read() if isinstance(record.event, ev.EngineLoaded)]
    return {event.executor: event.capabilities for event in events}
