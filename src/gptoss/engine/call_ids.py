"""Ids of the tool calls of one answer: a function of the request, so that a replay names them alike."""

import hashlib

CALL_ID_CHARS = 24


class CallIds:
    """Args: ``seed`` is the request's id; ``num_chars`` the length that a template insists on, 0 for OpenAI's form."""

    def __init__(self, seed: str, num_chars: int = 0) -> None:
        self._seed = seed
        self._num_chars = num_chars

    def of(self, index: int) -> str:
        """The id of the answer's call number ``index``."""
        digest = hashlib.sha256(f"{self._seed}/{index}".encode()).hexdigest()
        return digest[: self._num_chars] if self._num_chars else f"call_{digest[:CALL_ID_CHARS]}"
