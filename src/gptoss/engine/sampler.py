"""Chooses the next token of each row under its own settings.

Rules:
- A draw is ``argmax(logit / T + Gumbel(noise(seed, position, token)))`` over the tokens that the filters leave, which
  samples from their softmax. The noise is a hash of (seed, absolute position, token id): it does not depend on the
  batch, the order of requests, a restart or the process. Hashing is integer arithmetic, equal on every device.
- Order: logit bias, ``min_tokens``, penalties, then temperature, ``min_p``, ``top_k``, ``top_p``.
- A greedy row costs one pass over its logits; noise is made only for tokens that can be drawn.
- A row whose logits hold NaN or +inf is reported, not sampled.

Source: the Gumbel-max trick; the hash is the finaliser of splitmix64 (Steele, Lea, Flood 2014).
"""

import math
from collections import Counter
from collections.abc import Sequence

import msgspec
import torch

from gptoss.messages.sampling import SamplingParams

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# torch is only partly typed.

_MASK64 = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_MIX_1 = 0xBF58476D1CE4E5B9
_MIX_2 = 0x94D049BB133111EB
_NUCLEUS_POOL = 512
"""``top_p`` first looks at so many of the best tokens; nearly always they hold the wanted mass, and a full sort is slow."""


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


class SamplerState:
    """Settings and history of one request, as far as sampling depends on them.

    Args:
        params: its settings; without a seed, 0 is taken.
        prompt_ids: what counts for the repetition penalty from the start.
        end_ids: tokens that ``min_tokens`` holds back.
    """

    def __init__(self, params: SamplingParams, prompt_ids: Sequence[int], end_ids: Sequence[int]) -> None:
        self.params = params
        self.num_output = 0
        self._end_ids = list(end_ids)
        self._counts: Counter[int] = Counter()
        self._seen = set(prompt_ids) if params.repetition_penalty != 1.0 else set[int]()
        self._has_penalty = (
            params.repetition_penalty != 1.0 or params.presence_penalty != 0.0 or params.frequency_penalty != 0.0
        )

    def push(self, token_id: int) -> None:
        """Note a token of the output."""
        self.num_output += 1
        if self._has_penalty:
            self._counts[token_id] += 1
            self._seen.add(token_id)

    def adjusted(self, logits: torch.Tensor) -> torch.Tensor:
        """``logits`` with bias, ``min_tokens`` and penalties; the same tensor if there are none."""
        params = self.params
        holds_back = self.num_output < params.min_tokens and self._end_ids
        if not (params.logit_bias or holds_back or self._has_penalty):
            return logits
        logits = logits.float().clone()
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
    peaks: list[torch.Tensor] = []
    choices: list[torch.Tensor] = []
    for row, state, position in zip(rows, states, positions, strict=True):
        best = torch.max(row, dim=0)
        peaks.append(best.values)
        adjusted = state.adjusted(row)
        if state.params.temperature == 0.0:
            choices.append(best.indices if adjusted is row else adjusted.argmax())
        else:
            choices.append(_sample(adjusted, state.params, position))
    is_finite = torch.isfinite(torch.stack(peaks)).tolist()  # one wait for the device, for all rows
    token_ids: list[int] = torch.stack(choices).tolist()
    return [
        _draw(row, state.params, token_id) if finite else Draw(None)
        for row, state, token_id, finite in zip(rows, states, token_ids, is_finite, strict=True)
    ]


def gumbel_noise(seed: int, position: int, token_ids: torch.Tensor) -> torch.Tensor:
    """Standard Gumbel noise of tokens at a position, float64, of the shape of ``token_ids`` (int64)."""
    key = _mix(_mix(seed & _MASK64) ^ _mix((position + 1) * _GOLDEN & _MASK64))
    bits = (token_ids + 1) * _signed(_GOLDEN) + _signed(key)  # int64 arithmetic wraps, as the hash wants it
    bits = (bits ^ _shift(bits, 30)) * _signed(_MIX_1)
    bits = (bits ^ _shift(bits, 27)) * _signed(_MIX_2)
    bits = bits ^ _shift(bits, 31)
    uniform = (_shift(bits, 11).double() + 0.5) * 2.0**-53
    return -torch.log(-torch.log(uniform))


def _sample(logits: torch.Tensor, params: SamplingParams, position: int) -> torch.Tensor:
    scaled = logits.float() / params.temperature
    values, token_ids = _candidates(scaled, params)
    noise = gumbel_noise(params.seed or 0, position, token_ids)
    return token_ids[torch.argmax(values.double() + noise)]


def _candidates(scaled: torch.Tensor, params: SamplingParams) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits and ids of the tokens that pass the filters."""
    if params.min_p > 0.0:
        scaled = scaled.masked_fill(scaled < scaled.max() + math.log(params.min_p), float("-inf"))
    size = scaled.shape[0]
    if 0 < params.top_k < size:
        best = torch.topk(scaled, params.top_k)
        total = torch.logsumexp(best.values, dim=0)
    elif params.top_p < 1.0:
        total = torch.logsumexp(scaled, dim=0)
        best = torch.topk(scaled, min(_NUCLEUS_POOL, size))
        if torch.exp(best.values - total).sum() < params.top_p:
            best = torch.topk(scaled, size)
    else:
        return scaled, torch.arange(size, device=scaled.device)
    if params.top_p >= 1.0:
        return best.values, best.indices
    mass = torch.exp(best.values - total)
    kept = ~(torch.cumsum(mass, dim=0) - mass >= params.top_p)  # always the first token; all, if they are NaN
    return best.values[kept], best.indices[kept]


def _draw(row: torch.Tensor, params: SamplingParams, token_id: int) -> Draw:
    if params.logprobs is None:
        return Draw(token_id)
    logprobs = torch.log_softmax(row.float(), dim=0)
    best = torch.topk(logprobs, params.logprobs)
    top = zip(best.indices.tolist(), best.values.tolist(), strict=True)
    return Draw(token_id, float(logprobs[token_id]), tuple(top))


def _ids(token_ids: list[int], logits: torch.Tensor) -> torch.Tensor:
    return torch.tensor(token_ids, dtype=torch.long, device=logits.device)


def _mix(bits: int) -> int:
    bits = (bits + _GOLDEN) & _MASK64
    bits = (bits ^ bits >> 30) * _MIX_1 & _MASK64
    bits = (bits ^ bits >> 27) * _MIX_2 & _MASK64
    return bits ^ bits >> 31


def _shift(bits: torch.Tensor, by: int) -> torch.Tensor:
    """Right shift of int64 as if it had no sign."""
    return bits >> by & (1 << 64 - by) - 1


def _signed(bits: int) -> int:
    """The int64 with the same bits."""
    return bits - (1 << 64) if bits >> 63 else bits
