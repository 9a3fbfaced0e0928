"""One conversation of ``gptoss chat``: what was said, how answers are to be made, and the last answer.

A message that was not answered at all is not part of the conversation: nothing is sent twice without being typed twice.
"""

import contextlib
from typing import Any

import msgspec

from gptoss.cli.chat_client import Answer, ChatClient
from gptoss.cli.chat_screen import Screen


class ChatOptions(msgspec.Struct, frozen=True, kw_only=True):
    """What was asked for on the command line.

    Attributes:
        spec: the model that a server of the chat's own is to have; None for any.
    """

    spec: str | None = None
    url: str | None = None
    model: str | None = None
    api_key: str | None = None
    system: str | None = None
    temperature: float | None = None
    max_tokens: int | None = None


class Talk:
    """One conversation.

    Attributes:
        client: where it is held.
        model: the name that is asked for.
        system: instructions before it; empty for none.
        fields: of each request, as /set has them.
        turns: what was said.
        last: the last answer; None before the first.
    """

    def __init__(self, client: ChatClient, model: str, options: ChatOptions) -> None:
        self.client = client
        self.model = model
        self.system = options.system or ""
        given = {"temperature": options.temperature, "max_tokens": options.max_tokens}
        self.fields: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
        self.turns: list[dict[str, str]] = []
        self.last: Answer | None = None

    async def ask(self, text: str, screen: Screen) -> Answer:
        """Say something, and let the answer appear. Cancelling stops the answer and keeps what came.

        Raises:
            GptossError: the server refuses, fails, or is gone.
        """
        said = [{"role": "system", "content": self.system}] if self.system else []
        self.turns.append({"role": "user", "content": text})
        answer = self.last = Answer()
        body = {"model": self.model, "messages": [*said, *self.turns], **self.fields}
        try:
            async with contextlib.aclosing(self.client.ask(body, answer)) as pieces:
                async for piece in pieces:
                    screen.add(piece.kind, piece.text)
        finally:
            screen.end()
            if answer.text:
                self.turns.append({"role": "assistant", "content": answer.text})
            else:
                self.turns.pop()
        return answer
