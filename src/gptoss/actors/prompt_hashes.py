"""Keyed hashes of prompts: they say which are the same, to whoever has the key, and nothing else."""

import hashlib
import hmac

import msgspec

from gptoss.messages.commands import PREFIX_TOKENS

PREFIX_HEX = 16


def keyed_hash(key: bytes, value: object) -> str:
    """Hex of the hash of token ids, of text, or of a tuple of such."""
    return hmac.new(key, msgspec.msgpack.encode(value), hashlib.sha256).hexdigest()


def cache_salt(key: bytes, tenant: str, salt: str) -> str:
    """What a request's cached prefixes begin with: only the same salt of the same tenant gives the same; empty without both."""
    return keyed_hash(key, (tenant, salt)) if tenant or salt else ""


def prefix_hashes(key: bytes, salt: str, token_ids: tuple[int, ...]) -> tuple[str, ...]:
    """Hashes of ever longer beginnings, see ``PromptReady``.

    Powers of two: two conversations that part somewhere have more than half of that in common.
    """
    found: list[str] = []
    length = PREFIX_TOKENS
    while length <= len(token_ids):
        found.append(keyed_hash(key, (salt, token_ids[:length]))[:PREFIX_HEX])
        length *= 2
    return tuple(found)
