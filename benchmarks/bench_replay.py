"""How fast a journal is replayed, and how much memory that takes.

A server with fake engines serves requests until its journal on disk is large; then ``gptoss.replay`` runs every decision
again. The target is 50,000 events a second on one core.

    python benchmarks/bench_replay.py --requests 4000 --streams 16
"""

import argparse
import asyncio
import resource
import tempfile
import time
from pathlib import Path

from gptoss.actors.generation import GenerateRequest
from gptoss.app import ServingSystem
from gptoss.config import Settings
from gptoss.engine.model_source import PreparedModel
from gptoss.engine.port import ChatMessage
from gptoss.messages.sampling import SamplingParams
from gptoss.replay.verify import verify
from gptoss.telemetry.recording import JournalRecording, ListRecording
from gptoss.testing import FAKE_MODEL, FakeDriver, FakeOptions, FakeRenderer

TARGET_PER_S = 50_000


async def serve(data_dir: str, requests: int, streams: int, tokens: int) -> None:
    """Fill a journal."""
    model = PreparedModel(folder="", model_name=FAKE_MODEL, source="benchmark", max_model_len=4096)
    options = FakeOptions(max_batch_size=streams, step_s=0.0005)
    settings = Settings(data_dir=data_dir, devices="cpu", content="none", max_queue=10 * streams)
    async with ServingSystem(
        settings, drivers=lambda _: FakeDriver(options), renderer=FakeRenderer(), model=model
    ) as system:
        await system.ready(30.0)
        places = asyncio.Semaphore(2 * streams)

        async def one(number: int) -> None:
            async with places:
                messages = (ChatMessage(role="user", content="some words"),)
                sampling = SamplingParams(max_tokens=1 + number % (2 * tokens), seed=number)
                async for _ in system.submit(GenerateRequest(messages=messages, sampling=sampling)):
                    pass

        await asyncio.gather(*(one(number) for number in range(requests)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=4000)
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=20, help="mean length of an answer")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as data_dir:
        asyncio.run(serve(data_dir, arguments.requests, arguments.streams, arguments.tokens))
        folder = Path(data_dir) / "journal"
        size_mb = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 2**20
        recording = JournalRecording(folder)
        before_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        begin, begin_cpu = time.perf_counter(), time.process_time()
        result = verify(recording)
        wall_s, cpu_s = time.perf_counter() - begin, time.process_time() - begin_cpu
        grown_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024 - before_mb
        begin_cpu = time.process_time()
        records = list(recording.records())
        read_s = time.process_time() - begin_cpu
        begin_cpu = time.process_time()
        verify(ListRecording(records))
        decide_s = time.process_time() - begin_cpu
    assert result.same, result
    assert result.requests == arguments.requests
    print(f"{result.records:,} events, {size_mb:.1f} MB, {result.requests:,} requests")
    print(f"from disk:   {result.records / wall_s:>9,.0f} events/s ({result.records / cpu_s:,.0f} a second of CPU)")
    print(f"  reading:   {result.records / read_s:>9,.0f} events/s of CPU")
    print(f"  deciding:  {result.records / decide_s:>9,.0f} events/s of CPU")
    print(f"memory grew by {grown_mb:.1f} MB while replaying")
    print(f"target {TARGET_PER_S:,}: {'reached' if result.records / cpu_s >= TARGET_PER_S else 'missed'} by CPU time")


if __name__ == "__main__":
    main()
