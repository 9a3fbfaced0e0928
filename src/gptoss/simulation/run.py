"""One run of a scenario.

    start the system -> clients come and faults happen -> all clients have their end -> everything comes to rest ->
    look at the invariants -> stop the system -> look again

A run ends early when the process dies in it, or when an invariant that is watched with every record is broken.
"""

import asyncio
import contextlib
import gc
import io
import logging
import traceback
from collections.abc import Coroutine, Generator
from contextlib import contextmanager
from typing import Any

import msgspec
import pykka

from gptoss.errors import ActorError
from gptoss.simulation.clients import Client
from gptoss.simulation.faults import happen
from gptoss.simulation.invariants import AFTER_A_CRASH, AT_REST, AT_THE_END
from gptoss.simulation.journal import SimulatedJournal
from gptoss.simulation.loop import DeadlockError
from gptoss.simulation.observed import BrokenInvariant, Invariant, Observed, check
from gptoss.simulation.probe import MAILBOX, NAME, ProbeActor
from gptoss.simulation.rebuild import answers_of, rebuilt_answers
from gptoss.simulation.scenario import Arrival, Fault, Scenario
from gptoss.simulation.world import MS_PER_S, World
from gptoss.testing import run_until_idle

GRACE_S = 30.0
"""How much longer than its longest request a run may take."""
REST_S = 60.0
"""How long a system without requests may take to come to rest, restarts of its actors included."""
REST_POLL_S = 0.05
SETTLE_S = 1.5
"""Longer than any ask waits."""


class Verdict(msgspec.Struct, frozen=True):
    """How a run came out.

    Attributes:
        broken: name of the broken invariant; empty if all hold.
        message: what was wrong.
        num_records: control records that were appended.
        types: the types of event among them.
    """

    scenario: Scenario
    broken: str
    message: str
    num_records: int
    types: frozenset[str]


def simulate(scenario: Scenario) -> tuple[Verdict, SimulatedJournal]:
    """Run a scenario; what it recorded comes along."""
    run = _Run(scenario)
    broken, message = "", ""
    with _logged_to(run.python_log), _no_collection():
        try:
            run.world.loop.run_until_complete(run.to_the_end())
        except BrokenInvariant as error:
            broken, message = error.invariant, error.message
        except DeadlockError as error:
            broken, message = "somebody_goes_on", str(error)
        except Exception as error:  # noqa: BLE001 - what comes out of the system here comes out at its callers
            broken, message = "nothing_escapes", _where(error)
        finally:
            run.close()
    journal = run.world.journal
    types = frozenset(record.meta.type for record in journal.read())
    return Verdict(scenario, broken, message, journal.health.last_pos + 1, types), journal


