"""The engine itself: ``step`` is the whole machine on one screen. Schedule, run, postprocess.

Rules:
- Single-threaded: whoever owns the core calls ``handle`` and ``step``, never two at once. Neither raises for anything
  that a request can cause.
- Every event returned is of ``engine.port``; a request's terminal event comes after its last row, once.
- A submit with the id and attempt of a request that is still here is the same request, and ignored. One with another
  attempt takes its place: the older attempt ends as cancelled.
- A row that found no memory is run again once, after the worst other request gave its own back.
"""

from collections.abc import Callable
from typing import Any

import msgspec
import torch
from tokenizers import Tokenizer

from gptoss.clock import Clock
from gptoss.engine.attention import Chunk
from gptoss.engine.batch import Batch
from gptoss.engine.device_memory import memory_of
from gptoss.engine.grammar_mask import GrammarMasks
from gptoss.engine.load import CHUNK_TOKENS, LoadedModel
from gptoss.engine.memory_model import kv_bytes
from gptoss.engine.pace import PrefillPace
from gptoss.engine.port import (
    Cancel,
    CoreCommand,
    Drain,
    Drained,
    DropSession,
    EngineEvent,
    EngineStatus,
    Failed,
    Finished,
    Load,
    Snapshot,
    StepDone,
    StepRow,
    Submit,
    TokenLogprob,
)
from gptoss.engine.prefix_cache import PrefixCache
from gptoss.engine.runner import Runner
from gptoss.engine.sampler import Draw
from gptoss.engine.scheduler import schedule
from gptoss.engine.sequence import End, Sequence
from gptoss.engine.step import Fault, RowOutcome, Task, Undo, run_isolated, run_tasks
from gptoss.engine.submit_check import check_submit
from gptoss.engine.token_text import TokenText
from gptoss.errors import EngineError, GptossError, MemoryExhausted, NotReady, QueueFull
from gptoss.messages.model import EngineCapabilities
from gptoss.messages.plan import Limits, PlannedRow, RowFailure, StepPlan, without

WAITING_MAX = 8192
BLOCK_TOKENS = 32
PREFILL_TARGET_MS = 100.0
"""How long prefill may keep those waiting who decode, in each step."""
MEMORY_FAULTS_MAX = 2
DRAFT_STREAMS_MAX = 4
"""With more streams at once a step is no longer bound by reading the weights, and guesses cost what they save."""
NO_MEMORY = "the device has no memory for this request: {}"


class CoreOptions(msgspec.Struct, frozen=True, kw_only=True):
    """What an engine does beside running requests.

    Attributes:
        prefix_cache_bytes: the most that the prefix cache may hold, within the KV budget; 0 is no cache.
        session_bytes_max: of that, what one session may keep between its turns; 0 is nothing.
        provenance: names the model and its numerics, for the keys of that cache.
        speculates: guess tokens and verify several in a step; only with runners whose bits allow it.
        announce: told each plan before it is carried out.
    """

    prefix_cache_bytes: int = 0
    session_bytes_max: int = 0
    provenance: str = ""
    speculates: bool = False
    announce: Callable[[StepPlan], None] | None = None


