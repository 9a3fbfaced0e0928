"""Metrics, traces, ``/stats`` and log lines are functions of the journal: folded again from it alone they are what they were live."""

import asyncio
from collections.abc import AsyncGenerator, Iterable
from contextlib import asynccontextmanager, suppress
from io import StringIO
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import pytest

from gptoss.actors.generation import GenerateRequest, Generation
from gptoss.app import ServingSystem
from gptoss.config import Settings
from gptoss.engine.model_source import PreparedModel
from gptoss.engine.port import ChatMessage
from gptoss.errors import GptossError
from gptoss.messages import events as ev
from gptoss.messages.envelope import Record
from gptoss.messages.sampling import SamplingParams
from gptoss.surroundings import live_surroundings
from gptoss.telemetry.logs import LogWriter
from gptoss.telemetry.metrics import Metrics
from gptoss.telemetry.otlp import SpanCounts, SpanExport
from gptoss.telemetry.projection import Projection
from gptoss.telemetry.segments import SegmentReader
from gptoss.telemetry.spans import Span
from gptoss.telemetry.traces import Traces
from gptoss.testing import FAKE_MODEL, FakeDriver, FakeOptions, FakeRenderer

MODEL = PreparedModel(folder="", model_name=FAKE_MODEL, source="test", max_model_len=4096)
OPENMETRICS = "application/openmetrics-text"


class Views(NamedTuple):
    """What is told of a run, up to the record at ``pos``; ``now_ns`` is when it was asked."""

    boot: str
    pos: int
    now_ns: int
    metrics: bytes
    openmetrics: bytes
    stats: dict[str, Any]
    memory: dict[str, Any]
    health: dict[str, Any]
    requests: list[dict[str, Any]]
    errors: list[dict[str, Any]]
    log: str
    spans: list[Span]


class KeptSpans(SpanExport):
    """Keeps what would be exported."""

    def __init__(self) -> None:
        self.spans: list[Span] = []

    def put(self, spans: tuple[Span, ...]) -> None:
        self.spans += spans

    def take_counts(self) -> SpanCounts:
        return SpanCounts()

    def close(self, timeout_s: float = 0.0) -> None:
        """Nothing is left to do."""


def views_of(projection: Projection, metrics: Metrics, log: str, spans: list[Span], *, boot: str, now_ns: int) -> Views:
    return Views(
        boot=boot,
        pos=projection.newest_pos,
        now_ns=now_ns,
        metrics=metrics.render()[0],
        openmetrics=metrics.render(OPENMETRICS)[0],
        stats=projection.stats(now_ns),
        memory=projection.memory_stats(),
        health=projection.health(now_ns),
        requests=projection.recent_requests(1000),
        errors=projection.recent_errors(),
        log=log,
        spans=spans,
    )


def recomputed(records: Iterable[Record], live: Views) -> Views:
    projection, metrics, log = Projection(), Metrics(), StringIO()
    writer = LogWriter(log, "json", "debug")
    spans: list[Span] = []
    traces = Traces(spans.extend)
    for record in records:
        if record.meta.pos > live.pos:
            break
        for fold in (projection.fold, metrics.fold, writer.fold, traces.fold):
            fold(record)
    return views_of(projection, metrics, log.getvalue(), spans, boot=live.boot, now_ns=live.now_ns)


@asynccontextmanager
async def serving(log: StringIO, **settings: Any) -> AsyncGenerator[ServingSystem]:
    made: list[FakeDriver] = []

    def drivers(_: str) -> FakeDriver:
        dies_at = 0 if made else 9
        made.append(FakeDriver(FakeOptions(step_s=0.002, max_batch_size=3, kv_budget_bytes=300, die_at_step=dies_at)))
        return made[-1]

    writer = LogWriter(log, "json", "debug")
    values = Settings(devices="cpu", max_queue=6, otlp_endpoint="http://collector", trace_ratio=0.5, **settings)

    def keep(_: Settings) -> SpanExport:
        return KeptSpans()

    around = msgspec.structs.replace(live_surroundings(), open_span_export=keep)
    async with ServingSystem(
        values, drivers=drivers, renderer=FakeRenderer(), model=MODEL, log=writer, surroundings=around
    ) as system:
        await system.ready(10.0)
        yield system


def submit(system: ServingSystem, number: int) -> Generation:
    words = 3 + 20 * (number % 4)
    return system.submit(
        GenerateRequest(
            messages=(ChatMessage(role="user", content="word " * (5000 if number == 7 else words)),),
            sampling=SamplingParams(max_tokens=10 + number, seed=number),
            model="another" if number == 5 else "",
        )
    )


async def use(generation: Generation, *, cancel: bool) -> None:
    with suppress(GptossError):
        async for delta in generation:
            if cancel and delta.token_ids:
                generation.cancel()