class _Run:
    def __init__(self, scenario: Scenario) -> None:
        self.world = World(scenario)
        self.python_log = io.StringIO()
        self._foreign = pykka.ActorRegistry.get_all()

    async def to_the_end(self) -> None:
        """See the module's table. Raises ``BrokenInvariant``."""
        world, serving = self.world, self.world.serving
        await serving.start()
        serving.directory.add(
            NAME, serving.system.spawn(ProbeActor, name=NAME, mailbox=MAILBOX, supervisor=serving.system.root)
        )
        await self._live()
        if world.is_dead:
            self._check(AFTER_A_CRASH, self._observe())
            return
        stuck = await self._rest()
        observed = self._observe()
        observed.stuck = stuck
        with contextlib.suppress(ActorError):  # a telemetry actor that does not answer breaks an invariant below
            await serving.caught_up()
        if world.scenario.rebuilds_views:
            observed.live = answers_of(
                serving.projection, serving.metrics, world.clock.monotonic_ns(), world.log.getvalue()
            )
            observed.rebuilt = rebuilt_answers(observed, world.clock.monotonic_ns())
        self._check(AT_REST, observed)
        await serving.stop()
        self._check(AT_THE_END, self._observe())

    def close(self) -> None:
        """Leave nothing behind, and change nothing that was recorded."""
        self.world.journal.seal()
        for task in asyncio.all_tasks(self.world.loop):
            task.cancel()
        self.world.loop.run_ready()
        self.world.loop.close()
        # A system whose process died, or whose run broke, was not stopped.
        for ref in pykka.ActorRegistry.get_all():
            if ref not in self._foreign:
                pykka.ActorRegistry.unregister(ref)

    # ---- parts

    async def _live(self) -> None:
        world = self.world
        begin_s = world.now_s()
        tasks = [self._start(self._happen(begin_s, fault)) for fault in world.scenario.faults]
        tasks += [self._start(self._client(begin_s, arrival)) for arrival in world.scenario.arrivals]
        longest_s = max(
            (arrival.timeout_s or world.settings.request_timeout_s for arrival in world.scenario.arrivals), default=0.0
        )
        ends_s = longest_s + GRACE_S + max((arrival.at_ms for arrival in world.scenario.arrivals), default=0) / MS_PER_S
        over = self._start(self._until_over())
        everyone = self._start(_all(tasks))
        await asyncio.wait({over, everyone}, timeout=ends_s, return_when=asyncio.FIRST_COMPLETED)
        if everyone.done():
            everyone.result()
        self._raise_if_broken()

    def _start(self, coroutine: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        return self.world.loop.create_task(coroutine)

    async def _happen(self, begin_s: float, fault: Fault) -> None:
        if fault.on:
            self.world.triggers[fault.on, fault.target] = lambda: self._start(happen(self.world, fault))
            return
        await asyncio.sleep(begin_s + fault.at_ms / MS_PER_S - self.world.now_s())
        await happen(self.world, fault)

    async def _client(self, begin_s: float, arrival: Arrival) -> None:
        await asyncio.sleep(begin_s + arrival.at_ms / MS_PER_S - self.world.now_s())
        client = Client(arrival, self.world.serving.gateway, self.world.clock)
        self.world.clients[arrival.name] = client
        await client.live()

    async def _until_over(self) -> None:
        await self.world.over.wait()

    async def _rest(self) -> list[tuple[str, int]]:
        """Wait until nothing happens any more. Returns the mailboxes where letters wait nevertheless."""
        await asyncio.sleep(SETTLE_S)
        try:
            await run_until_idle(self.world.serving.system, REST_S, poll_s=REST_POLL_S)
        except TimeoutError:
            inboxes = self.world.dispatcher.inboxes
            return [(owner, len(inbox)) for owner, inbox in inboxes if not inbox.empty()]
        return []

    def _observe(self) -> Observed:
        world = self.world
        observed = Observed(world.scenario, world.settings, world.journal)
        observed.seen = [client.seen for client in world.clients.values()]
        observed.asks = world.asks
        observed.inboxes = world.dispatcher.inboxes
        observed.now_ns = world.clock.monotonic_ns()
        observed.engine_sessions = {name: device.kept_sessions for name, device in world.devices.items()}
        observed.logs = world.log.getvalue() + self.python_log.getvalue()
        observed.loop_failures = world.loop.failures
        return observed

    def _check(self, invariants: tuple[Invariant, ...], observed: Observed) -> None:
        self._raise_if_broken()
        check(invariants, observed)

    def _raise_if_broken(self) -> None:
        if self.world.watch.broken is not None:
            raise self.world.watch.broken


def _where(error: Exception) -> str:
    last = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {error} (at {last.filename}:{last.lineno} in {last.name})"


async def _all(tasks: list[asyncio.Task[None]]) -> None:
    for task in tasks:
        await task


@contextmanager
def _logged_to(stream: io.StringIO) -> Generator[None]:
    """Take what the package logs through ``logging`` away from the console, to look at it."""
    logger = logging.getLogger("gptoss")
    handler, propagates = logging.StreamHandler(stream), logger.propagate
    logger.addHandler(handler)
    logger.propagate = False
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.propagate = propagates


@contextmanager
def _no_collection() -> Generator[None]:
    """No garbage collection in a run: when it comes, and what it finalises, is no function of the seed."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
