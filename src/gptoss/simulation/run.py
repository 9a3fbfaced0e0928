"""One run: the system that ``app`` wires, in surroundings that a scenario decides.

    start the system -> clients come and faults happen -> all clients have their end -> let everything come to rest ->
    look at the invariants -> stop the system -> look again

Rules:
- Everything random is drawn from generators seeded by the scenario's seed, one for each purpose, so that the draws of
  one do not shift those of another.
- A run ends early when the process dies, or when an invariant that is watched all along is broken.
"""

import asyncio
import gc
import io
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import msgspec

from gptoss.actors.future import ReplyFuture
from gptoss.actors.journal import Journal
from gptoss.app import ServingSystem, Surroundings
from gptoss.clock import NS_PER_MS, Clock, SeededIds, SeededRng
from gptoss.config import Settings
from gptoss.engine.model_source import PreparedModel
from gptoss.engine.port import ChatMessage, RenderedPrompt
from gptoss.errors import GptossError, RequestError
from gptoss.fake_engine import FakeOptions
from gptoss.messages.envelope import Record
from gptoss.simulation.clients import CANARY, Client
from gptoss.simulation.engine import Device, SimulatedDriver
from gptoss.simulation.invariants import AT_REST, AT_THE_END, Broken, Observed, Watch
from gptoss.simulation.journal import Disk, SimulatedJournal
from gptoss.simulation.loop import Deadlock, SeededDispatcher, SimulatedLoop
from gptoss.simulation.probe import MAILBOX, NAME, ProbeActor, Question
from gptoss.simulation.scenario import Fault, Scenario
from gptoss.telemetry.logs import LogWriter
from gptoss.telemetry.telemetry_actor import CatchUp
from gptoss.testing import FAKE_MODEL, FakeRenderer, ManualClock

MAX_MODEL_LEN = 1024
REST_S = 60.0
"""How long a system without requests may take to come to rest, restarts included."""
REST_POLL_S = 0.05
GRACE_S = 30.0
"""How much longer than its longest request a run may take."""
DRAIN_S = 10.0
PARTIAL_S = 3.0


class Verdict(msgspec.Struct, frozen=True):
    """How a run came out.

    Attributes:
        broken: name of the broken invariant; empty if all hold.
        message: what was wrong.
        records: control records that were appended.
    """

    scenario: Scenario
    broken: str
    message: str
    records: int


def simulate(scenario: Scenario) -> tuple[Verdict, SimulatedJournal]:
    """Run a scenario; what it recorded comes along."""
    world = _World(scenario)
    broken, message = "", ""
    with _python_log(world.python_log), _no_cycles_collected():
        try:
            world.loop.run_until_complete(world.run())
        except Broken as error:
            broken, message = error.invariant, error.message
        except Deadlock as error:
            broken, message = "somebody_goes_on", f"the run stands still for ever: {error}"
        finally:
            world.close()
    return Verdict(scenario, broken, message, world.journal.health.last_pos + 1), world.journal


class _Poison:
    """A message that no actor can handle; a decider cannot even journal it."""


class _Renderer(FakeRenderer):
    """Renders as the fake does, unless a fault says otherwise; on what would be a thread."""

    def __init__(self, loop: SimulatedLoop) -> None:
        self._loop = loop
        self.slow_s = 0.0
        self.fault = ""

    def render_chat(
        self, messages: tuple[ChatMessage, ...], *, tools: tuple[dict[str, Any], ...], date: str
    ) -> RenderedPrompt:
        """See ``engine.port.Renderer``."""
        self._loop.block(self.slow_s)
        fault, self.fault = self.fault, ""
        if fault == "renderer_refuses":
            raise RequestError("the template refuses these messages", param="messages")
        if fault == "renderer_crashes":
            raise ValueError(f"cannot render {messages}")
        return super().render_chat(messages, tools=tools, date=date)


class _World:
    """Everything around the system, and the system."""

    def __init__(self, scenario: Scenario) -> None:
        shape = scenario.shape
        self.scenario = scenario
        self.clock = ManualClock()
        self.loop = SimulatedLoop(self.clock, self._rng("threads"))
        self.dispatcher = SeededDispatcher(self.clock, self._rng("turns"), shape.lag)
        self.disk = Disk()
        self.renderer = _Renderer(self.loop)
        self.log, self.python_log = io.StringIO(), io.StringIO()
        self.devices = {
            name: Device(
                name,
                FakeOptions(
                    max_batch_size=shape.slots, kv_budget_bytes=shape.kv_budget_bytes, max_model_len=MAX_MODEL_LEN
                ),
                shape.step_ms / 1000,
            )
            for name in shape.devices
        }
        self.serving = self._system()
        self.clients: dict[str, Client] = {}
        self.asks: list[ReplyFuture[Any]] = []
        self.journal: SimulatedJournal
        self.watch = Watch()
        self._is_over = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []

    def _rng(self, purpose: str) -> SeededRng:
        return SeededRng(f"{self.scenario.seed}/{purpose}")

    def _system(self) -> ServingSystem:
        shape, engines = self.scenario.shape, self._rng("engines")
        settings = Settings(
            model=FAKE_MODEL,
            devices=",".join(shape.devices),
            journal="memory",
            num_threads=1,
            max_queue=shape.max_queue,
            request_timeout_s=shape.request_timeout_s,
            queue_timeout_s=shape.queue_timeout_s,
            step_timeout_s=shape.step_timeout_s,
        )
        return ServingSystem(
            settings,
            drivers=lambda name: SimulatedDriver(self.devices[name], self.loop, self.clock, engines),
            renderer=self.renderer,
            model=PreparedModel(folder="", model_name=FAKE_MODEL, source="simulation", max_model_len=MAX_MODEL_LEN),
            log=LogWriter(self.log, "json", "debug"),
            surroundings=Surroundings(
                clock=self.clock,
                ids=SeededIds(self._rng("ids")),
                rng=self._rng("draws"),
                dispatcher=self.dispatcher,
                open_journal=self._open_journal,
            ),
        )

    def _open_journal(self, settings: Settings, boot: str, clock: Clock) -> Journal:
        del settings
        self.journal = SimulatedJournal(
            boot=boot, clock=clock, loop=self.loop, disk=self.disk, rng=self._rng("disk")
        )
        self.journal.subscribe(self._watch)
        return self.journal

    def _watch(self, record: Record) -> None:
        self.watch.see(record)
        if self.watch.broken is not None:
            self._is_over.set()

    # ---- the run

    async def run(self) -> None:
        """See the module's table. Raises ``Broken``."""
        self.started_s = self.loop.time()
        await self.serving.start()
        self.probe = self.serving.system.spawn(
            ProbeActor, name=NAME, mailbox=MAILBOX, supervisor=self.serving.system.root
        )
        self._schedule()
        await self._until_over()
        self._raise_if_broken()
        if self.scenario.dies:
            self._check((*AT_THE_END,) if False else ())
            return
        await self._rest()
        observed = await self._observe()
        self._check_all(AT_REST, observed)
        await self.serving.stop()
        self._raise_if_broken()
        self._check_all(AT_THE_END, observed)
