"""An executor: the actor that owns one engine and turns its answers into events and deliveries.

It runs on the event loop, like all who take part in a request, and nothing here waits. The engine's driver calls its sink
from wherever it hears the engine, which only tells this actor. An engine that exits takes its executor down with it: the
requests in flight are told that they were lost (and go on elsewhere), then the supervisor starts the executor anew, with a
new engine process.

An engine can also be replaced because somebody wants it, and then nobody is refused:

    serving -> RestartExecutor -> draining: chosen for nobody new; its place in the queue stays
            -> nobody in flight, or ``timeout_s`` over -> stopping: told to shut down; who is left goes on elsewhere
            -> it has exited -> a new engine loads -> serving

When the whole system stops, ``StopEngine`` comes first: the engine is told to shut down, and whoever asked hears when it has.
"""

from collections.abc import Callable
from typing import Any, Literal

import msgspec

from gptoss.actors.actor import LoopActor
from gptoss.actors.deliveries import CancelInEngine, TokensProduced
from gptoss.actors.directory import Directory, request_name
from gptoss.actors.engine_watch import EngineWatch
from gptoss.actors.executor_orders import STOP_TIMEOUT_S, RestartExecutor, StopEngine, TuneExecutor
from gptoss.actors.future import ReplyFuture
from gptoss.actors.standing import Standing
from gptoss.actors.step_record import committed_step
from gptoss.clock import NS_PER_S
from gptoss.engine import port
from gptoss.errors import EngineLost
from gptoss.messages import commands as cmd
from gptoss.messages import events as ev
from gptoss.messages.envelope import NO_CAUSE
from gptoss.messages.plan import Preemption

PROBE_PERIOD_S = 1.0
# Memory readings that differ by less than this say nothing new and are not recorded.
MEMORY_GRAIN_BYTES = 16 * 1024 * 1024
# What others leave free on a host changes all the time.
FREE_GRAIN_BYTES = 256 * 1024 * 1024


class Probe(msgspec.Struct, frozen=True, kw_only=True):
    """To itself, on a clock: is the engine alive, and how much memory does it use?"""


class ExecutorConfig(msgspec.Struct, frozen=True, kw_only=True):
    """What an executor needs to know. ``step_timeout_s`` is how long an engine with work may be silent."""

    executor: str
    load: port.Load
    step_timeout_s: float
    keep_content: bool


class _InFlight:
    """A request that the engine has."""

    __slots__ = ("attempt", "last_pos", "session_id", "tokens_out")

    def __init__(self, attempt: int, session_id: str, tokens_out: int, last_pos: int) -> None:
        self.attempt = attempt
        self.session_id = session_id
        self.tokens_out = tokens_out
        self.last_pos = last_pos
        """Position of the last record that concerns it: what its end is a consequence of."""


