"""Wires the live system, and is the API for programs that embed it.

    async with ServingSystem(settings) as serving:
        await serving.ready()
        async for delta in serving.submit(GenerateRequest(messages=(...,))):
            ...

A ``ServingSystem`` sets up no logging, no signal handlers and no other global state; ``gptoss.server`` does that for
the command line. Everything it started is gone when the context ends.
"""

import asyncio
import functools
from collections.abc import Callable, Mapping
from typing import Any, Self

import msgspec

from gptoss.actors.admission_actor import AdmissionActor
from gptoss.actors.batch_actor import BatchDesk, BatchWork
from gptoss.actors.decider import DeciderActor, Remake
from gptoss.actors.deciders import decider_with, deciders_of
from gptoss.actors.directory import Directory
from gptoss.actors.gateway import Gateway
from gptoss.actors.generation import GenerateRequest, Generation
from gptoss.actors.journal import Journal
from gptoss.actors.memory_guard import MemoryActor
from gptoss.actors.rendering import Rendering
from gptoss.actors.request import RequestServices
from gptoss.actors.system import System
from gptoss.clock import Clock
from gptoss.config import PROFILES, Settings, check_live, live_settings, needing_restart
from gptoss.engine.model_source import PreparedModel, prepare_in_child
from gptoss.engine.port import DriverFactory, EngineDriver, Renderer
from gptoss.engine.process import ProcessDriver
from gptoss.engine.prompt import load_renderer
from gptoss.errors import ModelLoadError, NotReady
from gptoss.fleet import Fleet
from gptoss.messages import commands as cmd
from gptoss.messages import events as ev
from gptoss.messages.envelope import Origin, Record
from gptoss.node import node_key, node_started
from gptoss.surroundings import Surroundings, live_surroundings
from gptoss.telemetry.carried_counters import counters_carried_into
from gptoss.telemetry.live_views import LiveViews
from gptoss.telemetry.logs import LogWriter
from gptoss.telemetry.observer import Observer
from gptoss.telemetry.segment_recovery import record_aborted
from gptoss.telemetry.segments import SegmentJournal
from gptoss.telemetry.telemetry_actor import COUNTERS_STREAM, CatchUp, TelemetryActor

CATCH_UP_TIMEOUT_S = 5.0
CLOCK_ANCHOR_PERIOD_S = 60.0


