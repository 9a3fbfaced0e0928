"""Thoughts and calls are found in the text, however it is cut; what is none of them stays text."""

import json
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from gptoss.engine.call_ids import CallIds
from gptoss.engine.dialect import HERMES, LLAMA, MISTRAL
from gptoss.engine.tagged_output import TagFormat, TaggedParser
from gptoss.messages.answer import CallPart, Part, TextPart, content_of, joined

THINK = ("<think>", "</think>")
FORMATS = {
    "think": TagFormat(think=THINK),
    "hermes": TagFormat(think=THINK, calls=HERMES),
    "llama": TagFormat(calls=LLAMA),
    "mistral": TagFormat(calls=MISTRAL),
}
NAMES = frozenset({"f", "get-weather_2"})
ARGUMENTS = '{"city": "Zürich }\\"{", "days": [1, 2]}'
CALL = f'{{"name": "f", "arguments": {ARGUMENTS}}}'
PARAMETERS = f'{{"name": "f", "parameters": {ARGUMENTS}}}'


def parser(kind: str, *, is_reasoning: bool = False, names: frozenset[str] = NAMES) -> TaggedParser:
    tags = FORMATS[kind]
    ids = CallIds("req_1", tags.calls.id_chars if tags.calls else 0)
    return TaggedParser(tags, names, {}, ids, is_reasoning=is_reasoning)


def read(kind: str, pieces: list[str], **options: Any) -> list[Part]:
    reader = parser(kind, **options)
    parts: list[Part] = []
    for token_id, piece in enumerate(pieces):
        parts += reader.push(token_id, piece)
    return joined([*parts, *reader.finish()])


def summary(parts: list[Part]) -> dict[str, Any]:
    """What a client would put together."""
    calls: list[list[str]] = []
    for part in parts:
        if isinstance(part, CallPart) and part.name:
            assert (part.index, part.arguments) == (len(calls), "")
            calls.append([part.name, ""])
        elif isinstance(part, CallPart):
            calls[part.index][1] += part.arguments
    reasoning = "".join(part.text for part in parts if isinstance(part, TextPart) and part.kind == "reasoning")
    return {"reasoning": reasoning, "content": content_of(parts), "calls": calls}


CASES: list[tuple[str, str, str, str, list[list[str]]]] = [
    ("think", "plain text\n", "", "plain text\n", []),
    ("think", "<think>\nHm. <b>\n</think>\n\nYes.", "Hm. <b>", "Yes.", []),
    ("think", "  <think></think>Yes.", "", "Yes.", []),
    ("think", "Yes <think>not a thought</think>", "", "Yes <think>not a thought</think>", []),
    ("think", "<think>cut off", "cut off", "", []),
    ("think", "<thin", "", "<thin", []),
    ("think", "<think>a</think", "a</think", "", []),
    ("hermes", f"<tool_call>\n{CALL}\n</tool_call>", "", "", [["f", ARGUMENTS]]),
    ("hermes", f"Look:\n<tool_call>{CALL}</tool_call>\n", "", "Look:", [["f", ARGUMENTS]]),
    ("hermes", f"<tool_call>{CALL}</tool_call>\n<tool_call>{CALL}</tool_call>", "", "", [["f", ARGUMENTS]] * 2),
    ("hermes", f"<think>so</think>\n<tool_call>{CALL}</tool_call>then", "so", "then", [["f", ARGUMENTS]]),
    ("hermes", '<tool_call>{"arguments": {"a": 1}, "name": "f"}</tool_call>', "", "", [["f", '{"a":1}']]),
    ("hermes", '<tool_call>{"name": "f"}</tool_call>', "", "", [["f", "{}"]]),
    ("hermes", '<tool_call>{"name": "f", "arguments": "{\\"a\\": 1}"}</tool_call>', "", "", [["f", '{"a": 1}']]),
    ("hermes", f'<tool_call>{{"name": "g", "arguments": {ARGUMENTS}}}</tool_call>', "", "same", []),
    ("hermes", 'a \n<tool_call>\n{"name": "g"}\n</tool_call> b', "", "same", []),
    ("hermes", "<tool_call>not json</tool_call> after", "", "same", []),
    ("hermes", "<tool_call>{'name': 'f'}</tool_call>", "", "same", []),
    ("hermes", "<tool_call>[1, 2", "", "same", []),
    ("hermes", "x <tool_call>", "", "same", []),
    ("hermes", '<tool_call>{"name": "f", "arguments": {"city": "Zü', "", "", [["f", '{"city": "Zü']]),
    ("hermes", '<tool_call>{"name": "f", "argum', "", "same", []),
    ("hermes", '<tool_call>{"name": "f", "arguments": {"a": 1]}</tool_call>', "", "", [["f", '{"a": 1]']]),
    ("llama", PARAMETERS, "", "", [["f", ARGUMENTS]]),
    ("llama", f'{PARAMETERS}; {{"type": "function", "name": "f", "parameters": {{}}}}', "", "", [["f", ARGUMENTS], ["f", "{}"]]),
    ("llama", f"<|python_tag|>{PARAMETERS}", "", "", [["f", ARGUMENTS]]),
    ("llama", '{"answer": 42} is JSON', "", "same", []),
    ("llama", "<|python_tag|>print(1)", "", "same", []),
    ("llama", f"text first {PARAMETERS}", "", "same", []),
    ("mistral", f"[TOOL_CALLS][{CALL}, {CALL}]", "", "", [["f", ARGUMENTS]] * 2),
    ("mistral", f"[TOOL_CALLS]f[ARGS]{ARGUMENTS}[TOOL_CALLS]get-weather_2{{}}", "", "", [["f", ARGUMENTS], ["get-weather_2", "{}"]]),
    ("mistral", f"[TOOL_CALLS]f[CALL_ID]abc123DEF[ARGS]{ARGUMENTS}", "", "", [["f", ARGUMENTS]]),
    ("mistral", "[TOOL_CALLS] none of it", "", "same", []),
    ("mistral", "[TOOL_CALLS]g[ARGS]{}", "", "same", []),
    ("mistral", "[TOOL", "", "same", []),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "text", "reasoning", "content", "calls"), CASES, ids=[case[1][:40] for case in CASES])
