"""Faults stay where they are: with the request that brought them, and with the engine process that hung.

What one fault alone does to a step is in ``test_step``, and what lack of memory does to a batch in ``test_batch``.
"""

import asyncio
import os
import random
import shutil
import signal
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import psutil
import pytest
import torch
from core_run import Run, submit
from safetensors.torch import load_file, save_file  # pyright: ignore[reportUnknownVariableType] - safetensors types its path loosely
from streams import NOTHING, SETTINGS, Stream, strangers, streams, targets

from gptoss.actors.generation import GenerateRequest, Generation
from gptoss.app import ServingSystem
from gptoss.config import Settings
from gptoss.engine.attention import Chunk
from gptoss.engine.load import LoadedModel, load_model
from gptoss.engine.memory_model import kv_bytes
from gptoss.engine.model_folder import no_progress
from gptoss.engine.model_source import PreparedModel
from gptoss.engine.port import ChatMessage, EngineEvent, Failed, Finished, Load, Submit
from gptoss.engine.runner import Runner, Slot
from gptoss.messages import events as ev
from gptoss.messages.sampling import SamplingParams
from gptoss.testing import FakeRenderer

Models = Callable[..., LoadedModel]
Folders = Callable[[str], str]

PACKED = ["llama", "mistral", "gpt_oss"]
KINDS = [*PACKED, "gemma2"]
POISON = 299
"""A token that the model has an embedding for, but no finite one."""


def ends(events: Sequence[EngineEvent]) -> dict[str, Finished | Failed]:
    """The terminal event of each request; there is exactly one."""
    found: dict[str, Finished | Failed] = {}
    for event in events:
        if isinstance(event, Finished | Failed):
            assert event.request_id not in found
            found[event.request_id] = event
    return found


def streams_of(model: LoadedModel, requests: Sequence[Submit], runner: Runner | None = None) -> dict[str, Stream]:
    running = Run(model, runner)
    running.handle(*requests)
    return streams(running.finish().events)


# ---------------------------------------------------------------- logits that are not finite


@pytest.fixture(params=["slots", "paged"])
def poisoned(tiny_folder: Folders, tmp_path: Path, request: pytest.FixtureRequest) -> Callable[[str], LoadedModel]:
    """Loads a tiny model in which one token's embedding is NaN."""

    def load(kind: str) -> LoadedModel:
        folder = Path(shutil.copytree(tiny_folder(kind), tmp_path / kind))
        weights = load_file(folder / "model.safetensors")
        weights["model.embed_tokens.weight"][POISON] = float("nan")
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        options = Load(
            folder=str(folder),
            model_name=kind,
            dtype="float32",
            max_batch_size=40,
            kv_budget_bytes=1 << 30,
            kv_layout=request.param,
        )
        return load_model(options, no_progress)

    return load


@pytest.mark.parametrize("kind", KINDS)
def test_a_request_that_makes_the_model_compute_nan_fails_alone_under_any_settings(
    kind: str, poisoned: Callable[[str], LoadedModel]
) -> None:
    model = poisoned(kind)
    good = [
        msgspec.structs.replace(each, sampling=msgspec.structs.replace(each.sampling, logit_bias={POISON: -100.0}))
        for each in targets()
    ]
    bad = [
        msgspec.structs.replace(
            submit(f"bad {name}", length=length, **(settings | {"min_tokens": 0})),
            prompt_token_ids=(*range(40, 40 + length), POISON, 50),
        )
        for length, (name, settings) in enumerate(SETTINGS.items(), start=1)
    ]
    expected = streams_of(model, good)
    running = Run(model)
    running.handle(*(each for pair in zip(good, bad, strict=True) for each in pair))
    running.finish()
    found = streams(running.events)
    for request in good:
        assert found[request.request_id] == expected[request.request_id]
    for request in bad:
        end = ends(running.events)[request.request_id]
        assert isinstance(end, Failed)
        assert (end.code, request.request_id in found) == ("engine_error", False)
        assert "finite" in end.message
    assert running.steps()[-1].kv_bytes_in_use == 0
    running.events.clear()
    running.handle(*(msgspec.structs.replace(each, attempt=2) for each in good))
    assert streams(running.finish().events) == expected, "nothing of it is left in memory"


# ---------------------------------------------------------------- a storm