class ServingSystem:
    """The whole server without HTTP: submit, stream and cancel requests.

    Args:
        settings: what to serve and how.
        drivers: makes an engine's driver for a device; None starts one engine process per executor.
        renderer: renders prompts; None takes the model's own tokenizer and chat template.
        log: where structured log lines go; None writes none.
        surroundings: time, ids, chance, journal and turns; None takes the live ones.
    """

    def __init__(
        self,
        settings: Settings | None = None,
        *,
        drivers: DriverFactory | None = None,
        renderer: Renderer | None = None,
        model: PreparedModel | None = None,
        log: LogWriter | None = None,
        surroundings: Surroundings | None = None,
    ) -> None:
        self.settings = settings or Settings()
        self.surroundings = surroundings or live_surroundings()
        self.clock: Clock = self.surroundings.clock
        self._observer = Observer()
        self.views = LiveViews(
            step_timeout_s=self.settings.step_timeout_s,
            log=log,
            spans=self._observer.put if self.settings.otlp_endpoint else None,
        )
        self.projection = self.views.projection
        self.metrics = self.views.metrics
        self.directory = Directory()
        self.deciders = deciders_of(self.settings)
        self.journal: Journal
        self.system: System
        self.gateway: Gateway
        self.fleet: Fleet
        self.node_key = b""
        self._drivers: DriverFactory = drivers or _own_process
        self._renderer = renderer
        self._model = model
        self._log = log
        self._services: RequestServices
        self._started_with = self.settings
        self._draining = False
        self._failure: str | None = None
        self.escalated: str = ""
        self._context_lengths: dict[str, int] = {}
        self._batch_desk: BatchDesk | None = None

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    # ---- life

    async def start(self) -> None:
        """Open the journal, prepare the model, start every actor. The engines go on loading after this returns.

        Raises:
            ConfigError, ModelLoadError: the model cannot be served, or traces cannot be sent as asked.
            JournalError: the data folder cannot be used.
        """
        around = self.surroundings
        boot = around.ids.new_id("boot")
        self.journal = await asyncio.to_thread(around.open_journal, self.settings, boot, around.clock)
        self.system = System(
            name="gptoss",
            clock=around.clock,
            ids=around.ids,
            rng=around.rng,
            journal=self.journal,
            dispatcher=around.dispatcher,
        )
        await self.system.start()
        self.system.on_escalated(self._note_escalation)
        try:
            self._observer.open(around.open_span_export(self.settings), around.open_host(self.settings))
            carried = await asyncio.to_thread(counters_carried_into, self.journal, self.settings.journal_path)
            self._start_telemetry()
            # From the first record on, the projections miss nothing.
            await self.caught_up()
            self._announce(carried)
            self.system.run_task(self._anchor_clock(), name="clock_anchor")
            self.system.run_task(self._observer.run(self.journal, self.clock), name="observer")
            model = self._model or await self._prepare_model()
            renderer = self._renderer or await asyncio.to_thread(load_renderer, model.folder)
            self.fleet = Fleet(self.system, self.directory, self._drivers, lambda: self.settings)
            await asyncio.to_thread(self.fleet.plan, model)
            self._start_deciders()
            self.node_key = await asyncio.to_thread(node_key, self.settings, around.ids)
            self._services = self._request_services(model, renderer)
            self.gateway = Gateway(self.system, self._services)
            self.fleet.start(model)
        except BaseException:
            await self.stop()
            raise

    async def ready(self, timeout_s: float = 600.0) -> None:
        """Wait until a request would be served.

        Raises:
            ModelLoadError: the engine cannot load the model.
            NotReady: it was not ready within ``timeout_s`` seconds.
        """
        deadline_ns = self.system.now_ns() + int(timeout_s * 1e9)
        while not self.projection.readiness(self.system.now_ns(), self.journal.health).ready:
            failure = self.load_failure()
            if failure is not None:
                raise ModelLoadError(failure)
            if self.system.now_ns() > deadline_ns:
                raise NotReady(f"the model was not ready within {timeout_s:.0f} s")
            await asyncio.sleep(0.02)

    async def drain(self, timeout_s: float) -> None:
        """Refuse new requests and let running ones finish; what still runs after ``timeout_s`` seconds is cancelled."""
        if self._draining:
            return
        self._draining = True
        self.journal.append(ev.DrainStarted(timeout_s=timeout_s), Origin(stream="system", actor="app"))
        if self._batch_desk is not None:
            self._batch_desk.stop_work()
        self.directory.tell("admission", cmd.StartDraining(now_ns=self.system.now_ns()), control=True)
        try:
            async with asyncio.timeout(timeout_s):
                await self._idle()
        except TimeoutError:
            self.gateway.cancel_all("shutdown")
            try:
                async with asyncio.timeout(2.0):
                    await self._idle()
            except TimeoutError:
                return

    async def stop(self) -> None:
        """End every request, every actor, every engine; idempotent."""
        if hasattr(self, "gateway") and not self._draining:
            await self.drain(0.0)
        if hasattr(self, "fleet"):
            await self.fleet.stop()
        await self.system.stop()
        await self._observer.close(self.journal)
        self.journal.append(ev.NodeStopped(reason="stopped"), Origin(stream="system", actor="app"))
        await asyncio.to_thread(self.journal.close)

    # ---- use

    def submit(self, request: GenerateRequest) -> Generation:
        """Start a request; iterate over what it returns."""
        return self.gateway.submit(request)

    def cancel(self, request_id: str) -> bool:
        """Stop a running request; False when no such request runs."""
        return self.gateway.cancel(request_id)

    async def open_batches(self, work: BatchWork) -> BatchDesk:
        """Begin to run batches, those that earlier runs left included; the first caller's work does it.

        Raises:
            JournalError, OSError: what earlier runs left cannot be read.
        """
        if self._batch_desk is None:
            self._batch_desk = BatchDesk(self.system, work)
            await self._batch_desk.open(self.deciders.batches, self.directory)
        return self._batch_desk

    def restart_executor(self, executor: str, *, origin: str = "embedder") -> bool:
        """Replace an executor's engine without refusing anybody; False when there is no executor of this name."""
        return self.fleet.restart(executor, origin=origin)

    def change_settings(self, changes: Mapping[str, Any], *, origin: str = "embedder") -> tuple[str, ...]:
        """Change settings of the running server, all or none; returns the names of those that are others than before.

        Raises:
            ConfigError: a setting is unknown, needs a restart, or has a bad value; the message names it.
        """
        return self._apply(check_live(changes, origin), origin)

    def reload_settings(self, settings: Settings, *, origin: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Take what can change from settings read anew. Returns what has changed, and what needs a restart to."""
        refused = needing_restart(self.settings, settings)
        return self._apply(live_settings(settings), origin, refused), refused

    def _apply(self, values: Mapping[str, Any], origin: str, refused: tuple[str, ...] = ()) -> tuple[str, ...]:
        changed = tuple(name for name, value in values.items() if getattr(self.settings, name) != value)
        if not changed and not refused:
            return ()
        self.settings = msgspec.structs.replace(self.settings, **{name: values[name] for name in changed})
        values = live_settings(self.settings)
        event = ev.ConfigChanged(settings=values, changed=changed, origin=origin, refused=refused)
        cause = self.journal.append(event, Origin(stream="system", actor="app")).meta.pos
        if changed:
            self._services.request_timeout_s = self.settings.request_timeout_s
            self._services.queue_timeout_s = self.settings.queue_timeout_s
            change = cmd.ChangeSettings(now_ns=self.system.now_ns(), settings=values, changed=changed, origin=origin)
            self.fleet.tune(change, cause)
        return changed

    @property
    def draining(self) -> bool:
        """Whether new requests are refused because the server is about to stop."""
        return self._draining

    async def caught_up(self) -> None:
        """Wait until the projections hold everything that has been recorded so far."""
        telemetry = self.directory.get("telemetry")
        if telemetry is not None:
            await telemetry.ask(CatchUp(), timeout_s=CATCH_UP_TIMEOUT_S)

    def load_failure(self) -> str | None:
        """Why the model cannot be served, once an engine has said so."""
        return self._failure

    def _note_escalation(self, child: str) -> None:
        self.escalated = child

    # ---- parts of start

    def _start_telemetry(self) -> None:
        def make() -> TelemetryActor:
            return TelemetryActor(
                journal=self.journal, views=self.views, saves_counters=isinstance(self.journal, SegmentJournal)
            )

        ref = self.system.spawn(make, name="telemetry", supervisor=self.system.root)
        self.directory.add("telemetry", ref)
        self.journal.subscribe(self._watch_loading, (ev.EngineLoadFailed, ev.EngineLoaded))

    def _watch_loading(self, record: Record) -> None:
        # On the appending thread: one assignment each, and the event loop only reads.
        event = record.event
        if isinstance(event, ev.EngineLoadFailed):
            self._failure = event.message
        elif isinstance(event, ev.EngineLoaded):
            self._context_lengths[event.executor] = event.capabilities.max_model_len

    def _announce(self, carried: msgspec.Raw | None) -> None:
        origin = Origin(stream="system", actor="app")
        self.journal.append(node_started(self.settings, self.clock), origin)
        if carried is not None:
            self.journal.append(ev.CountersCarried(state=carried), Origin(stream=COUNTERS_STREAM, actor="app"))
        if isinstance(self.journal, SegmentJournal):
            record_aborted(self.journal, self.journal.recovery.aborted)

    async def _anchor_clock(self) -> None:
        """Record now and then what time it is, so that a later step of the wall clock dates only what follows it."""
        while True:
            await asyncio.sleep(CLOCK_ANCHOR_PERIOD_S)
            anchored = ev.ClockAnchored(wall_ns=self.clock.wall_ns())
            self.journal.append(anchored, Origin(stream="system", actor="app"))

    async def _prepare_model(self) -> PreparedModel:
        settings = self.settings
        stream = Origin(stream="system", actor="app")

        def progress(stage: str, done: int, total: int, unit: str) -> None:
            event = ev.EngineLoadProgressed(executor=ev.PREPARATION, stage=stage, done=done, total=total, unit=unit)
            self.journal.append(event, stream)

        return await asyncio.to_thread(
            prepare_in_child,
            settings.model,
            cache_dir=settings.cache_path,
            dtype=settings.dtype,
            progress=progress,
            is_cancelled=lambda: self._draining,
        )

    def _start_deciders(self) -> None:
        deciders, directory = self.deciders, self.directory

        def remake(name: str) -> Remake:
            return functools.partial(decider_with, self._started_with, name)

        makers: dict[str, Callable[[], DeciderActor[Any]]] = {
            "memory": lambda: MemoryActor(deciders.memory, directory, remake("memory")),
            "admission": lambda: AdmissionActor(deciders.admission, directory, remake("admission")),
            "router": lambda: DeciderActor(deciders.router, directory, remake("router")),
        }
        for name, make in makers.items():
            directory.add(name, self.system.spawn(make, name=name, supervisor=self.system.root))

    def _request_services(self, model: PreparedModel, renderer: Renderer) -> RequestServices:
        settings = self.settings
        return RequestServices(
            lifecycle=self.deciders.lifecycle,
            directory=self.directory,
            rendering=Rendering(
                self.system,
                renderer,
                version=settings.prompt_version,
                on_loop=self.surroundings.renders_on_loop,
            ),
            served_model=settings.served_model_name or model.model_name,
            default_max_tokens=PROFILES[settings.profile].max_tokens,
            request_timeout_s=settings.request_timeout_s,
            hmac_key=self.node_key,
            keep_content=settings.content != "none",
            keep_text=settings.content == "full",
            hashes_prefixes=len(self.fleet.devices) > 1,
            max_model_len=self._max_model_len,
        )

    def _max_model_len(self) -> int:
        """The smallest context of the executors that have ever loaded; 0 before the first."""
        return min(tuple(self._context_lengths.values()), default=0)

    async def _idle(self) -> None:
        while self.gateway.running:  # noqa: ASYNC110 - a count in another object; polled only while draining
            await asyncio.sleep(0.02)


def _own_process(_: str) -> EngineDriver:
    return ProcessDriver()
