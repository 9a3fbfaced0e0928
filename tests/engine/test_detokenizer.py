"""Incremental text equals the text of the whole, whatever the split."""

from collections.abc import Sequence

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from gptoss.engine.detokenizer import Detokenizer, special_token_ids
from gptoss.engine.prompt import load_tokenizer

# The fixture is read only, so that examples may share it.
relaxed = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])

FAMILY = "\U0001f468\u200d\U0001f469\u200d\U0001f467\u200d\U0001f466"
FIRST_PLAIN = 17
"""Before it stand special tokens, which have no text and part what is on both sides of them."""
SAMPLES = [
    "Hello, world.",
    f"a family {FAMILY} and a flag \U0001f3f4\u200d\u2620\ufe0f",
    "\u0645\u0631\u062d\u0628\u0627 \u05e9\u05dc\u05d5\u05dd",
    "nul \x00 inside",
    "\u65e5\u672c\u8a9e\u306e\u6587\u7ae0 \ud55c\uad6d\uc5b4",
    "  spaces\n\n\ttabs ",
    "\U0001d573\U0001d58a\U0001d591\U0001d591\U0001d594 \ufffd real replacement",
]


@pytest.fixture(scope="session")
def tokenizer(demo_folder: str) -> Tokenizer:
    return load_tokenizer(demo_folder)


