"""The engine itself: ``step`` is the whole machine on one screen. Schedule, run, postprocess.

Rules:
- Single-threaded: whoever owns the core calls ``handle`` and ``step``, never two at once. Neither raises for anything
  that a request can cause.
- Every event returned is of ``engine.port``; a request's terminal event comes after its last row, once.
- A submit with the id and attempt of a request that is still here is the same request, and ignored. One with another
  attempt takes its place: the older attempt ends as cancelled.
"""

from typing import TypeAlias

import psutil
import torch
from tokenizers import Tokenizer

from gptoss.clock import Clock
from gptoss.engine.attention import Chunk
from gptoss.engine.memory_model import kv_bytes
from gptoss.engine.port import (
    Cancel,
    Drain,
    Drained,
    EngineEvent,
    EngineStatus,
    Failed,
    Finished,
    Snapshot,
    StepDone,
    StepRow,
    Submit,
    TokenLogprob,
)
from gptoss.engine.runner import Runner, run_isolated
from gptoss.engine.sampler import Draw, draw_tokens
from gptoss.engine.scheduler import Scheduler, Work
from gptoss.engine.sequence import End, Sequence
from gptoss.engine.token_text import TokenText
from gptoss.errors import (
    EngineError,
    GptossError,
    MemoryExhausted,
    NotReady,
    QueueFull,
    RequestError,
)
from gptoss.messages.model import EngineCapabilities
from gptoss.messages.sampling import check_sampling

WAITING_MAX = 8192
CHUNK_TOKENS = {"cpu": 256, "cuda": 2048}

CoreCommand: TypeAlias = Submit | Cancel | Drain | Snapshot


