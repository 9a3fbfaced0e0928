"""The whole actor system over a fake engine: every request ends once, and the journal tells the truth about it."""

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer

import gptoss
from gptoss.actors.generation import GenerateRequest, Generation
from gptoss.app import ServingSystem
from gptoss.config import Settings
from gptoss.engine.model_source import PreparedModel
from gptoss.engine.port import ChatMessage
from gptoss.errors import GptossError, QueueFull
from gptoss.messages import events as ev
from gptoss.messages.envelope import Record
from gptoss.messages.sampling import SamplingParams
from gptoss.replay.verify import verify
from gptoss.telemetry.recording import LiveRecording
from gptoss.telemetry.timeline import check_complete
from gptoss.testing import FAKE_MODEL, FakeDriver, FakeOptions, FakeRenderer, fake_token, run_until_idle

MODEL = PreparedModel(folder="", model_name=FAKE_MODEL, source="test", max_model_len=4096)


def request(
    content: str = "hello there", *, max_tokens: int = 5, seed: int = 3, request_id: str = ""
) -> GenerateRequest:
    return GenerateRequest(
        messages=(ChatMessage(role="user", content=content),),
        sampling=SamplingParams(max_tokens=max_tokens, seed=seed),
        request_id=request_id,
    )


@asynccontextmanager
async def serving(
    options: FakeOptions | None = None, *, drivers: Callable[[str], FakeDriver] | None = None, **settings: Any
) -> AsyncGenerator[ServingSystem]:
    values: dict[str, Any] = {"journal": "memory", "devices": "cpu", **settings}

    def fake(_: str) -> FakeDriver:
        return FakeDriver(options)

    async with ServingSystem(
        Settings(**values), drivers=drivers or fake, renderer=FakeRenderer(), model=MODEL
    ) as system:
        await system.ready(10.0)
        yield system


async def records(system: ServingSystem, request_id: str) -> list[Record]:
    await settled(system)
    return list(system.journal.read(correlation=request_id))


async def settled(system: ServingSystem) -> None:
    await run_until_idle(system.system)
    await system.caught_up()


def terminal(found: list[Record]) -> list[str]:
    return [record.meta.type for record in found if isinstance(record.event, ev.TERMINAL_EVENTS)]


async def token_ids(generation: Generation) -> list[int]:
    return [token async for delta in generation for token in delta.token_ids]


async def test_a_request_streams_its_tokens_and_its_timeline_is_complete() -> None:
    async with serving() as system:
        generation = system.submit(request())
        assert await token_ids(generation) == [fake_token(3, position) for position in range(5)]
        assert generation.outcome is not None
        assert generation.outcome.finish_reason == "length"
        assert generation.outcome.usage.completion_tokens == 5
        found = await records(system, generation.request_id)
        assert terminal(found) == ["RequestCompleted"]
        steps = [r for r in system.journal.read() if isinstance(r.event, ev.StepCommitted)]
        assert check_complete([*found, *steps], generation.request_id) == []


async def test_64_requests_at_once_all_end_once_and_leave_no_reservation() -> None:
    async with serving(FakeOptions(step_s=0.001, kv_budget_bytes=200)) as system:
        generations = [system.submit(request(seed=n)) for n in range(64)]
        answers = await asyncio.gather(*(token_ids(generation) for generation in generations))
        assert answers == [[fake_token(n, p) for p in range(5)] for n in range(64)]
        await settled(system)
        found = list(system.journal.read())
        granted = [r.event.request_id for r in found if isinstance(r.event, ev.ReservationGranted)]
        released = [r.event.request_id for r in found if isinstance(r.event, ev.ReservationReleased)]
        assert sorted(granted) == sorted(released)
        assert len(terminal(found)) == 64
        assert any(isinstance(r.event, ev.Enqueued) for r in found)


async def test_a_killed_engine_is_replaced_and_its_streams_go_on_with_the_same_tokens() -> None:
    made: list[FakeDriver] = []

    def drivers(_: str) -> FakeDriver:
        dies = FakeOptions(step_s=0.002, die_at_step=4) if not made else FakeOptions(step_s=0.002)
        made.append(FakeDriver(dies))
        return made[-1]

    async with serving(drivers=drivers) as system:
        generations = [system.submit(request(seed=n, max_tokens=9)) for n in range(3)]
        answers = await asyncio.gather(*(token_ids(generation) for generation in generations))
        assert answers == [[fake_token(n, p) for p in range(9)] for n in range(3)]
        assert len(made) == 2
        for generation in generations:
            found = await records(system, generation.request_id)
            assert terminal(found) == ["RequestCompleted"]
            assert any(isinstance(r.event, ev.AttemptRetried) for r in found)
        assert system.projection.readiness(system.system.now_ns(), system.journal.health).ready