async def eventful(system: ServingSystem, log: StringIO) -> Views:
    """Completions, cancels, refusals, bad requests, a lost engine with retries, waiting for memory."""
    await asyncio.gather(*(use(submit(system, number), cancel=number % 6 == 1) for number in range(14)))
    await use(submit(system, 2), cancel=False)
    async with asyncio.timeout(10.0):
        while system.gateway.running or any(system.system.mailbox_depths().values()):
            await asyncio.sleep(0.01)
    await system.caught_up()
    kept = system._observer.spans
    assert isinstance(kept, KeptSpans)
    return views_of(
        system.projection,
        system.metrics,
        log.getvalue(),
        list(kept.spans),
        boot=system.journal.boot,
        now_ns=system.system.now_ns(),
    )


def check_eventful(live: Views) -> None:
    """The run had everything in it: otherwise the comparison would say little."""
    counts = live.stats["requests"]
    assert all(counts[state] for state in ("completed", "cancelled", "rejected"))
    assert live.stats["faults"]["engine_exits"] == 1
    assert any(row["retries"] for row in live.requests)
    assert any(row["queue_ms"] for row in live.requests)
    assert live.stats["telemetry_missed"] == 0
    assert '"request_rejected"' in live.log
    assert b"vllm:time_to_first_token_seconds_count" in live.metrics
    assert b"trace_id" in live.openmetrics
    reasons = {
        span.attributes["gptoss.sampling.reason"] for span in live.spans if "gen_ai.response.id" in span.attributes
    }
    assert {"error", "ratio"} <= reasons
    assert any(span.links for span in live.spans)


async def test_views_are_the_same_from_the_journal_in_memory() -> None:
    log = StringIO()
    async with serving(log, journal="memory") as system:
        live = await eventful(system, log)
        check_eventful(live)
        assert recomputed(system.journal.read(), live) == live


async def test_views_are_the_same_from_the_segments_after_a_restart(tmp_path: Path) -> None:
    log = StringIO()
    async with serving(log, data_dir=str(tmp_path)) as system:
        live = await eventful(system, log)
    check_eventful(live)
    async with serving(StringIO(), data_dir=str(tmp_path)) as system:
        await use(submit(system, 1), cancel=False)
        assert recomputed(system.journal.read(boot=live.boot), live) == live
    assert recomputed(SegmentReader(tmp_path / "journal").read(boot=live.boot), live) == live


async def test_a_record_that_is_missing_is_noticed() -> None:
    log = StringIO()
    async with serving(log, journal="memory") as system:
        live = await eventful(system, log)
        cut = [r for r in system.journal.read() if not isinstance(r.event, ev.FirstTokenProduced)]
        again = recomputed(cut, live)
        assert (again.metrics, again.stats) != (live.metrics, live.stats)


@pytest.mark.parametrize("end", ["live", "stopped"])
async def test_the_newest_boot_alone_counts(tmp_path: Path, end: str) -> None:
    """The records of an older boot in front change nothing: what it counted, the newer boot's own records hold."""
    async with serving(StringIO(), data_dir=str(tmp_path)) as system:
        await use(submit(system, 1), cancel=False)
    log = StringIO()
    async with serving(log, data_dir=str(tmp_path)) as system:
        live = await eventful(system, log)
        if end == "live":
            again = recomputed(system.journal.read(boot=live.boot), live)
            assert again == live
    if end == "stopped":
        everything = [r for r in SegmentReader(tmp_path / "journal").read() if r.meta.boot != live.boot]
        everything += SegmentReader(tmp_path / "journal").read(boot=live.boot)
        again = recomputed((r for r in everything if r.meta.boot != live.boot or r.meta.pos <= live.pos), live)
        assert again.stats == live.stats
        assert again.metrics == live.metrics
        assert again.spans[-len(live.spans) :] == live.spans


def counted(metrics: bytes) -> dict[str, float]:
    """Every counter that a restart must not lose, by its line."""
    lines = (line.rpartition(" ") for line in metrics.decode().splitlines() if not line.startswith("#"))
    return {name: float(value) for name, _, value in lines if "_total" in name or "_count" in name}


async def test_a_restart_loses_no_counter(tmp_path: Path) -> None:
    log = StringIO()
    async with serving(log, data_dir=str(tmp_path)) as system:
        before = counted((await eventful(system, log)).metrics)
    log = StringIO()
    async with serving(log, data_dir=str(tmp_path)) as system:
        at_start = counted(system.metrics.render()[0])
        live = await eventful(system, log)
        after = counted(live.metrics)
        again = recomputed(system.journal.read(boot=live.boot), live)
    assert {name: value for name, value in before.items() if at_start.get(name, 0) < value} == {}
    success = next(name for name in before if name.startswith("vllm:request_success_total") and '"length"' in name)
    assert after[success] >= before[success] + 5
    assert again == live
