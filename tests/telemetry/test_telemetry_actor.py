"""The telemetry actor keeps the live projections level with the journal."""

import asyncio
import io
import json
import threading
from collections.abc import AsyncIterator, Callable
from typing import TYPE_CHECKING, Any

import msgspec
import pytest

from gptoss.actors.journal import Journal
from gptoss.actors.ref import Ref
from gptoss.actors.system import System
from gptoss.clock import SystemClock, SystemIds, SystemRng
from gptoss.messages import events as ev
from gptoss.messages.envelope import Event, Origin
from gptoss.telemetry import telemetry_actor
from gptoss.telemetry.live_views import LiveViews
from gptoss.telemetry.logs import LogWriter
from gptoss.telemetry.memory_journal import MemoryJournal
from gptoss.telemetry.metrics import Metrics, SavedMetrics
from gptoss.telemetry.projection import Projection
from gptoss.telemetry.telemetry_actor import CatchUp, TelemetryActor

if TYPE_CHECKING:
    from telemetry.conftest import Script

STEP = ev.StepCommitted(
    executor="cpu", step=1, started_ns=0, duration_ns=1, rows=(), waiting=0, running=0, kv_bytes_in_use=0
)


class Live:
    """A system with nothing but telemetry in it."""

    def __init__(self, system: System, journal: Journal, *, saves_counters: bool = False) -> None:
        self.system = system
        self.saves_counters = saves_counters
        self.journal = journal
        self.log = io.StringIO()
        self.views = LiveViews(log=LogWriter(self.log, "json"))
        self.projection = self.views.projection
        self.metrics = self.views.metrics
        self.ref: Ref[Any] = system.spawn(self._make, name="telemetry")

    def _make(self) -> TelemetryActor:
        return TelemetryActor(journal=self.journal, views=self.views, saves_counters=self.saves_counters)

    def append(self, event: Event, stream: str = "node", correlation: str = "") -> None:
        self.journal.append(event, Origin(stream=stream, correlation=correlation))

    async def catch_up(self) -> None:
        await self.ref.ask(CatchUp(), timeout_s=5)

    @property
    def steps(self) -> float:
        details = self.projection.executor_details()
        return details["cpu"]["steps"] if "cpu" in details else 0


@pytest.fixture
async def live() -> AsyncIterator[Live]:
    journal = MemoryJournal(node="node", boot="boot1", clock=SystemClock())
    async with System(name="test", clock=SystemClock(), ids=SystemIds(), rng=SystemRng(), journal=journal) as system:
        yield Live(system, journal)


async def test_after_a_catch_up_everything_appended_before_is_folded(live: Live, busy: "Script") -> None:
    for record in busy.records:
        live.append(record.event, record.meta.stream, record.meta.correlation)
    await live.catch_up()
    assert live.projection.stats()["requests"]["total"] == 5
    assert b'vllm:num_requests_running{engine="cpu",model_name="demo-20b"} 1.0' in live.metrics.render()[0]
    assert "request_completed" in {json.loads(line)["event"] for line in live.log.getvalue().splitlines()}


async def test_the_live_projections_equal_rebuilt_ones(live: Live, busy: "Script") -> None:
    live.append(STEP)
    await live.catch_up()
    for record in busy.records:
        live.append(record.event, record.meta.stream, record.meta.correlation)
    await live.catch_up()
    rebuilt, metrics = Projection(), Metrics()
    for record in live.journal.read():
        rebuilt.fold(record)
        metrics.fold(record)
    assert rebuilt.stats() == live.projection.stats()
    assert rebuilt.recent_requests(10) == live.projection.recent_requests(10)
    assert metrics.render() == live.metrics.render()


async def test_what_was_recorded_before_the_start_is_folded_once() -> None:
    journal = MemoryJournal(node="node", boot="boot1", clock=SystemClock())
    journal.append(STEP, Origin(stream="executor/cpu"))
    async with System(name="test", clock=SystemClock(), ids=SystemIds(), rng=SystemRng(), journal=journal) as system:
        live = Live(system, journal)
        live.append(STEP)
        await live.catch_up()
        assert live.steps == 2
        assert b'gptoss_events_total{type="StepCommitted"} 2.0' in live.metrics.render()[0]


