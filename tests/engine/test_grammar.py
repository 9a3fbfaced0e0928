"""A bound answer is of its form at every temperature, ends exactly where it is complete, and goes on exactly."""

import contextlib
import json
from collections.abc import Callable
from typing import Any

import jsonschema
import pytest
import torch
from core_run import Run
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from gptoss.engine.dialect import HERMES, LLAMA, MISTRAL, TaggedDialect, choose_dialect
from gptoss.engine.grammar import SCHEMA_DEPTH_MAX, check_grammar
from gptoss.engine.grammar_mask import GrammarMask, GrammarMasks
from gptoss.engine.port import Failed, Finished, Submit
from gptoss.engine.tagged_output import TagFormat
from gptoss.engine.token_text import byte_alphabet
from gptoss.errors import EngineError, RequestError
from gptoss.messages.answer import AnswerFormat, AnswerShape
from gptoss.messages.sampling import SamplingParams

END = 256
PLAIN = TaggedDialect(TagFormat(), {})
relaxed = settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])

PERSON: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["a", "b", None]}, "maxItems": 2},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}
SCHEMAS: list[dict[str, Any]] = [
    PERSON,
    {"type": "boolean"},
    {"enum": ["yes", "no", 3, {"deep": [1]}]},
    {"const": {"a": '日本 "quoted" \\ 🗼'}},
    {"type": "array", "items": {"type": "boolean"}, "minItems": 2, "maxItems": 3},
    {"anyOf": [{"type": "null"}, {"type": "integer", "minimum": -5, "maximum": 5}]},
    {"type": "string", "pattern": "^[a-z]{2,5}$"},
    {"type": "string", "format": "date"},
    {"type": "number", "minimum": 0, "maximum": 1},
    {
        "$defs": {"node": {"type": "object", "properties": {"v": {"type": "boolean"}}, "required": ["v"], "additionalProperties": False}},
        "type": "object",
        "properties": {"left": {"$ref": "#/$defs/node"}, "right": {"$ref": "#/$defs/node"}},
        "required": ["left", "right"],
        "additionalProperties": False,
    },
]  # fmt: skip


def json_grammar(schema: dict[str, Any]) -> str:
    form = AnswerFormat(kind="json", text=json.dumps(schema))
    return PLAIN.grammar((), AnswerShape(format=form), opens_reasoning=False)


def bound(grammar: str, prompt: tuple[int, ...] = (72, 105), **changes: Any) -> Submit:
    params: dict[str, Any] = {"max_tokens": 90, "temperature": 1.5, "seed": 1, **changes}
    output = params.pop("output", ())
    return Submit(
        request_id="r",
        attempt=1,
        prompt_token_ids=prompt,
        sampling=SamplingParams(**params),
        grammar=grammar,
        output_token_ids=output,
    )


def answer(run: Run) -> tuple[Finished, str]:
    end = run.end("r")
    assert isinstance(end, Finished), end
    return end, bytes(token_id for token_id in run.tokens("r") if token_id < END).decode()


@pytest.fixture(scope="module")
def masks(tiny_model: Callable[..., Any]) -> GrammarMasks:
    return GrammarMasks(tiny_model().tokenizer, 300, (END,))


def walk(mask: GrammarMask, text: bytes) -> bool:
    """Whether ``text``, byte by byte, keeps to the mask."""
    for byte in text:
        if not bool(mask.allowed()[byte]):
            return False
        mask.push(byte)
    return True


@pytest.mark.slow
@pytest.mark.timeout(300)
@relaxed
@given(
    st.sampled_from(SCHEMAS),
    st.lists(st.integers(0, 255), min_size=1, max_size=8),
    st.sampled_from([0.0, 0.7, 1.5, 2.0]),
    st.integers(0, 2**31),
)
def test_the_answer_validates_at_every_temperature(
    tiny_model: Callable[..., Any], masks: GrammarMasks, schema: Any, prompt: list[int], temperature: float, seed: int
) -> None:
    run = Run(tiny_model())
    grammar = json_grammar(schema)
    run.handle(bound(grammar, tuple(prompt), temperature=temperature, seed=seed))
    end, text = answer(run.finish())
    if end.reason == "stop":
        jsonschema.validate(json.loads(text), schema, format_checker=jsonschema.FormatChecker())
    else:
        assert end.reason == "length"
        assert end.completion_tokens == 90
        mask = masks.mask(grammar, torch.device("cpu"))
        assert walk(mask, text.encode(errors="surrogateescape"))
        assert not mask.is_over


