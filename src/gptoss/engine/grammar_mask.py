"""Grammars as token masks: which tokens may come next in an answer that a grammar binds.

Rules:
- The state of a grammar is a function of the tokens of the output alone. A request that goes on elsewhere pushes them
  again and is where it was.
- An end token is allowed exactly where the answer is complete; once nothing else is, the answer is over without one.
- The vocabulary is prepared once, while the engine loads: the library holds the interpreter's lock for all of that time.
  Compiled grammars are kept, and a request takes a copy.
- A grammar that reaches its bounds while it runs raises: that request fails, no other.
"""

import functools
from typing import Any

import torch
from llguidance import LLMatcher, LLTokenizer
from llguidance._tokenizer import TokenizerWrapper
from tokenizers import Tokenizer

from gptoss.engine.grammar import parser_limits
from gptoss.engine.panics import panics_become
from gptoss.engine.token_text import TokenText
from gptoss.errors import EngineError

# pyright: reportUnknownMemberType=false
# torch is only partly typed.

COMPILED_MAX = 64
_BITS = torch.tensor([1 << bit for bit in range(8)], dtype=torch.uint8)
SPECIAL_PREFIX = b"\xff"
"""How the library tells special tokens from text: no UTF-8 begins like this."""


class GrammarMasks:
    """Makes masks for one model.

    Args:
        tokenizer: of the model.
        vocab_size: width of its logits.
        end_ids: tokens that end an answer.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, end_ids: tuple[int, ...]) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._end_ids = [token_id for token_id in end_ids if token_id < vocab_size]
        self._vocabulary: LLTokenizer | None = None
        self._compiled = functools.lru_cache(maxsize=COMPILED_MAX)(self._compile)

    def prepare(self) -> None:
        """Build what all grammars share, unless it is there; seconds for a large vocabulary."""
        if self._vocabulary is None and self._end_ids:
            words = TokenizerWrapper(_Vocabulary(self._tokenizer, self._vocab_size, self._end_ids[0]))
            self._vocabulary = LLTokenizer(words, n_vocab=self._vocab_size, eos_token=self._end_ids)

    def mask(self, grammar: str, device: torch.device) -> "GrammarMask":
        """The mask of an answer that has not begun.

        Raises:
            EngineError: the grammar does not compile.
        """
        return GrammarMask(self._compiled(grammar).deep_copy(), self._vocab_size, device)

    def _compile(self, grammar: str) -> LLMatcher:
        self.prepare()
        if self._vocabulary is None:
            raise EngineError("the model has no end token, so that no grammar can end")
        with panics_become(EngineError("the grammar's compiler failed on it")):
            matcher = LLMatcher(self._vocabulary, grammar, log_level=0, limits=parser_limits())
        if matcher.is_error():
            raise EngineError("the grammar does not compile")
        return matcher


class GrammarMask:
    """``engine.sampler.TokenMask`` of one request."""

    def __init__(self, matcher: LLMatcher, vocab_size: int, device: torch.device) -> None:
        self._matcher = matcher
        self._vocab_size = vocab_size
        self._device = device

    @property
    def is_over(self) -> bool:
        """See ``engine.sampler.TokenMask``. An answer whose grammar failed is not over; its next token says so."""
        return self._matcher.is_stopped() and not self._matcher.is_error()

    def allowed(self) -> torch.Tensor:
        """See ``engine.sampler.TokenMask``.

        Raises:
            EngineError: the grammar is beyond its bounds here.
        """
        words = self._matcher.compute_bitmask()
        if self._matcher.is_error():
            raise EngineError(f"the grammar of the answer failed: {self._matcher.stop_reason()}")
        packed = torch.frombuffer(bytearray(words), dtype=torch.uint8)
        return packed.unsqueeze(1).bitwise_and(_BITS).bool().flatten()[: self._vocab_size].to(self._device)

    def push(self, token_id: int) -> None:
        """See ``engine.sampler.TokenMask``."""
        self._matcher.consume_token(token_id)


class _Vocabulary:
    """The tokens as the library reads them: bytes, special ones marked."""

    bos_token_id = None

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_token_id: int) -> None:
        spelling = TokenText(tokenizer)
        added = tokenizer.get_added_tokens_decoder()
        special = {token_id for token_id, token in added.items() if token.special}
        self.eos_token_id = eos_token_id
        self.special_token_ids = sorted(special)
        self.tokens = [
            SPECIAL_PREFIX + spelling.spell(token_id)[1] if token_id in special else spelling.spell(token_id)[1]
            for token_id in range(vocab_size)
        ]
        self._tokenizer = tokenizer

    def __call__(self, text: Any) -> list[int]:
        written = text.decode(errors="replace") if isinstance(text, bytes) else text
        return self._tokenizer.encode(written, add_special_tokens=False).ids
