"""Chooses the next token of each row under its own settings.

Rules:
- A draw is ``argmax(logit / T + Gumbel(noise(seed, position, token)))`` over the tokens that the filters leave, which
  samples from their softmax. The noise is a hash of (seed, absolute position, token id): it does not depend on the
  batch, the order of requests, a restart or the process. Hashing is integer arithmetic, equal on every device.
- Order, as vLLM has it: token mask, logit bias, ``min_tokens``, penalties, then temperature, ``min_p``, ``top_k``,
  ``top_p``. Tokens as good as the k-th best all pass ``top_k``.
- Greedy rows of a batch cost one pass over their logits, all in one call; noise is made only for tokens that can be drawn.
- What concerns one row is computed from that row alone, in the same calls whoever else is in the batch.
- A row whose logits hold NaN or +inf, or that allows no token at all, is reported, not sampled.

Source: the Gumbel-max trick; the hash is the finaliser of splitmix64 (Steele, Lea, Flood 2014).
"""

import functools
import math
from collections import Counter
from collections.abc import Sequence
from typing import Protocol

import msgspec
import torch

from gptoss.messages.sampling import SamplingParams

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# torch is only partly typed.

_MASK64 = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_MIX_1 = 0xBF58476D1CE4E5B9
_MIX_2 = 0x94D049BB133111EB
_LIKELY = 9.0
"""Filters first look at the tokens within this of the best, in nats: mostly all that can pass, and few of the rest."""
_NUCLEUS = 512
"""``top_p`` first looks at so many of the best tokens; mostly they hold the wanted mass, and a full sort is slow."""


class Draw(msgspec.Struct, frozen=True):
    """What was chosen for a row.

    Attributes:
        token_id: None if the logits are not finite.
        logprob: under the model's own distribution; None unless asked for.
        top: (token id, logprob) of the best alternatives, best first.
    """

    token_id: int | None
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


class TokenMask(Protocol):
    """Says which tokens may come next, such as those that go on with a sentence of a grammar."""

    @property
    def is_over(self) -> bool:
        """Whether the output is complete as it is."""
        ...

    def allowed(self) -> torch.Tensor | None:
        """Bool ``[vocab]`` on the logits' device, true where a token may come next; None if all may."""
        ...

    def push(self, token_id: int) -> None:
        """Note the next token of the output, those of earlier attempts included."""
        ...


class SamplerState:
    """Settings and history of one request, as far as sampling depends on them.

    Args:
        params: its settings; without a seed, 0 is taken.
        prompt_ids: what counts for the repetition penalty from the start.
        end_ids: tokens that ``min_tokens`` holds back.
        mask: restricts each token.
    """

    def __init__(
        self,
        params: SamplingParams,
        prompt_ids: Sequence[int],
        end_ids: Sequence[int],
        mask: TokenMask | None = None,
    ) -> None:
        self.params = params
        self._mask = mask
        self.num_output = 0
        self._end_ids = list(end_ids)
        self._counts: Counter[int] = Counter()
        self._seen = set(prompt_ids) if params.repetition_penalty != 1.0 else set[int]()
        self._has_penalty = (
            params.repetition_penalty != 1.0 or params.presence_penalty != 0.0 or params.frequency_penalty != 0.0
        )

    @property
    def is_settled(self) -> bool:
        """Whether the tokens still to come change nothing about how one is chosen, so that several can be at once."""
        holds_back = self.num_output < self.params.min_tokens and self._end_ids
        return not (self._has_penalty or holds_back or self._mask)

    @property
    def is_over(self) -> bool:
        """Whether the mask says that the output is complete."""
        return self._mask is not None and self._mask.is_over

    def push(self, token_id: int) -> None:
        """Note a token of the output."""
        self.num_output += 1
        if self._mask:
            self._mask.push(token_id)
        if self._has_penalty:
            self._counts[token_id] += 1
            self._seen.add(token_id)

    def adjusted(self, logits: torch.Tensor) -> torch.Tensor:
        """``logits`` with mask, bias, ``min_tokens`` and penalties; the same tensor if there are none."""
        params = self.params
        holds_back = self.num_output < params.min_tokens and self._end_ids
        allowed = self._mask.allowed() if self._mask else None
        if not (params.logit_bias or holds_back or self._has_penalty or allowed is not None):
            return logits
        logits = logits.float().clone()
        if allowed is not None:
            logits.masked_fill_(~allowed, float("-inf"))
        if params.logit_bias:
            ids = _ids(list(params.logit_bias), logits)
            logits[ids] += torch.tensor(list(params.logit_bias.values()), device=logits.device)
        if holds_back:
            logits[_ids(self._end_ids, logits)] = float("-inf")
        if params.repetition_penalty != 1.0 and self._seen:
            ids = _ids(sorted(self._seen), logits)
            kept = logits[ids]
            logits[ids] = torch.where(kept > 0, kept / params.repetition_penalty, kept * params.repetition_penalty)
        if self._counts and (params.presence_penalty or params.frequency_penalty):
            ids = _ids(list(self._counts), logits)
            counts = torch.tensor(list(self._counts.values()), dtype=torch.float32, device=logits.device)
            logits[ids] -= params.presence_penalty + params.frequency_penalty * counts
        return logits


