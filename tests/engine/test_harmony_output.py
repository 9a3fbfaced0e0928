"""Every sequence of tokens of gpt-oss is an answer: the parts where it is harmony, and the text where it is not."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import openai_harmony as oh
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from o200k import NAMED, write_tokenizer

from gptoss.engine.call_ids import CallIds
from gptoss.engine.detokenizer import Detokenizer
from gptoss.engine.harmony_output import PARTING, HarmonyParser
from gptoss.engine.harmony_prompt import load_encoding
from gptoss.engine.prompt import load_tokenizer
from gptoss.messages.answer import CallPart, Part, TextPart, content_of

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# The harmony library is only partly typed.

relaxed = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
IDS = {text: token_id for token_id, text in NAMED.items()}
SPECIAL = sorted(NAMED)
Answer = tuple[str, str, list[list[str]]]
Read = Callable[..., Answer]


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory, demo_cache: Path) -> Any:
    folder = tmp_path_factory.mktemp("o200k")
    try:
        write_tokenizer(folder / "tokenizer.json", demo_cache)
    except OSError as error:
        pytest.skip(str(error))
    return load_tokenizer(str(folder))


@pytest.fixture(scope="session")
def encoding(tokenizer: Any) -> oh.HarmonyEncoding:
    return load_encoding(tokenizer)


def put_together(parts: list[Part]) -> Answer:
    calls: list[list[str]] = []
    for part in parts:
        if isinstance(part, CallPart) and part.name:
            calls.append([part.name, ""])
        elif isinstance(part, CallPart):
            calls[part.index][1] += part.arguments
    reasoning = "".join(part.text for part in parts if isinstance(part, TextPart) and part.kind == "reasoning")
    return reasoning, content_of(parts), calls


def read_ids(tokenizer: Any, ids: list[int], *, stop: tuple[str, ...] = ()) -> tuple[Answer, HarmonyParser]:
    """As the engine and the request's actor read them, one token at a time."""
    detokenizer = Detokenizer(tokenizer, stop)
    parser = HarmonyParser(frozenset({"f", "g-2"}), CallIds("req_1"))
    parts: list[Part] = []
    for token_id in ids:
        piece = detokenizer.push(token_id)
        assert "\ufffd" not in piece.text or "\ufffd" in tokenizer.decode(ids, skip_special_tokens=False)
        parts += parser.push(token_id, piece.text)
        if piece.stopped is not None:
            break
    parts += parser.push(None, detokenizer.finish())
    return put_together([*parts, *parser.finish()]), parser


@pytest.fixture
def read(tokenizer: Any) -> Read:
    def reading(text: str, **options: Any) -> Answer:
        return read_ids(tokenizer, tokenizer.encode(text, add_special_tokens=False).ids, **options)[0]

    return reading


ANALYSIS = "<|channel|>analysis<|message|>Hm.<|end|>"
FINAL = "<|channel|>final<|message|>Hi 🗼<|return|>"
CALL = '<|channel|>commentary to=functions.f <|constrain|>json<|message|>{"a":1}<|call|>'
F = [["f", '{"a":1}']]

WELL_FORMED: list[tuple[str, str, Answer]] = [
    ("final alone", FINAL, ("", "Hi 🗼", [])),
    ("thought and final", f"{ANALYSIS}<|start|>assistant{FINAL}", ("Hm.", "Hi 🗼", [])),
    ("thought and call", f"{ANALYSIS}<|start|>assistant{CALL}", ("Hm.", "", F)),
    (
        "preamble and call",
        f"<|channel|>commentary<|message|>I look.<|end|><|start|>assistant{CALL}",
        ("", "I look.", F),
    ),
    (
        "preamble and final",
        f"<|channel|>commentary<|message|>I look.<|end|><|start|>assistant{FINAL}",
        ("", f"I look.{PARTING}Hi 🗼", []),
    ),
    ("two thoughts", f"{ANALYSIS}<|start|>assistant{ANALYSIS}<|start|>assistant{FINAL}", (f"Hm.{PARTING}Hm.", "Hi 🗼", [])),
    ("recipient in the role", ' to=functions.f<|channel|>commentary json<|message|>{"a":1}<|call|>', ("", "", F)),
    ("recipient after the type", '<|channel|>commentary <|constrain|>json to=functions.f<|message|>{"a":1}<|call|>', ("", "", F)),
    ("recipient without a namespace", '<|channel|>commentary to=f <|constrain|>json<|message|>{"a":1}<|call|>', ("", "", F)),
    ("recipient without to=", '<|channel|>commentary functions.f<|message|>{"a":1}<|call|>', ("", "", F)),
    ("recipient on analysis", '<|channel|>analysis to=functions.f code<|message|>{"a":1}<|call|>', ("", "", F)),
    (
        "several calls",
        CALL.replace("<|call|>", "<|end|>") + "<|start|>assistant<|channel|>commentary to=functions.g-2<|message|>{}<|call|>",
        ("", "", [*F, ["g-2", "{}"]]),
    ),
]  # fmt: skip