class Storm:
    """A runner on which requests of certain lengths go wrong in the middle, and any step may find no memory.

    Args:
        raising: capacities of requests, in tokens, whose rows raise after some.
        spoiled: the same, whose logits become NaN.
    """

    def __init__(self, model: LoadedModel, seed: int, raising: Sequence[int], spoiled: Sequence[int]) -> None:
        self._runner = model.runner
        self.layout = model.runner.layout
        self.is_batched = model.runner.is_batched
        self.is_row_invariant = model.runner.is_row_invariant
        self.is_batch_invariant = model.runner.is_batch_invariant
        self.geometry = model.runner.geometry
        self._chance = random.Random(seed)
        self._raising = frozenset(raising)
        self._spoiled = frozenset(spoiled)
        self._places: list[tuple[Slot, int]] = []  # kept, so that no slot takes the identity of another

    def new_slot(self, tokens: int) -> Slot:
        if self._chance.random() < 0.05:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        slot = self._runner.new_slot(tokens)
        self._places.append((slot, tokens))
        return slot

    def forward(self, chunks: Sequence[Chunk]) -> list[torch.Tensor | None]:
        if self._chance.random() < 0.05:
            raise MemoryError("no memory for the step")
        capacities = [next(tokens for slot, tokens in self._places if slot is chunk.slot) for chunk in chunks]
        late = [
            chunk.start + len(chunk.token_ids) > capacity - 12
            for chunk, capacity in zip(chunks, capacities, strict=True)
        ]
        if any(is_late and tokens in self._raising for is_late, tokens in zip(late, capacities, strict=True)):
            raise RuntimeError("a kernel failed")
        logits = self._runner.forward(chunks)
        return [
            rows * float("inf") if rows is not None and is_late and tokens in self._spoiled else rows
            for rows, is_late, tokens in zip(logits, late, capacities, strict=True)
        ]


@pytest.mark.parametrize("seed", range(9))
def test_in_a_storm_of_faults_every_request_ends_once_and_nobody_gets_a_wrong_token(
    seed: int, laid_out: Models
) -> None:
    kind = PACKED[seed % len(PACKED)]
    model = laid_out(kind, max_batch_size=20)
    requests = [*targets(priority=1), *strangers(8)]
    bad = [submit(f"bad{i}", length=100 + i, max_tokens=30, temperature=1.0, priority=i % 2) for i in range(6)]
    expected = streams_of(model, [*requests, *bad])
    capacities = [100 + i + 30 for i in range(6)]
    running = Run(model, Storm(model, seed, capacities[::2], capacities[1::2]))
    chance = random.Random(100 + seed)
    for request in chance.sample([*requests, *bad], k=len(requests) + len(bad)):
        running.handle(request)
        running.step(chance.randint(0, 2))
    running.finish()
    last = running.steps()[-1]
    assert (last.kv_bytes_in_use, last.running, last.waiting) == (0, 0, 0)
    over = ends(running.events)
    assert over.keys() == expected.keys()
    codes = {name: end.code for name, end in over.items() if isinstance(end, Failed)}
    assert {name: codes.get(name) in {"engine_error", "memory_exhausted"} for name in codes} == dict.fromkeys(
        codes, True
    )
    assert codes.keys() >= {request.request_id for request in bad}
    assert {codes.get(request.request_id) for request in requests} <= {None, "memory_exhausted"}
    assert sum(request.request_id not in codes for request in requests) > len(requests) // 2
    for name, stream in expected.items():
        rows = running.rows(name)
        tokens = tuple(token_id for row in rows for token_id in row.token_ids)
        assert tokens == stream.token_ids[: len(tokens)], "what was delivered before a fault is right"
        if name not in codes:
            assert streams(running.events).get(name, NOTHING) == stream


# ---------------------------------------------------------------- poison at the door


class Witness:
    """A runner that notes what it is asked for."""

    def __init__(self, model: LoadedModel) -> None:
        self._runner = model.runner
        self.layout = model.runner.layout
        self.is_batched = True
        self.is_row_invariant = model.runner.is_row_invariant
        self.is_batch_invariant = model.runner.is_batch_invariant
        self.geometry = model.runner.geometry
        self.slots: list[int] = []
        self.token_ids: set[int] = set()

    def new_slot(self, tokens: int) -> Slot:
        self.slots.append(tokens)
        return self._runner.new_slot(tokens)

    def forward(self, chunks: Sequence[Chunk]) -> list[torch.Tensor | None]:
        self.token_ids.update(token_id for chunk in chunks for token_id in chunk.token_ids)
        return self._runner.forward(chunks)


