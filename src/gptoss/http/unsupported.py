"""Fields of OpenAI's and vLLM's APIs that would change the answer and cannot be honoured: refused by name.

A value that asks for what happens anyway is no reason to refuse. Fields that are in neither list are unknown; those
are accepted and named once in the log.
"""

from collections.abc import Mapping

import msgspec

from gptoss.errors import RequestError

_TRIVIAL = frozenset((b"null", b"false", b"[]", b"{}", b'""'))

REFUSED: dict[str, str] = {
    "add_generation_prompt": "the answer is always a new assistant turn",
    "allowed_token_ids": "use logit_bias",
    "audio": "only text can be served",
    "bad_words": "use logit_bias",
    "best_of": "use n and choose among the answers",
    "chat_template": "templates come with the model, never from a request",
    "chat_template_kwargs": "templates get messages, tools and reasoning_effort, and nothing else from a request",
    "continue_final_message": "use /v1/completions",
    "documents": "put them into a message",
    "echo": "only /v1/completions can repeat its prompt",
    "guided_grammar": "use guided_json or guided_regex",
    "include_stop_str_in_output": "stop strings are never part of the answer",
    "kv_transfer_params": "caches are not shared between servers",
    "length_penalty": "beam search is not supported",
    "logits_processors": "no code is taken from requests",
    "mm_processor_kwargs": "only text can be served",
    "modalities": "only text can be served",
    "prediction": "it is not supported",
    "prompt_logprobs": "only generated tokens have logprobs",
    "return_token_ids": "it is not supported; /tokenize gives a prompt's ids",
    "return_tokens_as_token_ids": "logprobs name tokens by their text and bytes",
    "skip_special_tokens": "special tokens are never part of the text",
    "spaces_between_special_tokens": "special tokens are never part of the text",
    "truncate_prompt_tokens": "no prompt is cut in silence; send a shorter one",
    "use_beam_search": "it is not supported",
    "web_search_options": "nothing is ever fetched",
}
"""Field -> why, or what to do instead."""

_HARMLESS: dict[str, frozenset[bytes]] = {
    "add_generation_prompt": frozenset((b"true",)),
    "best_of": frozenset((b"1",)),
    "length_penalty": frozenset((b"1", b"1.0")),
    "modalities": frozenset((b'["text"]',)),
    "skip_special_tokens": frozenset((b"true",)),
    "spaces_between_special_tokens": frozenset((b"true",)),
}
_DECISIVE_WHEN_FALSE = frozenset(("add_generation_prompt", "skip_special_tokens"))


def unknown_fields(fields: Mapping[str, msgspec.Raw]) -> tuple[str, ...]:
    """Names of the fields that nobody knows.

    Args:
        fields: what the body has beside the fields of its type.

    Raises:
        RequestError: a field is known and cannot be honoured.
    """
    for name, raw in fields.items():
        if name in REFUSED and not _asks_for_nothing(name, bytes(raw)):
            raise RequestError(f"{name} cannot be honoured here: {REFUSED[name]}", param=name)
    return tuple(name for name in fields if name not in REFUSED)


def _asks_for_nothing(name: str, value: bytes) -> bool:
    if value in _HARMLESS.get(name, ()):
        return True
    return value in _TRIVIAL and not (value == b"false" and name in _DECISIVE_WHEN_FALSE)