RECOVERY: list[tuple[str, str, Answer]] = [
    ("nothing", "", ("", "", [])),
    ("only an end", "<|return|>", ("", "", [])),
    ("doubled start", f"<|start|><|start|>assistant{FINAL}", ("", "Hi 🗼", [])),
    ("start again", f"<|start|>assistant{FINAL}", ("", "Hi 🗼", [])),
    ("doubled start later", f"{ANALYSIS}<|start|>assistant<|start|>assistant{FINAL}", ("Hm.", "Hi 🗼", [])),
    ("end followed by return", "<|channel|>final<|message|>Hi<|end|><|return|>", ("", "Hi", [])),
    ("doubled end", f"{ANALYSIS}<|end|><|start|>assistant{FINAL}", ("Hm.", "Hi 🗼", [])),
    ("end of text in a header", f"{ANALYSIS}<|start|>assistant<|channel|>final<|endoftext|>", ("Hm.", "", [])),
    ("end of text in the first header", "<|channel|><|endoftext|>", ("", "", [])),
    ("return in a header with text", "<|channel|>final Hello there<|return|>", ("", "Hello there", [])),
    ("thought in a header", "<|channel|>analysis I think so<|return|>", ("I think so", "", [])),
    ("missing channel", "<|message|>Hello<|return|>", ("", "Hello", [])),
    ("missing channel later", f"{ANALYSIS}<|start|>assistant<|message|>Hello<|return|>", ("Hm.", "Hello", [])),
    ("unknown channel", "<|channel|>whisper<|message|>Hello<|return|>", ("", "Hello", [])),
    ("empty channel", "<|channel|><|message|>Hello<|return|>", ("", "Hello", [])),
    ("no structure at all", "Hello there, this is plain.", ("", "Hello there, this is plain.", [])),
    ("text between messages", f"{ANALYSIS}plain<|start|>assistant{FINAL}", ("Hm.", f"plain{PARTING}Hi 🗼", [])),
    ("text after the end", f"{ANALYSIS}plain text", ("Hm.", "plain text", [])),
    ("channel without a start", f"{ANALYSIS}{FINAL}", ("Hm.", "Hi 🗼", [])),
    ("channel inside of content", "<|channel|>analysis<|message|>Hm<|channel|>final<|message|>Hi<|return|>", ("Hm", "Hi", [])),
    ("message inside of content", "<|channel|>final<|message|>Hi<|message|> you<|return|>", ("", "Hi you", [])),
    ("message between messages", f"{ANALYSIS}<|message|>Hi<|return|>", ("Hm.", "Hi", [])),
    ("constrain inside of content", "<|channel|>final<|message|>Hi<|constrain|> you<|return|>", ("", "Hi you", [])),
    ("start inside of content", f"<|channel|>analysis<|message|>Hm.<|start|>assistant{FINAL}", ("Hm.", "Hi 🗼", [])),
    ("doubled channel", "<|channel|>analysis<|channel|>final<|message|>Hi<|return|>", ("", "Hi", [])),
    ("reserved token", "<|channel|>final<|message|>Hi<|startoftext|> you<|endofprompt|>!<|return|>", ("", "Hi you!", [])),
    ("recipient not offered", "<|channel|>commentary to=python<|message|>print(1)<|call|>", ("", "print(1)", [])),
    ("unknown function", "<|channel|>commentary to=functions.nope<|message|>{}<|call|>", ("", "{}", [])),
    ("recipient that is no name", "<|channel|>commentary to=functions.f/../x<|message|>{}<|call|>", ("", "{}", [])),
    ("recipient of nothing", "<|channel|>commentary to= <|message|>text<|call|>", ("", "text", [])),
    ("recipient twice", '<|channel|>commentary to=functions.f to=python<|message|>{"a":1}<|call|>', ("", "", F)),
    ("recipient glued to a token", '<|channel|>commentary to=functions.f<|channel|>commentary<|message|>{"a":1}<|call|>', ("", "", F)),
    ("another role", "<|start|>user<|message|>I am not you<|end|>", ("", "I am not you", [])),
    ("cut in the first header", "<|channel|>", ("", "", [])),
    ("cut in a channel", "<|channel|>analysis", ("", "", [])),
    ("cut in a recipient", "<|channel|>commentary to=functions", ("", "", [])),
    ("cut in a type", "<|channel|>commentary to=functions.f <|constrain|>json", ("", "", [])),
    ("cut in a thought", "<|channel|>analysis<|message|>Hm", ("Hm", "", [])),
    ("cut between messages", ANALYSIS, ("Hm.", "", [])),
    ("cut after a start", f"{ANALYSIS}<|start|>", ("Hm.", "", [])),
    ("cut after a role", f"{ANALYSIS}<|start|>assistant", ("Hm.", "", [])),
    ("cut in a final", "<|channel|>final<|message|>Hi", ("", "Hi", [])),
    ("cut before a final begins", "<|channel|>final<|message|>", ("", "", [])),
    ("cut in arguments", '<|channel|>commentary to=functions.f<|message|>{"a', ("", "", [["f", '{"a']])),
    ("cut before arguments", "<|channel|>commentary to=functions.f<|message|>", ("", "", [["f", ""]])),
]  # fmt: skip


