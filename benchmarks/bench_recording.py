"""What recording costs on disk, and how long a bundle takes.

    python benchmarks/bench_recording.py                 bytes appended, with an engine that costs nothing
    python benchmarks/bench_recording.py --demo          the same with the demo model
    python benchmarks/bench_recording.py --journal-mb 100    cutting and opening bundles of a journal of that size

Bytes are those of the segment files, without what a server records before its first request. A run with short answers
and one with long ones, otherwise alike, tell the bytes of a request from those of a token. A step is one record for all
streams in it, so a token costs less the more run at once.
Times of bundles are processor seconds, which a busy machine changes less than it does the clock.
"""

import argparse
import asyncio
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from gptoss.actors.generation import GenerateRequest
from gptoss.app import ServingSystem
from gptoss.config import Settings
from gptoss.engine.model_source import PreparedModel
from gptoss.engine.port import ChatMessage
from gptoss.messages.sampling import SamplingParams
from gptoss.telemetry.bundle_reader import BundleReader
from gptoss.testing import FAKE_MODEL, FakeDriver, FakeOptions, FakeRenderer

FAKE = PreparedModel(folder="", model_name=FAKE_MODEL, source="benchmark", max_model_len=4096)
PROMPT = "hello " * 64
SHORT, LONG = 16, 128


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo", action="store_true")
    parser.add_argument("--journal-mb", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if options.journal_mb:
            bundles(Path(folder), options.journal_mb)
        else:
            appended(Path(folder), demo=options.demo)


def appended(folder: Path, *, demo: bool) -> None:
    print("streams  control: bytes/request  bytes/token  content: bytes/request  bytes/token")
    for streams in (1, 8, 32):
        sizes: list[dict[str, int]] = []
        requests = max(8, streams * 2) if demo else streams * 8
        for tokens in (SHORT, LONG):
            data = folder / f"{streams}-{tokens}"
            before = asyncio.run(serve(data, streams, [requests], tokens, demo=demo))
            sizes.append({family: size - before[family] for family, size in stored(data).items()})
        figures: list[float] = []
        for family in ("control", "content"):
            per_token = (sizes[1][family] - sizes[0][family]) / (requests * (LONG - SHORT))
            figures += [sizes[0][family] / requests - SHORT * per_token, per_token]
        print(f"{streams:7}  {figures[0]:22.0f}  {figures[1]:11.1f}  {figures[2]:22.0f}  {figures[3]:11.1f}")


def bundles(folder: Path, journal_mb: int) -> None:
    data = folder / "data"
    asyncio.run(serve(data, 32, [2000] * journal_mb, LONG, until_mb=journal_mb))
    print(f"journal: control {stored(data)['control'] / 1e6:.0f} MB, content {stored(data)['content'] / 1e6:.0f} MB")
    for index in (data / "journal").glob("index-*"):
        index.unlink()  # So that the first cut makes the surveys of all segments, as of a journal of an older version.
    for name, choice in (
        ("one request, no surveys", ["--last", "1"]),
        ("one request", ["--last", "1"]),
        ("one request, tokens", ["--last", "1", "--content", "tokens"]),
        ("two seconds", ["--window", "2s"]),
        ("everything", ["--window", "1d", "--limit-mb", "2000"]),
        ("everything, tokens", ["--window", "1d", "--limit-mb", "2000", "--content", "tokens"]),
    ):
        output = folder / "x.zip"
        command = [sys.executable, "-m", "gptoss", "bundle", "create", "--data-dir", str(data), "--force", "-o", output]
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([*map(str, command), *choice], check=True, stdout=subprocess.DEVNULL)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        cut_s = after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime
        peak_mb = after.ru_maxrss / 1024
        print(f"{name}: cut in {cut_s:.1f} s, peak {peak_mb:.0f} MB; {output.stat().st_size / 1e6:.1f} MB;", end=" ")
        open_bundle(output)


def open_bundle(path: Path) -> None:
    before_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    start = time.process_time()
    with BundleReader(path) as reader:
        next(reader.records())
        opened_s = time.process_time() - start
        start = time.process_time()
        records = sum(1 for _ in reader.records())
        read_s = time.process_time() - start
        unpacked = sum(part.size for part in reader.manifest.parts)
    grown_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024 - before_mb
    print(
        f"{unpacked / 1e6:.0f} MB unpacked, first record after {opened_s * 1000:.0f} ms, "
        f"{records:,} records at {records / read_s:,.0f}/s, memory +{grown_mb:.0f} MB"
    )


async def serve(
    folder: Path, streams: int, rounds: list[int], tokens: int, *, demo: bool = False, until_mb: int = 0
) -> dict[str, int]:
    """Serve requests, and return what was stored before the first of them."""
    settings = Settings(devices="cpu", data_dir=str(folder), journal_retention_mb=10_000)
    if demo:
        system = ServingSystem(settings)
    else:
        options = FakeOptions(max_batch_size=streams, kv_budget_bytes=10**9)
        system = ServingSystem(settings, drivers=lambda _: FakeDriver(options), renderer=FakeRenderer(), model=FAKE)
    async with system:
        await system.ready()
        system.journal.flush()
        before = stored(folder)
        for requests in rounds:
            waiting = iter(range(requests))

            async def client(numbers=waiting) -> None:
                for number in numbers:
                    await one(system, number, tokens)

            await asyncio.gather(*(client() for _ in range(streams)))
            if until_mb and system.journal.health.stored_bytes > until_mb * 1e6:
                break
    return before


async def one(system: ServingSystem, seed: int, tokens: int) -> None:
    request = GenerateRequest(
        messages=(ChatMessage(role="user", content=PROMPT),),
        sampling=SamplingParams(max_tokens=tokens, seed=seed, ignore_eos=True),
    )
    async for _ in system.submit(request):
        pass


def stored(folder: Path) -> dict[str, int]:
    return {
        family: sum(path.stat().st_size for path in (folder / "journal").glob(f"{family}-*.seg"))
        for family in ("control", "content")
    }


if __name__ == "__main__":
    main()
