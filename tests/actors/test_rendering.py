"""Where prompts are rendered: short ones on the event loop, once the model's template has been found quick."""

import threading
from typing import Any

import pytest

from gptoss.actors.generation import GenerateRequest
from gptoss.actors.rendering import QUICK_CHARS, QUICK_MESSAGES, QUICK_NS, SLOW_PENALTY, Rendering
from gptoss.actors.system import System
from gptoss.clock import SeededIds, SeededRng
from gptoss.engine.port import ChatMessage, RenderedPrompt
from gptoss.errors import RequestError
from gptoss.messages.answer import AnswerFormat, AnswerShape, ToolChoice
from gptoss.telemetry.memory_journal import MemoryJournal
from gptoss.testing import FakeRenderer, ManualClock

DATE = "2026-01-01"


class Paced(FakeRenderer):
    """Takes as long as it is told, by the test's clock, and knows on which threads it ran."""

    def __init__(self, clock: ManualClock) -> None:
        self.clock = clock
        self.takes_ns = 0
        self.threads: list[int] = []

    def render_chat(self, *args: Any, **fields: Any) -> RenderedPrompt:
        self.threads.append(threading.get_ident())
        self.clock.advance_ns(self.takes_ns)
        return super().render_chat(*args, **fields)


def said(*contents: str, **fields: Any) -> GenerateRequest:
    return GenerateRequest(messages=tuple(ChatMessage(role="user", content=each) for each in contents), **fields)


SHORT = said("hello there")


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


def rendering_of(clock: ManualClock, renderer: FakeRenderer, *, on_loop: bool = True) -> tuple[System, Rendering]:
    rng = SeededRng("rendering")
    journal = MemoryJournal(node="n", boot="b", clock=clock)
    system = System(name="t", clock=clock, ids=SeededIds(rng), rng=rng, journal=journal)
    return system, Rendering(system, renderer, on_loop=on_loop)


async def test_the_first_is_rendered_on_a_thread_and_the_next_on_the_loop(clock: ManualClock) -> None:
    renderer = Paced(clock)
    system, rendering = rendering_of(clock, renderer)
    async with system:
        assert not rendering.is_quick(SHORT)
        first = await rendering.prompt(SHORT, date=DATE)
        assert rendering.is_quick(SHORT)
        assert rendering.render(SHORT, date=DATE) == first
    assert renderer.threads[0] != threading.get_ident()
    assert renderer.threads[1] == threading.get_ident()


async def test_a_slow_one_sends_the_next_ones_back_to_threads(clock: ManualClock) -> None:
    renderer = Paced(clock)
    system, rendering = rendering_of(clock, renderer)
    async with system:
        await rendering.prompt(SHORT, date=DATE)
        renderer.takes_ns = QUICK_NS + 1
        rendering.render(SHORT, date=DATE)
        renderer.takes_ns = 0
        for _ in range(SLOW_PENALTY):
            assert not rendering.is_quick(SHORT)
            await rendering.prompt(SHORT, date=DATE)
        assert rendering.is_quick(SHORT)


@pytest.mark.parametrize(
    "request_",
    [
        said("x" * (QUICK_CHARS + 1)),
        said("x" * QUICK_CHARS, "y"),
        said(*["x"] * (QUICK_MESSAGES + 1)),
        said("x", tools=({"type": "function", "function": {"name": "f"}},)),
        said("x", shape=AnswerShape(tool_choice="required")),
        said("x", shape=AnswerShape(format=AnswerFormat(kind="json", text="{}"))),
        GenerateRequest(messages=(ChatMessage(role="assistant", tool_calls=({"id": "c"},)),)),
        GenerateRequest(messages=(ChatMessage(role="assistant", reasoning="x" * (QUICK_CHARS + 1)),)),
        GenerateRequest(prompt="x" * (QUICK_CHARS + 1)),
        GenerateRequest(prompt=(1,) * (QUICK_CHARS + 1)),
    ],
    ids=["long", "long together", "many", "tools", "must call", "grammar", "calls", "thoughts", "text", "tokens"],
)
async def test_what_may_be_much_work_is_never_rendered_on_the_loop(
    clock: ManualClock, request_: GenerateRequest
) -> None:
    system, rendering = rendering_of(clock, FakeRenderer())
    async with system:
        await rendering.prompt(SHORT, date=DATE)
        assert rendering.is_quick(SHORT)
        assert not rendering.is_quick(request_)


@pytest.mark.parametrize("choice", ["none", "auto"])
async def test_what_chat_completions_ask_for_without_tools_is_rendered_on_the_loop(
    clock: ManualClock, choice: ToolChoice
) -> None:
    system, rendering = rendering_of(clock, FakeRenderer())
    async with system:
        await rendering.prompt(SHORT, date=DATE)
        assert rendering.is_quick(said("x", shape=AnswerShape(tool_choice=choice)))


async def test_waiting_is_no_work(clock: ManualClock, monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread of a busy server waits for the interpreter longer than it renders."""
    renderer = Paced(clock)
    renderer.takes_ns = 10 * QUICK_NS
    system, rendering = rendering_of(clock, renderer)
    monkeypatch.setattr(clock, "thread_ns", lambda: 0)
    async with system:
        await rendering.prompt(SHORT, date=DATE)
        assert rendering.is_quick(SHORT)


async def test_it_can_be_switched_off(clock: ManualClock) -> None:
    system, rendering = rendering_of(clock, FakeRenderer(), on_loop=False)
    async with system:
        await rendering.prompt(SHORT, date=DATE)
        assert not rendering.is_quick(SHORT)


async def test_a_bad_prompt_is_refused_on_either_way(clock: ManualClock) -> None:
    system, rendering = rendering_of(clock, FakeRenderer())
    bad = GenerateRequest(prompt=(1, 1 << 40))
    async with system:
        with pytest.raises(RequestError, match="token id"):
            await rendering.prompt(bad, date=DATE)
        with pytest.raises(RequestError, match="token id"):
            rendering.render(bad, date=DATE)