@pytest.mark.parametrize(("text", "answer"), [row[1:] for row in WELL_FORMED], ids=[row[0] for row in WELL_FORMED])
def test_harmony_becomes_parts(text: str, answer: Answer, read: Read) -> None:
    assert read(text) == answer


@pytest.mark.parametrize(("text", "answer"), [row[1:] for row in RECOVERY], ids=[row[0] for row in RECOVERY])
def test_what_is_not_harmony_is_answered_with_its_text(text: str, answer: Answer, read: Read) -> None:
    assert read(text) == answer


def test_a_long_answer_without_a_header_streams(tokenizer: Any) -> None:
    parser = HarmonyParser(frozenset(), CallIds("r"))
    parts = [part for _ in range(80) for part in parser.push(24912, "hello ")]
    assert parts
    assert content_of([*parts, *parser.finish()]) == "hello " * 80


def test_bytes_that_are_no_utf8_end_with_their_message(tokenizer: Any) -> None:
    broken = tokenizer.encode("🗼", add_special_tokens=False).ids[:1]
    head = tokenizer.encode("<|channel|>analysis<|message|>x", add_special_tokens=False).ids
    tail = tokenizer.encode(f"<|end|><|start|>assistant{FINAL}", add_special_tokens=False).ids
    (reasoning, content, calls), _ = read_ids(tokenizer, [*head, *broken, *tail])
    assert (reasoning, content, calls) == ("x\ufffd", "Hi 🗼", [])
    (_, content, _), _ = read_ids(tokenizer, [*broken, IDS["<|channel|>"], *broken, IDS["<|message|>"], *broken])
    assert content == "\ufffd"


def test_a_stop_string_ends_the_visible_text_and_leaks_nothing(read: Read) -> None:
    text = f"{ANALYSIS}<|start|>assistant<|channel|>final<|message|>one STOP two<|return|>"
    assert read(text, stop=("STOP",)) == ("Hm.", "one ", [])


def test_tokens_of_thoughts_are_counted(tokenizer: Any) -> None:
    thought = tokenizer.encode("Let me think about 日本 for a while.", add_special_tokens=False).ids
    head = tokenizer.encode("<|channel|>analysis<|message|>", add_special_tokens=False).ids
    tail = tokenizer.encode(f"<|end|><|start|>assistant{FINAL}", add_special_tokens=False).ids
    assert read_ids(tokenizer, [*head, *thought, *tail])[1].reasoning_tokens == len(thought)


@relaxed
@given(
    st.lists(
        st.sampled_from([*SPECIAL * 2, 24912, 2375, 35644, 17196, 12606, 173781, 316, 28, 5318, 220, 172, 245]),
        max_size=40,
    )
)
def test_any_tokens_are_answered(tokenizer: Any, ids: list[int]) -> None:
    (reasoning, content, calls), parser = read_ids(tokenizer, ids)
    assert parser.num_calls == len(calls)
    assert parser.reasoning_tokens <= len(ids)
    written = tokenizer.decode(ids, skip_special_tokens=True)
    kept = reasoning + content + "".join(call[1] for call in calls)
    assert len(kept) <= len(written) + 2 * len(ids) + 2


TEXTS = st.text(min_size=1, max_size=30).filter(lambda text: not any(token in text for token in IDS))
MESSAGES = st.lists(
    st.one_of(
        st.tuples(st.just("analysis"), TEXTS),
        st.tuples(st.just("commentary"), TEXTS),
        st.tuples(st.just("final"), TEXTS),
        st.tuples(st.just("call"), TEXTS),
    ),
    min_size=1,
    max_size=5,
)


@relaxed
@given(MESSAGES)
def test_what_the_library_renders_is_read_back_as_the_library_reads_it(
    tokenizer: Any, encoding: oh.HarmonyEncoding, messages: list[tuple[str, str]]
) -> None:
    ids: list[int] = []
    for kind, text in messages:
        message = oh.Message.from_role_and_content(oh.Role.ASSISTANT, text)
        message = message.with_channel("commentary" if kind == "call" else kind)
        if kind == "call":
            message = message.with_recipient("functions.f").with_content_type("<|constrain|>json")
        ids += encoding.render(message)
    assert ids[:2] == tokenizer.encode("<|start|>assistant", add_special_tokens=False).ids
    ids = ids[2:]  # the prompt ends with them
    (reasoning, content, calls), _ = read_ids(tokenizer, ids)

    parsed = encoding.parse_messages_from_completion_tokens(ids, oh.Role.ASSISTANT)
    texts: dict[str, list[str]] = {"analysis": [], "visible": [], "call": []}
    for message in parsed:
        kind = "call" if message.recipient else "analysis" if message.channel == "analysis" else "visible"
        texts[kind].append(message.content[0].to_dict()["text"])
    assert reasoning == PARTING.join(texts["analysis"])
    assert content == PARTING.join(texts["visible"])
    assert calls == [["f", text] for text in texts["call"]]
    assert texts["call"] == [text for kind, text in messages if kind == "call"]