class ExecutorActor(LoopActor):
    """Drives one engine."""

    def __init__(self, config: ExecutorConfig, drivers: port.DriverFactory, directory: Directory) -> None:
        super().__init__()
        self._config = config
        self._name = config.executor
        self._drivers = drivers
        self._driver = drivers(config.load.device)
        self._directory = directory
        self._in_flight: dict[str, _InFlight] = {}
        self._watch = EngineWatch(config.step_timeout_s)
        self._standing = Standing(self._name, directory, self._now)
        self._restart: Literal["", "draining", "stopping", "leaving"] = ""
        self._restart_by_ns = 0
        self._leaver: ReplyFuture[None] | None = None
        self._nonce = 0
        self._observed: tuple[int, int, int] = (0, 0, -1)
        self._is_deaf = False
        self._handlers: dict[type[Any], Callable[[Any], None]] = {
            port.LoadProgressed: self._load_progressed,
            port.Loaded: self._loaded,
            port.LoadFailed: self._load_failed,
            port.Submit: self._submit,
            CancelInEngine: self._cancel,
            cmd.DropSession: lambda drop: self._driver.send(port.DropSession(session_id=drop.session_id)),
            port.StepDone: self._step_done,
            port.Finished: self._finished,
            port.Failed: self._failed,
            port.EngineStatus: self._status,
            port.Drained: lambda _: None,
            port.EngineExited: self._engine_exited,
            Probe: self._probe,
            RestartExecutor: self._begin_restart,
            StopEngine: self._stop_engine,
            TuneExecutor: self._tune,
        }

    def on_start(self) -> None:
        """Start the engine; it loads while this actor already takes messages."""
        self._start_engine()
        self._probes = self.context.system.send_every(PROBE_PERIOD_S, self.context.ref, Probe)

    def _start_engine(self) -> None:
        load = self._config.load
        self.record(
            ev.EngineStarted(executor=self._name, device=load.device, model=load.model_name, folder=load.folder)
        )
        self._watch.begin()
        self._driver.start(load, self._hear)

    def on_stop(self) -> None:
        """No engine may live on without its actor. One that was to end in peace has got ``StopEngine`` before."""
        self._probes.cancel()
        self._is_deaf = True
        self._standing.leave("stopped")
        self._driver.kill()

    def on_failure(self, *_: object) -> None:
        """After a crash of this actor, no engine may live on without it."""
        self._probes.cancel()
        self._is_deaf = True
        self._driver.kill()
        self._lose_all("engine_lost", "the executor crashed")
        self._standing.leave("crashed", fault=True, returns=bool(self._restart))

    def on_receive(self, message: object) -> None:
        """Hand each message to its handler."""
        self._watch.hear(message, self._now(), has_work=bool(self._in_flight))
        self._handlers[type(message)](message)

    def _hear(self, news: port.EngineEvent) -> None:
        # On the loop, or on a thread of the driver's. What a dismissed engine still says concerns nobody.
        if not self._is_deaf:
            self.context.ref.tell(news)

    # ---- loading

    def _load_progressed(self, news: port.LoadProgressed) -> None:
        self.record(
            ev.EngineLoadProgressed(
                executor=self._name, stage=news.stage, done=news.done, total=news.total, unit=news.unit
            )
        )

    def _loaded(self, news: port.Loaded) -> None:
        capabilities = news.capabilities
        loaded = ev.EngineLoaded(
            executor=self._name,
            capabilities=capabilities,
            fingerprint=news.fingerprint,
            load_ms=news.load_ms,
            pid=news.pid,
            notes=news.notes,
        )
        cause = self.record(loaded).meta.pos
        self._standing.join(capabilities, cause)

    def _load_failed(self, news: port.LoadFailed) -> None:
        self._standing.capabilities = None
        self.record(ev.EngineLoadFailed(executor=self._name, code=news.code, message=news.message))

    # ---- serving

    def _submit(self, submit: port.Submit) -> None:
        accepted = ev.ExecutorAccepted(
            request_id=submit.request_id,
            executor=self._name,
            attempt=submit.attempt,
            prompt_tokens=len(submit.prompt_token_ids),
            resumed_tokens=len(submit.output_token_ids),
            max_tokens=submit.sampling.max_tokens or 0,
            priority=submit.priority,
            deadline_ns=submit.deadline_ns,
        )
        pos = self.record(accepted, correlation=submit.request_id).meta.pos
        flight = _InFlight(submit.attempt, submit.session_id, len(submit.output_token_ids), pos)
        self._in_flight[submit.request_id] = flight
        if self._restart in ("stopping", "leaving"):
            del self._in_flight[submit.request_id]
            self._report_fault(submit.request_id, flight, EngineLost.code, "the engine is being replaced", lost=True)
            return
        self._driver.send(submit)

    def _cancel(self, cancel: CancelInEngine) -> None:
        self._driver.send(port.Cancel(request_id=cancel.request_id))

    def _step_done(self, news: port.StepDone) -> None:
        committed = committed_step(self._name, news)
        cause = self.record(committed).meta.pos
        for lost in news.preemptions:
            self._preempted(news.step, lost, cause)
        produced: list[ev.ProducedRow] = []
        for row in news.rows:
            flight = self._in_flight.get(row.request_id)
            if flight is None or flight.attempt != row.attempt or not (row.token_ids or row.text):
                continue
            produced.append(ev.ProducedRow(row.request_id, row.attempt, flight.tokens_out, row.token_ids))
            flight.tokens_out += len(row.token_ids)
            flight.last_pos = cause
            tokens = TokensProduced(
                attempt=row.attempt,
                token_ids=row.token_ids,
                text=row.text,
                logprobs=row.logprobs,
                text_lengths=row.text_lengths,
            )
            self._directory.tell(request_name(row.request_id), tokens, cause=cause)
        if produced and self._config.keep_content:
            self.record(ev.StepTokens(executor=self._name, step=news.step, rows=tuple(produced)))

    def _preempted(self, step: int, lost: Preemption, cause: int) -> None:
        preempted = ev.Preempted(
            request_id=lost.request_id, executor=self._name, attempt=lost.attempt, step=step, reason=lost.reason
        )
        self.record(preempted, correlation=lost.request_id, cause=cause)

    def _finished(self, news: port.Finished) -> None:
        flight = self._take(news.request_id, news.attempt)
        if flight is None:
            return
        if news.reason == "cancelled":
            applied = ev.CancelApplied(
                request_id=news.request_id, executor=self._name, completion_tokens=news.completion_tokens
            )
            flight.last_pos = self.record(applied, correlation=news.request_id, cause=flight.last_pos).meta.pos
        elif flight.session_id:
            self._standing.keep(flight.session_id, news.session_tokens, news.session_bytes, flight.last_pos)
        name = request_name(news.request_id)
        stopped_by = news.stop_reason if isinstance(news.stop_reason, str) else ""
        if news.text or stopped_by:
            rest = TokensProduced(attempt=news.attempt, token_ids=(), text=news.text, stopped_by=stopped_by)
            self._directory.tell(name, rest)
        done = cmd.EngineDone(
            now_ns=self._now(),
            attempt=news.attempt,
            reason=news.reason,
            prompt_tokens=news.prompt_tokens,
            completion_tokens=news.completion_tokens,
            cached_tokens=news.cached_tokens,
            stop_reason=news.stop_reason if isinstance(news.stop_reason, int) else None,
            session_tokens=news.session_tokens,
            session_bytes=news.session_bytes,
        )
        self._directory.tell(name, done, cause=flight.last_pos)

    def _failed(self, news: port.Failed) -> None:
        flight = self._take(news.request_id, news.attempt)
        if flight is not None:
            self._report_fault(news.request_id, flight, news.code, news.message, lost=False)
        if self._watch.is_sick:
            self.record(ev.EngineSickened(executor=self._name, failures=self._watch.failures))
            self._watch.begin()
            self._driver.kill()

    # ---- health

    def _probe(self, _: Probe) -> None:
        now_ns = self._now()
        silence = self._watch.silence(now_ns, has_work=bool(self._in_flight))
        if silence == "stalled":
            self.record(ev.EngineStalled(executor=self._name, silent_ms=self._watch.silent_ms(now_ns)))
            self._driver.kill()
            return
        self._standing.rate(is_suspect=silence == "suspect", silent_ms=self._watch.silent_ms(now_ns))
        self._go_on_with_restart()
        self._nonce += 1
        self._driver.send(port.Snapshot(nonce=self._nonce))

    def _tune(self, tuned: TuneExecutor) -> None:
        self._watch.step_timeout_s = tuned.step_timeout_s

    def _status(self, news: port.EngineStatus) -> None:
        observed = (
            news.memory_bytes // MEMORY_GRAIN_BYTES,
            news.free_bytes // FREE_GRAIN_BYTES,
            news.kv_bytes_in_use,
        )
        if observed == self._observed:
            return
        self._observed = observed
        observe = cmd.ObserveMemory(
            now_ns=self._now(),
            executor=self._name,
            used_bytes=news.memory_bytes,
            total_bytes=news.device_memory_total_bytes,
            kv_bytes_in_use=news.kv_bytes_in_use,
            free_bytes=news.free_bytes,
            prefix_cache_bytes=news.prefix_cache_bytes,
            devices=news.devices,
        )
        self._directory.tell("memory", observe)

    def _engine_exited(self, news: port.EngineExited) -> None:
        if self._restart == "leaving":
            self._lose_all(EngineLost.code, "the engine was shut down")
            if self._leaver is not None:
                self._leaver.resolve(None)
            return
        in_flight = len(self._in_flight)
        is_planned = self._restart == "stopping"
        exited = ev.EngineExited(
            executor=self._name,
            exit_code=news.exit_code,
            reason=news.reason,
            in_flight=in_flight,
            planned=is_planned,
        )
        pos = self.record(exited).meta.pos
        self._standing.leave(news.reason, pos, fault=not is_planned, returns=bool(self._restart))
        self._lose_all(EngineLost.code, f"the engine process ended: {news.reason}", pos)
        if not is_planned:
            raise EngineLost(f"the engine of {self._name} ended with {news.exit_code}: {news.reason}")
        self._restart = ""
        self._driver = self._drivers(self._config.load.device)
        self._start_engine()

    # ---- a wanted restart, or the end

    def _begin_restart(self, wanted: RestartExecutor) -> None:
        if self._restart or self._standing.capabilities is None:
            return  # a new engine comes anyway
        requested = ev.RestartRequested(
            executor=self._name, origin=wanted.origin, in_flight=len(self._in_flight), timeout_s=wanted.timeout_s
        )
        cause = self.record(requested).meta.pos
        self._restart = "draining"
        self._restart_by_ns = self._now() + int(wanted.timeout_s * NS_PER_S)
        self._standing.drain(cause)

    def _go_on_with_restart(self) -> None:
        """With each probe, so that who was on the way here when the router was told arrives before the end."""
        is_late = self._now() > self._restart_by_ns
        if self._restart == "draining" and (not self._in_flight or is_late):
            self._restart = "stopping"
            self._restart_by_ns = self._now() + int(STOP_TIMEOUT_S * NS_PER_S)
            self._driver.send(port.Shutdown())
        elif self._restart in ("stopping", "leaving") and is_late:
            self._driver.kill()

    def _stop_engine(self, _: StopEngine) -> None:
        self._leaver = self.defer()
        self._restart = "leaving"
        self._restart_by_ns = self._now() + int(STOP_TIMEOUT_S * NS_PER_S)
        self._driver.send(port.Shutdown())
        if self._standing.capabilities is None:
            self._driver.kill()  # one that loads listens to nobody, and has nothing to give back

    # ---- parts

    def _lose_all(self, code: str, message: str, cause: int = NO_CAUSE) -> None:
        for request_id, flight in self._in_flight.items():
            flight.last_pos = flight.last_pos if cause == NO_CAUSE else cause
            self._report_fault(request_id, flight, code, message, lost=True)
        self._in_flight.clear()

    def _report_fault(self, request_id: str, flight: _InFlight, code: str, message: str, *, lost: bool) -> None:
        faulted = ev.ExecutorFaulted(
            request_id=request_id,
            executor=self._name,
            attempt=flight.attempt,
            code=code,
            message=message,
            lost=lost,
        )
        pos = self.record(faulted, correlation=request_id, cause=flight.last_pos).meta.pos
        failure = cmd.EngineFailure(
            now_ns=self._now(),
            attempt=flight.attempt,
            code=code,
            message=message,
            lost=lost,
            tokens_out=flight.tokens_out,
        )
        self._directory.tell(request_name(request_id), failure, cause=pos)

    def _take(self, request_id: str, attempt: int) -> _InFlight | None:
        flight = self._in_flight.get(request_id)
        if flight is None or flight.attempt != attempt:
            return None
        return self._in_flight.pop(request_id)

    def _now(self) -> int:
        return self.context.system.now_ns()
