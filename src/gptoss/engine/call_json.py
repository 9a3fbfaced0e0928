"""Reads tool calls that a model writes as JSON, as they come, and leaves what is no call as text.

    {"name": "f", "arguments": {...}}      Hermes, Qwen; Llama says ``parameters``
    [{...}, {...}]   {...}; {...}          several, as Mistral and Llama write them
    f[ARGS]{...}[TOOL_CALLS]g[ARGS]{...}   newer Mistral tokenizers

Rules:
- Arguments are passed on as the model wrote them, without waiting for their end, once the name is known and one of the
  offered tools. A call whose keys come in another order is passed on when it is whole.
- Never raises. What cannot become a call of an offered tool is given back, not one character lost.
"""

import re
from typing import Any, Literal, TypeAlias, cast

import msgspec

NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
HEAD_CHARS_MAX = 200
"""More than the longest head of a call without its object can have."""

_HEAD = re.compile(
    r'\{\s*(?:"type"\s*:\s*"function"\s*,\s*)?"name"\s*:\s*"([A-Za-z0-9_-]{1,64})"\s*,\s*'
    r'"(?:arguments|parameters)"\s*:\s*(?=\{)'
)
_BARE_HEAD = re.compile(r"([A-Za-z0-9_-]{1,64})(?:\[CALL_ID\][A-Za-z0-9_-]*)?(?:\[ARGS\])?\s*(?=\{)")
_BARE_HEAD_SO_FAR = re.compile(r"[A-Za-z0-9_-]{1,64}(?:\[[A-Za-z0-9_\[\]-]*)?\s*")
_SPACE = re.compile(r"\s*")
_SEPARATORS = re.compile(r"[\s,;\[\]]*")
_BRACKET = re.compile(r'["{}\[\]]')
_STRING_END = re.compile(r'["\\]')

Read: TypeAlias = tuple[Literal["call", "arguments", "text"], str]
"""What came of the text: a call's name, more of its arguments, or text that is no call."""


class ObjectEnd:
    """Finds where a JSON object ends in text that comes bit by bit. ``depth`` brackets are open at the start."""

    def __init__(self, depth: int = 0) -> None:
        self._depth = depth
        self._in_string = False
        self._is_escaped = False

    def find(self, text: str) -> int | None:
        """Index behind the end of the object in ``text``, which goes on where the last one stopped; None before that."""
        at = 0
        while at < len(text):
            if self._is_escaped:
                self._is_escaped = False
                at += 1
                continue
            match = (_STRING_END if self._in_string else _BRACKET).search(text, at)
            if match is None:
                return None
            at = match.end()
            if match[0] == '"':
                self._in_string = not self._in_string
            elif match[0] == "\\":
                self._is_escaped = True
            else:
                self._depth += 1 if match[0] in "{[" else -1
                if self._depth <= 0:
                    return at
        return None


