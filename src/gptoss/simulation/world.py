"""The surroundings of a simulated system, as a scenario wants them, and the system in them.

Everything random is drawn from generators seeded by the scenario's seed, one for each purpose, so that the draws of one
do not shift those of another.
"""

import asyncio
import io
from collections.abc import Callable
from typing import Any

import msgspec

from gptoss.actors.future import ReplyFuture
from gptoss.actors.journal import Journal
from gptoss.app import ServingSystem
from gptoss.clock import NS_PER_S, Clock, SeededIds, SeededRng
from gptoss.config import Settings
from gptoss.engine.model_source import PreparedModel
from gptoss.engine.port import ChatMessage, RenderedPrompt
from gptoss.errors import RequestError
from gptoss.fake_engine import FakeOptions
from gptoss.messages.envelope import Record
from gptoss.simulation.clients import Client
from gptoss.simulation.engine import Device, SimulatedDriver
from gptoss.simulation.journal import Disk, SimulatedJournal
from gptoss.simulation.loop import SeededDispatcher, SimulatedLoop
from gptoss.simulation.scenario import Scenario, Shape
from gptoss.simulation.watched import Watch
from gptoss.surroundings import Surroundings
from gptoss.telemetry.logs import LogWriter
from gptoss.testing import FAKE_MODEL, FakeRenderer, ManualClock

MAX_MODEL_LEN = 1024
MS_PER_S = 1000
PRESSURE_LEVELS = ("pressure_evict", "pressure_shrink", "pressure_queue", "pressure_refuse")


class FaultyRenderer(FakeRenderer):
    """Renders as the fake does, unless a fault says otherwise; on what would be a thread.

    Attributes:
        slow_s: how long each prompt takes.
        fault: what becomes of the next prompt: ``refuses`` or ``crashes``.
    """

    def __init__(self, loop: SimulatedLoop) -> None:
        self.slow_s = 0.0
        self.fault = ""
        self._loop = loop

    def render_chat(
        self,
        messages: tuple[ChatMessage, ...],
        *,
        tools: tuple[dict[str, Any], ...],
        date: str,
        reasoning_effort: str = "",
        add_generation_prompt: bool = True,
    ) -> RenderedPrompt:
        """See ``engine.port.Renderer``."""
        self._loop.block(self.slow_s)
        fault, self.fault = self.fault, ""
        if fault == "refuses":
            raise RequestError("the template refuses these messages", param="messages")
        if fault == "crashes":
            raise ValueError(f"cannot render {messages}")
        return super().render_chat(
            messages,
            tools=tools,
            date=date,
            reasoning_effort=reasoning_effort,
            add_generation_prompt=add_generation_prompt,
        )


def _options(shape: Shape, device: str) -> FakeOptions:
    return FakeOptions(
        max_batch_size=shape.slots,
        kv_budget_bytes=shape.budget_of(device),
        prefix_cache_bytes=shape.prefix_cache_bytes,
        max_model_len=MAX_MODEL_LEN,
    )


class World:
    """Everything around the system, and the system.

    Attributes:
        over: set when there is nothing more to wait for: the process died, or a watched invariant broke.
        is_dead: the process died.
        asks: each ask of the probe, with what was asked.
        triggers: what to do, once, at an event of this type of the request of this arrival.
    """

    def __init__(self, scenario: Scenario) -> None:
        shape = scenario.shape
        self.scenario = scenario
        self.clock = ManualClock()
        self.loop = SimulatedLoop(self.clock, self.rng("threads"))
        self.dispatcher = SeededDispatcher(self.clock, self.rng("turns"), shape.lag)
        self.disk = Disk()
        self.renderer = FaultyRenderer(self.loop)
        self.log = io.StringIO()
        self.devices = {name: Device(name, _options(shape, name), shape.step_ms / MS_PER_S) for name in shape.devices}
        self.watch = Watch()
        self.clients: dict[str, Client] = {}
        self.asks: list[tuple[str, ReplyFuture[Any]]] = []
        self.over = asyncio.Event()
        self.is_dead = False
        self.triggers: dict[tuple[str, str], Callable[[], object]] = {}
        self.journal: SimulatedJournal
        self.settings = Settings(
            model=FAKE_MODEL,
            devices=",".join(shape.devices),
            journal="memory",
            num_threads=1,
            max_queue=shape.max_queue,
            request_timeout_s=shape.request_timeout_s,
            queue_timeout_s=shape.queue_timeout_s,
            step_timeout_s=shape.step_timeout_s,
            session_idle_s=shape.session_idle_s,
            queue_ageing_s=shape.ageing_s,
            drain_timeout_s=shape.drain_timeout_s,
            multi_prompt_len=shape.multi_prompt_len,
        )
        if not shape.heeds_pressure:
            self.settings = msgspec.structs.replace(self.settings, **dict.fromkeys(PRESSURE_LEVELS, 0.0))
        self.serving = self._system()

    def rng(self, purpose: str) -> SeededRng:
        """The chance for one purpose."""
        return SeededRng(f"{self.scenario.seed}/{purpose}")

    def now_s(self) -> float:
        """Virtual seconds."""
        return self.clock.monotonic_ns() / NS_PER_S

    def _system(self) -> ServingSystem:
        engines = self.rng("engines")
        return ServingSystem(
            self.settings,
            drivers=lambda name: SimulatedDriver(self.devices[name], self.loop, self.clock, engines),
            renderer=self.renderer,
            model=PreparedModel(folder="", model_name=FAKE_MODEL, source="simulation", max_model_len=MAX_MODEL_LEN),
            log=LogWriter(self.log, "json", "debug"),
            surroundings=Surroundings(
                clock=self.clock,
                ids=SeededIds(self.rng("ids")),
                rng=self.rng("draws"),
                renders_on_loop=self.rng("rendering").pick((True, False)),
                dispatcher=self.dispatcher,
                open_journal=self._open_journal,
            ),
        )

    def _open_journal(self, settings: Settings, boot: str, clock: Clock) -> Journal:
        del settings
        self.journal = SimulatedJournal(boot=boot, clock=clock, loop=self.loop, disk=self.disk, rng=self.rng("disk"))
        self.journal.subscribe(self._watch)
        return self.journal

    def _watch(self, record: Record) -> None:
        self.watch.see(record)
        if self.watch.broken is not None:
            self.over.set()
        if self.triggers and record.meta.correlation:
            self._pull_triggers(record)

    def _pull_triggers(self, record: Record) -> None:
        for key in tuple(self.triggers):
            kind, name = key
            client = self.clients.get(name)
            is_it = client is not None and client.seen.request_id == record.meta.correlation
            if is_it and kind == record.meta.type:
                self.loop.call_soon(self.triggers.pop(key))