@pytest.mark.parametrize("schema", SCHEMAS, ids=[json.dumps(schema)[:40] for schema in SCHEMAS])
def test_an_answer_with_room_ends_by_itself_and_validates(
    tiny_model: Callable[..., Any], schema: dict[str, Any]
) -> None:
    run = Run(tiny_model())
    run.handle(bound(json_grammar(schema), max_tokens=600, temperature=1.0))
    end, text = answer(run.finish())
    assert end.reason == "stop"
    jsonschema.validate(json.loads(text), schema)


def test_an_answer_cut_by_max_tokens_says_so(tiny_model: Callable[..., Any]) -> None:
    run = Run(tiny_model())
    run.handle(bound(json_grammar(PERSON), max_tokens=5))
    end, _ = answer(run.finish())
    assert (end.reason, end.completion_tokens) == ("length", 5)


@pytest.mark.parametrize(
    ("form", "allowed"),
    [
        (AnswerFormat(kind="choice", choices=("red", "red wine", "日本")), {"red", "red wine", "日本"}),
        (AnswerFormat(kind="regex", text="(ab|ba){2}"), {"abab", "abba", "baab", "baba"}),
    ],
)
def test_choices_and_expressions_bind_the_whole_answer(
    tiny_model: Callable[..., Any], form: AnswerFormat, allowed: set[str]
) -> None:
    found: set[str] = set()
    for seed in range(12):
        run = Run(tiny_model())
        run.handle(bound(PLAIN.grammar((), AnswerShape(format=form), opens_reasoning=False), seed=seed))
        end, text = answer(run.finish())
        assert end.reason == "stop"
        found.add(text)
    assert found <= allowed
    assert len(found) > 1


