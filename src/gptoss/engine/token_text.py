"""Text and bytes of single tokens, for logprobs: a token need not be whole UTF-8, so its bytes are given as well."""

import functools
import re

from tokenizers import Tokenizer

_SPIECE_SPACE = "\u2581"
_BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class TokenText:
    """Spells tokens of one tokenizer."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._added = {token_id: token.content for token_id, token in tokenizer.get_added_tokens_decoder().items()}
        self._is_byte_level = "ByteLevel" in repr(tokenizer.decoder)

    def spell(self, token_id: int) -> tuple[str, bytes]:
        """The token as text, with U+FFFD for what is no character, and as bytes; empty for an id without a token."""
        raw = self._raw(token_id)
        return raw.decode(errors="replace"), raw

    def _raw(self, token_id: int) -> bytes:
        added = self._added.get(token_id)
        if added is not None:
            return added.encode()
        piece = self._tokenizer.id_to_token(token_id) or ""
        if self._is_byte_level:
            alphabet = byte_alphabet()
            return b"".join(bytes([alphabet[char]]) if char in alphabet else char.encode() for char in piece)
        byte = _BYTE_PIECE.fullmatch(piece)
        return bytes([int(byte[1], 16)]) if byte else piece.replace(_SPIECE_SPACE, " ").encode()


@functools.cache
def byte_alphabet() -> dict[str, int]:
    """The character that byte-level BPE writes for each byte, reversed.

    Source: ``bytes_to_unicode`` of GPT-2's encoder.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    alphabet = {chr(byte): byte for byte in printable}
    return alphabet | {chr(256 + index): byte for index, byte in enumerate(others)}
