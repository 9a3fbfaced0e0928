"""Guesses at the next tokens of a request, looked up in its own prompt and output.

Rules:
- What followed the last ``NGRAM`` tokens when they stood there before is guessed to follow again. Summaries, code and
  quotations repeat themselves; free text does not.
- A guess costs a row in the step that verifies it and saves a step if it is right. So the size follows success: it
  doubles when all was right, falls to what was right otherwise, and after nothing was right there is a pause.
- Everything here is a function of the request's tokens and of which guesses were verified: a replay guesses the same.

Source: prompt lookup decoding (Saxena 2023).
"""

from collections.abc import Sequence

NGRAM = 3
SIZE_FIRST = 4
SIZE_MAX = 8
PAUSE_TOKENS = 16


class Drafter:
    """Guesses of one request.

    Args:
        token_ids: its prompt and output; the list grows with it.
    """

    def __init__(self, token_ids: Sequence[int]) -> None:
        self._token_ids = token_ids
        self._followers: dict[tuple[int, ...], int] = {}
        """n-gram -> position after its latest occurrence, the last n-gram of the text left out"""
        self._num_indexed = NGRAM
        self._size = SIZE_FIRST
        self._paused_until = 0

    def guess(self, tokens_max: int) -> tuple[int, ...]:
        """What may follow the last token, at most ``tokens_max`` tokens; often nothing."""
        length = len(self._token_ids)
        if length < self._paused_until or tokens_max < 1 or length <= NGRAM:
            return ()
        for end in range(self._num_indexed, length):
            self._followers[tuple(self._token_ids[end - NGRAM : end])] = end
        self._num_indexed = length
        start = self._followers.get(tuple(self._token_ids[length - NGRAM :]))
        return () if start is None else tuple(self._token_ids[start : start + min(self._size, tokens_max)])

    def learn(self, num_guessed: int, num_right: int) -> None:
        """Note how many of the guesses in a step were right; called after those tokens were added."""
        if num_right == num_guessed:
            self._size = min(SIZE_MAX, 2 * self._size)
        elif num_right:
            self._size = num_right + 1
        else:
            self._size = max(1, self._size // 2)
            self._paused_until = len(self._token_ids) + PAUSE_TOKENS