def test_a_resumed_answer_goes_on_as_it_would_have(tiny_model: Callable[..., Any]) -> None:
    grammar = json_grammar(PERSON)
    whole = Run(tiny_model())
    whole.handle(bound(grammar, seed=5, max_tokens=400))
    whole.finish()
    tokens = whole.tokens("r")
    assert len(tokens) > 12
    for at in (1, len(tokens) // 2, len(tokens) - 1):
        resumed = Run(tiny_model())
        resumed.handle(bound(grammar, seed=5, max_tokens=400, output=tokens[:at]))
        resumed.finish()
        assert tokens[:at] + resumed.tokens("r") == tokens
        end = resumed.end("r")
        assert isinstance(end, Finished)
        assert end.reason == "stop"


def test_a_neighbour_changes_nothing_and_is_not_bound(tiny_model: Callable[..., Any]) -> None:
    grammar = json_grammar(PERSON)
    alone, together = Run(tiny_model()), Run(tiny_model())
    alone.handle(bound(grammar))
    free = Submit(request_id="free", attempt=1, prompt_token_ids=(1, 2), sampling=SamplingParams(max_tokens=90, seed=2))
    together.handle(free, bound(grammar))
    assert alone.finish().tokens("r") == together.finish().tokens("r")
    assert any(token_id > 127 for token_id in together.tokens("free"))


def test_an_answer_whose_grammar_fails_fails_alone(tiny_model: Callable[..., Any]) -> None:
    run = Run(tiny_model())
    run.handle(bound(json_grammar(PERSON)))
    run.step(3)
    mask = run.core._batch.sequences["r"].sampler._mask
    assert isinstance(mask, GrammarMask)
    mask._matcher.consume_token(ord("x"))  # what no mask allowed: the grammar is broken for good
    run.handle(
        Submit(request_id="other", attempt=1, prompt_token_ids=(1,), sampling=SamplingParams(max_tokens=4, seed=1))
    )
    run.finish()
    failed = run.end("r")
    assert isinstance(failed, Failed)
    assert "grammar" in failed.message
    assert isinstance(run.end("other"), Finished)


def test_a_grammar_that_does_not_compile_is_a_failure_of_its_request(tiny_model: Callable[..., Any]) -> None:
    run = Run(tiny_model())
    run.handle(bound("%llguidance {}\nstart: nonsense\n"))
    assert isinstance(run.end("r"), Failed)


@pytest.mark.parametrize("setting", [{"min_tokens": 3}, {"ignore_eos": True}])
def test_what_would_go_on_beyond_the_end_is_refused(tiny_model: Callable[..., Any], setting: dict[str, Any]) -> None:
    run = Run(tiny_model())
    run.handle(bound(json_grammar(PERSON), **setting))
    failed = run.end("r")
    assert isinstance(failed, Failed)
    assert failed.code == "invalid_request"


def deep(levels: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "boolean"}
    for _ in range(levels):
        schema = {"type": "array", "items": schema}
    return schema


REFUSED = [
    (AnswerFormat(kind="json", text="{"), "not valid JSON"),
    (AnswerFormat(kind="json", text="[1]"), "an object"),
    (AnswerFormat(kind="json", text="{" * 100_000), "longer than"),
    (AnswerFormat(kind="json", text=json.dumps(deep(SCHEMA_DEPTH_MAX + 1))), "levels deep"),
    (AnswerFormat(kind="json", text='{"type": "nonsense"}'), "nonsense"),
    (AnswerFormat(kind="json", text='{"not": {}}'), "not"),
    (AnswerFormat(kind="json", text='{"$ref": "http://127.0.0.1/x"}'), "does not fetch"),
    (AnswerFormat(kind="json", text='{"type": "string", "pattern": "(?=a)b"}'), "look-around"),
    (AnswerFormat(kind="json", text='{"enum": []}'), "Unsatisfiable"),
    (AnswerFormat(kind="json", text=json.dumps({"enum": ["x" * 50 + str(i) for i in range(1200)]})), "longer than"),
    (AnswerFormat(kind="regex", text=""), "1 to"),
    (AnswerFormat(kind="regex", text="(a|", param="guided_regex"), "regex"),
    (AnswerFormat(kind="regex", text=r"(a)\1"), "backreference"),
    (AnswerFormat(kind="regex", text="a" * 5000), "1 to"),
    (AnswerFormat(kind="choice"), "1 to"),
    (AnswerFormat(kind="choice", choices=("a", "")), "none empty"),
    (AnswerFormat(kind="choice", choices=("a",) * 1025), "1 to"),
]


@pytest.mark.parametrize(("form", "why"), REFUSED, ids=[f"{row[0].kind} {row[0].text[:30]}" for row in REFUSED])
def test_a_form_that_cannot_be_enforced_is_refused_by_name(form: AnswerFormat, why: str) -> None:
    with pytest.raises(RequestError) as caught:
        PLAIN.grammar((), AnswerShape(format=form), opens_reasoning=False)
    assert caught.value.param == form.param
    assert why in caught.value.message
    assert len(caught.value.message) < 500


@relaxed
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(max_size=6),
        lambda inner: (
            st.lists(inner, max_size=4)
            | st.dictionaries(
                st.sampled_from(
                    [
                        "type",
                        "properties",
                        "items",
                        "enum",
                        "anyOf",
                        "$ref",
                        "pattern",
                        "minLength",
                        "required",
                        "x-guidance",
                        "format",
                    ]
                )
                | st.text(max_size=4),
                inner,
                max_size=4,
            )
        ),
    )
)
def test_any_schema_compiles_or_is_refused(masks: GrammarMasks, schema: Any) -> None:
    form = AnswerFormat(kind="json", text=json.dumps(schema))
    with contextlib.suppress(RequestError):
        grammar = PLAIN.grammar((), AnswerShape(format=form), opens_reasoning=False)
        assert masks.mask(grammar, torch.device("cpu")).allowed().any()


