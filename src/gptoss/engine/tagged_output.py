"""The output of models that mark thoughts and tool calls by tags in their text, as typed parts.

    <think> thoughts </think> text <tool_call> {"name": ..., "arguments": {...}} </tool_call>

Rules:
- Pure: the parts depend on the tokens and their texts alone, and put together not on how those were cut.
- Never raises. A tag that is not closed, a call that is no JSON or calls no offered tool: all of it comes back as text.
- Text is held back only while it may be the beginning of a tag, and white space while a tag may follow: space around
  tags belongs to nobody.
- Tags that are special tokens have no text of their own; they are given theirs again here.
"""

from collections.abc import Mapping

import msgspec

from gptoss.engine.call_ids import CallIds
from gptoss.engine.call_json import CallReader, Read
from gptoss.messages.answer import CallPart, Part, TextPart, joined


class CallTags(msgspec.Struct, frozen=True, kw_only=True):
    """How a model marks tool calls.

    Attributes:
        opening, closing: around them; without ``closing`` they go on to the end of the answer.
        is_bare_json: an answer that begins with ``{`` is a call as well.
        id_chars: length of the ids that its template takes; 0 leaves it free.
    """

    opening: str
    closing: str = ""
    is_bare_json: bool = False
    id_chars: int = 0


class TagFormat(msgspec.Struct, frozen=True, kw_only=True):
    """How a model marks thoughts and calls. ``think`` is the pair of tags around thoughts, None without any."""

    think: tuple[str, str] | None = None
    calls: CallTags | None = None


class TaggedParser:
    """``engine.port.OutputParser`` of one answer.

    Args:
        tags: what to look for.
        names: of the offered tools; without any, calls are text.
        texts: of the special tokens that are tags, by id.
        is_reasoning: the prompt ended inside of a thought.
        call_ids: names the calls.
    """

    def __init__(
        self,
        tags: TagFormat,
        names: frozenset[str],
        texts: Mapping[int, str],
        call_ids: CallIds,
        *,
        is_reasoning: bool,
    ) -> None:
        self.reasoning_tokens = 0
        self.num_calls = 0
        self._think = tags.think
        self._calls = tags.calls if names else None
        self._again = tags.calls.opening if tags.calls and not tags.calls.closing else ""
        self._names = names
        self._texts = texts
        self._call_ids = call_ids
        self._is_reasoning = is_reasoning
        self._reader: CallReader | None = None
        self._buffer = ""
        self._space = ""  # held back: before a tag it is dropped
        self._has_text = False  # of the thought or the visible text that is being read
        self._drops_space = is_reasoning
        self._is_plain = not (self._think or self._calls or is_reasoning)  # no tag means anything: all of it is text
        self._found: list[Part] = []

    def push(self, token_id: int | None, text: str) -> list[Part]:
        """See ``engine.port.OutputParser``."""
        was_reasoning = self._is_reasoning
        more = text + self._texts.get(token_id, "") if token_id is not None else text
        if self._is_plain:
            return [TextPart("content", more)] if more else []
        if more:
            self._read(more)
        if token_id is not None and was_reasoning and self._is_reasoning:
            self.reasoning_tokens += 1
        return self._take()

    def finish(self) -> list[Part]:
        """See ``engine.port.OutputParser``."""
        if self._reader:
            self._note(self._reader.finish())
            self._reader = None
        self._emit(self._buffer)
        self._buffer = ""
        if self._space and not self._drops_space:
            self._found.append(self._part(self._space))
            self._space = ""
        return self._take()

    def _part(self, text: str) -> TextPart:
        return TextPart("reasoning" if self._is_reasoning else "content", text)

    def _take(self) -> list[Part]:
        found, self._found = joined(self._found), []
        return found

    def _read(self, text: str) -> None:
        while text or (self._reader is None and self._buffer):
            if self._reader:
                self._note(self._reader.feed(text))
                if self._reader.rest is None:
                    return
                text, self._reader = self._reader.rest, None
                continue
            self._buffer += text
            text = ""
            if not self._read_text():
                return

    def _read_text(self) -> bool:
        """Read the buffer up to a tag. False when it holds none."""
        if self._opens_bare():
            return True
        tags = self._tags()
        places = [(place, tag) for tag in tags if (place := self._find(tag)) >= 0]
        if not places:
            keep = max((_overlap(self._buffer, tag) for tag in tags), default=0)
            split = len(self._buffer) - keep
            self._emit(self._buffer[:split])
            self._buffer = self._buffer[split:]
            return False
        place, tag = min(places)
        self._emit(self._buffer[:place])
        self._buffer = self._buffer[place + len(tag) :]
        self._enter(tag)
        return True

    def _find(self, tag: str) -> int:
        place = self._buffer.find(tag)
        begins_thought = self._think is not None and tag == self._think[0]
        return -1 if begins_thought and self._buffer[: max(place, 0)].strip() else place

    def _tags(self) -> list[str]:
        """The tags that mean something here."""
        if self._is_reasoning:
            assert self._think is not None
            return [self._think[1]]
        tags = [self._calls.opening] if self._calls else []
        if self._think and not self._has_text and not self.num_calls:
            tags.append(self._think[0])
        return tags

    def _enter(self, tag: str) -> None:
        if self._calls and not self._is_reasoning and tag == self._calls.opening:
            self._open(self._space + tag)
        else:
            self._space, self._drops_space = "", True
            self._is_reasoning = not self._is_reasoning
            self._has_text = False

    def _opens_bare(self) -> bool:
        begins = self._buffer.lstrip()[:1]
        if not (self._calls and self._calls.is_bare_json) or begins != "{" or self._has_text or self._is_reasoning:
            return False
        self._open(self._space)
        return True

    def _open(self, opening: str) -> None:
        assert self._calls is not None
        self._space = ""
        reader = self._reader = CallReader(opening, self._calls.closing, self._names, self._again)
        buffer, self._buffer = self._buffer, ""
        self._note(reader.feed(buffer))
        if reader.rest is not None:
            self._reader, self._buffer = None, reader.rest

    def _note(self, reads: list[Read]) -> None:
        for what, text in reads:
            if what == "call":
                call_id = self._call_ids.of(self.num_calls)
                self._found.append(CallPart(self.num_calls, name=text, call_id=call_id))
                self.num_calls += 1
                self._space, self._drops_space, self._has_text = "", True, False
            elif what == "arguments":
                self._found.append(CallPart(self.num_calls - 1, arguments=text))
            else:
                self._emit(text)
                self._has_text = True  # a section that was none is not looked for again

    def _emit(self, text: str) -> None:
        """Pass text on, but for white space that may stand before a tag."""
        if self._drops_space:
            text = text.lstrip()
        if not text:
            return
        self._drops_space = False
        if self._think or self._calls:
            text = self._space + text
            shown = text.rstrip()
            self._space = text[len(shown) :]
            text = shown
        if text:
            self._has_text = True
            self._found.append(self._part(text))


def _overlap(text: str, tag: str) -> int:
    """Length of the longest end of ``text`` that is a beginning of ``tag``."""
    return next((size for size in range(min(len(text), len(tag) - 1), 0, -1) if tag.startswith(text[-size:])), 0)
