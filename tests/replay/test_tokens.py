"""The engine again: the recorded tokens on the recorded model, and the first that differs on another."""

import asyncio
from typing import Any

import msgspec
import pytest
from scenarios import BoastfulDriver, all_of, outcome, record, request, tiny_llama

from gptoss.actors.generation import GenerateRequest
from gptoss.app import ServingSystem
from gptoss.engine.inprocess import InProcessDriver
from gptoss.engine.model_source import PreparedModel
from gptoss.engine.port import ChatMessage
from gptoss.errors import ConfigError, ReplayError
from gptoss.messages import events as ev
from gptoss.messages.envelope import Record
from gptoss.messages.sampling import SamplingParams
from gptoss.replay.result import TokensResult
from gptoss.replay.tokens import replay_tokens
from gptoss.telemetry.recording import ListRecording

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# torch and safetensors are only partly typed.

pytestmark = [pytest.mark.timeout(180)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_llama(tmp_path_factory.mktemp("tiny"))


def sampled(words: int, *, seed: int, **fields: Any) -> GenerateRequest:
    return GenerateRequest(
        messages=(ChatMessage(role="user", content="word " * words),),
        sampling=SamplingParams(max_tokens=24, seed=seed, temperature=1.0, top_p=0.9, ignore_eos=True),
        **fields,
    )


async def eventful(system: ServingSystem, made: list[InProcessDriver]) -> None:
    """Requests that displace each other, one that is cancelled, and an engine that dies under the rest."""
    first = system.submit(sampled(50, seed=1, priority=1, request_id="yields"))
    async for _ in first:
        break
    cancelled = system.submit(sampled(20, seed=2, request_id="cancelled"))
    others = [asyncio.ensure_future(outcome(system.submit(sampled(9 + n, seed=n)))) for n in range(3)]
    async for _ in cancelled:
        cancelled.cancel()
        break
    await outcome(cancelled)
    await others[0]
    made[-1].kill()
    await asyncio.gather(outcome(first), *others)


@pytest.fixture(scope="module")
def recording(folder: str) -> ListRecording:
    made: list[InProcessDriver] = []

    def drivers(device: str) -> InProcessDriver:
        made.append(BoastfulDriver(device))
        return made[-1]

    async def work(system: ServingSystem) -> None:
        await eventful(system, made)

    model = PreparedModel(folder=folder, model_name="tiny", source="test", max_model_len=640)
    return asyncio.run(
        record(
            work,
            drivers=drivers,
            model=model,
            max_batch_size=2,
            num_threads=1,
            dtype="float32",
        )
    )


def replayed(recording: ListRecording, folder: str, **options: Any) -> TokensResult:
    return replay_tokens(recording, model=folder, **options)


def test_the_recorded_tokens_come_again_through_preemption_cancellation_and_death(
    recording: ListRecording, folder: str
) -> None:
    kinds = {type(r.event) for r in recording.records()}
    assert {ev.Preempted, ev.CancelApplied, ev.EngineExited, ev.AttemptRetried} <= kinds
    result = replayed(recording, folder)
    assert result.diverged == ()
    assert result.is_same_model
    assert result.left_out == 0
    assert result.requests > 5
    assert result.tokens == sum(
        len(row.token_ids) for r in recording.content() if isinstance(r.event, ev.StepTokens) for row in r.event.rows
    )


def test_one_request_alone_gives_its_tokens(recording: ListRecording, folder: str) -> None:
    result = replayed(recording, folder, request_id="yields")
    assert result.diverged == ()
    assert result.tokens >= 24
    assert result.left_out > 0


def test_a_changed_token_is_reported_where_it_is(recording: ListRecording, folder: str) -> None:
    content = list(recording.content())
    index, row = next(
        (i, row)
        for i, r in enumerate(content)
        if isinstance(r.event, ev.StepTokens)
        for row in r.event.rows
        if row.request_id == "yields" and row.position == 5
    )
    event = content[index].event
    assert isinstance(event, ev.StepTokens)
    wrong = msgspec.structs.replace(row, token_ids=((row.token_ids[0] + 1) % 256,))
    rows = tuple(wrong if each is row else each for each in event.rows)
    content[index] = Record(content[index].meta, msgspec.structs.replace(event, rows=rows))
    result = replayed(ListRecording(recording.records(), content), folder)
    assert [each.request_id for each in result.diverged] == ["yields"]
    first = result.diverged[0]
    assert (first.position, first.step) == (5, event.step)
    assert (first.recorded, first.replayed) == (wrong.token_ids[0], row.token_ids[0])
    assert first.logprob_replayed is not None
    assert first.logprob_replayed < 0


def test_another_model_is_refused_unless_it_is_forced(
    recording: ListRecording, tmp_path_factory: pytest.TempPathFactory
) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    other = tiny_llama(tmp_path_factory.mktemp("other"))
    weights = load_file(f"{other}/model.safetensors")
    torch.manual_seed(7)
    save_file(
        {name: torch.randn_like(each) for name, each in weights.items()},
        f"{other}/model.safetensors",
        metadata={"format": "pt"},
    )
    with pytest.raises(ConfigError, match="its weights differ"):
        replayed(recording, other)
    result = replayed(recording, other, force=True)
    assert not result.is_same_model
    assert result.diverged
    assert any("not the recorded model" in note for note in result.notes)


def test_a_recording_without_tokens_is_refused(recording: ListRecording, folder: str) -> None:
    with pytest.raises(ReplayError, match="holds no token ids"):
        replayed(ListRecording(recording.records()), folder)
    with pytest.raises(ReplayError, match="of nobody"):
        replayed(recording, folder, request_id="nobody")


def test_what_differs_on_this_machine_is_said(recording: ListRecording, folder: str) -> None:
    def elsewhere(found: Record) -> Record:
        if not isinstance(found.event, ev.EngineLoaded):
            return found
        capabilities = msgspec.structs.replace(found.event.capabilities, device="cuda:0")
        return Record(found.meta, msgspec.structs.replace(found.event, capabilities=capabilities))

    moved = ListRecording(map(elsewhere, recording.records()), recording.content())
    result = replayed(moved, folder, request_id="yields")
    assert "device: recorded cuda:0, here cpu" in result.notes


async def test_stop_strings_end_a_replay_where_they_ended_the_request(folder: str) -> None:
    model = PreparedModel(folder=folder, model_name="tiny", source="test", max_model_len=640)

    async def work(system: ServingSystem) -> None:
        await all_of(system, request(5, max_tokens=40))
        text = await system.submit(request(5, max_tokens=40)).text()
        stopping = request(5, max_tokens=40, request_id="stops")
        sampling = msgspec.structs.replace(stopping.sampling, stop=(text[3:5],))
        await all_of(system, msgspec.structs.replace(stopping, sampling=sampling))

    found = await record(work, drivers=InProcessDriver, model=model, max_batch_size=2, num_threads=1, dtype="float32")
    result = await asyncio.to_thread(replayed, found, folder, request_id="stops")
    assert result.diverged == ()
    assert 0 < result.tokens < 40