def test_a_compiler_that_panics_refuses_its_request_alone() -> None:
    schema = {"": {"required": None, "b": 52796353675924064}, "format": 10414770, "x": "\U000efa48" * 40}
    form = AnswerFormat(kind="json", text=json.dumps(schema))
    with pytest.raises(RequestError):
        PLAIN.grammar((), AnswerShape(format=form), opens_reasoning=False)


@pytest.mark.parametrize(
    "form",
    [
        AnswerFormat(kind="regex", text="(canary_9f"),
        AnswerFormat(kind="regex", text="canary_9f(?=x)"),
        AnswerFormat(kind="json", text='{"type": "string", "pattern": "canary_9f(?=a)b"}'),
        AnswerFormat(kind="json", text='{"$ref": "http://127.0.0.1/canary_9f"}'),
        AnswerFormat(kind="json", text='{"properties": {"canary_9f": {"not": {}}}}'),
    ],
)
def test_a_refusal_does_not_repeat_what_the_client_wrote(form: AnswerFormat) -> None:
    with pytest.raises(RequestError) as caught:
        PLAIN.grammar((), AnswerShape(format=form), opens_reasoning=False)
    assert "canary_9f" not in caught.value.message


def test_a_mask_without_any_end_token_says_so(tiny_model: Callable[..., Any]) -> None:
    with pytest.raises(EngineError, match="no end token"):
        GrammarMasks(tiny_model().tokenizer, 300, ()).mask(json_grammar(PERSON), torch.device("cpu"))


# ---------------------------------------------------------------- tools

TOOLS: tuple[dict[str, Any], ...] = tuple(
    {
        "type": "function",
        "function": {
            "name": name,
            "strict": True,
            "parameters": {
                "type": "object",
                "properties": {"n": {"type": "integer"}},
                "required": ["n"],
                "additionalProperties": False,
            },
        },
    }
    for name in ("f", "g")
)
# pyright: reportUnknownMemberType=false
SPECIAL = ["<|end|>", "[TOOL_CALLS]", "[ARGS]", "<|python_tag|>"]


@pytest.fixture(scope="module")
def tagged() -> tuple[Tokenizer, GrammarMasks]:
    """Bytes, and the special tokens of the families."""
    tokenizer = Tokenizer(models.BPE(vocab=byte_alphabet(), merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in SPECIAL])
    return tokenizer, GrammarMasks(tokenizer, 260, (END,))


def dialect(kind: str) -> TaggedDialect:
    think = ("<think>", "</think>")
    ids = {text: END + index for index, text in enumerate(SPECIAL)}
    return {
        "hermes": TaggedDialect(TagFormat(think=think, calls=HERMES), {}),
        "llama": TaggedDialect(TagFormat(calls=LLAMA), ids),
        "mistral": TaggedDialect(TagFormat(calls=MISTRAL), {"[TOOL_CALLS]": ids["[TOOL_CALLS]"]}),
        "mistral-args": TaggedDialect(TagFormat(calls=MISTRAL), ids),
    }[kind]


