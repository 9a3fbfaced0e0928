"""Recordings of a serving system under a fake or tiny engine: what the tests replay, and what the committed bundles hold."""

import asyncio
import functools
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import msgspec

from gptoss.actors.generation import GenerateRequest, Generation
from gptoss.app import ServingSystem
from gptoss.config import Settings
from gptoss.engine.inprocess import InProcessDriver
from gptoss.engine.model_source import PreparedModel
from gptoss.engine.port import ChatMessage, DriverFactory, EngineEvent, Load, Loaded, Renderer
from gptoss.errors import GptossError
from gptoss.messages import events as ev
from gptoss.messages.envelope import Event, Record
from gptoss.messages.sampling import SamplingParams
from gptoss.telemetry.recording import ListRecording, LiveRecording
from gptoss.testing import FAKE_MODEL, FakeDriver, FakeOptions, FakeRenderer

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# torch and transformers are only partly typed.

FAKE = PreparedModel(folder="", model_name=FAKE_MODEL, source="test", max_model_len=4096)
Work = Callable[[ServingSystem], Coroutine[Any, Any, None]]


def request(words: int = 4, *, max_tokens: int = 6, seed: int = 3, **fields: Any) -> GenerateRequest:
    """A request of so many tokens under ``FakeRenderer``."""
    return GenerateRequest(
        messages=(ChatMessage(role="user", content="word " * words),),
        sampling=SamplingParams(max_tokens=max_tokens, seed=seed, ignore_eos=True),
        **fields,
    )


async def outcome(generation: Generation) -> GptossError | None:
    """Read to the end; returns what went wrong."""
    try:
        async for _ in generation:
            pass
    except GptossError as error:
        return error
    return None


def fakes(options: FakeOptions | None = None, *, first: FakeOptions | None = None) -> DriverFactory:
    """Fake engines; the first one may be another than those that replace it."""
    made: list[FakeDriver] = []

    def make(_: str) -> FakeDriver:
        made.append(FakeDriver(first if first and not made else options))
        return made[-1]

    return make


async def record(
    work: Work, *, drivers: DriverFactory | None = None, model: PreparedModel = FAKE, **settings: Any
) -> ListRecording:
    """The recording of a server that does ``work`` and then stops in order."""
    values: dict[str, Any] = {"journal": "memory", "devices": "cpu", **settings}
    renderer: Renderer = FakeRenderer()
    system = ServingSystem(Settings(**values), drivers=drivers or fakes(), renderer=renderer, model=model)
    async with system:
        await system.ready(60.0)
        await work(system)
    live = LiveRecording(system.journal)
    return ListRecording(live.records(), live.content())


async def all_of(system: ServingSystem, *requests: GenerateRequest) -> None:
    """Run requests at once, to their ends."""
    await asyncio.gather(*(outcome(system.submit(each)) for each in requests))


# ---------------------------------------------------------------- one incident each


async def clean() -> ListRecording:
    """Four requests, and nothing happens to them."""

    async def work(system: ServingSystem) -> None:
        await all_of(system, *(request(3 + n, seed=n, request_id=f"clean-{n}") for n in range(4)))

    return await record(work, drivers=fakes(FakeOptions(step_s=0.001)))


async def refused_for_memory() -> ListRecording:
    """A request that no executor could ever hold, beside one that fits."""

    async def work(system: ServingSystem) -> None:
        await all_of(system, request(40, request_id="too-large"), request(request_id="fits"))

    return await record(work, drivers=fakes(FakeOptions(step_s=0.001, kv_budget_bytes=60)))


async def shrunk() -> ListRecording:
    """A request that gets fewer tokens than it asked for."""

    async def work(system: ServingSystem) -> None:
        await all_of(system, request(max_tokens=80, request_id="long"))

    return await record(work, drivers=fakes(FakeOptions(step_s=0.001, kv_budget_bytes=60)))


async def queued_past_deadline() -> ListRecording:
    """A request that waits for the only place until its time is over."""

    async def work(system: ServingSystem) -> None:
        await all_of(system, request(max_tokens=60, request_id="runs"), request(request_id="waits"))

    drivers = fakes(FakeOptions(step_s=0.02, max_batch_size=1))
    return await record(work, drivers=drivers, queue_timeout_s=0.3)


