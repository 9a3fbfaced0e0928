"""The live system with engines that pretend: what every load test without a model runs against."""

import asyncio
import contextlib
import os
import tempfile
from collections.abc import AsyncGenerator, Generator
from pathlib import Path

import msgspec

from gptoss.app import ServingSystem
from gptoss.bench.fleet import FakeFleet
from gptoss.config import Settings
from gptoss.engine.model_source import PreparedModel
from gptoss.telemetry.logs import LogWriter
from gptoss.testing import FAKE_MODEL, FakeRenderer

READY_TIMEOUT_S = 60.0
_MODEL = PreparedModel(folder="", model_name=FAKE_MODEL, source="bench", max_model_len=0)


class FakeShape(msgspec.Struct, frozen=True, kw_only=True):
    """What such a system is like.

    Attributes:
        executors: 1 to 64, each with ``slots`` places and KV memory for ``kv_tokens`` tokens; 0 is plenty.
        step_ms: how long an engine's step takes; 0 is as fast as it can be planned.
        max_queue: requests that may wait for admission.
        journal: ``segments`` on disk or ``memory``.
        data_dir: where the journal is kept; empty takes a temporary folder that is gone afterwards.
        model: a folder whose tokenizer and chat template render the prompts; empty makes a token of each word.
        client_stall_s, request_timeout_s: as in ``Settings``.
    """

    executors: int = 1
    slots: int = 64
    kv_tokens: int = 0
    step_ms: float = 0.0
    max_queue: int = 512
    journal: str = "segments"
    data_dir: str = ""
    model: str = ""
    client_stall_s: float = 30.0
    request_timeout_s: float = 600.0


@contextlib.asynccontextmanager
async def fake_system(shape: FakeShape) -> AsyncGenerator[tuple[ServingSystem, FakeFleet]]:
    """A started system of this shape, all of its engines loaded.

    Raises:
        GptossError: it cannot start.
    """
    with (
        _data_dir(shape.data_dir) as folder,
        FakeFleet(shape.executors, step_ms=shape.step_ms, kv_tokens=shape.kv_tokens) as fleet,
        Path(os.devnull).open("w", encoding="utf-8") as sink,  # noqa: ASYNC230 - never blocks; lines are made as for a server
    ):
        settings = Settings(
            model=FAKE_MODEL,
            devices=f"cpu:{shape.executors}",
            data_dir=folder,
            journal="memory" if shape.journal == "memory" else "segments",
            max_batch_size=shape.slots,
            max_queue=shape.max_queue,
            client_stall_s=shape.client_stall_s,
            request_timeout_s=shape.request_timeout_s,
        )
        serving = ServingSystem(
            settings,
            drivers=fleet.driver,
            renderer=None if shape.model else FakeRenderer(),
            model=msgspec.structs.replace(_MODEL, folder=shape.model),
            log=LogWriter(sink, "json"),
        )
        async with serving:
            await serving.ready(READY_TIMEOUT_S)
            async with asyncio.timeout(READY_TIMEOUT_S):
                while _num_ready(serving) < shape.executors:  # noqa: ASYNC110 - folded from the journal, told to nobody
                    await asyncio.sleep(0.02)
            yield serving, fleet


def _num_ready(serving: ServingSystem) -> int:
    views = serving.projection.health(serving.clock.monotonic_ns())["executors"]
    return sum(view["state"] == "ready" for view in views)


@contextlib.contextmanager
def _data_dir(chosen: str) -> Generator[str]:
    if chosen:
        Path(chosen).mkdir(parents=True, exist_ok=True)
        yield chosen
        return
    with tempfile.TemporaryDirectory(prefix="gptoss-bench-") as folder:
        yield folder
