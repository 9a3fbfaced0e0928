"""Beginnings of prompts as keyed hashes, so that the router knows equal ones without seeing a token."""

import hashlib
import hmac

import msgspec

from gptoss.messages.commands import PREFIX_TOKENS

PREFIX_HEX = 16


def prefix_hmacs(key: bytes, salt: str, token_ids: tuple[int, ...]) -> tuple[str, ...]:
    """Hashes of the first ``PREFIX_TOKENS`` tokens, of twice as many, and so on, as far as the prompt goes.

    Powers of two: two prompts that part somewhere have more than half of what they share in common here.

    Args:
        key: of the node.
        salt: of the prefix cache; another one shares nothing.
        token_ids: of the prompt.
    """
    found: list[str] = []
    length = PREFIX_TOKENS
    while length <= len(token_ids):
        digest = hmac.new(key, msgspec.msgpack.encode((salt, token_ids[:length])), hashlib.sha256).hexdigest()
        found.append(digest[:PREFIX_HEX])
        length *= 2
    return tuple(found)