async def test_cancelling_frees_everything() -> None:
    async with serving(FakeOptions(step_s=0.002)) as system:
        generation = system.submit(request(max_tokens=4000))
        async for _ in generation:
            generation.cancel()
            break
        found = await records(system, generation.request_id)
        assert terminal(found) == ["RequestCancelled"]
        released = [r for r in system.journal.read() if isinstance(r.event, ev.ReservationReleased)]
        assert [r.event.request_id for r in released if isinstance(r.event, ev.ReservationReleased)] == [
            generation.request_id
        ]


async def test_a_full_queue_refuses_and_says_when_to_come_back() -> None:
    async with serving(FakeOptions(step_s=0.005, max_batch_size=1), max_queue=2) as system:
        generations = [system.submit(request(max_tokens=40)) for _ in range(8)]
        results = await asyncio.gather(*(token_ids(g) for g in generations), return_exceptions=True)
        refused = [result for result in results if isinstance(result, QueueFull)]
        assert len(refused) == 5
        assert all(error.retry_after_s >= 1 for error in refused)


@pytest.mark.parametrize(
    ("bad", "code"),
    [
        (GenerateRequest(messages=()), "invalid_request"),
        (GenerateRequest(messages=(ChatMessage(role="user", content="x"),), model="other"), "model_not_found"),
        (request("word " * 5000), "context_length_exceeded"),
    ],
)
async def test_a_bad_request_is_refused_and_the_next_is_served(bad: GenerateRequest, code: str) -> None:
    async with serving() as system:
        generation = system.submit(bad)
        with pytest.raises(GptossError) as caught:
            await token_ids(generation)
        assert caught.value.code == code
        assert terminal(await records(system, generation.request_id)) == ["RequestRejected"]
        assert len(await token_ids(system.submit(request()))) == 5


async def test_what_was_recorded_replays() -> None:
    async with serving(FakeOptions(kv_budget_bytes=300)) as system:
        await asyncio.gather(*(token_ids(system.submit(request(seed=n))) for n in range(20)))
        await settled(system)
        result = verify(LiveRecording(system.journal))
    assert result.same
    assert result.requests == 20
    decided = {each.decider: each.decisions for each in result.checked}
    assert min(decided[name] for name in ("admission", "memory", "router", "request")) >= 20


async def test_the_http_application_mounts_under_a_prefix() -> None:
    async with serving() as system:
        app = web.Application()
        app.add_subapp("/llm/", gptoss.make_app(system))
        async with TestClient(TestServer(app)) as client:
            body = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 3, "seed": 3}
            answer = await client.post("/llm/v1/chat/completions", json=body)
            assert answer.status == 200
            found = await answer.json()
            assert found["choices"][0]["message"]["content"].split() == [f"t{fake_token(3, p)}" for p in range(3)]
            request_id = answer.headers["X-Request-ID"]
            events = await (await client.get(f"/llm/admin/requests/{request_id}/events")).json()
            assert "RequestCompleted" in {event["type"] for event in events["events"]}


async def test_a_restarted_server_finds_its_journal(tmp_path: Path) -> None:
    async with serving(journal="segments", data_dir=str(tmp_path)) as system:
        generation = system.submit(request())
        await token_ids(generation)
    async with serving(journal="segments", data_dir=str(tmp_path)) as system:
        assert terminal(await records(system, generation.request_id)) == ["RequestCompleted"]


@pytest.mark.parametrize(
    ("content", "kinds"),
    [
        ("none", set[str]()),
        ("tokens", {"PromptTokens", "StepTokens"}),
        ("full", {"MessagesReceived", "PromptTokens", "StepTokens", "AnswerDelivered"}),
    ],
)
async def test_content_is_recorded_as_far_as_the_setting_allows(content: str, kinds: set[str]) -> None:
    async with serving(content=content) as system:
        asked = msgspec.structs.replace(
            request("canary words"), sampling=SamplingParams(max_tokens=3, seed=3, stop=("canary stop",))
        )
        generation = system.submit(asked)
        await token_ids(generation)
        await settled(system)
        found = {record.meta.type: record.event for record in system.journal.read(family="content")}
        assert found.keys() == kinds
        assert not any("canary" in str(record.event) for record in system.journal.read())
        if content != "none":
            prompt = ev.PromptTokens(request_id=generation.request_id, token_ids=(6, 5), stop=("canary stop",))
            assert found["PromptTokens"] == prompt
        if content == "full":
            assert "canary words" in str(found["MessagesReceived"])
            answer = "".join(f"t{fake_token(3, position)} " for position in range(3))
            assert found["AnswerDelivered"] == ev.AnswerDelivered(request_id=generation.request_id, text=answer)


async def test_the_wall_clock_is_anchored_again_and_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gptoss.app.CLOCK_ANCHOR_PERIOD_S", 0.01)
    async with serving() as system:
        async with asyncio.timeout(10.0):
            while sum(isinstance(r.event, ev.ClockAnchored) for r in system.journal.read(stream="system")) < 2:
                await asyncio.sleep(0.01)
