"""``POST /v1/completions``: go on from text or token ids, without a chat template.

Rules:
- Several prompts are several choices: those of the first prompt come first, then those of the second, and so on.
- A special token written in a prompt's text is ordinary text; who means the token sends its id.
- Everything that chat has too goes through the same code.
"""

from collections.abc import Sequence
from typing import Annotated

import msgspec
from msgspec import Meta

from gptoss.actors.generation import GenerateRequest, Generation
from gptoss.errors import RequestError
from gptoss.http.answering import Answer, Call
from gptoss.http.decode import BodyDecoder
from gptoss.http.endpoint import Endpoint
from gptoss.http.intake import Caller
from gptoss.http.sampling_fields import as_choices, check_params, num_choices, sampling_params, stream_shape
from gptoss.http.schema import GenerationFields, TokenId
from gptoss.http.text_answer import TextAnswer

ENDPOINT = "/v1/completions"
MAX_PROMPTS = 128
MAX_ANSWERS = 128
MAX_TOKENS_DEFAULT = 16
"""OpenAI's and vLLM's default here; chat has none."""

Prompt = str | tuple[int, ...]


class CompletionRequest(GenerationFields, frozen=True, kw_only=True):
    """The body of ``POST /v1/completions``.

    ``prompt`` is a text, a list of texts, token ids, or a list of lists of token ids.
    """

    prompt: str | Annotated[list[str | TokenId | list[TokenId]], Meta(min_length=1)]
    echo: bool | None = None
    logprobs: int | None = None
    add_special_tokens: bool | None = None
    suffix: str | None = None
    best_of: int | None = None


async def _call_of(wire: CompletionRequest, caller: Caller) -> Call:
    context = caller.context
    _refuse(wire)
    shape = stream_shape(wire.stream, wire.stream_options)
    count = num_choices(wire)
    prompts = prompts_of(wire)
    if len(prompts) * count > MAX_ANSWERS:
        raise RequestError(
            f"{len(prompts)} prompts with n {count} make more than {MAX_ANSWERS} answers; send fewer", param="prompt"
        )
    base = caller.sign(_generate_request(wire, context.default_temperature))
    requests = [
        choice for prompt in prompts for choice in as_choices(msgspec.structs.replace(base, prompt=prompt), count)
    ]
    echoes = [""] * len(requests)
    if wire.echo:
        texts = [p if isinstance(p, str) else await context.gateway.rendering.decode(p, "prompt") for p in prompts]
        echoes = [text for text in texts for _ in range(count)]

    def answer(generations: Sequence[Generation]) -> Answer:
        return TextAnswer(generations, shape, echoes=echoes, choices_per_prompt=count, logprobs=wire.logprobs)

    return Call(requests=tuple(requests), stream=base.stream, answer=answer)


def prompts_of(wire: CompletionRequest) -> list[Prompt]:
    """The prompts of a request, each as text or as token ids.

    Raises:
        RequestError: texts, ids and lists of ids are mixed, or there are too many.
    """
    prompt = wire.prompt
    if isinstance(prompt, str):
        return [prompt]
    ids = [item for item in prompt if isinstance(item, int)]
    if ids:
        if len(ids) != len(prompt):
            raise RequestError("prompt mixes token ids with texts or lists; send one kind", param="prompt")
        return [tuple(ids)]
    if len({type(item) for item in prompt}) > 1:
        raise RequestError("prompt mixes texts with lists of token ids; send one kind", param="prompt")
    if len(prompt) > MAX_PROMPTS:
        raise RequestError(f"prompt has {len(prompt)} entries; at most {MAX_PROMPTS} are allowed", param="prompt")
    return [item if isinstance(item, str) else tuple(item) for item in prompt if not isinstance(item, int)]


def _generate_request(wire: CompletionRequest, default_temperature: float) -> GenerateRequest:
    """What all prompts of a request have in common."""
    params = sampling_params(
        wire,
        default_temperature=default_temperature,
        max_tokens=MAX_TOKENS_DEFAULT if wire.max_tokens is None else wire.max_tokens,
        logprobs=wire.logprobs,
    )
    check_params(params, {})
    return GenerateRequest(
        sampling=params,
        model=wire.model or "",
        endpoint=ENDPOINT,
        stream=bool(wire.stream),
        add_special_tokens=wire.add_special_tokens is not False,
        priority=wire.priority or 0,
        timeout_s=wire.timeout,
        cache_salt=wire.cache_salt or "",
        user=wire.user or "",
        profile=wire.profile or "",
    )


def _refuse(wire: CompletionRequest) -> None:
    if wire.suffix:
        raise RequestError("suffix: filling in before a given end is not supported by these models", param="suffix")
    if wire.best_of not in (None, 1, wire.n):
        raise RequestError(
            f"best_of is {wire.best_of}; only as many answers are generated as are returned, see n", param="best_of"
        )
    if wire.echo and wire.logprobs is not None:
        raise RequestError("logprobs with echo: only generated tokens have logprobs", param="logprobs")


COMPLETIONS = Endpoint(ENDPOINT, BodyDecoder(CompletionRequest), _call_of)
