"""How answers are read and bound: the part of the engine's contract that ends where text begins to mean something.

It runs in the server's process, beside the request's actor: the engine knows tokens and their texts and nothing of what
they say. Imports neither torch nor a tokenizer.
"""

from typing import Any, Protocol

from gptoss.messages.answer import AnswerShape, Part


class OutputParser(Protocol):
    """Turns the tokens of one answer into its parts.

    Pure: the parts, put together, are a function of the tokens and their texts, however those were cut. Never raises: what
    it cannot read is text.
    """

    @property
    def reasoning_tokens(self) -> int:
        """Tokens of thoughts so far."""
        ...

    @property
    def num_calls(self) -> int:
        """Tool calls so far."""
        ...

    def push(self, token_id: int | None, text: str) -> list[Part]:
        """Take a token, None for text that came without one, and return what is now certain."""
        ...

    def finish(self) -> list[Part]:
        """What was still held back, at the end of the answer."""
        ...


class Dialect(Protocol):
    """How the model's family writes thoughts and tool calls."""

    def opens_reasoning(self, prompt: str) -> bool:
        """Whether a prompt, as text, ends inside of a thought."""
        ...

    def parser(
        self, tools: tuple[dict[str, Any], ...], shape: AnswerShape, *, opens_reasoning: bool, request_id: str
    ) -> OutputParser:
        """A parser for the answer to one request; the ids of its calls are derived from ``request_id``."""
        ...

    def grammar(self, tools: tuple[dict[str, Any], ...], shape: AnswerShape, *, opens_reasoning: bool) -> str:
        """The grammar of the whole answer; empty if nothing binds it. Takes up to some hundredths of a second.

        Raises:
            RequestError: what is asked for cannot be enforced.
        """
        ...
