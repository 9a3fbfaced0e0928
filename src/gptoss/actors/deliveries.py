"""What a request's actor and its executor tell each other, beside the engine port's own messages."""

import msgspec

from gptoss.engine.port import TokenLogprob


class TokensProduced(msgspec.Struct, frozen=True, kw_only=True):
    """From the executor: what one step produced for this request.

    ``stopped_by`` is the stop string that ended it: the client's text, which no command may hold.
    """

    attempt: int
    token_ids: tuple[int, ...]
    text: str
    logprobs: tuple[TokenLogprob, ...] = ()
    text_lengths: tuple[int, ...] = ()
    stopped_by: str = ""

    def pieces(self) -> list[tuple[int | None, str]]:
        """Each token with the text that came with it; text without a token last."""
        if len(self.token_ids) == 1:
            return [(self.token_ids[0], self.text)]
        at = 0
        found: list[tuple[int | None, str]] = []
        for token_id, length in zip(self.token_ids, self.text_lengths, strict=False):
            found.append((token_id, self.text[at : at + length]))
            at += length
        found += [(token_id, "") for token_id in self.token_ids[len(self.text_lengths) :]]
        if at < len(self.text):
            found.append((None, self.text[at:]))
        return found


class CancelInEngine(msgspec.Struct, frozen=True, kw_only=True):
    """To the executor: stop this request."""

    request_id: str
