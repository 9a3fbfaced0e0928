"""The output of gpt-oss, which is written in harmony, as typed parts.

    [<|start|>] role [to=recipient] [<|channel|> channel [to=recipient]] [<|constrain|> type] <|message|> text <|end|>

    state     on <|start|>   <|channel|>     <|message|>    text            <|end|> <|call|> <|return|> <|endoftext|>
    header    new header     channel part    read header    more of it      give its text back, between
    content   new header     new header      ignored        more of it      between
    between   new header     new header      plain content  plain content   ignored

The prompt ends with ``<|start|>assistant``, so an answer begins inside a header.

Rules:
- Every state takes every token and nothing raises: what makes no sense as structure is text. No header is so broken that
  the text behind it is lost.
- Pure: the parts depend on the tokens and their texts alone, and put together not on how those were cut.
- ``analysis`` is reasoning; a recipient that is an offered tool makes a call, on whichever channel and in whichever part
  of the header it stands, bare or as ``functions.name``; everything else is visible.

The texts come from the engine's detokenizer, not from the harmony library's parser: they are cut at stop strings and never
split a character, and that parser raises on a part of what a model can write. A test holds the two side by side.

Source: openai/harmony, docs/format.md.
"""

import re
from typing import Literal

from gptoss.engine.call_ids import CallIds
from gptoss.messages.answer import CallPart, Part, TextPart

ENDOFTEXT = 199999
RETURN = 200002
CONSTRAIN = 200003
CHANNEL = 200005
START = 200006
END = 200007
MESSAGE = 200008
CALL = 200012
ENDS = (END, CALL, RETURN, ENDOFTEXT)

HEADER_CHARS_MAX = 256
"""A header is a role, a channel and a name of at most 64 characters; what grows beyond this is an answer without one."""
CHANNELS = ("analysis", "commentary", "final")
NAMESPACE = "functions."
PARTING = "\n\n"
"""Stands between two messages that become one text."""

_RECIPIENT = re.compile(r"\bto=([^\s<]+)|(?<![^\s])(functions\.[^\s<]+)")
_ROLE_PART = re.compile(r"\s*(?:assistant)?\s*(?:to=\S*)?\s*")
_CHANNEL_PART = re.compile(rf"\s*(?:{'|'.join(CHANNELS)})?\b\s*(?:to=\S*)?\s*")
_TYPE_PART = re.compile(r"\s*(?:json|code)?\b\s*")


class HarmonyParser:
    """``engine.port.OutputParser`` of one answer.

    Args:
        names: of the offered tools.
        call_ids: names the calls.
    """

    def __init__(self, names: frozenset[str], call_ids: CallIds) -> None:
        self.reasoning_tokens = 0
        self.num_calls = 0
        self._names = names
        self._call_ids = call_ids
        self._state: Literal["header", "content", "between"] = "header"
        self._header = [""]  # the role's part, then one for each <|channel|> or <|constrain|>
        self._kind: Literal["content", "reasoning", "call"] = "content"
        self._parting = {"content": "", "reasoning": ""}
        self._is_new = False  # nothing of this message was passed on yet
        self._found: list[Part] = []

    def push(self, token_id: int | None, text: str) -> list[Part]:
        """See ``engine.port.OutputParser``."""
        if text:
            self._text(text)
        if token_id is not None:
            self._token(token_id)
        found, self._found = self._found, []
        return found

    def finish(self) -> list[Part]:
        """See ``engine.port.OutputParser``."""
        self._close()
        found, self._found = self._found, []
        return found

    # ---- transitions

    def _token(self, token_id: int) -> None:
        if token_id == START:
            self._close()
            self._open_header("")
        elif token_id in ENDS:
            self._close()
        elif token_id in (CHANNEL, CONSTRAIN, MESSAGE):
            self._header_token(token_id)
        elif self._state == "content" and self._kind == "reasoning":
            self.reasoning_tokens += 1

    def _header_token(self, token_id: int) -> None:
        if token_id == CHANNEL and self._state != "header":
            self._close()
            self._open_header("assistant")
        if self._state == "header":
            if token_id == MESSAGE:
                self._read_header()
            else:
                self._header.append("channel " if token_id == CHANNEL else "type ")
        elif token_id == MESSAGE and self._state == "between":
            self._begin("content")

    def _text(self, text: str) -> None:
        if self._state == "between":
            self._begin("content")
        if self._state == "content":
            self._emit(text)
            return
        self._header[-1] += text
        if sum(map(len, self._header)) > HEADER_CHARS_MAX:
            self._give_header_back()

    def _close(self) -> None:
        """End the message, or the header that no message followed."""
        if self._state == "header":
            self._give_header_back()
        self._state = "between"

    def _open_header(self, role: str) -> None:
        self._state, self._header = "header", [role]

    def _begin(self, kind: Literal["content", "reasoning"]) -> None:
        self._state, self._kind, self._is_new = "content", kind, True

    # ---- headers

    def _read_header(self) -> None:
        words = " ".join(self._header)
        recipient = _RECIPIENT.search(words)
        name = (recipient[1] or recipient[2]).removeprefix(NAMESPACE) if recipient else ""
        if name in self._names:
            self._state, self._kind = "content", "call"
            self._found.append(CallPart(self.num_calls, name=name, call_id=self._call_ids.of(self.num_calls)))
            self.num_calls += 1
        else:
            self._begin(self._header_kind())

    def _header_kind(self) -> Literal["content", "reasoning"]:
        channels = [part.removeprefix("channel ").split()[:1] for part in self._header if part.startswith("channel ")]
        return "reasoning" if channels and channels[-1] == ["analysis"] else "content"

    def _give_header_back(self) -> None:
        """Nothing made this a header: whatever of it no header would have is text."""
        texts: list[str] = []
        for part in self._header:
            name, _, rest = part.partition(" ")
            pattern = {"channel": _CHANNEL_PART, "type": _TYPE_PART}.get(name if part is not self._header[0] else "")
            whole = rest if pattern else part
            match = (pattern or _ROLE_PART).match(whole)
            texts.append(whole[match.end() :] if match else whole)
        self._begin(self._header_kind())
        text = "".join(texts)
        if text:
            self._emit(text)

    # ---- content

    def _emit(self, text: str) -> None:
        if self._kind == "call":
            self._found.append(CallPart(self.num_calls - 1, arguments=text))
            return
        if self._is_new:
            text = self._parting[self._kind] + text
            self._parting[self._kind] = PARTING
            self._is_new = False
        self._found.append(TextPart(self._kind, text))
