"""A serving system in virtual time: the real deciders and the real scheduler, and steps that take as long as recorded ones.

Rules:
- Messages between deciders take no time. What happens outside is taken from the recording: arrivals, the rendering of
  prompts, cancels by clients, engines that load and die.
- A request makes as many tokens as it did. One that the recording cut short or never ran makes as many as half of the
  others do (``Script.output_tokens``).
- Everything is ordered by (time, order of sending): the same input gives the same run.
"""

import heapq
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import msgspec

from gptoss.actors.admission_actor import DEADLINE_PERIOD_S
from gptoss.actors.directory import REQUEST_PREFIX, executor_name, request_name
from gptoss.actors.memory_guard import SESSION_PERIOD_S
from gptoss.clock import NS_PER_S
from gptoss.config import BYTES_PER_MB
from gptoss.engine.memory_model import kv_bytes, tokens_within
from gptoss.engine.scheduler import schedule
from gptoss.messages import commands as cmd
from gptoss.messages import events as ev
from gptoss.messages.commands import Command
from gptoss.messages.envelope import Event
from gptoss.messages.model import EngineCapabilities
from gptoss.messages.plan import Limits, StepPlan
from gptoss.replay.plans import ExecutorLog
from gptoss.replay.policy import Policy
from gptoss.replay.step_cost import StepCost

DEADLINE_WAIT_NS = int(DEADLINE_PERIOD_S / 2 * NS_PER_S)
"""How long after a deadline admission notices on average."""
SESSION_WAIT_NS = int(SESSION_PERIOD_S / 2 * NS_PER_S)
"""How long after a session's time is up the guard notices on average."""
ANY_CHUNK = 2**20
"""Tokens of prompt in a step of an engine that does not say how it cuts prompts."""
MESSAGES_MAX = 20_000_000

Watcher = Callable[[int, str, Event], None]


class Script(msgspec.Struct, frozen=True, kw_only=True):
    """What a recording says of requests, whoever decides.

    Attributes:
        render: how long after the arrival the prompt was there, in nanoseconds, and the command that said so.
        outputs: tokens that each request made in all, if it came to its own end.
        hits: tokens that the prefix cache had of each prompt.
        typical_output: median of ``outputs``.
    """

    render: dict[str, tuple[int, Command]]
    outputs: dict[str, int]
    hits: dict[str, int]
    typical_output: int

    def output_tokens(self, request_id: str) -> int:
        """How many tokens a request makes if nothing stops it."""
        return self.outputs.get(request_id, self.typical_output)