class CallReader:
    """Reads the calls of one section of the output.

    Args:
        opening: what began the section; given back as text if no call comes of it.
        closing: what ends it; empty if nothing but the end of the answer does.
        names: of the offered tools.
        again: what may stand before each further call of the section; empty for nothing.

    Attributes:
        rest: what follows the section, once it is over.
    """

    def __init__(self, opening: str, closing: str, names: frozenset[str], again: str = "") -> None:
        self.rest: str | None = None
        self._again = again
        self._closing = closing
        self._names = names
        self._passed = opening  # read, but given back should no call follow
        self._buffer = ""
        self._arguments: ObjectEnd | None = None  # of the call that is being passed on
        self._wrapper: ObjectEnd | None = None  # around those arguments; its other keys are passed over
        self._object: ObjectEnd | None = None  # of a call that must be whole before it can be read
        self._num_scanned = 0

    def feed(self, text: str) -> list[Read]:
        """Take more of the output. Once ``rest`` is set, the section is over and takes no more."""
        self._buffer += text
        found: list[Read] = []
        while self.rest is None and self._buffer:
            if self._arguments:
                is_on = self._read_arguments(self._arguments, found)
            elif self._wrapper:
                is_on = self._leave_wrapper(self._wrapper)
            else:
                is_on = self._read_between(found)
            if not is_on:
                break
        return found

    def finish(self) -> list[Read]:
        """What is left at the end of the answer: text that did not become a call."""
        left = self._passed + self._buffer
        if self.rest is not None or self._arguments or self._wrapper or not left.strip(" \t\r\n,;[]"):
            return []
        return [("text", left)]

    def _read_arguments(self, arguments: ObjectEnd, found: list[Read]) -> bool:
        end = arguments.find(self._buffer)
        found.append(("arguments", self._buffer[:end]))
        self._buffer = "" if end is None else self._buffer[end:]
        if end is not None:
            self._arguments = None
        return end is not None

    def _leave_wrapper(self, wrapper: ObjectEnd) -> bool:
        end = wrapper.find(self._buffer)
        self._buffer = "" if end is None else self._buffer[end:]
        if end is not None:
            self._wrapper = None
        return end is not None

    def _read_between(self, found: list[Read]) -> bool:
        """Read what stands before a call. False when more of it is needed."""
        if self._object is None:
            self._pass(_SPACE)
            if self._again and self._buffer.startswith(self._again):
                self._pass(re.compile(re.escape(self._again)))
            if self._again.startswith(self._buffer):
                return False
            self._pass(_SEPARATORS)
        buffer = self._buffer
        if not buffer:
            return False
        if self._closing and buffer.startswith(self._closing):
            self.rest = buffer[len(self._closing) :]
            return False
        if self._closing and self._closing.startswith(buffer):
            return False
        if buffer[0] == "{":
            return self._read_object(found)
        head = _BARE_HEAD.match(buffer)
        if head:
            return self._begin(head, found, is_wrapped=False)
        if len(buffer) <= HEAD_CHARS_MAX and _BARE_HEAD_SO_FAR.fullmatch(buffer):
            return False
        return self._give_back(found)

    def _read_object(self, found: list[Read]) -> bool:
        head = _HEAD.match(self._buffer)
        if head:
            self._object = None
            return self._begin(head, found, is_wrapped=True)
        if self._object is None:
            self._object, self._num_scanned = ObjectEnd(), 0
        end = self._object.find(self._buffer[self._num_scanned :])
        if end is None:
            self._num_scanned = len(self._buffer)
            return False
        whole = self._buffer[: self._num_scanned + end]
        self._object = None
        call = whole_call(whole)
        if call is None or call[0] not in self._names:
            return self._give_back(found)
        self._buffer = self._buffer[len(whole) :]
        self._passed = ""
        found.append(("call", call[0]))
        found.append(("arguments", call[1]))
        return True

    def _begin(self, head: re.Match[str], found: list[Read], *, is_wrapped: bool) -> bool:
        if head[1] not in self._names:
            return self._give_back(found)
        self._buffer = self._buffer[head.end() :]
        self._passed = ""
        self._arguments = ObjectEnd()
        self._wrapper = ObjectEnd(depth=1) if is_wrapped else None
        found.append(("call", head[1]))
        return True

    def _pass(self, pattern: re.Pattern[str]) -> None:
        match = pattern.match(self._buffer)
        if match:
            self._passed += match[0]
            self._buffer = self._buffer[match.end() :]

    def _give_back(self, found: list[Read]) -> bool:
        """What stands here is no call: end the section with it."""
        found.append(("text", self._passed))
        self.rest, self._buffer, self._passed = self._buffer, "", ""
        return False


def whole_call(text: str) -> tuple[str, str] | None:
    """Name and arguments of a call that is there as a whole; None if it is none."""
    try:
        value = msgspec.json.decode(text)
    except (msgspec.DecodeError, UnicodeError, RecursionError):
        return None
    if not isinstance(value, dict):
        return None
    call = cast("dict[str, Any]", value)
    name = call.get("name")
    arguments = call.get("arguments", call.get("parameters", {}))
    if not isinstance(name, str):
        return None
    try:
        return name, arguments if isinstance(arguments, str) else msgspec.json.encode(arguments).decode()
    except (UnicodeError, RecursionError):
        return None
