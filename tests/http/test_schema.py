"""Decoding alone: what is accepted, how it maps, and that nothing but ``RequestError`` ever comes out."""

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptoss.actors.generation import GenerateRequest
from gptoss.errors import RequestError
from gptoss.http.chat_request import generate_request, stream_shape, without_effect
from gptoss.http.schema import MAX_CONTAINERS, ChatCompletionRequest, check_depth, decode_chat


def decode(**fields: Any) -> GenerateRequest:
    body = {"messages": [{"role": "user", "content": "x"}], **fields}
    wire, _ = decode_chat(msgspec.json.encode(body))
    return generate_request(wire, default_temperature=0.7)


def test_every_parameter_reaches_the_sampling_settings() -> None:
    sampling = decode(
        temperature=1, top_p=0.5, top_k=3, min_p=0.1, seed=-5, max_tokens=9, min_tokens=2, stop=["a", "b"],
        stop_token_ids=[4], ignore_eos=True, presence_penalty=0.5, frequency_penalty=-0.5, repetition_penalty=1.1,
        logit_bias={"7": -3}, logprobs=True, top_logprobs=2,
    ).sampling  # fmt: skip
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p) == (1, 0.5, 3, 0.1)
    assert (sampling.seed, sampling.max_tokens, sampling.min_tokens) == (-5, 9, 2)
    assert (sampling.stop, sampling.stop_token_ids, sampling.ignore_eos) == (("a", "b"), (4,), True)
    assert (sampling.presence_penalty, sampling.frequency_penalty, sampling.repetition_penalty) == (0.5, -0.5, 1.1)
    assert (sampling.logit_bias, sampling.logprobs) == ({7: -3}, 2)


def test_null_is_the_same_as_leaving_a_field_out() -> None:
    names = set(ChatCompletionRequest.__struct_fields__) - {"messages"}
    assert decode(**dict.fromkeys(names)) == decode()
    assert decode().sampling.temperature == 0.7


def test_zero_temperature_is_greedy_not_the_default() -> None:
    assert decode(temperature=0).sampling.temperature == 0


def test_trivial_values_of_unsupported_fields_pass() -> None:
    passed = decode(
        n=1, response_format={"type": "text"}, tools=[], tool_choice="auto", functions=[], parallel_tool_calls=True
    )
    assert passed == decode()


def test_max_completion_tokens_is_the_newer_name_of_max_tokens() -> None:
    assert decode(max_completion_tokens=5).sampling.max_tokens == 5


def test_a_developer_speaks_as_the_system() -> None:
    assert decode(messages=[{"role": "developer", "content": "x"}]).messages[0].role == "system"


def test_text_parts_are_joined_by_newlines() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert decode(messages=[{"role": "user", "content": parts}]).messages[0].content == "a\nb"


def test_an_assistant_turn_with_tool_calls_needs_no_content() -> None:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    message = decode(messages=[{"role": "assistant", "content": None, "tool_calls": [call]}]).messages[0]
    assert message.tool_calls == (call,)


@pytest.mark.parametrize("text", ["a\u200db", "\u202eabc", "a\x00b", "👩‍👩‍👧", "<|end|>"])
def test_odd_text_reaches_the_actors_unchanged(text: str) -> None:
    assert decode(messages=[{"role": "user", "content": text}]).messages[0].content == text


def test_unknown_fields_are_accepted_and_named() -> None:
    wire, unknown = decode_chat(b'{"messages":[{"role":"user","content":"x"}],"zeta":1,"alpha":[],"user":"u"}')
    assert unknown == ("alpha", "zeta")
    assert without_effect(wire) == ("user",)


def test_continuous_usage_implies_usage() -> None:
    body = b'{"messages":[{"role":"user","content":"x"}],"stream_options":{"continuous_usage_stats":true}}'
    shape = stream_shape(decode_chat(body)[0])
    assert shape.include_usage
    assert shape.continuous_usage


def test_brackets_inside_strings_do_not_nest() -> None:
    check_depth(b'["' + b"[" * 1000 + b'", "\\"' + b"{" * 1000 + b'"]')


def test_nesting_of_64_passes_and_65_does_not() -> None:
    check_depth(b"[" * 64 + b"]" * 64 + b"[]")
    with pytest.raises(RequestError, match="64 levels"):
        check_depth(b"[" * 65 + b"]" * 65)


def test_a_body_of_nothing_but_brackets_is_refused_early() -> None:
    with pytest.raises(RequestError, match="arrays and objects"):
        check_depth(b"[" + b"[]," * (MAX_CONTAINERS + 1) + b"1]")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63) | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=8,
)
FIELD_NAMES = st.sampled_from(ChatCompletionRequest.__struct_fields__)


@given(st.dictionaries(FIELD_NAMES, JSON, max_size=6))
def test_any_json_in_any_field_is_served_or_refused_by_name(fields: dict[str, Any]) -> None:
    try:
        decode(**fields)
        is_served_or_named = True
    except RequestError as error:
        is_served_or_named = bool(error.param)
    assert is_served_or_named


@given(st.binary(max_size=64))
def test_any_bytes_are_refused_as_the_body(body: bytes) -> None:
    with pytest.raises(RequestError) as refused:
        decode_chat(body)
    assert refused.value.param in {"body", "messages"}
