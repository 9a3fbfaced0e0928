"""The bundle of a live server: over HTTP, from its own journal, while it serves."""

import asyncio
import errno
import io
import json
import os
import sys
import zipfile
from asyncio.subprocess import PIPE
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from aiohttp.test_utils import TestClient, TestServer

import gptoss
from gptoss.app import ServingSystem
from gptoss.config import Settings
from gptoss.engine.model_source import PreparedModel
from gptoss.messages import events as ev
from gptoss.telemetry.bundle_reader import BundleReader
from gptoss.telemetry.metrics import Metrics
from gptoss.telemetry.projection import Projection
from gptoss.telemetry.recording import LiveRecording
from gptoss.testing import FAKE_MODEL, FakeDriver, FakeOptions, FakeRenderer

MODEL = PreparedModel(folder="", model_name=FAKE_MODEL, source="test", max_model_len=4096)


@pytest.fixture(params=["segments", "memory"])
async def serving(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[ServingSystem]:
    settings = Settings(devices="cpu", journal=request.param, data_dir=str(tmp_path / "data"))
    options = FakeOptions(step_s=0.001, max_batch_size=2)
    async with ServingSystem(
        settings, drivers=lambda _: FakeDriver(options), renderer=FakeRenderer(), model=MODEL
    ) as system:
        await system.ready(10.0)
        yield system


@pytest.fixture
async def client(serving: ServingSystem) -> AsyncIterator[TestClient[Any, Any]]:
    async with TestClient(TestServer(gptoss.make_app(serving))) as client:
        yield client


async def ask(client: TestClient[Any, Any], name: str, **fields: Any) -> int:
    body = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 8, "seed": 3, **fields}
    async with client.post("/v1/chat/completions", json=body, headers={"X-Request-ID": name}) as answer:
        await answer.read()
        return answer.status


async def fetch(client: TestClient[Any, Any], path: str, folder: Path) -> tuple[BundleReader, str]:
    async with client.get(path) as answer:
        assert answer.status == 200
        data = await answer.read()
        assert len(data) == answer.content_length
        name = answer.headers["Content-Disposition"].split('"')[1]
    (folder / name).write_bytes(data)
    return BundleReader(folder / name), name


async def test_a_request_can_be_taken_from_a_server_that_goes_on_serving(
    client: TestClient[Any, Any], tmp_path: Path
) -> None:
    await asyncio.gather(*(ask(client, f"night-{number}") for number in range(6)))
    others = [asyncio.ensure_future(ask(client, f"later-{number}")) for number in range(6)]
    reader, name = await fetch(client, "/admin/debug/bundle/night-4?content=tokens", tmp_path)
    with reader:
        assert name == "gptoss-night-4.zip"
        assert reader.manifest.requests == ("night-4",)
        assert reader.manifest.missing == ()
        received = [r.event.request_id for r in reader.records() if isinstance(r.event, ev.RequestReceived)]
        tokens = [r.event for r in reader.content() if isinstance(r.event, ev.StepTokens)]
        assert received == ["night-4"]
        assert sum(len(row.token_ids) for event in tokens for row in event.rows) == 8
    assert await asyncio.gather(*others) == [200] * 6