def draw_tokens(rows: Sequence[torch.Tensor], states: Sequence[SamplerState], positions: Sequence[int]) -> list[Draw]:
    """Choose a token for each row.

    Args:
        rows: logits ``[vocab]``, any float dtype.
        states: of the request of each row.
        positions: absolute position, in prompt plus output, that the chosen token will have.
    """
    if not rows:
        return []
    peaks, choices = _best(rows)
    for index, (row, state, position) in enumerate(zip(rows, states, positions, strict=True)):
        adjusted = state.adjusted(row)
        if adjusted is not row:
            best = adjusted.max(dim=0)
            choices[index] = best.indices
            peaks[index] = peaks[index] + 0.0 * best.values  # NaN where the row allows no token
        if state.params.temperature != 0.0:
            choices[index] = _sample(adjusted, state.params, position)
    is_finite = torch.isfinite(torch.stack(peaks)).tolist()  # one wait for the device, for all rows
    token_ids: list[int] = torch.stack(choices).tolist()
    return [
        _draw(row, state.params, token_id) if finite else Draw(None)
        for row, state, token_id, finite in zip(rows, states, token_ids, is_finite, strict=True)
    ]


def _best(rows: Sequence[torch.Tensor]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """The largest logit of each row and its token, the first of equals. NaN is larger than anything."""
    first = rows[0]
    stride = rows[1].storage_offset() - first.storage_offset() if len(rows) > 1 else first.shape[0]
    storage = first.untyped_storage().data_ptr()
    are_in_a_row = stride >= first.shape[0] and all(
        row.storage_offset() == first.storage_offset() + index * stride
        and row.stride() == (1,)
        and row.untyped_storage().data_ptr() == storage
        for index, row in enumerate(rows)
    )
    if are_in_a_row:  # as runners give them: they need not be copied to be one tensor
        table = torch.as_strided(first, (len(rows), first.shape[0]), (stride, 1), first.storage_offset())
        best = table.max(dim=1)
        return list(best.values.unbind(0)), list(best.indices.unbind(0))
    found = [row.max(dim=0) for row in rows]
    return [best.values for best in found], [best.indices for best in found]


def gumbel_noise(seed: int, position: int, token_ids: torch.Tensor) -> torch.Tensor:
    """Standard Gumbel noise of tokens at a position, float64, of the shape of ``token_ids`` (int64)."""
    return _noise(seed, position, (token_ids + 1) * _signed(_GOLDEN))


def _noise(seed: int, position: int, counters: torch.Tensor) -> torch.Tensor:
    """``gumbel_noise`` of tokens whose counters are given; a dozen passes, so in place wherever it can be."""
    key = _mix(_mix(seed & _MASK64) ^ _mix((position + 1) * _GOLDEN & _MASK64))
    bits = counters + _signed(key)  # int64 arithmetic wraps, as the hash wants it
    shifted = torch.empty_like(bits)
    bits.bitwise_xor_(_shift(bits, 30, shifted)).mul_(_signed(_MIX_1))
    bits.bitwise_xor_(_shift(bits, 27, shifted)).mul_(_signed(_MIX_2))
    bits.bitwise_xor_(_shift(bits, 31, shifted))
    uniform = _shift(bits, 11, shifted).double().add_(0.5).mul_(2.0**-53)
    return uniform.log_().neg_().log_().neg_()


@functools.lru_cache(maxsize=4)
def _all_counters(size: int, device: torch.device) -> torch.Tensor:
    """What the noise of tokens 0 to ``size`` is hashed from."""
    return (torch.arange(size, device=device) + 1) * _signed(_GOLDEN)


def _sample(logits: torch.Tensor, params: SamplingParams, position: int) -> torch.Tensor:
    scaled = logits.float() / params.temperature
    token_ids = _candidates(scaled, params)
    if token_ids is None:
        noise = _noise(params.seed or 0, position, _all_counters(scaled.shape[0], scaled.device))
        return noise.add_(scaled).max(dim=0).indices
    noise = gumbel_noise(params.seed or 0, position, token_ids)
    return token_ids[noise.add_(scaled[token_ids]).argmax()]


def _candidates(scaled: torch.Tensor, params: SamplingParams) -> torch.Tensor | None:
    """Ids of the tokens that pass the filters; None if there are no filters."""
    has_top_k = 0 < params.top_k < scaled.shape[0]
    if not (params.min_p > 0.0 or has_top_k or params.top_p < 1.0):
        return None
    token_ids = _pool(scaled, params, has_top_k=has_top_k)
    values = scaled[token_ids]
    if has_top_k and params.top_k < values.shape[0]:
        kept = _not_below(values, torch.topk(values, params.top_k).values[-1])
        token_ids, values = token_ids[kept], values[kept]
    if params.top_p < 1.0:
        total = torch.logsumexp(values if has_top_k or params.min_p > 0.0 else scaled, dim=0)
        best = torch.topk(values, min(_NUCLEUS, values.shape[0]))
        if torch.exp(best.values - total).sum() < params.top_p:
            best = torch.topk(values, values.shape[0])
        mass = torch.exp(best.values - total)
        is_beyond = torch.cumsum(mass, dim=0) - mass >= params.top_p  # never the first
        token_ids = token_ids[best.indices[~is_beyond]]
    return token_ids


def _pool(scaled: torch.Tensor, params: SamplingParams, *, has_top_k: bool) -> torch.Tensor:
    """Ids, ascending, of what passes ``min_p`` and holds all that can pass the other filters."""
    peak = scaled.max()
    if params.min_p > 0.0:
        return _not_below(scaled, peak + math.log(params.min_p))
    token_ids = _not_below(scaled, peak - _LIKELY)
    if has_top_k:
        is_enough = token_ids.shape[0] >= params.top_k
    else:
        values = scaled[token_ids]
        is_enough = bool(torch.logsumexp(values, dim=0) - torch.logsumexp(scaled, dim=0) >= math.log(params.top_p))
    return token_ids if is_enough else torch.arange(scaled.shape[0], device=scaled.device)


def _not_below(values: torch.Tensor, lowest: torch.Tensor) -> torch.Tensor:
    """Indices, ascending, of the values that are not below ``lowest``. Where NaN is involved, none is: something stays."""
    return (values < lowest).logical_not_().nonzero().squeeze(1)


def _draw(row: torch.Tensor, params: SamplingParams, token_id: int) -> Draw:
    if params.logprobs is None:
        return Draw(token_id)
    logits = row.float()
    total = torch.logsumexp(logits, dim=0)
    best = torch.topk(logits, params.logprobs)
    top = zip(best.indices.tolist(), (best.values - total).tolist(), strict=True)
    return Draw(token_id, float(logits[token_id] - total), tuple(top))


def _ids(token_ids: list[int], logits: torch.Tensor) -> torch.Tensor:
    return torch.tensor(token_ids, dtype=torch.long, device=logits.device)


def _mix(bits: int) -> int:
    bits = (bits + _GOLDEN) & _MASK64
    bits = (bits ^ bits >> 30) * _MIX_1 & _MASK64
    bits = (bits ^ bits >> 27) * _MIX_2 & _MASK64
    return bits ^ bits >> 31


def _shift(bits: torch.Tensor, by: int, out: torch.Tensor) -> torch.Tensor:
    """Right shift of int64 as if it had no sign."""
    return torch.bitwise_right_shift(bits, by, out=out).bitwise_and_((1 << 64 - by) - 1)


def _signed(bits: int) -> int:
    """The int64 with the same bits."""
    return bits - (1 << 64) if bits >> 63 else bits
