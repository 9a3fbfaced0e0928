"""Sampling settings of one request, and the one place that knows their bounds."""

import msgspec

from gptoss.errors import RequestError

MAX_STOP_STRINGS = 16
MAX_LOGIT_BIAS = 1024
MAX_TOP_LOGPROBS = 20
MAX_BIAS = 100.0


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True):
    """How tokens are chosen for one request; every field is independent of the other requests in the batch.

    Attributes:
        max_tokens: upper bound on generated tokens; ``None`` means as many as the context allows.
        temperature: 0 is greedy.
        top_k: 0 keeps every token.
        seed: with the position it fixes the noise of each draw; ``None`` lets the server draw and record one.
        logprobs: how many alternatives to report for each token; 0 reports only the chosen one, ``None`` none.
    """

    max_tokens: int | None = None
    min_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logit_bias: dict[int, float] = {}
    logprobs: int | None = None


# name -> (lowest, highest), both allowed
BOUNDS: dict[str, tuple[float, float]] = {
    "max_tokens": (1, 2**31 - 1),
    "min_tokens": (0, 2**31 - 1),
    "temperature": (0.0, 2.0),
    "top_p": (0.0, 1.0),
    "top_k": (0, 2**31 - 1),
    "min_p": (0.0, 1.0),
    "presence_penalty": (-2.0, 2.0),
    "frequency_penalty": (-2.0, 2.0),
    "repetition_penalty": (0.01, 10.0),
    "seed": (-(2**63), 2**63 - 1),
    "logprobs": (0, MAX_TOP_LOGPROBS),
}


def check_sampling(params: SamplingParams) -> None:
    """Refuse settings outside their bounds.

    Raises:
        RequestError: naming the parameter, its value and the allowed range.
    """
    for name, (low, high) in BOUNDS.items():
        value = getattr(params, name)
        if value is not None and not low <= value <= high:
            raise RequestError(f"{name} is {value}; it must be between {low:g} and {high:g}", param=name)
    if params.top_p == 0.0:
        raise RequestError("top_p is 0; it must be above 0 and at most 1", param="top_p")
    if params.max_tokens is not None and params.min_tokens > params.max_tokens:
        raise RequestError(
            f"min_tokens is {params.min_tokens}, above max_tokens {params.max_tokens}", param="min_tokens"
        )
    if len(params.stop) > MAX_STOP_STRINGS:
        raise RequestError(f"stop has {len(params.stop)} strings; at most {MAX_STOP_STRINGS} are allowed", param="stop")
    if any(not s for s in params.stop):
        raise RequestError("stop contains an empty string", param="stop")
    _check_logit_bias(params.logit_bias)


def check_bound_sampling(params: SamplingParams) -> None:
    """Refuse settings that would have an answer go on beyond the end that its grammar knows.

    Raises:
        RequestError: naming the parameter.
    """
    if params.min_tokens or params.ignore_eos:
        name = "min_tokens" if params.min_tokens else "ignore_eos"
        raise RequestError(f"{name} cannot be combined with an answer of a fixed form", param=name)


def _check_logit_bias(logit_bias: dict[int, float]) -> None:
    if len(logit_bias) > MAX_LOGIT_BIAS:
        raise RequestError(
            f"logit_bias has {len(logit_bias)} entries; at most {MAX_LOGIT_BIAS} are allowed", param="logit_bias"
        )
    for token_id, bias in logit_bias.items():
        if token_id < 0 or not -MAX_BIAS <= bias <= MAX_BIAS:
            raise RequestError(
                f"logit_bias[{token_id}] is {bias}; biases must be between -100 and 100", param="logit_bias"
            )