async def cancelled_by_disconnect() -> ListRecording:
    """A client that goes away in the middle of its answer."""

    async def work(system: ServingSystem) -> None:
        generation = system.submit(request(max_tokens=400, request_id="gone"))
        async for _ in generation:
            generation.client_disconnected()
            break
        await outcome(generation)

    return await record(work, drivers=fakes(FakeOptions(step_s=0.005)))


async def engine_killed() -> ListRecording:
    """An engine that dies under three requests, which go on with the next one."""

    async def work(system: ServingSystem) -> None:
        await all_of(system, *(request(max_tokens=9, seed=n, request_id=f"survivor-{n}") for n in range(3)))

    return await record(work, drivers=fakes(FakeOptions(step_s=0.002), first=FakeOptions(step_s=0.002, die_at_step=4)))


class BoastfulDriver(InProcessDriver):
    """A real engine that says it has more places than its scheduler gives, so that requests displace each other."""

    def start(self, load: Load, sink: Callable[[EngineEvent], None]) -> None:
        """See ``engine.port.EngineDriver``."""

        def boast(event: EngineEvent) -> None:
            if isinstance(event, Loaded):
                capabilities = msgspec.structs.replace(event.capabilities, max_batch_size=8)
                event = msgspec.structs.replace(event, capabilities=capabilities)
            sink(event)

        super().start(load, boast)


async def preempted(folder: str) -> ListRecording:
    """A request that must give its place in the batch to one of better priority, and computes its tokens again.

    Args:
        folder: of a tiny model.
    """
    model = PreparedModel(folder=folder, model_name="tiny", source="test", max_model_len=640)

    async def work(system: ServingSystem) -> None:
        first = system.submit(request(30, max_tokens=40, priority=1, request_id="yields"))
        async for _ in first:
            break
        await asyncio.gather(
            outcome(first),
            *(outcome(system.submit(request(priority=0, seed=n, request_id=f"urgent-{n}"))) for n in range(2)),
        )

    return await record(
        work,
        drivers=BoastfulDriver,
        model=model,
        max_batch_size=1,
        dtype="float32",
        num_threads=1,
    )


INCIDENTS: dict[str, Callable[[], Coroutine[Any, Any, ListRecording]]] = {
    "clean": clean,
    "refused_for_memory": refused_for_memory,
    "shrunk": shrunk,
    "queued_past_deadline": queued_past_deadline,
    "cancelled_by_disconnect": cancelled_by_disconnect,
    "engine_killed": engine_killed,
}


def tiny_llama(folder: Path) -> str:
    """Write a two-layer model of random weights whose tokens are bytes into ``folder``; always the same one."""
    import torch
    import transformers
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    from gptoss.engine.token_text import byte_alphabet

    torch.manual_seed(1)
    config = transformers.LlamaConfig(
        vocab_size=300,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=640,
        eos_token_id=256,
    )
    model: Any = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(5)  # far from uniform, so that a wrong step shows
    model.save_pretrained(folder)
    tokenizer = Tokenizer(models.BPE(vocab=byte_alphabet(), merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<|end|>", special=True)])
    tokenizer.save(str(folder / "tokenizer.json"))
    return str(folder)


# ---------------------------------------------------------------- doctoring


def doctored(recording: ListRecording, change: Callable[[Record], Event | None]) -> tuple[ListRecording, Record]:
    """The recording with one event replaced: the first for which ``change`` gives another.

    Returns:
        the recording, and the record as it was.
    """
    records = list(recording.records())
    for index, record in enumerate(records):
        event = change(record)
        if event is not None:
            records[index] = Record(record.meta, event)
            return ListRecording(records, recording.content()), record
    raise ValueError("nothing was changed")


def with_more_tokens(record: Record) -> Event | None:
    """Admission grants a token more than it did."""
    event = record.event
    if isinstance(event, ev.AdmissionDecided) and event.action == "shrink":
        return msgspec.structs.replace(event, max_tokens=event.max_tokens + 1)
    return None


@functools.cache
def bundles_folder() -> Path:
    """Where the committed bundles are."""
    return Path(__file__).with_name("bundles")