class EngineCore:
    """Runs requests on a loaded model.

    Args:
        runner: computes logits and owns the shape of KV memory.
        capabilities: limits that submits are checked against.
        tokenizer: of the model.
        clock: for the times of steps.
    """

    def __init__(self, runner: Runner, capabilities: EngineCapabilities, tokenizer: Tokenizer, clock: Clock) -> None:
        self._runner = runner
        self._capabilities = capabilities
        self._tokenizer = tokenizer
        self._spelling = TokenText(tokenizer)
        self._clock = clock
        self._device = torch.device(capabilities.device)
        self._scheduler = Scheduler(
            max_batch_size=capabilities.max_batch_size,
            kv_budget_bytes=capabilities.kv_budget_bytes,
            chunk_tokens=CHUNK_TOKENS.get(self._device.type, CHUNK_TOKENS["cpu"]),
        )
        self._sequences: dict[str, Sequence] = {}
        self._num_steps = 0
        self._num_submits = 0
        self._is_draining = False

    def has_work(self) -> bool:
        """Whether ``step`` would do something."""
        return bool(self._sequences)

    def handle(self, command: CoreCommand) -> list[EngineEvent]:
        """Take a command between steps. Returns what there is to say at once."""
        match command:
            case Submit():
                return self._submit(command)
            case Cancel():
                return self._cancel(command.request_id)
            case Drain():
                self._is_draining = True
                return [] if self._sequences else [Drained()]
            case Snapshot():
                return [self._status(command.nonce)]

    def step(self) -> list[EngineEvent]:
        """Run one step of the batch. Returns a ``StepDone``, then the terminal events that it brought."""
        started_ns = self._clock.monotonic_ns()
        ends: list[EngineEvent] = [
            self._fail(sequence, EngineError(message))
            for sequence, message in self._scheduler.start_waiting(self._runner)
        ]
        work = self._scheduler.plan()
        logits, failures = run_isolated(self._runner, [_chunk(item) for item in work])
        draws = self._draw(work, logits)
        rows: list[StepRow] = []
        for index, item in enumerate(work):
            if index in failures:
                ends.append(
                    self._fail(item.sequence, EngineError(f"the model failed on this request: {failures[index]}"))
                )
                continue
            rows.append(self._advance(item, draws.get(index)))
            if index in draws and draws[index].token_id is None:
                ends.append(
                    self._fail(item.sequence, EngineError("the model's logits are not finite (NaN or infinite)"))
                )
            elif item.sequence.end:
                ends.append(self._finish(item.sequence, item.sequence.end))
        if self._is_draining and not self._sequences:
            ends.append(Drained())
        self._num_steps += 1
        done = StepDone(
            step=self._num_steps,
            started_ns=started_ns,
            duration_ns=self._clock.monotonic_ns() - started_ns,
            rows=tuple(rows),
            waiting=self._scheduler.num_waiting,
            running=self._scheduler.num_running,
            kv_bytes_in_use=self._scheduler.kv_bytes_in_use,
        )
        return [done, *ends]

    def _draw(self, work: list[Work], logits: list[torch.Tensor | None]) -> dict[int, Draw]:
        """Choose a token for each piece of work that has logits, by its index."""
        wanting = [
            (index, item.sequence, row)
            for index, (item, row) in enumerate(zip(work, logits, strict=True))
            if row is not None
        ]
        draws = draw_tokens(
            [row[-1] for _, _, row in wanting],
            [sequence.sampler for _, sequence, _ in wanting],
            [len(sequence.token_ids) for _, sequence, _ in wanting],
        )
        return {index: draw for (index, _, _), draw in zip(wanting, draws, strict=True)}

    def _advance(self, item: Work, draw: Draw | None) -> StepRow:
        """Note what was computed and chosen for one request."""
        sequence = item.sequence
        start = sequence.num_computed
        sequence.num_computed += item.num_tokens
        prefilled = max(0, min(sequence.num_computed, sequence.num_prompt) - start)
        request_id, attempt = sequence.submit.request_id, sequence.submit.attempt
        if draw is None or draw.token_id is None:
            return StepRow(request_id=request_id, attempt=attempt, prefilled=prefilled)
        return StepRow(
            request_id=request_id,
            attempt=attempt,
            token_ids=(draw.token_id,),
            text=sequence.push(draw.token_id),
            prefilled=prefilled,
            logprobs=() if draw.logprob is None else (self._token_logprob(draw.token_id, draw.logprob, draw),),
        )

    def _token_logprob(self, token_id: int, logprob: float, draw: Draw) -> TokenLogprob:
        text, raw = self._spelling.spell(token_id)
        top = tuple((other, value, *self._spelling.spell(other)) for other, value in draw.top)
        return TokenLogprob(token_id=token_id, logprob=logprob, text=text, raw=raw, top=top)

    def _submit(self, submit: Submit) -> list[EngineEvent]:
        earlier = self._sequences.get(submit.request_id)
        if earlier is not None and earlier.submit.attempt == submit.attempt:
            return []
        try:
            self._check(submit)
            sequence = Sequence(submit, self._num_submits, self._capabilities, self._tokenizer)
            kv_bytes_needed = self._check_memory(sequence)
        except GptossError as error:
            return [_failed(submit, error)]
        events: list[EngineEvent] = [self._finish(earlier, End("cancelled"))] if earlier else []
        self._num_submits += 1
        self._sequences[submit.request_id] = sequence
        self._scheduler.add(sequence, kv_bytes_needed)
        if sequence.end:  # the earlier attempt had produced everything but could not say so
            events.append(self._finish(sequence, sequence.end))
        return events

    def _cancel(self, request_id: str) -> list[EngineEvent]:
        sequence = self._sequences.get(request_id)
        if sequence is None:
            return []
        finished = self._finish(sequence, End("cancelled"))
        return [finished, Drained()] if self._is_draining and not self._sequences else [finished]

    def _check(self, submit: Submit) -> None:
        """Refuse what cannot run. Raises an error of the tree, with its code."""
        if self._is_draining:
            raise NotReady("the engine is draining and takes no new requests")
        if len(self._sequences) >= WAITING_MAX:
            raise QueueFull(f"the engine holds {WAITING_MAX} requests already")
        prompt = submit.prompt_token_ids
        if not prompt:
            raise RequestError("the prompt is empty")
        vocab_size = self._capabilities.vocab_size
        wrong = next((id_ for id_ in (*prompt, *submit.output_token_ids) if not 0 <= id_ < vocab_size), None)
        if wrong is not None:
            raise RequestError(f"token id {wrong} is not in the vocabulary, 0 to {vocab_size - 1}")
        context = self._capabilities.max_model_len
        if len(prompt) >= context or len(prompt) + len(submit.output_token_ids) > context:
            raise RequestError(f"the prompt has {len(prompt)} tokens; the context is {context}, output included")
        params = submit.sampling
        check_sampling(params)
        if any(token_id >= vocab_size for token_id in params.logit_bias):
            raise RequestError(f"logit_bias names token {max(params.logit_bias)}; the last one is {vocab_size - 1}")

    def _check_memory(self, sequence: Sequence) -> int:
        """KV bytes that the request will hold. Raises ``MemoryExhausted`` if they can never be free."""
        needed = kv_bytes(self._runner.layout, sequence.capacity)
        budget = self._capabilities.kv_budget_bytes
        if needed > budget:
            raise MemoryExhausted(f"the request needs {needed} bytes of KV memory; this engine has {budget} in all")
        return needed

    def _finish(self, sequence: Sequence, end: End) -> Finished:
        self._release(sequence)
        return Finished(
            request_id=sequence.submit.request_id,
            attempt=sequence.submit.attempt,
            reason=end.reason,
            text=sequence.rest(),
            prompt_tokens=sequence.num_prompt,
            completion_tokens=sequence.num_output,
            stop_reason=end.stop_reason,
        )

    def _fail(self, sequence: Sequence, error: GptossError) -> Failed:
        self._release(sequence)
        return _failed(sequence.submit, error)

    def _release(self, sequence: Sequence) -> None:
        self._scheduler.remove(sequence)
        del self._sequences[sequence.submit.request_id]

    def _status(self, nonce: int) -> EngineStatus:
        if self._device.type == "cuda":
            free, total = torch.cuda.mem_get_info(self._device)
            used = total - free
        else:
            used, total = psutil.Process().memory_info().rss, psutil.virtual_memory().total
        return EngineStatus(
            nonce=nonce,
            step=self._num_steps,
            waiting=self._scheduler.num_waiting,
            running=self._scheduler.num_running,
            kv_bytes_in_use=self._scheduler.kv_bytes_in_use,
            memory_bytes=used,
            device_memory_total_bytes=total,
        )


def _chunk(item: Work) -> Chunk:
    sequence = item.sequence
    start = sequence.num_computed
    stop = start + item.num_tokens
    return Chunk(
        slot=sequence.slot,
        token_ids=sequence.token_ids[start:stop],
        start=start,
        num_logits=int(stop == len(sequence.token_ids)),
    )


def _failed(submit: Submit, error: GptossError) -> Failed:
    return Failed(request_id=submit.request_id, attempt=submit.attempt, code=error.code, message=error.message)