async def test_a_server_whose_disk_failed_tells_what_it_has_in_memory(
    client: TestClient[Any, Any], serving: ServingSystem, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(_: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    assert await ask(client, "before") == 200
    assert serving.journal.flush()
    monkeypatch.setattr(os, "fdatasync", failing)
    lost = serving.submit(
        gptoss.GenerateRequest(messages=(gptoss.ChatMessage(role="user", content="hi"),), request_id="lost")
    )
    lost.cancel()
    async for _ in lost:
        pass
    assert serving.journal.flush() is (serving.settings.journal == "memory")
    for name in ("before", "lost"):
        reader, _ = await fetch(client, f"/admin/debug/bundle/{name}", tmp_path)
        with reader:
            assert reader.manifest.requests == (name,)
            assert any(isinstance(record.event, ev.TERMINAL_EVENTS) for record in reader.records())


async def test_a_window_is_of_everybody_and_of_this_moment(client: TestClient[Any, Any], tmp_path: Path) -> None:
    running = asyncio.ensure_future(ask(client, "running", max_tokens=2000))
    await asyncio.sleep(0.1)
    reader, name = await fetch(client, "/admin/debug/bundle?window=1m", tmp_path)
    with reader:
        assert name.startswith("gptoss-20")
        assert [gap.stream for gap in reader.manifest.missing] == ["request/running"]
        assert "had not ended" in reader.manifest.missing[0].what
        settings = reader.manifest.boots[0].settings
        assert settings["max_queue"] == 512
    running.cancel()


async def test_what_is_unknown_or_too_large_is_refused(
    client: TestClient[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    async with client.get("/admin/debug/bundle/nobody") as answer:
        assert (answer.status, (await answer.json())["error"]["code"]) == (404, "request_not_found")
    monkeypatch.setattr("gptoss.telemetry.bundle_writer.BUNDLE_BYTES_MAX", 1000)
    async with client.get("/admin/debug/bundle") as answer:
        error = (await answer.json())["error"]
        assert (answer.status, error["code"], error["param"]) == (413, "bundle_too_large", "limit_mb")


async def test_the_snapshot_is_still_there(client: TestClient[Any, Any]) -> None:
    async with client.get("/admin/debug/bundle?format=json") as answer:
        assert {"gpu", "memory", "configuration", "metrics", "stats"} <= (await answer.json()).keys()


async def test_nothing_of_a_bundle_stays_on_the_servers_disk(
    serving: ServingSystem, client: TestClient[Any, Any]
) -> None:
    await ask(client, "r1")
    async with client.get("/admin/debug/bundle") as answer:
        with zipfile.ZipFile(io.BytesIO(await answer.read())) as archive:
            assert json.loads(archive.read("manifest.json"))["format"] == "gptoss-bundle"
    folder = serving.settings.data_path
    assert {path.name for path in folder.iterdir()} <= {"journal", "node.key"} if folder.exists() else True


async def test_the_journal_alone_gives_the_live_metrics_and_stats(
    serving: ServingSystem, client: TestClient[Any, Any]
) -> None:
    await asyncio.gather(*(ask(client, f"r{number}") for number in range(8)))
    assert await ask(client, "refused", messages=[]) == 400
    await serving.caught_up()
    projection, metrics = Projection(step_timeout_s=serving.settings.step_timeout_s), Metrics()
    records = list(LiveRecording(serving.journal).records())
    for record in records:
        projection.fold(record)
        metrics.fold(record)
    now_ns = serving.system.now_ns()
    assert projection.newest_pos == serving.projection.newest_pos
    assert projection.stats(now_ns) == serving.projection.stats(now_ns)
    assert projection.memory_stats() == serving.projection.memory_stats()
    assert projection.recent_requests(100) == serving.projection.recent_requests(100)
    assert metrics.render() == serving.metrics.render()


async def test_the_command_line_fetches_from_a_running_server(client: TestClient[Any, Any], tmp_path: Path) -> None:
    async def create(*options: str) -> tuple[int, str, str]:
        command = [sys.executable, "-m", "gptoss", "bundle", "create", "--url", str(client.make_url("")), *options]
        process = await asyncio.create_subprocess_exec(*command, stdout=PIPE, stderr=PIPE, cwd=folder)
        stdout, stderr = await process.communicate()
        assert process.returncode is not None
        return process.returncode, stdout.decode(), stderr.decode()

    folder = tmp_path / "laptop"
    folder.mkdir()
    await asyncio.gather(*(ask(client, f"night-{number}") for number in range(3)))
    status, stdout, _ = await create("--request", "night-1", "--request", "night-2", "--content", "tokens")
    assert status == 0
    assert "request night-1, night-2" in stdout
    (path,) = folder.iterdir()
    with BundleReader(path) as reader:
        assert reader.manifest.requests == ("night-1", "night-2")
        assert reader.manifest.redaction.content == "tokens"
    status, _, stderr = await create("--request", "nobody")
    assert (status, stderr.count("\n")) == (1, 1)
    assert "no request has the id 'nobody'" in stderr
    assert list(folder.iterdir()) == [path]