@pytest.fixture(scope="session")
def byte_fallback_tokenizer() -> Tokenizer:
    """A SentencePiece-like tokenizer: words with a leading space mark, everything else as single bytes."""
    vocab = {"<unk>": 0, "\u2581": 1, "\u2581the": 2, "\u2581cat": 3, "s": 4, ".": 5}
    vocab |= {f"<0x{byte:02X}>": 6 + byte for byte in range(256)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>", byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


def pieces_of(detokenizer: Detokenizer, ids: Sequence[int]) -> list[str]:
    """Push until a stop string, then finish."""
    pieces: list[str] = []
    for token_id in ids:
        piece = detokenizer.push(token_id)
        pieces.append(piece.text)
        if piece.stopped is not None:
            return pieces
    return [*pieces, detokenizer.finish()]


def cut(text: str, stop: Sequence[str]) -> tuple[str, str | None]:
    """The text before the stop string that ends first, the longest of those that end there."""
    for end in range(1, len(text) + 1):
        ended = [string for string in stop if text[:end].endswith(string)]
        if ended:
            longest = max(ended, key=len)
            return text[: end - len(longest)], longest
    return text, None


@pytest.mark.parametrize("text", SAMPLES)
def test_text_comes_back_whole_and_no_piece_ends_inside_a_character(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    pieces = pieces_of(Detokenizer(tokenizer), ids)
    assert "".join(pieces) == text
    assert text.count("\ufffd") == "".join(pieces).count("\ufffd")


@relaxed
@given(st.text(max_size=60), st.lists(st.text(min_size=1, max_size=4), max_size=3))
@example("aab", ["ab"])
@example("abcd", ["abcd", "bc"])
@example("xaabaabaaay", ["aabaaa"])
def test_pieces_of_any_text_make_the_text_before_the_first_stop_string(
    tokenizer: Tokenizer, text: str, stop: list[str]
) -> None:
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    detokenizer = Detokenizer(tokenizer, tuple(stop))
    expected, stopped = cut(tokenizer.decode(ids), stop)
    assert "".join(pieces_of(detokenizer, ids)) == expected
    assert detokenizer.stopped == stopped


@relaxed
@given(st.lists(st.integers(FIRST_PLAIN, 49151), max_size=40))
@example([17 + 0xFF] * 40)
def test_pieces_of_random_tokens_make_the_decoding_of_all(tokenizer: Tokenizer, ids: list[int]) -> None:
    assert "".join(pieces_of(Detokenizer(tokenizer), ids)) == tokenizer.decode(ids)


@relaxed
@given(st.lists(st.sampled_from([17, 30, 100, 150, 160, 200, 210, 230, 240, 250, 260, 300]), max_size=60))
def test_pieces_of_random_bytes_make_the_decoding_of_all(tokenizer: Tokenizer, ids: list[int]) -> None:
    assert "".join(pieces_of(Detokenizer(tokenizer), ids)) == tokenizer.decode(ids)


def test_bytes_on_both_sides_of_a_special_token_are_no_character(tokenizer: Tokenizer) -> None:
    assert tokenizer.decode([150, 230]) == "\u02cc"
    assert "".join(pieces_of(Detokenizer(tokenizer), [150, 0, 230])) == "\ufffd\ufffd"


@relaxed
@given(st.lists(st.sampled_from(["the", "cats", "é", "\u65e5", FAMILY, ".", " "]), max_size=12))
def test_a_byte_fallback_tokenizer_streams_the_same_text(byte_fallback_tokenizer: Tokenizer, words: list[str]) -> None:
    ids = byte_fallback_tokenizer.encode(" ".join(words)).ids
    pieces = pieces_of(Detokenizer(byte_fallback_tokenizer), ids)
    assert "".join(pieces) == byte_fallback_tokenizer.decode(ids)
    assert "\ufffd" not in "".join(pieces)


def test_with_the_prompt_the_leading_space_of_the_first_token_is_kept(byte_fallback_tokenizer: Tokenizer) -> None:
    assert Detokenizer(byte_fallback_tokenizer).push(3).text == "cat"
    assert Detokenizer(byte_fallback_tokenizer, prompt_ids=(2,)).push(3).text == " cat"


@relaxed
@given(st.text(max_size=40), st.lists(st.text(min_size=1, max_size=3), max_size=2), st.data())
def test_a_replayed_prefix_leaves_the_same_rest(
    tokenizer: Tokenizer, text: str, stop: list[str], data: st.DataObject
) -> None:
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    at = data.draw(st.integers(0, len(ids)))
    whole = Detokenizer(tokenizer, tuple(stop))
    delivered = [whole.push(token_id).text for token_id in ids]
    resumed = Detokenizer(tokenizer, tuple(stop))
    resumed.replay(ids[:at])
    assert [resumed.push(token_id).text for token_id in ids[at:]] == delivered[at:]
    assert (resumed.finish(), resumed.stopped) == (whole.finish(), whole.stopped)


@relaxed
@given(st.text(max_size=40), st.lists(st.text(min_size=1, max_size=4), min_size=1, max_size=3))
def test_what_is_held_back_is_a_beginning_of_a_stop_string(tokenizer: Tokenizer, text: str, stop: list[str]) -> None:
    plain, stopping = Detokenizer(tokenizer), Detokenizer(tokenizer, tuple(stop))
    shown = given_ = ""
    for token_id in tokenizer.encode(text, add_special_tokens=False).ids:
        shown += plain.push(token_id).text
        piece = stopping.push(token_id)
        given_ += piece.text
        if piece.stopped is not None:
            break
        held = shown.removeprefix(given_)
        assert not held or any(string.startswith(held) for string in stop)


def test_special_tokens_have_no_text(tokenizer: Tokenizer) -> None:
    ids = [1, *tokenizer.encode("hi", add_special_tokens=False).ids, 2]
    assert pieces_of(Detokenizer(tokenizer), ids)[0] == ""
    assert "".join(pieces_of(Detokenizer(tokenizer), ids)) == "hi"
    assert {0, 1, 2} <= special_token_ids(tokenizer)


def test_after_a_stop_string_nothing_follows(tokenizer: Tokenizer) -> None:
    detokenizer = Detokenizer(tokenizer, ("b",))
    a, b = (tokenizer.encode(letter).ids[0] for letter in "ab")
    assert [detokenizer.push(a).text, detokenizer.push(b).stopped] == ["a", "b"]
    assert (detokenizer.push(a).text, detokenizer.finish()) == ("", "")


def test_a_character_cut_short_at_the_end_shows_as_one_replacement(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("ok \U0001d573", add_special_tokens=False).ids
    detokenizer = Detokenizer(tokenizer)
    assert "".join(detokenizer.push(token_id).text for token_id in ids[:-1]) == "ok "
    assert detokenizer.finish() == "\ufffd"


def test_the_window_stays_short_on_an_endless_invalid_sequence(tokenizer: Tokenizer) -> None:
    continuation = tokenizer.get_vocab()["\u0122"]  # a lone byte 0x80
    detokenizer = Detokenizer(tokenizer)
    text = "".join(detokenizer.push(continuation).text for _ in range(500))
    assert len(text) >= 495
    assert len(detokenizer._window) < 20
    assert text + detokenizer.finish() == "\ufffd" * 500
