"""An executor: the actor that owns one engine and turns its answers into events and deliveries.

It runs on its own thread. The engine's driver calls its sink from yet another thread, which only tells this actor, so
everything below happens one message at a time. An engine that exits takes its executor down with it: the requests in
flight are told that they were lost (and go on elsewhere), then the supervisor starts the executor anew, with a new
engine process.
"""

from collections.abc import Callable
from typing import Any

import msgspec

from gptoss.actors.actor import ThreadedActor
from gptoss.actors.directory import Directory, request_name
from gptoss.actors.request import CancelInEngine, TokensProduced
from gptoss.clock import NS_PER_MS, NS_PER_S
from gptoss.engine import port
from gptoss.errors import EngineLost
from gptoss.messages import commands as cmd
from gptoss.messages import events as ev
from gptoss.messages.envelope import NO_CAUSE
from gptoss.messages.plan import Preemption

PROBE_PERIOD_S = 1.0
STOP_TIMEOUT_S = 5.0
# Memory readings that differ by less than this say nothing new and are not recorded.
MEMORY_GRAIN_BYTES = 16 * 1024 * 1024
# What others leave free on a host changes all the time.
FREE_GRAIN_BYTES = 256 * 1024 * 1024

# What shows that the engine gets on with its work; an answered probe shows only that the process lives.
PROGRESS = (port.StepDone, port.Finished, port.Failed)


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

    __slots__ = ("attempt", "last_pos", "tokens_out")

    def __init__(self, attempt: int, tokens_out: int, last_pos: int) -> None:
        self.attempt = attempt
        self.tokens_out = tokens_out
        self.last_pos = last_pos
        """Position of the last record that concerns it: what its end is a consequence of."""


class ExecutorActor(ThreadedActor):
    """Drives one engine."""

    def __init__(self, config: ExecutorConfig, drivers: port.DriverFactory, directory: Directory) -> None:
        super().__init__()
        self._config = config
        self._name = config.executor
        self._driver = drivers(config.load.device)
        self._directory = directory
        self._in_flight: dict[str, _InFlight] = {}
        self._progress_ns = 0
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
        }

    def on_start(self) -> None:
        """Start the engine; it loads while this actor already takes messages."""
        load = self._config.load
        self.record(
            ev.EngineStarted(executor=self._name, device=load.device, model=load.model_name, folder=load.folder)
        )
        ref = self.context.ref
        self._driver.start(load, self._hear)
        self._probes = self.context.system.send_every(PROBE_PERIOD_S, ref, Probe)

    def on_stop(self) -> None:
        """Let the engine release its device, or end it."""
        self._probes.cancel()
        self._is_deaf = True
        self._withdraw_capacity("stopped")
        self._driver.send(port.Shutdown())
        if not self._driver.join(STOP_TIMEOUT_S):
            self._driver.kill()
            self._driver.join(STOP_TIMEOUT_S)

    def on_failure(self, *_: object) -> None:
        """After a crash of this actor, no engine may live on without it."""
        self._probes.cancel()
        self._is_deaf = True
        self._driver.kill()
        self._lose_all("engine_lost", "the executor crashed")
        self._withdraw_capacity("crashed")

    def on_receive(self, message: object) -> None:
        """Hand each message to its handler."""
        if isinstance(message, PROGRESS) or not self._in_flight:
            self._progress_ns = self._now()
        self._handlers[type(message)](message)

    def _hear(self, news: port.EngineEvent) -> None:
        # On the driver's thread. What a dismissed engine still says concerns nobody.
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
        now_ns = self._now()
        slots, budget = capabilities.max_batch_size, capabilities.kv_budget_bytes
        messages = {
            "memory": cmd.SetMemoryPool(now_ns=now_ns, executor=self._name, capabilities=capabilities),
            "router": cmd.SetExecutor(now_ns=now_ns, executor=self._name, slots=slots, kv_budget_bytes=budget),
            "admission": cmd.SetCapacity(
                now_ns=now_ns,
                executor=self._name,
                slots=slots,
                kv_budget_bytes=budget,
                multi_device=capabilities.multi_device,
            ),
        }
        for name, message in messages.items():
            self._directory.tell(name, message, cause=cause)

    def _load_failed(self, news: port.LoadFailed) -> None:
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
        self._in_flight[submit.request_id] = _InFlight(submit.attempt, len(submit.output_token_ids), pos)
        self._driver.send(submit)

    def _cancel(self, cancel: CancelInEngine) -> None:
        self._driver.send(port.Cancel(request_id=cancel.request_id))

    def _step_done(self, news: port.StepDone) -> None:
        committed = ev.StepCommitted(
            executor=self._name,
            step=news.step,
            started_ns=news.started_ns,
            duration_ns=news.duration_ns,
            rows=tuple(map(committed_row, news.rows)),
            waiting=news.waiting,
            running=news.running,
            kv_bytes_in_use=news.kv_bytes_in_use,
            prefix_cache_bytes=news.prefix_cache_bytes,
            submits_taken=news.submits_taken,
            preemptions=news.preemptions,
            starts=news.starts,
            refused=news.refused,
            prefill_tokens_max=news.prefill_tokens_max,
            prefill_ms_per_token=news.prefill_ms_per_token,
            kv_budget_bytes=news.kv_budget_bytes,
        )
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

    # ---- health

    def _probe(self, _: Probe) -> None:
        silent_ns = self._now() - self._progress_ns
        if self._in_flight and silent_ns > self._config.step_timeout_s * NS_PER_S:
            self.record(ev.EngineStalled(executor=self._name, silent_ms=silent_ns / NS_PER_MS))
            self._driver.kill()
            return
        self._nonce += 1
        self._driver.send(port.Snapshot(nonce=self._nonce))

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
        )
        self._directory.tell("memory", observe)

    def _engine_exited(self, news: port.EngineExited) -> None:
        in_flight = len(self._in_flight)
        exited = ev.EngineExited(executor=self._name, exit_code=news.exit_code, reason=news.reason, in_flight=in_flight)
        pos = self.record(exited).meta.pos
        self._withdraw_capacity(news.reason, pos)
        self._lose_all("engine_lost", f"the engine process ended: {news.reason}", pos)
        raise EngineLost(f"the engine of {self._name} ended with {news.exit_code}: {news.reason}")

    # ---- parts

    def _withdraw_capacity(self, reason: str, cause: int = NO_CAUSE) -> None:
        """Tell the deciders that nothing more can run here."""
        now_ns = self._now()
        drop = cmd.DropExecutor(now_ns=now_ns, executor=self._name, reason=reason)
        self._directory.tell("router", drop, cause=cause)
        self._directory.tell("memory", cmd.DropMemoryPool(now_ns=now_ns, executor=self._name), cause=cause)
        budget = cmd.SetCapacity(now_ns=now_ns, executor=self._name, slots=0, kv_budget_bytes=0)
        self._directory.tell("admission", budget, cause=cause)

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


def committed_row(row: port.StepRow) -> ev.CommittedRow:
    """What the log keeps of a row: no tokens, no text."""
    return ev.CommittedRow(
        row.request_id,
        row.attempt,
        len(row.token_ids),
        row.prefilled,
        row.start,
        row.num_tokens,
        row.num_logits,
        row.num_draft,
        row.failure,
        row.ended,
    )