def test_what_a_model_writes_becomes_parts_whatever_the_cut(
    kind: str, text: str, reasoning: str, content: str, calls: list[list[str]]
) -> None:
    expected = {"reasoning": reasoning, "content": text if content == "same" else content, "calls": calls}
    assert summary(read(kind, [text])) == expected
    assert summary(read(kind, list(text))) == expected
    for at in range(1, len(text)):
        assert summary(read(kind, [text[:at], text[at:]])) == expected


WORDS = [
    "<think>", "</think>", "<tool_call>", "</tool_call>", "[TOOL_CALLS]", "[ARGS]", "<|python_tag|>", CALL, PARAMETERS,
    '{"name": "f", ', '"arguments": {', '"g"', "}", "{", "]", "[", ";", ",", "\n", " ", '"', "\\", "f", "a <", "tool", "日",
]  # fmt: skip


@given(st.sampled_from(sorted(FORMATS)), st.lists(st.sampled_from(WORDS), max_size=12), st.booleans(), st.randoms())
@example("hermes", ["<tool_call>", "{", "{", "}"], False, None)
def test_nothing_raises_and_the_cut_changes_nothing(
    kind: str, words: list[str], is_reasoning: bool, random: Any
) -> None:
    is_reasoning = is_reasoning and FORMATS[kind].think is not None
    text = "".join(words)
    whole = summary(read(kind, [text], is_reasoning=is_reasoning))
    assert summary(read(kind, list(text), is_reasoning=is_reasoning)) == whole
    if random is not None:
        cuts = sorted(random.sample(range(len(text) + 1), min(3, len(text))))
        pieces = [text[start:end] for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]
        assert summary(read(kind, pieces, is_reasoning=is_reasoning)) == whole


@given(st.text(max_size=60))
def test_text_without_tags_is_given_back_as_it_is(text: str) -> None:
    for kind in FORMATS:
        if not text.lstrip().startswith("{"):
            assert summary(read(kind, list(text)))["content"] == text


@given(
    st.dictionaries(st.text(max_size=8), st.none() | st.booleans() | st.integers() | st.text(max_size=8), max_size=4)
)
def test_arguments_arrive_as_they_were_written(arguments: dict[str, Any]) -> None:
    written = json.dumps(arguments)
    text = f'<tool_call>{{"name": "f", "arguments": {written}}}</tool_call>'
    assert summary(read("hermes", list(text)))["calls"] == [["f", written]]


def test_a_call_is_told_before_its_arguments_end() -> None:
    reader = parser("hermes")
    told = reader.push(0, '<tool_call>{"name": "f", "arguments": {"a": ')
    assert told == [CallPart(0, name="f", call_id=CallIds("req_1").of(0)), CallPart(0, '{"a": ')]
    assert reader.push(1, "1}}") == [CallPart(0, "1}")]
    assert (reader.finish(), reader.num_calls) == ([], 1)


def test_ids_of_calls_are_a_function_of_the_request_and_have_the_length_that_a_template_wants() -> None:
    first, other = CallIds("req_1"), CallIds("req_2")
    assert first.of(0) == CallIds("req_1").of(0)
    assert len({first.of(0), first.of(1), other.of(0)}) == 3
    assert first.of(0).startswith("call_")
    assert len(CallIds("req_1", 9).of(0)) == 9


def test_without_offered_tools_a_call_is_text() -> None:
    text = f"<tool_call>{CALL}</tool_call>"
    assert summary(read("hermes", list(text), names=frozenset()))["content"] == text


def test_a_prompt_that_opened_the_thought_begins_inside_of_it() -> None:
    assert summary(read("think", ["\nHm", "</think>", "\nYes"], is_reasoning=True)) == {
        "reasoning": "Hm",
        "content": "Yes",
        "calls": [],
    }


def test_tokens_between_the_tags_are_the_reasoning_tokens() -> None:
    reader = parser("think")
    for token_id, piece in enumerate(["<think>", "a", " b", " c", "</think>", "d"]):
        reader.push(token_id, piece)
    assert reader.reasoning_tokens == 3


def test_tags_that_are_special_tokens_are_known_by_their_ids() -> None:
    reader = TaggedParser(
        FORMATS["mistral"], NAMES, {5: "[TOOL_CALLS]", 6: "[ARGS]"}, CallIds("r", 9), is_reasoning=False
    )
    parts: list[Part] = []
    for token_id, piece in [(5, ""), (9, "f"), (6, ""), (10, "{}"), (2, "")]:
        parts += reader.push(token_id, piece)
    assert summary([*parts, *reader.finish()])["calls"] == [["f", "{}"]]
