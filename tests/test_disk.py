"""A disk that fails under a running server: nothing is promised that is not kept, and the server can still be looked at."""

import asyncio
import errno
import os
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from aiohttp.test_utils import TestClient, TestServer

import gptoss
from gptoss.actors.generation import GenerateRequest
from gptoss.app import ServingSystem
from gptoss.config import Settings
from gptoss.engine.model_source import PreparedModel
from gptoss.errors import NotReady
from gptoss.messages import events as ev
from gptoss.telemetry.segment_reader import SegmentReader
from gptoss.testing import FAKE_MODEL, FakeDriver, FakeOptions, FakeRenderer

MODEL = PreparedModel(folder="", model_name=FAKE_MODEL, source="test", max_model_len=4096)
BODY: dict[str, Any] = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 3}
WAIT_S = 10.0


@asynccontextmanager
async def served(folder: Path) -> AsyncGenerator[tuple[ServingSystem, TestClient[Any, Any]]]:
    settings = Settings(devices="cpu", data_dir=str(folder))
    async with ServingSystem(
        settings, drivers=lambda _: FakeDriver(FakeOptions(step_s=0.005)), renderer=FakeRenderer(), model=MODEL
    ) as system:
        await system.ready(WAIT_S)
        async with TestClient(TestServer(gptoss.make_app(system))) as client:
            yield system, client


async def chat(client: TestClient[Any, Any], **fields: Any) -> tuple[int, Any, str]:
    async with client.post("/v1/chat/completions", json=BODY | fields) as answer:
        return answer.status, await answer.json(), answer.headers.get("Retry-After", "")


@pytest.mark.parametrize(
    ("call", "number"), [("fdatasync", errno.EIO), ("write", errno.ENOSPC), ("write", errno.EDQUOT)]
)
async def test_a_disk_that_fails_refuses_new_requests_and_leaves_the_server_to_be_looked_at(
    call: str, number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with served(tmp_path) as (system, client):
        assert (await chat(client))[0] == 200
        assert await asyncio.to_thread(system.journal.flush)
        kept = system.journal.health.committed_pos
        running = asyncio.create_task(chat(client, max_tokens=400))
        while not any(isinstance(r.event, ev.FirstTokenProduced) for r in system.journal.read(after=kept)):
            await asyncio.sleep(0.005)
        assert await asyncio.to_thread(system.journal.flush)
        tried: list[int] = []

        def failing(fd: int, *_: object) -> int:
            tried.append(fd)
            raise OSError(number, os.strerror(number))

        with monkeypatch.context() as patch:
            patch.setattr(os, call, failing)
            async with asyncio.timeout(WAIT_S):
                while system.journal.health.ok:
                    await asyncio.sleep(0.005)
            kept = system.journal.health.committed_pos
            for fields in ({}, {"stream": True}):
                status, answer, retry_after = await chat(client, **fields)
                assert (status, answer["error"]["code"]) == (503, "not_ready")
                assert errno.errorcode[number] in answer["error"]["message"]
                assert int(retry_after) >= 1
            with pytest.raises(NotReady, match=errno.errorcode[number]):
                await system.submit(GenerateRequest(prompt="x")).text()
            async with client.get("/health/ready") as answer:
                assert answer.status == 503
                assert errno.errorcode[number] in (await answer.json())["reason"]
            for path in ("/health/live", "/metrics", "/stats", "/admin/requests", "/admin/events", "/v1/models"):
                async with client.get(path) as answer:
                    assert answer.status == 200, path
            assert (await running)[0] == 200, "who runs already is served to the end"
        assert (await chat(client))[0] == 503, "a disk that is well again does not make up for what is missing"
        assert len(tried) == 1, "nothing is tried twice on a disk that has failed"
        assert system.journal.health.committed_pos == kept
    on_disk = [record.meta.pos for record in SegmentReader(tmp_path / "journal").read()]
    assert on_disk[: kept + 1] == list(range(kept + 1))
    async with served(tmp_path) as (system, client):
        assert (await chat(client))[0] == 200
        ends = [r.event for r in system.journal.read() if isinstance(r.event, ev.TERMINAL_EVENTS)]
    assert [type(end).__name__ for end in ends] == ["RequestCompleted", "RequestFailed", "RequestCompleted"]
    assert getattr(ends[1], "code", "") == "aborted_by_crash"