class Simulation:
    """A system that can be put anywhere and let run.

    Args:
        policy: its deciders.
        script: of the requests.
        cost: of steps.
        watch: called with time, request and event for each event that names a request.

    Attributes:
        states: of the deciders, by stream.
        engines: what each executor's engine has, by stream; those without capabilities have not loaded.
        made: tokens that each running request has made by now.
    """

    def __init__(self, policy: Policy, script: Script, cost: StepCost, watch: Watcher) -> None:
        self.states: dict[str, Any] = {}
        self.engines: dict[str, ExecutorLog] = {}
        self.made: dict[str, int] = {}
        self.now_ns = 0
        self._policy = policy
        self._script = script
        self._cost = cost
        self._watch = watch
        self._heap: list[tuple[int, int, Callable[[], None]]] = []
        self._sent = 0
        self._busy: set[str] = set()
        self._lives: defaultdict[str, int] = defaultdict(int)

    def at(self, time_ns: int, what: Callable[[], None]) -> None:
        """Do something then, or now if that is past."""
        self._sent += 1
        heapq.heappush(self._heap, (max(time_ns, self.now_ns), self._sent, what))

    def tell(self, time_ns: int, stream: str, command: Command) -> None:
        """Have an actor consume a command then."""
        self.at(time_ns, lambda: self._consume(stream, command))

    def run(self, until_ns: int) -> bool:
        """Go on until nothing is left to happen; False when that is not before ``until_ns``."""
        for stream in self.engines:
            self._wake(stream)
        for _ in range(MESSAGES_MAX):
            if not self._heap:
                return True
            self.now_ns, _, what = heapq.heappop(self._heap)
            if self.now_ns > until_ns:
                return False
            what()
        return False

    def load_engine(self, stream: str, capabilities: EngineCapabilities) -> None:
        """An engine has loaded."""
        self._engine(stream).capabilities = self._policy.capabilities(capabilities)
        self._wake(stream)

    def accept(self, stream: str, event: ev.ExecutorAccepted) -> None:
        """An executor gets a request that was on its way to it when the policies parted."""
        state = self.states.get(request_name(event.request_id))
        if state is None or (state.phase, state.attempt) != ("running", event.attempt):
            return
        self._engine(stream).observe(event)
        if state.cancel is not None:
            self.cancel(event.request_id)
        self._wake(stream)

    def cancel(self, request_id: str) -> None:
        """An engine hears that a request was cancelled, if it has it."""
        state = self.states.get(request_name(request_id))
        if state is None or not state.executor:
            return
        stream = executor_name(state.executor)
        engine = self._engine(stream)
        if request_id in engine.requests():
            made = self.made.get(request_id, 0)
            engine.observe(ev.CancelApplied(request_id=request_id, executor=state.executor, completion_tokens=made))
            self._done(request_id, "cancelled")
            self._wake(stream)

    def lose_engine(self, stream: str, event: ev.EngineExited) -> None:
        """An engine has died: whatever it had goes back to the requests."""
        engine = self._engine(stream)
        lost = tuple(engine.requests())
        engine.observe(event)
        self._lives[stream] += 1
        self._busy.discard(stream)
        for request_id in lost:
            state = self.states.get(request_name(request_id))
            if state is None:
                continue
            failure = cmd.EngineFailure(
                now_ns=self.now_ns,
                attempt=state.attempt,
                code="engine_lost",
                message=event.reason,
                lost=True,
                tokens_out=self.made.get(request_id, 0),
            )
            self._consume(request_name(request_id), failure)

    # ---- deciders

    def _consume(self, stream: str, command: Command) -> None:
        decider = self._policy.decider(stream)
        if decider is None or (stream.startswith(REQUEST_PREFIX) and not self._is_for_a_life(stream, command)):
            return
        if isinstance(command, cmd.ChangeSettings):
            self._policy.take(stream, command.settings)
            return
        state = self.states.get(stream)
        state = decider.initial() if state is None else state
        command = msgspec.structs.replace(command, now_ns=self.now_ns)
        events = decider.decide(state, command)
        for event in events:
            state = decider.evolve(state, event)
        self.states[stream] = state
        for event in events:
            request_id = getattr(event, "request_id", stream.removeprefix(REQUEST_PREFIX))
            self._watch(self.now_ns, request_id, event)
            for name, told in decider.tells(state, event, self.now_ns):
                self.tell(self.now_ns, name, told)
            self._react(stream, request_id, state, event)

    def _is_for_a_life(self, stream: str, command: Command) -> bool:
        return stream in self.states or isinstance(command, cmd.BeginRequest)

    def _react(self, stream: str, request_id: str, state: Any, event: Event) -> None:
        """What the actors do beside telling other deciders."""
        match event:
            case ev.RequestReceived():
                self.tell(event.deadline_ns, stream, cmd.CancelRequest(now_ns=0, reason="deadline"))
            case ev.RequestValidated() if request_id in self._script.render:
                wait_ns, ready = self._script.render[request_id]
                self.tell(self.now_ns + wait_ns, stream, ready)
            case ev.Enqueued():
                check_ns = event.ask.deadline_ns + DEADLINE_WAIT_NS
                self.tell(check_ns, "admission", cmd.CheckDeadlines(now_ns=0))
            case ev.SessionKept() | ev.ReservationReleased() if event.at_ns:
                self._check_sessions(event.at_ns)
            case ev.SamplingBound():
                self._submit(request_id, state, event)
            case ev.CancelRequested() if state.phase == "running":
                self.cancel(request_id)
            case ev.RequestCompleted() | ev.RequestFailed() | ev.RequestCancelled() | ev.RequestRejected():
                self.states.pop(stream, None)
                self.made.pop(request_id, None)
            case _:
                pass

    def _check_sessions(self, used_ns: int) -> None:
        idle_ns = int(self._policy.settings.session_idle_s * NS_PER_S)
        self.tell(used_ns + idle_ns + SESSION_WAIT_NS, "memory", cmd.CheckSessions(now_ns=0))

    # ---- engines

    def _engine(self, stream: str) -> ExecutorLog:
        if stream not in self.engines:
            self.engines[stream] = ExecutorLog(set(), is_whole=True)
        return self.engines[stream]

    def _submit(self, request_id: str, state: Any, event: ev.SamplingBound) -> None:
        stream = executor_name(state.executor)
        accepted = ev.ExecutorAccepted(
            request_id=request_id,
            executor=state.executor,
            attempt=event.attempt,
            prompt_tokens=state.prompt_tokens,
            resumed_tokens=state.tokens_out,
            max_tokens=event.sampling.max_tokens or 0,
            priority=state.priority,
            deadline_ns=state.deadline_ns,
        )
        self.made.setdefault(request_id, state.tokens_out)
        self._engine(stream).observe(accepted)
        self._wake(stream)

    def _wake(self, stream: str) -> None:
        """Begin a step, if the engine is loaded, idle and has work."""
        engine = self._engine(stream)
        if stream in self._busy or engine.capabilities is None:
            return
        engine.take(len(engine.sent))
        plan = self._plan(engine, engine.capabilities)
        if not plan.rows and not plan.preemptions:
            return
        self._busy.add(stream)
        prefill = sum(min(row.num_tokens, self._prompt_left(engine, row.request_id, row.start)) for row in plan.rows)
        decode = sum(self._prompt_left(engine, row.request_id, row.start) == 0 for row in plan.rows)
        life = self._lives[stream]
        end_ns = self.now_ns + self._cost.duration_ns(decode, prefill)
        self.at(end_ns, lambda: self._end_step(stream, plan, life))

    def _plan(self, engine: ExecutorLog, capabilities: EngineCapabilities) -> StepPlan:
        limits = capabilities.limits or Limits(
            max_batch_size=capabilities.max_batch_size, chunk_tokens=ANY_CHUNK, is_row_invariant=True
        )
        hits = {key: self._script.hits[key] for key in engine.line if key in self._script.hits}
        state = engine.state(limits, capabilities.kv_budget_bytes, self._cost.prefill_token_ms, hits, {})
        return schedule(state)

    def _end_step(self, stream: str, plan: StepPlan, life: int) -> None:
        if life != self._lives[stream]:
            return
        engine = self._engine(stream)
        present = set(engine.requests())
        rows: list[ev.CommittedRow] = []
        for row in plan.rows:
            if row.request_id not in present:
                continue  # cancelled meanwhile
            tokens = min(1, row.num_logits)
            made = self.made[row.request_id] = self.made.get(row.request_id, 0) + tokens
            state = self.states.get(request_name(row.request_id))
            target = self._script.output_tokens(row.request_id)
            is_over = state is None or bool(tokens and made >= max(1, min(target, state.max_tokens)))
            rows.append(
                ev.CommittedRow(
                    row.request_id,
                    row.attempt,
                    tokens,
                    0,
                    row.start,
                    row.num_tokens,
                    row.num_logits,
                    ended=is_over,
                )
            )
        step = ev.StepCommitted(
            executor=stream,
            step=0,
            started_ns=0,
            duration_ns=0,
            rows=tuple(rows),
            waiting=0,
            running=0,
            kv_bytes_in_use=0,
            preemptions=plan.preemptions,
            starts=tuple(start for start in plan.starts if start.request_id in present),
        )
        engine.apply(step)
        self._busy.discard(stream)
        for row in rows:
            self._tell_progress(row)
        self._wake(stream)

    def _tell_progress(self, row: ev.CommittedRow) -> None:
        name = request_name(row.request_id)
        state = self.states.get(name)
        if state is None:
            return
        if row.tokens and not state.first_token:
            self._consume(name, cmd.FirstTokenSeen(now_ns=self.now_ns, attempt=row.attempt))
        if row.ended:
            reason = "length" if self.made[row.request_id] >= state.max_tokens else "stop"
            self._done(row.request_id, reason)

    def _done(self, request_id: str, reason: Any) -> None:
        state = self.states.get(request_name(request_id))
        if state is not None:
            made = self.made.get(request_id, 0)
            tokens, kept = self._kept(state, made) if reason != "cancelled" else (0, 0)
            if state.session_id and reason != "cancelled":
                keep = cmd.KeepSession(
                    now_ns=self.now_ns,
                    session_id=state.session_id,
                    executor=state.executor,
                    tokens=tokens,
                    kv_bytes=kept,
                )
                self.tell(self.now_ns, "memory", keep)
            done = cmd.EngineDone(
                now_ns=self.now_ns,
                attempt=state.attempt,
                reason=reason,
                prompt_tokens=state.prompt_tokens,
                completion_tokens=made,
                session_tokens=tokens,
                session_bytes=kept,
            )
            self.tell(self.now_ns, request_name(request_id), done)

    def _kept(self, state: Any, made: int) -> tuple[int, int]:
        """Tokens and bytes that an engine would keep for a session, if all of its turn fits the limit."""
        capabilities = self._engine(executor_name(state.executor)).capabilities
        limit = self._policy.settings.session_kv_mb * BYTES_PER_MB
        if not state.session_id or capabilities is None or not capabilities.prefix_cache_bytes:
            return 0, 0
        tokens = tokens_within(capabilities.kv_layout, limit, state.prompt_tokens + made)
        return tokens, kv_bytes(capabilities.kv_layout, tokens)

    def _prompt_left(self, engine: ExecutorLog, request_id: str, start: int) -> int:
        candidate = engine.running.get(request_id) or engine.line.get(request_id)
        return max(0, candidate.num_prompt - start) if candidate else 0
