"""Decoding alone: what is accepted, how it maps, and that nothing but ``RequestError`` ever comes out."""

import contextlib
import sys
from typing import Any, cast

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptoss.actors.generation import GenerateRequest
from gptoss.errors import RequestError
from gptoss.http.chat_request import generate_request, without_effect
from gptoss.http.decode import MAX_CONTAINERS, MAX_STRINGS, BodyDecoder, check_depth
from gptoss.http.sampling_fields import as_choices, num_choices, stream_shape
from gptoss.http.schema import ChatCompletionRequest
from gptoss.http.unsupported import REFUSED, unknown_fields

decode_chat = BodyDecoder(ChatCompletionRequest).decode


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
    wire, unknown = decode_chat(b'{"messages":[{"role":"user","content":"x"}],"zeta":1,"alpha":[],"store":true}')
    assert tuple(unknown) == unknown_fields(unknown) == ("alpha", "zeta")
    assert without_effect(wire, takes_reasoning_effort=False) == ("store",)


def test_continuous_usage_implies_usage() -> None:
    body = b'{"messages":[{"role":"user","content":"x"}],"stream_options":{"continuous_usage_stats":true}}'
    shape = stream_shape(True, decode_chat(body)[0].stream_options)
    assert shape.include_usage
    assert shape.continuous_usage


def test_brackets_inside_strings_do_not_nest() -> None:
    check_depth(b'["' + b"[" * 1000 + b'", "\\"' + b"{" * 1000 + b'"]')


def test_nesting_of_64_passes_and_65_does_not() -> None:
    check_depth(b"[" * 64 + b"]" * 64 + b"[]")
    with pytest.raises(RequestError, match="64 levels"):
        check_depth(b"[" * 65 + b"]" * 65)


def test_brackets_behind_escaped_quotes_are_found() -> None:
    with pytest.raises(RequestError, match="64 levels"):
        check_depth(b'["\\\\",' + b"[" * 65 + b"]" * 65 + b"]")
    check_depth(b'["\\"' + b"[" * 100 + b'"]')


HOSTILE = {
    "brackets": b"[" * (2 << 20),
    "closing brackets": b"[" * 65 + b"]" * (2 << 20),
    "flat arrays": b"[" + b"[]," * 700_000 + b"1]",
    "empty strings": b"[" * 65 + b'"",' * 700_000,
    "deep pairs": (b"[" * 5000 + b"]" * 5000) * 200,
    "one string of brackets": b'["' + b"[" * (2 << 20) + b'"]',
    "escapes": b"[" * 65 + b'"' + b'\\"' * 700_000,
}


@pytest.mark.parametrize("body", HOSTILE.values(), ids=HOSTILE.keys())
def test_no_body_makes_the_depth_check_take_more_than_a_few_passes(body: bytes) -> None:
    calls = 0

    def count(_frame: Any, event: str, _what: Any) -> None:
        nonlocal calls
        calls += event == "c_call"

    sys.setprofile(count)
    try:
        with contextlib.suppress(RequestError):
            check_depth(body)
    finally:
        sys.setprofile(None)
    assert 0 < calls < 100, "the work is passes at the speed of C, never a step for each byte or bracket"


def test_a_body_of_too_many_strings_is_refused_before_they_are_cut() -> None:
    with pytest.raises(RequestError, match="strings"):
        check_depth(b"[" * 65 + b'"",' * (MAX_STRINGS + 1))


@given(st.text(alphabet='[]{}"\\a', max_size=200))
def test_the_depth_check_agrees_with_a_parser_that_counts(text: str) -> None:
    body = b"[" * 60 + text.encode() + b"]" * 60
    try:
        parsed = msgspec.json.decode(body)
    except msgspec.DecodeError:
        return
    if depth(parsed) <= 64:
        check_depth(body)
    else:
        with pytest.raises(RequestError, match="64 levels"):
            check_depth(body)


def depth(value: Any) -> int:
    if isinstance(value, dict):
        value = list(cast("dict[str, Any]", value).values())
    return 1 + max(map(depth, cast("list[Any]", value)), default=0) if isinstance(value, list) else 0


def test_choices_have_seeds_of_their_own_that_wrap_within_64_bits() -> None:
    seeds = [choice.sampling.seed for choice in as_choices(decode(seed=2**63 - 1), 3)]
    assert seeds == [2**63 - 1, -(2**63), -(2**63) + 1]
    assert [choice.sampling.seed for choice in as_choices(decode(), 2)] == [None, None]
    assert num_choices(decode_chat(b'{"messages":[{"role":"user","content":"x"}],"n":16}')[0]) == 16


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_change_the_answer_is_refused_by_name_unless_it_asks_for_nothing(name: str) -> None:
    with pytest.raises(RequestError, match=name) as refused:
        unknown_fields({name: msgspec.Raw(b'"x"')})
    assert refused.value.param == name
    assert unknown_fields({name: msgspec.Raw(b"null")}) == ()


@pytest.mark.parametrize("name", ["add_generation_prompt", "skip_special_tokens"])
def test_false_is_a_wish_where_true_is_what_happens(name: str) -> None:
    assert unknown_fields({name: msgspec.Raw(b"true")}) == ()
    with pytest.raises(RequestError):
        unknown_fields({name: msgspec.Raw(b"false")})


def test_who_asks_and_what_for_reach_the_actors() -> None:
    request = decode(user="u", metadata={"a": "b"}, cache_salt="s", reasoning_effort="low", priority=-2, timeout=3)
    assert (request.user, request.metadata, request.cache_salt) == ("u", {"a": "b"}, "s")
    assert (request.reasoning_effort, request.priority, request.timeout_s) == ("low", -2, 3)


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
