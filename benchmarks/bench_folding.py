"""What the projections cost on the event loop: processor time for each control record and token.

    python benchmarks/bench_folding.py                32 streams of a fake engine, folded again and again

One run is recorded in memory; its records are then folded as a live server does, without the journal and the engine. The
table shows the least of the rounds, which a busy machine disturbs least. With traces there is a server's share of kept ones,
3%, and all of them. RESULTS.md has what came out: 2.5 us a record with log lines, of which half are commands and only counted,
and 5.9 us when every view looked at every record.
"""

import argparse
import asyncio
import json
import time
from collections import Counter
from collections.abc import Callable
from io import StringIO

import msgspec

from gptoss.actors.generation import GenerateRequest
from gptoss.app import ServingSystem
from gptoss.config import Settings
from gptoss.engine.model_source import PreparedModel
from gptoss.engine.port import ChatMessage
from gptoss.messages.envelope import Record
from gptoss.messages.events import NodeStarted, StepCommitted
from gptoss.messages.sampling import SamplingParams
from gptoss.telemetry.live_views import LiveViews
from gptoss.telemetry.logs import LogWriter
from gptoss.testing import FAKE_MODEL, FakeDriver, FakeOptions, FakeRenderer

MODEL = PreparedModel(folder="", model_name=FAKE_MODEL, source="benchmark", max_model_len=4096)


async def record(streams: int, tokens: int) -> list[Record]:
    settings = Settings(devices="cpu", journal="memory")
    options = FakeOptions(step_s=0.001, max_batch_size=64)
    async with ServingSystem(
        settings, drivers=lambda _: FakeDriver(options), renderer=FakeRenderer(), model=MODEL
    ) as system:
        await system.ready(30)

        async def use(number: int) -> None:
            request = GenerateRequest(
                messages=(ChatMessage(role="user", content="hello " * 64),),
                sampling=SamplingParams(max_tokens=tokens, seed=number, ignore_eos=True),
            )
            async for _ in system.submit(request):
                pass

        await asyncio.gather(*(use(number) for number in range(streams)))
        return list(system.journal.read())


def traced(records: list[Record], ratio: float) -> list[Record]:
    """The same records of a server that exports this share of traces."""
    found: list[Record] = []
    for one in records:
        event = one.event
        if isinstance(event, NodeStarted):
            settings = json.loads(event.settings) | {"otlp_endpoint": "http://collector", "trace_ratio": ratio}
            event = msgspec.structs.replace(event, settings=json.dumps(settings))
        found.append(Record(one.meta, event))
    return found


def fold_s(records: list[Record], make: Callable[[], LiveViews]) -> float:
    views = make()
    began = time.process_time()
    for one in records:
        views.fold(one)
    return time.process_time() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=20)
    options = parser.parse_args()
    records = asyncio.run(record(options.streams, options.tokens))
    kinds = Counter(one.meta.type for one in records)
    tokens = sum(row.tokens for one in records if isinstance(one.event, StepCommitted) for row in one.event.rows)
    print(f"{len(records)} records, {tokens} tokens; {dict(kinds.most_common(4))}\n")
    cases: dict[str, tuple[list[Record], Callable[[], LiveViews]]] = {
        "projection, metrics": (records, LiveViews),
        "and log lines": (records, lambda: LiveViews(log=LogWriter(StringIO(), "json"))),
        "and traces, 3% kept": (traced(records, 0.03), lambda: LiveViews(spans=lambda _: None)),
        "and traces, all kept": (traced(records, 1.0), lambda: LiveViews(spans=lambda _: None)),
    }
    print("| folded | us a record | us a token |\n|---|---|---|")
    for name, (given, make) in cases.items():
        least_s = min(fold_s(given, make) for _ in range(options.rounds))
        print(f"| {name} | {least_s / len(given) * 1e6:.2f} | {least_s / tokens * 1e6:.2f} |", flush=True)


if __name__ == "__main__":
    main()