class EngineCore:
    """Runs requests on a loaded model.

    Args:
        runner: computes logits and owns the shape of KV memory.
        capabilities: limits that submits are checked against.
        tokenizer: of the model.
        clock: for the times of steps.
        options: see there.

    Attributes:
        capabilities: with what the core itself decides on.
        notes: for people, on what is not as it was asked for.
        grammars: of requests whose output is bound.
    """

    def __init__(
        self,
        runner: Runner,
        capabilities: EngineCapabilities,
        tokenizer: Tokenizer,
        clock: Clock,
        options: CoreOptions | None = None,
    ) -> None:
        self._runner = runner
        self._tokenizer = tokenizer
        self._spelling = TokenText(tokenizer)
        self._clock = clock
        self._device = torch.device(capabilities.device)
        self.grammars = GrammarMasks(tokenizer, capabilities.vocab_size, capabilities.eos_token_ids)
        options = options or CoreOptions()
        limits = Limits(
            max_batch_size=capabilities.max_batch_size,
            chunk_tokens=CHUNK_TOKENS.get(self._device.type, CHUNK_TOKENS["cpu"]),
            align_tokens=BLOCK_TOKENS,
            is_row_invariant=runner.is_row_invariant,
            target_ms=PREFILL_TARGET_MS,
            draft_streams_max=DRAFT_STREAMS_MAX if options.speculates and runner.is_row_invariant else 0,
            is_batch_invariant=runner.is_batch_invariant,
        )
        cache = None
        cache_bytes_max = min(options.prefix_cache_bytes, capabilities.kv_budget_bytes)
        if cache_bytes_max > 0 and runner.geometry is not None:
            block_tokens = limits.align_tokens if limits.has_free_cuts else limits.chunk_tokens
            cache = PrefixCache(runner.geometry, block_tokens, options.provenance)
        self.capabilities = msgspec.structs.replace(
            capabilities, limits=limits, prefix_cache_bytes=cache_bytes_max if cache else 0
        )
        self.notes = _notes(options, limits, has_cache=cache is not None)
        self._batch = Batch(runner, limits, capabilities.kv_budget_bytes, cache, cache_bytes_max)
        self._session_bytes_max = options.session_bytes_max
        self._pace = PrefillPace()
        self._num_steps = 0
        self._num_sequences = 0
        self._submits_taken = 0
        self._is_draining = False
        self._announce = options.announce

    def has_work(self) -> bool:
        """Whether ``step`` would do something."""
        return bool(self._batch.sequences)

    def handle(self, command: CoreCommand) -> list[EngineEvent]:
        """Take a command between steps. Returns what there is to say at once."""
        match command:
            case Submit():
                self._submits_taken += 1
                return self._submit(command)
            case Cancel():
                return self._cancel(command.request_id)
            case Drain():
                self._is_draining = True
                return self._drained()
            case DropSession():
                return self._batch.drop_session(command.session_id)
            case Snapshot():
                return [self._status(command.nonce)]

    def step(self, plan: StepPlan | None = None) -> list[EngineEvent]:
        """Run one step of the batch.

        Args:
            plan: what to do; None asks the scheduler. A replay gives the plans of the log.

        Returns:
            a ``StepDone``, then the terminal events that it brought.
        """
        started_ns = self._clock.monotonic_ns()
        state = self._batch.state(self._pace.ms_per_token)
        plan = plan or schedule(state)
        if self._announce is not None:
            self._announce(plan)
        refused = self._batch.place(plan)
        plan = without(plan, refused)
        self._make_up(plan)
        ends = self._fail_hopeless(refused)
        outcomes = run_tasks(self._runner, [self._task(row) for row in plan.rows], self._batch.relieve)
        rows = [self._advance(row, outcome, ends) for row, outcome in zip(plan.rows, outcomes, strict=True)]
        if any(row.failure == "memory" for row in rows):
            self._batch.shorten_budget()
        duration_ns = self._clock.monotonic_ns() - started_ns
        self._pace.observe(plan, duration_ns)
        self._num_steps += 1
        done = StepDone(
            step=self._num_steps,
            started_ns=started_ns,
            duration_ns=duration_ns,
            rows=tuple(rows),
            waiting=self._batch.num_waiting,
            running=self._batch.num_running,
            kv_bytes_in_use=self._batch.kv_bytes_in_use,
            prefix_cache_bytes=self._batch.cache_bytes,
            submits_taken=self._submits_taken,
            preemptions=plan.preemptions,
            starts=plan.starts,
            refused=tuple(refused),
            prefill_tokens_max=plan.prefill_tokens_max,
            prefill_ms_per_token=plan.prefill_ms_per_token,
            kv_budget_bytes=plan.kv_budget_bytes,
        )
        self._submits_taken = 0
        return [done, *ends, *self._drained()]

    def _fail_hopeless(self, refused: dict[str, str]) -> list[EngineEvent]:
        """If the device refuses memory although nothing else runs, waiting will not help: fail the first of them."""
        if not refused or self._batch.num_running:
            return []
        request_id, message = next(iter(refused.items()))
        return [self._fail(self._batch.sequences[request_id], MemoryExhausted(NO_MEMORY.format(message)))]

    def _make_up(self, plan: StepPlan) -> None:
        """Compute what a plan of the log took from a prefix cache that does not have it here."""
        chunk_tokens = self._batch.limits.chunk_tokens
        for start in plan.starts:
            sequence = self._batch.sequences[start.request_id]
            while sequence.num_computed < start.num_cached:
                first = sequence.num_computed
                end = min(start.num_cached, (first // chunk_tokens + 1) * chunk_tokens)
                token_ids = sequence.token_ids[first:end]
                chunk = Chunk(slot=sequence.slot, token_ids=token_ids, start=first, num_logits=0)
                run_isolated(self._runner, [Undo(chunk)], self._batch.relieve)
                sequence.num_computed = end

    def _task(self, row: PlannedRow) -> Task:
        """What it takes to run a planned row."""
        sequence = self._batch.sequences[row.request_id]
        draft = sequence.draft[: row.num_draft]
        token_ids = [*sequence.token_ids[row.start : row.start + row.num_tokens - len(draft)], *draft]
        chunk = Chunk(slot=sequence.slot, token_ids=token_ids, start=row.start, num_logits=row.num_logits)
        return Task(chunk, draft, sequence.sampler, len(sequence.token_ids))

    def _advance(self, row: PlannedRow, outcome: RowOutcome, ends: list[EngineEvent]) -> StepRow:
        """Note what was computed and chosen for one request; ``ends`` grows if that ends it."""
        sequence = self._batch.sequences[row.request_id]
        if outcome.fault is not None:
            return self._fault(sequence, row, outcome.fault, ends)
        sequence.num_memory_faults = 0
        num_right = len(outcome.draws) - 1 if row.num_draft else 0
        sequence.num_computed = row.start + row.num_tokens - row.num_draft + num_right
        texts: list[str] = []
        draws: list[Draw] = []
        failure: RowFailure = ""
        for draw in outcome.draws:
            if draw.token_id is None:
                failure = "not_finite"
                break
            draws.append(draw)
            texts.append(sequence.push(draw.token_id))
            if sequence.end:
                break
        if failure:
            self._batch.distrust(sequence)
            ends.append(self._fail(sequence, EngineError("the model's logits are not finite (NaN or infinite)")))
        else:
            self._batch.keep(sequence)
            sequence.learn(row.num_draft, num_right)
        if sequence.end:
            ends.append(self._finish(sequence, sequence.end))
        return _came_of(
            row,
            token_ids=tuple(draw.token_id for draw in draws if draw.token_id is not None),
            text="".join(texts),
            prefilled=max(0, min(row.start + row.num_tokens, sequence.num_prompt) - row.start),
            logprobs=tuple(self._token_logprob(draw) for draw in draws if draw.logprob is not None),
            failure=failure,
            ended=bool(failure or sequence.end),
            text_lengths=tuple(map(len, texts)) if len(texts) > 1 else (),
        )

    def _fault(self, sequence: Sequence, row: PlannedRow, fault: Fault, ends: list[EngineEvent]) -> StepRow:
        """Note that a row came to nothing."""
        sequence.num_memory_faults += fault.failure == "memory"
        if fault.failure != "memory":
            ends.append(self._fail(sequence, EngineError(f"the model failed on this request: {fault.message}")))
        elif sequence.num_memory_faults >= MEMORY_FAULTS_MAX:
            ends.append(self._fail(sequence, MemoryExhausted(NO_MEMORY.format(fault.message))))
        return _came_of(row, failure=fault.failure, ended=row.request_id not in self._batch.sequences)

    def _token_logprob(self, draw: Draw) -> TokenLogprob:
        assert draw.token_id is not None
        assert draw.logprob is not None
        text, raw = self._spelling.spell(draw.token_id)
        top = tuple((other, value, *self._spelling.spell(other)) for other, value in draw.top)
        return TokenLogprob(token_id=draw.token_id, logprob=draw.logprob, text=text, raw=raw, top=top)

    def _submit(self, submit: Submit) -> list[EngineEvent]:
        earlier = self._batch.sequences.get(submit.request_id)
        if earlier is not None and earlier.submit.attempt == submit.attempt:
            return []
        try:
            self._check_room()
            check_submit(submit, self.capabilities)
            mask = self.grammars.mask(submit.grammar, self._device) if submit.grammar else None
            sequence = Sequence(submit, self._num_sequences, self.capabilities, self._tokenizer, mask)
            sequence.kv_bytes = self._kv_bytes(sequence.capacity)
        except GptossError as error:
            return [_failed(submit, error)]
        events: list[EngineEvent] = [self._finish(earlier, End("cancelled"))] if earlier else []
        self._num_sequences += 1
        self._batch.add(sequence)
        if sequence.end:  # the earlier attempt had produced everything but could not say so
            events.append(self._finish(sequence, sequence.end))
        return events

    def _check_room(self) -> None:
        """Raise an error of the tree if nothing more is taken."""
        if self._is_draining:
            raise NotReady("the engine is draining and takes no new requests")
        if len(self._batch.sequences) >= WAITING_MAX:
            raise QueueFull(f"the engine holds {WAITING_MAX} requests already")

    def _kv_bytes(self, capacity: int) -> int:
        """KV bytes of a request of so many tokens. Raises ``MemoryExhausted`` if they can never be free."""
        needed = kv_bytes(self._runner.layout, capacity)
        budget = self.capabilities.kv_budget_bytes
        if needed > budget:
            raise MemoryExhausted(f"the request needs {needed} bytes of KV memory; this engine has {budget} in all")
        return needed

    def _cancel(self, request_id: str) -> list[EngineEvent]:
        sequence = self._batch.sequences.get(request_id)
        if sequence is None:
            return []
        return [self._finish(sequence, End("cancelled")), *self._drained()]

    def _drained(self) -> list[EngineEvent]:
        return [Drained()] if self._is_draining and not self._batch.sequences else []

    def _finish(self, sequence: Sequence, end: End) -> Finished:
        # Of a turn that its client gave up, nobody is told what was kept.
        kept = self._batch.keep_session(sequence, 0 if end.reason == "cancelled" else self._session_bytes_max)
        self._batch.remove(sequence)
        return Finished(
            request_id=sequence.submit.request_id,
            attempt=sequence.submit.attempt,
            reason=end.reason,
            text=sequence.rest(),
            prompt_tokens=sequence.num_prompt,
            completion_tokens=sequence.num_output,
            cached_tokens=min(sequence.num_cached, sequence.num_prompt),
            stop_reason=end.stop_reason,
            session_tokens=kept.num_tokens,
            session_bytes=kept.num_bytes,
        )

    def _fail(self, sequence: Sequence, error: GptossError) -> Failed:
        self._batch.remove(sequence)
        return _failed(sequence.submit, error)

    def _status(self, nonce: int) -> EngineStatus:
        geometry = self._runner.geometry
        memory = memory_of(geometry.devices if geometry else (self._device,))
        return EngineStatus(
            nonce=nonce,
            step=self._num_steps,
            waiting=self._batch.num_waiting,
            running=self._batch.num_running,
            kv_bytes_in_use=self._batch.kv_bytes_in_use,
            prefix_cache_bytes=self._batch.cache_bytes,
            **memory,
        )


def _came_of(row: PlannedRow, **outcome: Any) -> StepRow:
    """What the log keeps of a planned row: the row and its outcome."""
    return StepRow(**msgspec.structs.asdict(row), **outcome)


def _notes(options: CoreOptions, limits: Limits, *, has_cache: bool) -> tuple[str, ...]:
    notes: list[str] = []
    if options.prefix_cache_bytes > 0 and not has_cache:
        notes.append("no prefix cache: this runner's KV memory cannot be copied")
    if options.speculates and not limits.draft_streams_max:
        notes.append("no speculation: with this runner's kernels it would change the bits of logits")
    if not limits.is_batch_invariant:
        notes.append("not batch-invariant: on this device a token may depend on which requests share its steps")
    return tuple(notes)


def _failed(submit: Submit, error: GptossError) -> Failed:
    return Failed(request_id=submit.request_id, attempt=submit.attempt, code=error.code, message=error.message)


def core_options(load: Load, model: LoadedModel) -> CoreOptions:
    """What ``load`` asks for, on the model that it gave."""
    budget = model.capabilities.kv_budget_bytes
    return CoreOptions(
        prefix_cache_bytes=load.prefix_cache_bytes or budget // 2,
        session_bytes_max=load.session_bytes_max,
        speculates=load.speculation == "ngram",
        provenance=f"{model.fingerprint.weights} {type(model.runner).__name__} {model.capabilities.dtype} {torch.__version__}",
    )
