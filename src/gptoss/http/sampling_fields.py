"""The fields that all generating endpoints share -> sampling settings and choices: one path for each parameter.

Rules:
- Ranges of sampling settings have one home, ``messages.sampling``; errors are only renamed to what the client wrote.
- Choices of one call differ by their seed: the first has the caller's, the next that plus one, and so on. Without a
  seed each draws its own. Either way a choice can be had again alone, by its own seed.
"""

import msgspec

from gptoss.actors.generation import GenerateRequest
from gptoss.config import PROFILES
from gptoss.errors import RequestError
from gptoss.http.schema import GenerationFields, SamplingFields, StreamOptions
from gptoss.messages.sampling import SamplingParams, check_sampling

MAX_CHOICES = 16
_SEEDS = 2**64


class StreamShape(msgspec.Struct, frozen=True, kw_only=True):
    """What each chunk of a stream carries beside its text."""

    include_usage: bool = False
    continuous_usage: bool = False


def sampling_params(
    wire: SamplingFields, *, default_temperature: float, max_tokens: int | None, logprobs: int | None
) -> SamplingParams:
    """Sampling settings of a request, not checked yet.

    Args:
        wire: the decoded body.
        default_temperature: of the server's profile, for a request that names neither temperature nor profile.
        max_tokens: of the endpoint's own field and default; None is what the context allows.
        logprobs: alternatives to report for each token; None reports nothing.
    """
    given = {
        "max_tokens": max_tokens,
        "min_tokens": wire.min_tokens,
        "temperature": wire.temperature,
        "top_p": wire.top_p,
        # -1 is vLLM's way to say that every token is kept.
        "top_k": 0 if wire.top_k == -1 else wire.top_k,
        "min_p": wire.min_p,
        "presence_penalty": wire.presence_penalty,
        "frequency_penalty": wire.frequency_penalty,
        "repetition_penalty": wire.repetition_penalty,
        "seed": wire.seed,
        "stop": (wire.stop,) if isinstance(wire.stop, str) else wire.stop and tuple(wire.stop),
        "stop_token_ids": wire.stop_token_ids and tuple(wire.stop_token_ids),
        "ignore_eos": wire.ignore_eos,
        "logit_bias": wire.logit_bias,
        "logprobs": logprobs,
    }
    defaults = SamplingParams(temperature=PROFILES[wire.profile].temperature if wire.profile else default_temperature)
    return msgspec.structs.replace(defaults, **{name: value for name, value in given.items() if value is not None})


def check_params(params: SamplingParams, written: dict[str, str]) -> None:
    """Refuse settings outside their bounds.

    Args:
        params: the settings.
        written: the names under which the endpoint's clients write settings, where they differ.

    Raises:
        RequestError: naming the parameter as it was written, its value and the allowed range.
    """
    try:
        check_sampling(params)
    except RequestError as error:
        name = error.param or ""
        field = written.get(name, name)
        raise RequestError(error.message.replace(f"{name} ", f"{field} ", 1), param=field) from None


def num_choices(wire: GenerationFields) -> int:
    """How many choices are wanted. Raises ``RequestError`` when that is out of bounds."""
    if wire.n is None:
        return 1
    if not 1 <= wire.n <= MAX_CHOICES:
        raise RequestError(f"n is {wire.n}; it must be between 1 and {MAX_CHOICES}", param="n")
    return wire.n


def as_choices(request: GenerateRequest, count: int) -> tuple[GenerateRequest, ...]:
    """``request`` once for each choice."""
    seed = request.sampling.seed
    if seed is None or count == 1:
        return (request,) * count
    return tuple(
        msgspec.structs.replace(request, sampling=msgspec.structs.replace(request.sampling, seed=_seed(seed + index)))
        for index in range(count)
    )


def stream_shape(stream: bool | None, options: StreamOptions | None) -> StreamShape:
    """What the stream's chunks carry. ``continuous_usage_stats`` implies usage, as it does in vLLM.

    Raises:
        RequestError: there are options but no stream.
    """
    if options is None:
        return StreamShape()
    if not stream:
        raise RequestError("stream_options is only allowed when stream is true", param="stream_options")
    continuous = bool(options.continuous_usage_stats)
    return StreamShape(include_usage=continuous or bool(options.include_usage), continuous_usage=continuous)


def _seed(value: int) -> int:
    """``value`` within 64 signed bits."""
    return (value + _SEEDS // 2) % _SEEDS - _SEEDS // 2
