"""A wall clock that is set while the server runs: it dates what is recorded, and decides nothing."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest

from gptoss.actors.generation import GenerateRequest, Generation
from gptoss.app import ServingSystem
from gptoss.clock import NS_PER_S, SystemClock
from gptoss.config import Settings
from gptoss.engine.model_source import PreparedModel
from gptoss.errors import DeadlineExceeded
from gptoss.messages import events as ev
from gptoss.messages.sampling import SamplingParams
from gptoss.surroundings import live_surroundings
from gptoss.telemetry.segment_reader import SegmentReader
from gptoss.testing import FAKE_MODEL, FakeDriver, FakeOptions, FakeRenderer, fake_token

MODEL = PreparedModel(folder="", model_name=FAKE_MODEL, source="test", max_model_len=4096)
HOUR_NS = 3600 * NS_PER_S


class SetClock(SystemClock):
    """The machine's clocks, with a wall clock that is set to another time."""

    def __init__(self, off_by_ns: int = 0) -> None:
        self.off_by_ns = off_by_ns

    def wall_ns(self) -> int:
        return super().wall_ns() + self.off_by_ns


@asynccontextmanager
async def serving(clock: SetClock, **settings: Any) -> AsyncGenerator[ServingSystem]:
    around = msgspec.structs.replace(live_surroundings(), clock=clock)
    values: dict[str, Any] = {"journal": "memory", "devices": "cpu", "max_batch_size": 1, **settings}
    async with ServingSystem(
        Settings(**values),
        drivers=lambda _: FakeDriver(FakeOptions(step_s=0.01, max_batch_size=1)),
        renderer=FakeRenderer(),
        model=MODEL,
        surroundings=around,
    ) as system:
        await system.ready(10.0)
        yield system


def request(max_tokens: int, name: str, timeout_s: float | None = None) -> GenerateRequest:
    sampling = SamplingParams(max_tokens=max_tokens, seed=3, ignore_eos=True)
    return GenerateRequest(prompt="x", sampling=sampling, request_id=name, timeout_s=timeout_s)


async def tokens(generation: Generation) -> list[int]:
    return [token async for delta in generation for token in delta.token_ids]


@pytest.mark.parametrize("step_ns", [HOUR_NS, -HOUR_NS])
async def test_deadlines_and_the_order_of_the_line_do_not_follow_the_wall_clock(step_ns: int) -> None:
    clock = SetClock()
    async with serving(clock) as system:
        running = system.submit(request(60, "runs"))
        await anext(aiter(running))
        begun_ns = system.system.now_ns()
        queued = [system.submit(request(3, f"waits-{number}")) for number in range(3)]
        late = system.submit(request(3, "late", timeout_s=0.3))
        clock.off_by_ns = step_ns
        with pytest.raises(DeadlineExceeded):
            await asyncio.wait_for(late.text(), 10.0)
        assert system.system.now_ns() - begun_ns >= int(0.3 * NS_PER_S), "not a moment before its time"
        clock.off_by_ns = 0
        queued.append(system.submit(request(3, "waits-3")))
        await tokens(running)
        assert running.outcome is not None
        assert running.outcome.usage.completion_tokens == 60
        assert await asyncio.gather(*map(tokens, queued)) == [[fake_token(3, position) for position in range(3)]] * 4
        records = list(system.journal.read())
        order = [r.event.request_id for r in records if isinstance(r.event, ev.ExecutorAccepted)]
        assert order == ["runs", *(f"waits-{number}" for number in range(4))]
        assert [r.meta.mono_ns for r in records if r.meta.stream == "admission"] == sorted(
            r.meta.mono_ns for r in records if r.meta.stream == "admission"
        )


async def test_a_start_with_an_earlier_wall_clock_is_still_the_newer_one(tmp_path: Path) -> None:
    boots: list[str] = []
    for off_by_ns in (HOUR_NS, -HOUR_NS, 0):
        async with serving(SetClock(off_by_ns), journal="segments", data_dir=str(tmp_path)) as system:
            await tokens(system.submit(request(3, "again")))
            boots.append(system.journal.boot)
    reader = SegmentReader(tmp_path / "journal")
    assert list(dict.fromkeys(record.meta.boot for record in reader.read())) == boots