async def test_records_from_any_thread_are_folded(live: Live) -> None:
    threads = [
        threading.Thread(target=lambda: [live.append(STEP, "executor/cpu") for _ in range(500)]) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        await asyncio.sleep(0)
    await live.catch_up()
    assert live.steps == 2000


async def test_a_long_backlog_lets_the_loop_breathe_between_batches(live: Live) -> None:
    await live.catch_up()
    for _ in range(10 * telemetry_actor.BATCH):
        live.append(STEP)
    seen: list[float] = []
    while live.steps < 10 * telemetry_actor.BATCH:
        await asyncio.sleep(0)
        seen.append(live.steps)
    assert max(after - before for before, after in zip([0.0, *seen], seen, strict=False)) <= telemetry_actor.BATCH


async def test_under_overload_steps_are_missed_and_counted_but_ends_are_not(
    live: Live, script: "Script", monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(telemetry_actor, "PENDING_MAX", 100)
    await live.catch_up()
    for _ in range(150):
        live.append(STEP)
    script.rejected("req_1")
    for record in script.records:
        live.append(record.event, record.meta.stream, record.meta.correlation)
    await live.catch_up()
    # one of the script's own records is of a frequent kind
    assert live.projection.stats()["telemetry_missed"] == 51
    assert b"gptoss_telemetry_missed_total 51.0" in live.metrics.render()[0]
    assert live.projection.stats()["requests"]["rejected"] == 1
    live.append(STEP)
    await live.catch_up()
    assert live.steps == 101


async def test_what_is_left_at_the_stop_is_folded(live: Live) -> None:
    await live.catch_up()
    stopping = asyncio.ensure_future(live.system.stop())
    live.append(STEP)
    await stopping
    assert live.steps == 1
    live.append(STEP)
    assert live.steps == 1


async def test_what_was_counted_is_saved_every_so_often_and_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(telemetry_actor, "SAVE_RECORDS_MIN", 100)
    monkeypatch.setattr(telemetry_actor, "SAVED_BYTES_PER_RECORD", 1000)
    journal = MemoryJournal(node="node", boot="boot1", clock=SystemClock())
    async with System(name="test", clock=SystemClock(), ids=SystemIds(), rng=SystemRng(), journal=journal) as system:
        live = Live(system, journal, saves_counters=True)
        await live.catch_up()
        for _ in range(3):
            for _ in range(60):
                live.append(STEP, "executor/cpu")
            await live.catch_up()
    saved = [record.event for record in journal.read() if isinstance(record.event, ev.CountersSaved)]
    assert len(saved) == 2
    state = msgspec.msgpack.decode(saved[-1].state, type=SavedMetrics)
    counts = {labels: values[0] for labels, values, _ in state.families["gptoss_events_total"].rows}
    assert counts["StepCommitted",] == 180
    steps = [record.meta.pos for record in journal.read() if record.event is STEP]
    assert saved[0].pos < steps[-1] <= saved[-1].pos


async def test_a_record_that_cannot_be_folded_costs_only_itself(live: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    await live.catch_up()
    reported: list[dict[str, Any]] = []
    live.system.loop.set_exception_handler(lambda _, context: reported.append(context))
    fold: Callable[[Any], None] = live.views.fold

    def fails_on_dead_letters(record: Any) -> None:
        if isinstance(record.event, ev.DeadLettered):
            raise ValueError("planted")
        fold(record)

    monkeypatch.setattr(live.views, "fold", fails_on_dead_letters)
    live.append(STEP)
    live.append(ev.DeadLettered(to="a", message_type="m", reason="full"))
    live.append(STEP)
    await live.catch_up()
    assert live.steps == 2
    assert [str(context["exception"]) for context in reported] == ["planted"]