REQUIRED = AnswerShape(tool_choice="required")
ONE = AnswerShape(tool_choice="required", parallel_calls=False)
NAMED = AnswerShape(tool_choice="named", tool_name="g")
AUTO = AnswerShape()
FORMAT = AnswerShape(format=AnswerFormat(kind="choice", choices=("yes",)))
H = '<tool_call>\n{"name": "f", "arguments": {"n": 1}}\n</tool_call>'
M = '{"name": "f", "arguments": {"n":1}}'
L = '{"name": "f", "parameters": {"n":1}}'
BOUND: list[tuple[str, AnswerShape, str, bool]] = [
    ("hermes", REQUIRED, H, True),
    ("hermes", REQUIRED, f"<think>so</think>\n{H}\n{H}", True),
    ("hermes", REQUIRED, "I will not", False),
    ("hermes", REQUIRED, H.replace('"f"', '"h"'), False),
    ("hermes", REQUIRED, H.replace('"n": 1', '"m": 1'), False),
    ("hermes", ONE, H, True),
    ("hermes", ONE, f"{H}\n{H}", False),
    ("hermes", NAMED, H, False),
    ("hermes", NAMED, H.replace('"f"', '"g"'), True),
    ("hermes", AUTO, "just text", True),
    ("hermes", AUTO, f"text {H}", True),
    ("hermes", AUTO, "text <tool_call>oops", False),
    ("hermes", AUTO, H.replace("1", '"x"'), False),
    ("hermes", FORMAT, "<think>hm</think>yes", True),
    ("hermes", FORMAT, "yes", True),
    ("hermes", FORMAT, "no", False),
    ("hermes", FORMAT, H, True),
    ("llama", REQUIRED, f"{L}; {L}", True),
    ("llama", REQUIRED, "text", False),
    ("llama", ONE, f"{L};", False),
    ("llama", AUTO, "text", True),
    ("llama", AUTO, '{"name": "f", "parameters": {"m"', False),
    ("mistral", REQUIRED, f"[TOOL_CALLS][{M}, {M}]", True),
    ("mistral", ONE, f"[TOOL_CALLS][{M}, {M}]", False),
    ("mistral", AUTO, f"text[TOOL_CALLS][{M}]", True),
    ("mistral", AUTO, "text[TOOL_CALLS]oops", False),
    ("mistral-args", REQUIRED, '[TOOL_CALLS]f[ARGS]{"n":1}[TOOL_CALLS]g[ARGS]{"n":2}', True),
    ("mistral-args", NAMED, '[TOOL_CALLS]f[ARGS]{"n":1}', False),
]


@pytest.mark.parametrize(("kind", "shape", "text", "fits"), BOUND)
def test_calls_keep_to_the_schemas_of_their_tools(
    tagged: tuple[Tokenizer, GrammarMasks], kind: str, shape: AnswerShape, text: str, fits: bool
) -> None:
    tokenizer, masks = tagged
    mask = masks.mask(dialect(kind).grammar(TOOLS, shape, opens_reasoning=False), torch.device("cpu"))
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    kept = 0
    for token_id in [*ids, END]:
        if not bool(mask.allowed()[token_id]):
            break
        mask.push(token_id)
        kept += 1
    assert (kept == len(ids) + 1) == fits


def test_nothing_is_bound_without_a_reason() -> None:
    loose = tuple({**tool, "function": {**tool["function"], "strict": False}} for tool in TOOLS)
    for kind in ("hermes", "llama", "mistral"):
        assert dialect(kind).grammar(loose, AUTO, opens_reasoning=False) == ""
        assert dialect(kind).grammar(TOOLS, AnswerShape(tool_choice="none"), opens_reasoning=False) == ""
        check_grammar(dialect(kind).grammar(loose, REQUIRED, opens_reasoning=False), "tools")


def test_a_model_without_a_form_for_calls_refuses_to_be_made_to() -> None:
    with pytest.raises(RequestError, match="no form for tool calls"):
        PLAIN.grammar(TOOLS, REQUIRED, opens_reasoning=False)


def test_families_are_known_by_what_their_files_say(tagged: tuple[Tokenizer, GrammarMasks]) -> None:
    plain = Tokenizer(models.BPE(vocab=byte_alphabet(), merges=[]))

    def tags(tokenizer: Tokenizer, template: str) -> TagFormat:
        chosen = choose_dialect(tokenizer, template)
        assert isinstance(chosen, TaggedDialect)
        return chosen._tags

    assert tags(plain, "{{ messages }}") == TagFormat()
    assert tags(plain, "<tool_call> {{ tools }} </think>") == TagFormat(think=("<think>", "</think>"), calls=HERMES)
    assert tags(plain, "<tool_call><function=f>").calls is None
    assert tags(plain, 'ipython {"name": x, "parameters": y}').calls is LLAMA
    assert tags(plain, "[TOOL_CALLS] [/THINK]") == TagFormat(think=("[THINK]", "[/THINK]"), calls=MISTRAL)
    assert tags(tagged[0], "").calls is MISTRAL
