"""An engine without a model, as a machine that is stepped.

It keeps every rule of ``engine.port``: one terminal event a request, tokens only in steps, cancel within a step,
resumption after delivered tokens. Its steps are planned by the real scheduler. Token ``i`` of a request is a function
of its seed and position, so a resumed stream goes on as it would have.
"""

from collections.abc import Mapping

import msgspec

from gptoss.engine import port
from gptoss.engine.memory_model import kv_bytes
from gptoss.engine.scheduler import NO_DEADLINE, Candidate, SchedulerState, schedule
from gptoss.messages.model import EngineCapabilities, FinishReason, KvLayout, ModelFingerprint
from gptoss.messages.plan import Limits, PlannedRow, RowFailure, StepPlan

FAKE_VOCAB = 1000
FAKE_LAYOUT = KvLayout(full_layers=1, sliding_layers=0, sliding_window=0, kv_heads=1, head_dim=1, dtype_bytes=1)
CHUNK_TOKENS = 64


class FakeOptions(msgspec.Struct, frozen=True, kw_only=True):
    """What a fake engine is like.

    Attributes:
        step_s: how long a step takes, in seconds.
        die_at_step: the engine exits with -9 at this step, once for each driver; 0 never.
        kv_budget_bytes: what its capabilities say; one token costs ``2`` bytes.
        prefix_cache_bytes: likewise; with it, sessions keep all their tokens. No prompt gets cheaper by it.
    """

    step_s: float = 0.0
    die_at_step: int = 0
    max_batch_size: int = 8
    max_model_len: int = 4096
    kv_budget_bytes: int = 1_000_000
    prefix_cache_bytes: int = 0
    vocab_size: int = FAKE_VOCAB
    eos_token_ids: tuple[int, ...] = (0,)


def fake_token(seed: int, position: int) -> int:
    """The token that a fake engine produces."""
    return (seed * 31 + position * 7) % FAKE_VOCAB


def fake_text(token_id: int) -> str:
    """The text of a token of a fake engine."""
    return f"t{token_id} "


class FakeSequence:
    """A request inside the fake engine; ``is_running`` while it has KV memory, ``end`` and what follows once it is over."""

    def __init__(self, submit: port.Submit, arrival: int) -> None:
        self.submit = submit
        self.arrival = arrival
        self.num_prompt = len(submit.prompt_token_ids)
        self.produced = len(submit.output_token_ids)
        self.max_tokens = submit.sampling.max_tokens or 1
        self.num_computed = 0
        self.is_running = False
        self.end: FinishReason | None = None
        self.stop_reason: str | int | None = None
        self.rest = ""

    @property
    def candidate(self) -> Candidate:
        """Itself as the scheduler sees it."""
        submit = self.submit
        return Candidate(
            submit.request_id,
            submit.attempt,
            submit.priority,
            submit.deadline_ns or NO_DEADLINE,
            self.arrival,
            self.num_prompt,
            self.num_prompt + self.produced,
            self.num_computed,
            self.kv_bytes,
        )

    @property
    def kv_bytes(self) -> int:
        """What its KV memory takes."""
        return kv_bytes(FAKE_LAYOUT, self.num_prompt + self.max_tokens)


