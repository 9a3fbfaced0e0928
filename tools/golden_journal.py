"""Write a journal as this version of the program keeps it: ``python tools/golden_journal.py FOLDER``.

Such a folder is committed once for each version of the format or of an event, and read for ever by
``tests/telemetry/test_golden_journal.py``. Two runs of a server over a fake engine stand in it: the first is killed with
requests running and queued, the second ends what the first left and stops in order.
"""

import asyncio
import json
import shutil
import sys
import tempfile
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import msgspec

from gptoss.actors.generation import GenerateRequest, Generation
from gptoss.app import ServingSystem
from gptoss.config import Settings
from gptoss.engine.model_source import PreparedModel
from gptoss.engine.port import ChatMessage
from gptoss.errors import GptossError
from gptoss.messages import events as ev
from gptoss.messages.sampling import SamplingParams
from gptoss.telemetry.newest import Newest, RequestFilter
from gptoss.telemetry.segments import SegmentReader
from gptoss.testing import FAKE_MODEL, FakeDriver, FakeOptions, FakeRenderer

MODEL = PreparedModel(folder="", model_name=FAKE_MODEL, source="golden", max_model_len=4096)


def main() -> None:
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True)
    with tempfile.TemporaryDirectory() as scratch:
        asyncio.run(live_twice(Path(scratch)))
        image = Path(scratch) / "image" / "journal"
        rows = Newest.in_journal(SegmentReader(image)).requests(RequestFilter(), 1000)
        (folder / "requests.json").write_text(json.dumps(msgspec.to_builtins(rows), indent=1) + "\n", encoding="utf-8")
        for path in image.glob("*.seg"):
            shutil.copy(path, folder / path.name)


async def live_twice(scratch: Path) -> None:
    async with serving(scratch / "live", max_queue=2) as system:
        await consume(submit(system, "completed", 4))
        refused = submit(system, "too-long", 4, words=5000)
        await consume(refused)
        running = [submit(system, f"running-{number}", 4000) for number in range(2)]
        cancelled = submit(system, "cancelled", 4000)
        await first_token(running[1])
        cancelled.cancel()
        await consume(cancelled)
        queued = submit(system, "queued", 4000)
        while not any(  # noqa: ASYNC110 - what is waited for is a record
            r.meta.correlation == "queued" for r in system.journal.read() if isinstance(r.event, ev.Enqueued)
        ):
            await asyncio.sleep(0.01)
        system.journal.flush()
        shutil.copytree(scratch / "live", scratch / "image")
        for generation in (*running, queued):
            generation.cancel()
            await consume(generation)
    async with serving(scratch / "image", max_queue=2) as system:
        await consume(submit(system, "completed", 3))


@asynccontextmanager
async def serving(folder: Path, *, max_queue: int) -> AsyncGenerator[ServingSystem]:
    options = FakeOptions(step_s=0.003, max_batch_size=2)
    values = Settings(devices="cpu", data_dir=str(folder), max_queue=max_queue)
    async with ServingSystem(
        values, drivers=lambda _: FakeDriver(options), renderer=FakeRenderer(), model=MODEL
    ) as system:
        await system.ready(10.0)
        yield system


def submit(system: ServingSystem, name: str, max_tokens: int, *, words: int = 6) -> Generation:
    message = ChatMessage(role="user", content="word " * words)
    sampling = SamplingParams(max_tokens=max_tokens, seed=7)
    return system.submit(GenerateRequest(messages=(message,), sampling=sampling, request_id=name))


async def first_token(generation: Generation) -> None:
    async for delta in generation:
        if delta.token_ids:
            return


async def consume(generation: Generation) -> None:
    with suppress(GptossError):
        async for _ in generation:
            pass


if __name__ == "__main__":
    main()
