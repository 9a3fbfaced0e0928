"""Bytes of a body -> the wire type of its endpoint, or an error that names the field at fault.

Rules:
- A recursive parser never sees deep nesting. That is found out in a fixed number of passes at the speed of C, however
  the body is made: strings are cut out, then brackets, and each pass takes away the innermost pairs.
- A top-level field that the type does not list is reported by name, never refused here: clients are newer than servers.
"""

import re
from typing import Generic, TypeVar

import msgspec

from gptoss.errors import RequestError

MAX_DEPTH = 64
MAX_CONTAINERS = 20_000
MAX_STRINGS = 200_000
"""Arrays and objects, and strings, in one body: they bound the work of looking at it."""

_BODY_PARAM = "body"
_PATH = re.compile(r"(?P<reason>.*) - at (?:`key` in )?`\$\.?(?P<path>[^`]*)`\Z", re.DOTALL)
_MISSING = re.compile(r"Object missing required field `(?P<field>\w+)`\Z")
_NO_BRACKETS = bytes(byte for byte in range(256) if byte not in b"[]{}")
_TO_SQUARE = bytes.maketrans(b"{}", b"[]")

_Wire = TypeVar("_Wire", bound=msgspec.Struct)
_Any = TypeVar("_Any")
_fields_decoder = msgspec.json.Decoder(dict[str, msgspec.Raw])


class BodyDecoder(Generic[_Wire]):
    """Reads the bodies of one endpoint.

    Args:
        wire_type: the msgspec type of a body.
    """

    def __init__(self, wire_type: type[_Wire]) -> None:
        self.wire_type = wire_type
        self._decoder = msgspec.json.Decoder(wire_type)
        self._known = frozenset(wire_type.__struct_fields__)

    def decode(self, body: bytes) -> tuple[_Wire, dict[str, msgspec.Raw]]:
        """Read a body.

        Returns:
            What it holds, and the top-level fields that this server does not know.

        Raises:
            RequestError: the body is not JSON of that shape; ``param`` names the field at fault, such as
                ``messages[0].role``, or is ``body`` when the fault lies in no field.
        """
        _check_utf8(body)
        check_depth(body)
        wire = _decode(self._decoder, body)
        fields = _decode(_fields_decoder, body)
        return wire, {name: fields[name] for name in sorted(fields.keys() - self._known)}


def check_depth(body: bytes) -> None:
    """Refuse deep nesting before a recursive parser sees it.

    Raises:
        RequestError: arrays and objects nest more than ``MAX_DEPTH`` deep, or there are over ``MAX_CONTAINERS`` of
            them or over ``MAX_STRINGS`` strings.
    """
    if body.count(b"[") + body.count(b"{") <= MAX_DEPTH:
        return
    if b"\\" in body:
        body = body.replace(b"\\\\", b"").replace(b'\\"', b"")
    if body.count(b'"') > 2 * MAX_STRINGS:
        raise RequestError(f"the body holds more than {MAX_STRINGS} strings", param=_BODY_PARAM)
    outside_strings = b"".join(body.split(b'"')[::2])
    brackets = outside_strings.translate(_TO_SQUARE, _NO_BRACKETS)
    if brackets.count(b"[") > MAX_CONTAINERS:
        raise RequestError(f"the body holds more than {MAX_CONTAINERS} arrays and objects", param=_BODY_PARAM)
    for _ in range(MAX_DEPTH):
        if not brackets:
            return
        brackets = brackets.replace(b"[]", b"")
    # Brackets that do not match are left over too; where they do not nest deep, the parser says what is wrong.
    if brackets.count(b"[") > MAX_DEPTH or b"[]" in brackets:
        raise RequestError(f"the body nests more than {MAX_DEPTH} levels deep", param=_BODY_PARAM)


def _check_utf8(body: bytes) -> None:
    """The parser looks only at the fields that it keeps; what it skips is to be text as well."""
    try:
        body.decode()
    except UnicodeDecodeError as error:
        raise RequestError(f"the body is not valid JSON in UTF-8: {error}", param=_BODY_PARAM) from None


def _decode(decoder: msgspec.json.Decoder[_Any], body: bytes) -> _Any:
    try:
        return decoder.decode(body)
    except msgspec.ValidationError as error:
        raise _explain(str(error)) from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise RequestError(f"the body is not valid JSON in UTF-8: {error}", param=_BODY_PARAM) from None


def _explain(message: str) -> RequestError:
    """Turn "Expected `str`, got `int` - at `$.messages[0].role`" into an error whose ``param`` is the field."""
    located = _PATH.match(message)
    reason = located["reason"] if located else message
    path = located["path"].removesuffix("[...]") if located else ""
    if missing := _MISSING.match(reason):
        path = f"{path}.{missing['field']}".lstrip(".")
        reason = "this field is required"
    if not path:
        return RequestError(f"the body does not fit: {reason}", param=_BODY_PARAM)
    return RequestError(f"{path}: {reason}", param=path)
