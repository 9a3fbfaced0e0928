"""One request inside the engine: its tokens, what of them was computed, and how it ends.

Rules:
- ``token_ids`` is prompt plus output. ``num_computed`` of them are in KV memory; the rest is pending. What is pending
  after a resumption or a preemption, earlier output included, is computed again.
- The request ends with the first of: an end token, a stop string, the end of its grammar, ``max_tokens`` or the end of the
  context.
- The text of the end token is not output.
"""

import msgspec
from tokenizers import Tokenizer

from gptoss.engine.detokenizer import Detokenizer
from gptoss.engine.port import Submit
from gptoss.engine.prefix_cache import Chain, Hit
from gptoss.engine.runner import Slot
from gptoss.engine.sampler import SamplerState, TokenMask
from gptoss.engine.scheduler import NO_DEADLINE, Candidate
from gptoss.engine.speculation import Drafter
from gptoss.messages.model import EngineCapabilities, FinishReason


class End(msgspec.Struct, frozen=True):
    """Why a request is over."""

    reason: FinishReason
    stop_reason: str | int | None = None


class Sequence:
    """A request that waits or runs.

    Args:
        submit: what was asked; its ``output_token_ids`` count as generated.
        arrival: order of submission.
        capabilities: of the engine.
        tokenizer: of the model.
        mask: of the grammar that binds its output.

    Attributes:
        slot: its KV memory, while it runs.
        kv_bytes: what its KV memory takes or will take.
        num_memory_faults: how often in succession its part of a step found no memory.
        drafter: makes guesses; None without speculation.
        chain: keys of its blocks in the prefix cache; None without a cache.
        num_cached: tokens that the cache saved it from computing.
        draft: guesses at what follows its tokens, for the step being planned.
        counts_hits: until it is preempted; what it finds again then is its own work.
        max_tokens: bound on generated tokens, by the request and by the context.
        end: set when it is over.
    """

    def __init__(
        self,
        submit: Submit,
        arrival: int,
        capabilities: EngineCapabilities,
        tokenizer: Tokenizer,
        mask: TokenMask | None = None,
    ) -> None:
        params = submit.sampling
        self.submit = submit
        self.order = (submit.priority, submit.deadline_ns or NO_DEADLINE, arrival)
        self.token_ids = list(submit.prompt_token_ids)
        self.num_prompt = len(self.token_ids)
        self.num_computed = 0
        self.slot: Slot | None = None
        self.kv_bytes = 0
        self.num_memory_faults = 0
        self.chain: Chain | None = None
        self.num_cached = 0
        self.counts_hits = True
        self.drafter: Drafter | None = None
        self.draft: tuple[int, ...] = ()
        self.end: End | None = None
        room = capabilities.max_model_len - self.num_prompt
        self.max_tokens = room if params.max_tokens is None else min(params.max_tokens, room)
        eos_ids = () if params.ignore_eos else capabilities.eos_token_ids
        self._end_ids = frozenset((*eos_ids, *params.stop_token_ids))
        end_ids = [token_id for token_id in self._end_ids if token_id < capabilities.vocab_size]
        self.sampler = SamplerState(params, submit.prompt_token_ids, sorted(end_ids), mask)
        self._detokenizer = Detokenizer(tokenizer, params.stop, submit.prompt_token_ids)
        for token_id in submit.output_token_ids:
            self.push(token_id)

    @property
    def capacity(self) -> int:
        """Positions that its KV memory must hold."""
        return self.num_prompt + self.max_tokens

    @property
    def num_output(self) -> int:
        """Tokens generated over all attempts."""
        return len(self.token_ids) - self.num_prompt

    def guess(self) -> tuple[int, ...]:
        """What may follow, where that can be verified: the next token is the only one pending, and it is drawn freely."""
        is_decoding = self.num_computed == len(self.token_ids) - 1
        if self.drafter is None or not is_decoding or not self.sampler.is_settled:
            return ()
        return self.drafter.guess(self.max_tokens - self.num_output - 1)

    def learn(self, num_guessed: int, num_right: int) -> None:
        """Note how the guesses of a step turned out."""
        if self.drafter and num_guessed:
            self.drafter.learn(num_guessed, num_right)

    def candidate(self, hit: Hit | None = None) -> Candidate:
        """Itself as the scheduler sees it, with what the prefix cache has for it."""
        priority, deadline_ns, arrival = self.order
        return Candidate(
            self.submit.request_id,
            self.submit.attempt,
            priority,
            deadline_ns,
            arrival,
            self.num_prompt,
            len(self.token_ids),
            self.num_computed,
            self.kv_bytes,
            hit.num_tokens if hit and hit.num_tokens > self.num_computed else 0,
            hit.num_bytes if hit else 0,
            len(self.draft),
        )

    def push(self, token_id: int) -> str:
        """Take a generated token; sets ``end`` if it was the last. Returns the text that became final."""
        self.token_ids.append(token_id)
        self.sampler.push(token_id)
        if token_id in self._end_ids:
            self.end = End("stop", token_id)
            return self._detokenizer.finish()
        piece = self._detokenizer.push(token_id)
        if piece.stopped is not None:
            self.end = End("stop", piece.stopped)
        elif self.sampler.is_over:
            self.end = End("stop")
        elif self.num_output >= self.max_tokens:
            self.end = End("length")
        return piece.text

    def rest(self) -> str:
        """The text still held back, once the request is over."""
        return self._detokenizer.finish()