class FakeEngine:
    """An engine as a machine: commands and steps go in, events come out. It has no thread, clock or chance of its own.

    Attributes:
        kv_budget_bytes: KV memory that requests may hold now; lower it to let the device run out of memory.
        step_number: of the last step.
        sessions: bytes kept for each.
    """

    def __init__(self, load: port.Load, options: FakeOptions) -> None:
        self.kv_budget_bytes = options.kv_budget_bytes
        self.step_number = 0
        self.sessions: dict[str, int] = {}
        self._load = load
        self._options = options
        self._limits = Limits(max_batch_size=options.max_batch_size, chunk_tokens=CHUNK_TOKENS, is_row_invariant=True)
        self._sequences: dict[str, FakeSequence] = {}
        self._arrivals = 0
        self._submits_taken = 0
        self._is_draining = False

    @property
    def has_work(self) -> bool:
        """Whether a step would do anything."""
        return bool(self._sequences)

    @property
    def request_ids(self) -> tuple[str, ...]:
        """The requests that are here, in the order in which they came."""
        return tuple(self._sequences)

    def handle(self, command: port.EngineCommand) -> list[port.EngineEvent]:
        """Take a command between two steps."""
        match command:
            case port.Load():
                return [self._loaded()]
            case port.Submit():
                return self._submit(command)
            case port.Cancel():
                sequence = self._sequences.pop(command.request_id, None)
                return [] if sequence is None else [_finished(sequence, "cancelled"), *self._drained()]
            case port.Snapshot():
                return [self._status(command.nonce)]
            case port.DropSession():
                self.sessions.pop(command.session_id, None)
                return []
            case port.Drain():
                self._is_draining = True
                return self._drained()
            case port.Shutdown():
                return []

    def step(
        self, *, started_ns: int, duration_ns: int, failures: Mapping[str, RowFailure] | None = None
    ) -> list[port.EngineEvent]:
        """Do one step.

        Args:
            started_ns: monotonic time; ``duration_ns`` later the step is over.
            duration_ns: see ``started_ns``.
            failures: rows that come to nothing, by request id, where the request has a row in this step.
        """
        plan = schedule(self._state())
        self.step_number += 1
        for preemption in plan.preemptions:
            lost = self._sequences[preemption.request_id]
            lost.is_running, lost.num_computed = False, 0
        for start in plan.starts:
            self._sequences[start.request_id].is_running = True
        rows = [self._run(row, (failures or {}).get(row.request_id, "")) for row in plan.rows]
        ends = [self._end(row) for row in rows if row.ended]
        done = self._step_done(plan, tuple(rows), started_ns, duration_ns)
        return [done, *ends, *self._drained()]

    def produce(self, sequence: FakeSequence) -> tuple[int, str]:
        """The next token of a request, and the text that it makes final; sets ``end`` if it is the last."""
        token_id = fake_token(sequence.submit.sampling.seed or 0, sequence.produced)
        return token_id, fake_text(token_id)

    # ---- parts

    def _submit(self, submit: port.Submit) -> list[port.EngineEvent]:
        self._submits_taken += 1
        if self._is_draining:
            return [_failed(submit, "not_ready", "the engine is draining")]
        older = self._sequences.get(submit.request_id)
        if older is not None and older.submit.attempt == submit.attempt:
            return []
        self._sequences.pop(submit.request_id, None)
        self._sequences[submit.request_id] = FakeSequence(submit, self._arrivals)
        self._arrivals += 1
        return [] if older is None else [_finished(older, "cancelled")]

    def _state(self) -> SchedulerState:
        candidates = [sequence.candidate for sequence in self._sequences.values()]
        waiting = [each for each in candidates if not self._sequences[each.request_id].is_running]
        return SchedulerState(
            limits=self._limits,
            running=tuple(each for each in candidates if self._sequences[each.request_id].is_running),
            waiting=tuple(sorted(waiting, key=lambda each: each.order)[: self._limits.max_batch_size]),
            kv_budget_bytes=self.kv_budget_bytes,
        )

    def _run(self, row: PlannedRow, failure: RowFailure) -> port.StepRow:
        sequence = self._sequences[row.request_id]
        token_ids: tuple[int, ...] = ()
        text = ""
        prefilled = 0
        if not failure:
            prefilled = max(0, min(row.start + row.num_tokens, sequence.num_prompt) - row.start)
            sequence.num_computed += row.num_tokens
            if row.num_logits:
                token_id, text = self.produce(sequence)
                token_ids = (token_id,)
                sequence.produced += 1
                if sequence.end is None and sequence.produced >= sequence.max_tokens:
                    sequence.end = "length"
        return port.StepRow(
            request_id=row.request_id,
            attempt=row.attempt,
            token_ids=token_ids,
            text=text,
            prefilled=prefilled,
            start=row.start,
            num_tokens=row.num_tokens,
            num_logits=row.num_logits,
            failure=failure,
            ended=failure not in {"", "memory"} or sequence.end is not None,
        )

    def _end(self, row: port.StepRow) -> port.EngineEvent:
        sequence = self._sequences.pop(row.request_id)
        if row.failure:
            return _failed(sequence.submit, "engine_error", f"the model's output is {row.failure}")
        finished = _finished(sequence, sequence.end or "length")
        session_id = sequence.submit.session_id
        if not session_id or not self._options.prefix_cache_bytes or not self._load.session_bytes_max:
            return finished
        tokens = sequence.num_prompt + sequence.produced
        kept = self.sessions[session_id] = kv_bytes(FAKE_LAYOUT, tokens)
        return msgspec.structs.replace(finished, session_tokens=tokens, session_bytes=kept)

    def _step_done(
        self, plan: StepPlan, rows: tuple[port.StepRow, ...], started_ns: int, duration_ns: int
    ) -> port.StepDone:
        running = [sequence for sequence in self._sequences.values() if sequence.is_running]
        taken, self._submits_taken = self._submits_taken, 0
        return port.StepDone(
            step=self.step_number,
            started_ns=started_ns,
            duration_ns=duration_ns,
            rows=rows,
            waiting=len(self._sequences) - len(running),
            running=len(running),
            kv_bytes_in_use=sum(sequence.kv_bytes for sequence in running),
            submits_taken=taken,
            preemptions=plan.preemptions,
            starts=plan.starts,
            prefill_tokens_max=plan.prefill_tokens_max,
            prefill_ms_per_token=plan.prefill_ms_per_token,
            kv_budget_bytes=plan.kv_budget_bytes,
        )

    def _drained(self) -> list[port.EngineEvent]:
        return [port.Drained()] if self._is_draining and not self._sequences else []

    def _status(self, nonce: int) -> port.EngineStatus:
        running = [sequence for sequence in self._sequences.values() if sequence.is_running]
        return port.EngineStatus(
            nonce=nonce,
            step=self.step_number,
            waiting=len(self._sequences) - len(running),
            running=len(running),
            kv_bytes_in_use=sum(sequence.kv_bytes for sequence in running),
            memory_bytes=0,
            device_memory_total_bytes=0,
        )

    def _loaded(self) -> port.Loaded:
        options, load = self._options, self._load
        capabilities = EngineCapabilities(
            model_name=load.model_name,
            architecture="Fake",
            vocab_size=options.vocab_size,
            max_model_len=options.max_model_len,
            max_batch_size=options.max_batch_size,
            kv_budget_bytes=options.kv_budget_bytes,
            prefix_cache_bytes=options.prefix_cache_bytes,
            kv_layout=FAKE_LAYOUT,
            weights_bytes=0,
            device=load.device,
            dtype="float32",
            num_threads=1,
            eos_token_ids=options.eos_token_ids,
            limits=self._limits,
            multi_device="+" in load.device,
        )
        fingerprint = ModelFingerprint(weights="", tokenizer="", chat_template="", config="")
        return port.Loaded(capabilities=capabilities, fingerprint=fingerprint, load_ms=0.0, pid=0)


def _finished(sequence: FakeSequence, reason: FinishReason) -> port.Finished:
    return port.Finished(
        request_id=sequence.submit.request_id,
        attempt=sequence.submit.attempt,
        reason=reason,
        prompt_tokens=sequence.num_prompt,
        completion_tokens=sequence.produced,
        text=sequence.rest,
        stop_reason=sequence.stop_reason,
    )


def _failed(submit: port.Submit, code: str, message: str) -> port.Failed:
    return port.Failed(request_id=submit.request_id, attempt=submit.attempt, code=code, message=message)
