"""Requests that end where the simulator once found that they did not, or that they left something behind."""

import asyncio
import gc
import time
from typing import Any

import pytest

from gptoss.actors.generation import GenerateRequest, Generation
from gptoss.actors.rendering import Rendering
from gptoss.actors.request import RequestActor
from gptoss.app import ServingSystem
from gptoss.config import Settings
from gptoss.engine.dialect import TaggedDialect
from gptoss.engine.model_source import PreparedModel
from gptoss.engine.port import ChatMessage, RenderedPrompt
from gptoss.engine.tagged_output import TagFormat
from gptoss.errors import ActorError, EngineError, GptossError, RequestError
from gptoss.messages import events as ev
from gptoss.messages.envelope import Record
from gptoss.messages.sampling import SamplingParams
from gptoss.testing import FAKE_MODEL, FakeDriver, FakeOptions, FakeRenderer, run_until_idle

MODEL = PreparedModel(folder="", model_name=FAKE_MODEL, source="test", max_model_len=4096)
SECRET = "do-not-tell"


def serving(renderer: FakeRenderer | None = None, **options: Any) -> ServingSystem:
    return ServingSystem(
        Settings(journal="memory", devices="cpu"),
        drivers=lambda _: FakeDriver(FakeOptions(**options)),
        renderer=renderer or FakeRenderer(),
        model=MODEL,
    )


def submit(system: ServingSystem, max_tokens: int = 4000) -> Generation:
    message = ChatMessage(role="user", content=SECRET)
    return system.submit(GenerateRequest(messages=(message,), sampling=SamplingParams(max_tokens=max_tokens, seed=1)))


async def error_of(generation: Generation) -> GptossError:
    with pytest.raises(GptossError) as caught:
        await asyncio.wait_for(generation.text(), 5.0)
    return caught.value


def ends(system: ServingSystem) -> list[Record]:
    return [record for record in system.journal.read() if isinstance(record.event, ev.TERMINAL_EVENTS)]


class Broken(FakeRenderer):
    def render_chat(
        self,
        messages: tuple[ChatMessage, ...],
        *,
        tools: tuple[dict[str, Any], ...],
        date: str,
        reasoning_effort: str = "",
        add_generation_prompt: bool = True,
    ) -> RenderedPrompt:
        raise ValueError(f"cannot render {messages}")


async def test_a_renderer_that_crashes_fails_the_request_at_once_and_quotes_no_prompt() -> None:
    async with serving(Broken()) as system:
        await system.ready(10.0)
        error = await error_of(submit(system))
        assert isinstance(error, EngineError)
        await run_until_idle(system.system)
        assert [record.meta.type for record in ends(system)] == ["RequestFailed"]
        assert SECRET not in str([record.event for record in system.journal.read()])
        failed = [record.event for record in system.journal.read() if isinstance(record.event, ev.ActorFailed)]
        assert [event.message_type for event in failed] == ["render"]


class Slow(FakeRenderer):
    def render_chat(self, *args: Any, **options: Any) -> RenderedPrompt:
        time.sleep(0.3)
        return super().render_chat(*args, **options)


class SlowDialect(TaggedDialect):
    """Whose grammars take long to compile."""

    def grammar(self, *args: Any, **options: Any) -> str:
        time.sleep(0.3)
        return super().grammar(*args, **options)


class SlowToCompile(FakeRenderer):
    dialect = SlowDialect(TagFormat(), {})


@pytest.mark.parametrize("renderer", [Slow, SlowToCompile])
async def test_what_takes_too_long_to_render_is_refused_before_admission(
    renderer: type[FakeRenderer], monkeypatch: pytest.MonkeyPatch
) -> None:
    async with serving(renderer()) as system:
        await system.ready(10.0)
        monkeypatch.setattr(system.gateway.rendering, "_timeout_s", 0.05)
        error = await error_of(submit(system))
        assert isinstance(error, RequestError)
        assert (error.status, error.param) == (400, "messages")
        await run_until_idle(system.system)
        assert [record.meta.type for record in ends(system)] == ["RequestRejected"]
        assert not any(isinstance(record.event, ev.MemoryEstimated) for record in system.journal.read())
        raw = GenerateRequest(prompt="x", sampling=SamplingParams(max_tokens=1, seed=1))
        assert await asyncio.wait_for(system.submit(raw).text(), 5.0)


async def test_a_request_whose_actor_crashes_ends_and_gives_everything_back() -> None:
    async with serving(step_s=0.002) as system:
        await system.ready(10.0)
        generation = submit(system)
        async for _ in generation:
            system.directory.tell(f"request/{generation.request_id}", object())
            break
        assert isinstance(await error_of(generation), ActorError)
        await run_until_idle(system.system)
        found = list(system.journal.read())
        assert [record.meta.type for record in ends(system)] == ["RequestFailed"]
        for given_back in (ev.ReservationReleased, ev.SlotReleased, ev.RouteForgotten):
            assert sum(isinstance(record.event, given_back) for record in found) == 1
        async with asyncio.timeout(5.0):
            while not any(isinstance(record.event, ev.CancelApplied) for record in system.journal.read()):
                await asyncio.sleep(0.005)


async def test_a_request_whose_actor_crashes_as_it_begins_ends_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> bool:
        raise ValueError("planted")

    async with serving() as system:
        await system.ready(10.0)
        monkeypatch.setattr(Rendering, "is_quick", broken)
        assert isinstance(await error_of(submit(system)), ActorError)
        await run_until_idle(system.system)
        assert [record.meta.type for record in ends(system)] == ["RequestFailed"]
        monkeypatch.undo()
        assert await submit(system, 3).text()


async def test_the_end_of_a_request_that_is_cancelled_before_it_runs_carries_its_id() -> None:
    async with serving() as system:
        await system.ready(10.0)
        generation = submit(system)
        generation.cancel()
        await asyncio.wait_for(generation.text(), 5.0)
        await run_until_idle(system.system)
        assert [(record.meta.type, record.meta.correlation) for record in ends(system)] == [
            ("RequestCancelled", generation.request_id)
        ]


async def test_a_request_that_is_over_leaves_nothing_to_the_garbage_collector() -> None:
    async with serving(step_s=0.002) as system:
        await system.ready(10.0)

        async def some() -> None:
            assert len((await submit(system, 3).text()).split()) == 3
            cancelled = submit(system)
            await cancelled.admitted()
            cancelled.cancel()
            await cancelled.text()
            await system.caught_up()
            await run_until_idle(system.system)

        await some()
        gc.collect()
        gc.disable()
        try:
            await some()
            gc.set_debug(gc.DEBUG_SAVEALL)
            gc.collect()
            found = [
                each for each in gc.garbage if isinstance(each, RequestActor) and each.context.system is system.system
            ]
        finally:
            gc.set_debug(0)
            gc.garbage.clear()
            gc.enable()
        assert found == []