@pytest.mark.parametrize(
    ("prompt", "output", "code"),
    [
        ((), (), "invalid_request"),
        ((201, 300), (), "invalid_request"),
        ((201, 2**62), (), "invalid_request"),
        ((-1, 201), (), "invalid_request"),
        ((201,), (-5,), "invalid_request"),
        ((201,) * 640, (), "invalid_request"),
        ((201,) * 639, (1, 2), "invalid_request"),
        ((201,) * 60, (), "memory_exhausted"),
    ],
)
def test_what_cannot_run_is_refused_before_it_touches_memory_or_a_step(
    prompt: tuple[int, ...], output: tuple[int, ...], code: str, laid_out: Models
) -> None:
    layout = laid_out().capabilities.kv_layout
    model = laid_out("llama", kv_budget_bytes=kv_bytes(layout, 64))
    witness = Witness(model)
    running = Run(model, witness)
    running.handle(submit("good", max_tokens=4))
    running.step(2)
    sampling = SamplingParams(max_tokens=20, temperature=0.0)
    running.handle(
        Submit(request_id="bad", attempt=1, prompt_token_ids=prompt, output_token_ids=output, sampling=sampling)
    )
    end = running.end("bad")
    assert isinstance(end, Failed)
    assert end.code == code
    running.finish()
    assert isinstance(running.end("good"), Finished)
    assert witness.slots == [16]
    assert 201 not in witness.token_ids


# ---------------------------------------------------------------- a process that hangs


ANSWER_TOKENS = 400
STALLED_AFTER_S = 3.0


def question(seed: int) -> GenerateRequest:
    return GenerateRequest(
        messages=(ChatMessage(role="user", content="why " * 30),),
        sampling=SamplingParams(max_tokens=ANSWER_TOKENS, temperature=1.0, seed=seed, ignore_eos=True),
    )


@pytest.fixture
async def serving(tiny_folder: Folders) -> AsyncIterator[ServingSystem]:
    """A server over a tiny gpt-oss in an engine process."""
    settings = Settings(journal="memory", devices="cpu", dtype="float32", num_threads=1, step_timeout_s=STALLED_AFTER_S)
    model = PreparedModel(folder=tiny_folder("gpt_oss"), model_name="tiny", source="tests", max_model_len=640)
    async with ServingSystem(settings, model=model, renderer=FakeRenderer()) as system:
        await system.ready(60.0)
        yield system


def events_of(system: ServingSystem, kind: type[Any]) -> list[Any]:
    return [record.event for record in system.journal.read() if isinstance(record.event, kind)]


def stop_engine(system: ServingSystem) -> int:
    """Freeze the engine process: it lives, holds its socket, and does nothing."""
    pid = events_of(system, ev.EngineLoaded)[-1].pid
    os.kill(pid, signal.SIGSTOP)
    return pid


async def answer(generation: Generation, *, on_delta: Callable[[int], None] | None = None) -> tuple[list[int], str]:
    token_ids: list[int] = []
    text = ""
    number = 0
    async for delta in generation:
        token_ids += delta.token_ids
        text += delta.text
        number += 1
        if on_delta:
            on_delta(number)
    return token_ids, text


@pytest.mark.slow
@pytest.mark.timeout(120)
async def test_a_hung_engine_is_replaced_and_its_streams_go_on_with_the_same_text(serving: ServingSystem) -> None:
    expected = [await answer(serving.submit(question(seed))) for seed in (1, 2)]
    frozen: list[int] = []

    def freeze(number: int) -> None:
        if number == 3:
            frozen.append(stop_engine(serving))

    found = await asyncio.gather(
        answer(serving.submit(question(1)), on_delta=freeze), answer(serving.submit(question(2)))
    )
    assert found == expected
    assert len(found[0][0]) == ANSWER_TOKENS
    (stalled,) = events_of(serving, ev.EngineStalled)
    assert stalled.silent_ms >= 1000 * STALLED_AFTER_S
    assert [exited.exit_code for exited in events_of(serving, ev.EngineExited)] == [-signal.SIGKILL]
    assert len(events_of(serving, ev.EngineLoaded)) == 2
    assert not psutil.pid_exists(frozen[0])
    assert len(events_of(serving, ev.AttemptRetried)) == 2
    assert len(events_of(serving, ev.RequestCompleted)) == 4


@pytest.mark.slow
@pytest.mark.timeout(120)
async def test_an_engine_that_hung_while_idle_is_found_by_the_next_request(serving: ServingSystem) -> None:
    expected = await answer(serving.submit(question(1)))
    stop_engine(serving)
    assert await answer(serving.submit(question(1))) == expected
    assert len(events_of(serving, ev.EngineStalled)) == 1
    assert len(events_of(serving, ev.EngineLoaded)) == 2
