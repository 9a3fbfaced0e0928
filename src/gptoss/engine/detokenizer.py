"""Token ids to text, one token at a time, with stop strings.

Rules:
- The pieces of a request, put together, are the decoding of all its tokens, cut before the first stop string. It does
  not matter where the stream was interrupted: ``replay`` of the same tokens leaves the same state.
- A piece is final: it never ends inside a character, and text that may become part of a stop string is held back.
- A special token is a boundary: no character and no stop string goes across it, and what was held back comes with it. So
  every piece lies on the side of the special token that its own tokens lie on, and output parsers need no positions.
- The first stop string is the one whose last character comes first; of several that end there, the longest.
- A push costs the same however long the output is: a window of a few tokens is decoded, and each stop string keeps
  only the length of its longest prefix that the text ends with (Knuth, Morris and Pratt).

The window starts where the text last ended with a whole character, one token or more before the newest, because
decoders join neighbours: bytes into characters, and a leading space only where something stands before it.
"""

import functools
from collections.abc import Iterable

import msgspec
from tokenizers import Tokenizer

REPLACEMENT = "\ufffd"
MAX_PENDING_TOKENS = 4
"""A character is at most four bytes, so a tail that is no character after this many tokens never becomes one."""
MAX_WINDOW_TOKENS = 12


class Piece(msgspec.Struct, frozen=True):
    """What one token made final. ``stopped`` is the stop string that is now complete; nothing follows it."""

    text: str
    stopped: str | None = None


class Detokenizer:
    """The output text of one request.

    Args:
        tokenizer: shared with other requests; only read.
        stop: strings that end the output and are not part of it.
        prompt_ids: the prompt, or its end: with it the first token's leading space is kept.
    """

    def __init__(self, tokenizer: Tokenizer, stop: tuple[str, ...] = (), prompt_ids: tuple[int, ...] = ()) -> None:
        self._tokenizer = tokenizer
        self._special_ids = special_token_ids(tokenizer)
        self._stops = [_StopString(text) for text in stop]
        self._held = ""
        self._stopped: str | None = None
        context = [token_id for token_id in prompt_ids[-2 * MAX_PENDING_TOKENS :] if token_id not in self._special_ids]
        self._window = context[-MAX_PENDING_TOKENS:]
        self._clean = 0  # window index up to which the text last ended with a whole character
        self._given = len(self._decode().rstrip(REPLACEMENT)) if self._window else 0  # window characters already taken

    @property
    def stopped(self) -> str | None:
        """The stop string that ended the output, if one did."""
        return self._stopped

    def push(self, token_id: int) -> Piece:
        """Take one token and return the text that became final. After a stop string every piece is empty."""
        if self._stopped is not None:
            return Piece("", self._stopped)
        if token_id in self._special_ids:
            return Piece(self.finish(), self._stopped)
        return Piece(self._release(self._next_text(token_id)), self._stopped)

    def finish(self) -> str:
        """The text still held back: a possible stop string that did not come, or a character cut short (U+FFFD)."""
        if self._stopped is not None:
            return ""
        text = self._decode()
        rest = self._release(text[self._given :])
        if self._stopped is None:
            rest += self._held
        self._held = ""
        for stop in self._stops:
            stop.matched = 0
        # What follows needs a neighbour to keep its leading space, but must not complete a character cut short.
        self._window = [] if text.endswith(REPLACEMENT) else self._window[-MAX_PENDING_TOKENS:]
        self._clean, self._given = len(self._window), len(self._decode()) if self._window else 0
        return rest

    def replay(self, token_ids: Iterable[int]) -> None:
        """Take tokens whose text was delivered before, as if they had been pushed one by one."""
        for token_id in token_ids:
            self.push(token_id)

    def _next_text(self, token_id: int) -> str:
        window = self._window
        window.append(token_id)
        text = self._decode()
        stable = text.rstrip(REPLACEMENT)
        is_clean = len(stable) == len(text)
        if not is_clean and len(window) - self._clean > MAX_PENDING_TOKENS:
            stable = text[:-1]  # not characters at all, except perhaps the very end
        new = stable[self._given :]
        self._given = max(self._given, len(stable))
        if len(window) >= MAX_WINDOW_TOKENS:
            self._slide(held_chars=len(text) - self._given)
        if is_clean:
            self._clean = len(window)
        return new

    def _slide(self, *, held_chars: int) -> None:
        """Shorten the window to what the next tokens can depend on; its last ``held_chars`` were not given yet."""
        start = self._clean if 0 < len(self._window) - self._clean <= MAX_PENDING_TOKENS else -MAX_PENDING_TOKENS
        del self._window[:start]
        self._given = len(self._decode()) - held_chars
        self._clean = 0

    def _release(self, new: str) -> str:
        """Pass ``new`` through the stop strings and return what is now certain to be output."""
        if not self._stops:
            return new
        text = self._held + new
        for index, char in enumerate(new, start=len(self._held)):
            ended = [stop for stop in self._stops if stop.advance(char)]
            if ended:
                first = max(ended, key=lambda stop: len(stop.text))
                self._stopped = first.text
                self._held = ""
                return text[: index + 1 - len(first.text)]
        certain = len(text) - max(stop.matched for stop in self._stops)
        self._held = text[certain:]
        return text[:certain]

    def _decode(self) -> str:
        return self._tokenizer.decode(self._window, skip_special_tokens=False)


@functools.lru_cache(maxsize=8)
def special_token_ids(tokenizer: Tokenizer) -> frozenset[int]:
    """Ids of the tokens that have no text."""
    return frozenset(token_id for token_id, token in tokenizer.get_added_tokens_decoder().items() if token.special)


class _StopString:
    """Recognises one string in a stream of characters."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.matched = 0
        self._fallback = _borders(text)

    def advance(self, char: str) -> bool:
        """Take one character; True when the string is now complete."""
        while self.matched and self.text[self.matched] != char:
            self.matched = self._fallback[self.matched - 1]
        if self.text[self.matched] == char:
            self.matched += 1
        return self.matched == len(self.text)


def _borders(text: str) -> list[int]:
    """For each prefix of ``text``, the length of its longest proper suffix that is also a prefix."""
    borders = [0] * len(text)
    length = 0
    for index in range(1, len(text)):
        while length and text[index] != text[length]:
            length = borders[length - 1]
        if text[index] == text[length]:
            length += 1
        borders[index] = length
    return borders
