"""What a server that was killed leaves behind: its requests end once in the journal, at the next start."""

import asyncio
import shutil
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

from gptoss.actors.generation import GenerateRequest, Generation
from gptoss.app import ServingSystem
from gptoss.config import Settings
from gptoss.engine.model_source import PreparedModel
from gptoss.engine.port import ChatMessage
from gptoss.errors import GptossError
from gptoss.messages import events as ev
from gptoss.messages.sampling import SamplingParams
from gptoss.telemetry.request_records import request_records
from gptoss.telemetry.segments import SegmentReader
from gptoss.telemetry.timeline import check_complete, timeline
from gptoss.telemetry.timeline_text import render_text
from gptoss.testing import FAKE_MODEL, FakeDriver, FakeOptions, FakeRenderer

MODEL = PreparedModel(folder="", model_name=FAKE_MODEL, source="test", max_model_len=4096)
OPTIONS = FakeOptions(step_s=0.002, max_batch_size=2)


@asynccontextmanager
async def serving(folder: Path) -> AsyncGenerator[ServingSystem]:
    settings = Settings(devices="cpu", data_dir=str(folder))
    async with ServingSystem(
        settings, drivers=lambda _: FakeDriver(OPTIONS), renderer=FakeRenderer(), model=MODEL
    ) as system:
        await system.ready(10.0)
        yield system


def submit(system: ServingSystem, name: str, max_tokens: int) -> Generation:
    message = ChatMessage(role="user", content="hello there")
    sampling = SamplingParams(max_tokens=max_tokens, seed=3)
    return system.submit(GenerateRequest(messages=(message,), sampling=sampling, request_id=name))


async def consume(generation: Generation) -> None:
    with suppress(GptossError):
        async for _ in generation:
            pass


async def image_of_a_crash(tmp_path: Path) -> Path:
    """The data folder as ``kill -9`` leaves it: one request done, two running, one queued."""
    image = tmp_path / "image"
    async with serving(tmp_path / "live") as system:
        await consume(submit(system, "done", 3))
        generations = [submit(system, name, 4000) for name in ("running-1", "running-2", "queued")]
        async for delta in generations[0]:
            if delta.token_ids:
                break
        async with asyncio.timeout(5.0):
            while not any(isinstance(record.event, ev.Enqueued) for record in system.journal.read()):
                await asyncio.sleep(0.01)
        assert system.journal.flush()
        shutil.copytree(tmp_path / "live", image)
        for generation in generations:
            generation.cancel()
            await consume(generation)
    return image


async def test_requests_that_a_crash_cut_off_end_exactly_once_at_the_next_start(tmp_path: Path) -> None:
    image = await image_of_a_crash(tmp_path)
    cut_off = {"running-1", "running-2", "queued"}
    for _ in range(2):  # Another start must not end them again.
        async with serving(image) as system:
            await system.caught_up()
            found = list(system.journal.read())
            ends = [r for r in found if isinstance(r.event, ev.TERMINAL_EVENTS)]
            assert sorted(r.meta.correlation for r in ends) == sorted({"done"} | cut_off)
            for name in cut_off:
                assert check_complete(request_records(system.journal, name), name) == []


async def test_they_count_once_and_not_as_requests_of_the_new_boot(tmp_path: Path) -> None:
    image = await image_of_a_crash(tmp_path)
    async with serving(image) as system:
        await consume(submit(system, "", 3))
        await system.caught_up()
        stats = system.projection.stats()
        assert stats["requests"]["total"] == stats["requests"]["completed"] == 1
        assert stats["requests"]["failed"] == 0
        assert stats["faults"]["aborted_by_crash"] == 3
        text = system.metrics.render()[0].decode()
        assert 'gptoss_request_ends_total{outcome="aborted_by_crash",state="failed"} 3.0' in text
        assert system.projection.request("running-1") is None
    async with serving(image) as system:
        await system.caught_up()
        assert "aborted_by_crash" not in system.projection.stats()["faults"]


async def test_the_timeline_of_such_a_request_ends_with_the_crash(tmp_path: Path) -> None:
    image = await image_of_a_crash(tmp_path)
    before = timeline(request_records(SegmentReader(image / "journal"), "running-1"))
    assert before.outcome == "open"
    async with serving(image):
        pass
    after = timeline(request_records(SegmentReader(image / "journal"), "running-1"))
    assert after.outcome == "failed"
    assert after.total_ms == before.total_ms
    assert after.decode == before.decode
    assert "aborted_by_crash: the server process ended" in render_text(after, width=140)


async def test_an_id_of_a_cut_off_request_may_be_used_again(tmp_path: Path) -> None:
    image = await image_of_a_crash(tmp_path)
    async with serving(image) as system:
        await consume(submit(system, "running-1", 3))
    found = request_records(SegmentReader(image / "journal"), "running-1")
    assert timeline(found, "running-1").outcome == "completed"
    assert check_complete(found, "running-1") == []
