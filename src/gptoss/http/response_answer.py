"""Responses as OpenAI writes them: the object, and the typed events of a stream.

    response.created, response.in_progress,
    for each item:  output_item.added, content_part.added, deltas, the text's done, content_part.done, output_item.done
    response.completed, response.incomplete or response.failed

Rules:
- ``id`` is ``resp_`` and the request's id. Events are numbered from 0 and each is framed under its own type.
- An item is made of the parts of one kind that follow each other. A stream and a whole answer go through the same
  items, so they cannot differ.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeAlias

import msgspec

from gptoss.actors.generation import Delta, Generation, Outcome
from gptoss.engine.port import TokenLogprob
from gptoss.errors import GptossError
from gptoss.http.answer_schema import TokenLogprobBody, chat_logprobs
from gptoss.http.answering import FinishedChoice
from gptoss.http.response_schema import (
    FunctionCallItem,
    IncompleteDetails,
    InputTokensDetails,
    ItemStatus,
    MessageItem,
    OutputItem,
    OutputText,
    OutputTokensDetails,
    ReasoningItem,
    ReasoningText,
    ResponseBody,
    ResponseFault,
    ResponseUsage,
    Status,
)
from gptoss.messages.answer import CallPart, Part

Emit = Callable[..., None]
TextKind: TypeAlias = Literal["content", "reasoning"]


class ResponseAnswer:
    """``Answer`` of responses.

    Args:
        generation: the one choice.
        body: the response as far as it is known before it begins.
        keep: takes the response that has ended.
    """

    def __init__(self, generation: Generation, body: ResponseBody, keep: Callable[[ResponseBody], None]) -> None:
        self._body = body
        self._keep = keep
        self._is_stream = False
        self._frames: list[bytes] = []
        self._num_events = 0
        self._output = _Output(generation.request_id, self._emit)

    def whole(self, choices: Sequence[FinishedChoice]) -> ResponseBody:
        """See ``Answer``."""
        (choice,) = choices
        self._output.add(choice.parts, choice.logprobs)
        return self._end(choice.outcome)

    def opened(self) -> bytes:
        """See ``Answer``."""
        self._is_stream = True
        self._emit("response.created", response=self._body)
        self._emit("response.in_progress", response=self._body)
        return self._taken()

    def delta(self, index: int, delta: Delta) -> bytes:
        """See ``Answer``."""
        del index
        self._output.add(delta.parts, delta.logprobs)
        return self._taken()

    def ended(self, index: int, outcome: Outcome) -> bytes:
        """See ``Answer``."""
        del index
        body = self._end(outcome)
        self._emit(f"response.{'completed' if body.status == 'completed' else 'incomplete'}", response=body)
        return self._taken()

    def closed(self) -> bytes:
        """See ``Answer``: the event before said that it was the last."""
        return b""

    def failed(self, error: GptossError) -> bytes:
        """See ``Answer``."""
        self._output.close("incomplete")
        fault = ResponseFault(error.code, error.message)
        body = msgspec.structs.replace(self._body, status="failed", error=fault, output=self._output.items)
        self._keep(body)
        self._emit("response.failed", response=body)
        return self._taken()

    def _end(self, outcome: Outcome) -> ResponseBody:
        status, details = _STATUSES[outcome.finish_reason or "stop"]
        self._output.end("completed" if status == "completed" else "incomplete")
        usage = outcome.usage
        body = msgspec.structs.replace(
            self._body,
            status=status,
            incomplete_details=details,
            output=self._output.items,
            usage=ResponseUsage(
                usage.prompt_tokens,
                usage.completion_tokens,
                usage.prompt_tokens + usage.completion_tokens,
                InputTokensDetails(usage.cached_tokens),
                OutputTokensDetails(usage.reasoning_tokens),
            ),
        )
        self._keep(body)
        return body

    def _emit(self, kind: str, **fields: Any) -> None:
        if not self._is_stream:
            return
        event = {"type": kind, "sequence_number": self._num_events, **fields}
        self._num_events += 1
        self._frames.append(b"event: %s\ndata: %s\n\n" % (kind.encode(), msgspec.json.encode(event)))

    def _taken(self) -> bytes:
        frames = b"".join(self._frames)
        self._frames.clear()
        return frames


_STATUSES: dict[str, tuple[Status, IncompleteDetails | None]] = {
    "stop": ("completed", None),
    "tool_calls": ("completed", None),
    "length": ("incomplete", IncompleteDetails("max_output_tokens")),
    "cancelled": ("cancelled", None),
}


class _Output:
    """The items of a response, as its parts come; at most the last one is open.

    Attributes:
        items: that are complete.
    """

    def __init__(self, request_id: str, emit: Emit) -> None:
        self.items: list[OutputItem] = []
        self._request_id = request_id
        self._emit = emit
        self._open: _OpenText | _OpenCall | None = None

    def add(self, parts: Sequence[Part], logprobs: Sequence[TokenLogprob]) -> None:
        """Take parts, and the logprobs of their tokens."""
        tokens = chat_logprobs(tuple(logprobs)).content
        for part in parts:
            if isinstance(part, CallPart):
                self._call(part).add(part.arguments)
            elif part.kind == "reasoning":
                self._text(part.kind).add(part.text, [])
            else:
                self._text(part.kind).add(part.text, tokens)
                tokens = []

    def close(self, status: ItemStatus) -> None:
        """Complete the item that is open, if one is."""
        if self._open is not None:
            self.items.append(self._open.done(status))
            self._open = None

    def end(self, status: ItemStatus) -> None:
        """Complete the output, which has one item at least, be it an empty message."""
        if self._open is None and not self.items:
            self._text("content")
        self.close(status)

    def _text(self, kind: TextKind) -> "_OpenText":
        if isinstance(self._open, _OpenText) and self._open.kind == kind:
            return self._open
        self.close("completed")
        self._open = opened = _OpenText(kind, len(self.items), self._request_id, self._emit)
        return opened

    def _call(self, part: CallPart) -> "_OpenCall":
        if isinstance(self._open, _OpenCall) and self._open.index == part.index:
            return self._open
        self.close("completed")
        self._open = opened = _OpenCall(part, len(self.items), self._request_id, self._emit)
        return opened


class _OpenText:
    """A message or a chain of thought that grows."""

    def __init__(self, kind: TextKind, output_index: int, request_id: str, emit: Emit) -> None:
        self.kind = kind
        self._emit = emit
        self._id = f"{'msg' if kind == 'content' else 'rs'}_{output_index}_{request_id}"
        self._place = {"output_index": output_index}
        self._where = {"item_id": self._id, "output_index": output_index, "content_index": 0}
        self._event = "response.output_text" if kind == "content" else "response.reasoning_text"
        self._texts: list[str] = []
        self._logprobs: list[TokenLogprobBody] = []
        emit("response.output_item.added", **self._place, item=self._item("in_progress", has_part=False))
        emit("response.content_part.added", **self._where, part=self._part())

    def add(self, text: str, logprobs: list[TokenLogprobBody]) -> None:
        self._texts.append(text)
        self._logprobs += logprobs
        self._emit(f"{self._event}.delta", **self._where, delta=text, **self._also(logprobs))

    def done(self, status: ItemStatus) -> OutputItem:
        item = self._item(status)
        self._emit(f"{self._event}.done", **self._where, text="".join(self._texts), **self._also(self._logprobs))
        self._emit("response.content_part.done", **self._where, part=self._part())
        self._emit("response.output_item.done", **self._place, item=item)
        return item

    def _also(self, logprobs: list[TokenLogprobBody]) -> dict[str, Any]:
        return {"logprobs": logprobs} if self.kind == "content" else {}

    def _part(self) -> OutputText | ReasoningText:
        text = "".join(self._texts)
        return OutputText(text, [], list(self._logprobs)) if self.kind == "content" else ReasoningText(text)

    def _item(self, status: ItemStatus, *, has_part: bool = True) -> OutputItem:
        content: list[Any] = [self._part()] if has_part else []
        if self.kind == "content":
            return MessageItem(self._id, status, content)
        return ReasoningItem(self._id, status, content)


class _OpenCall:
    """A function call that grows."""

    def __init__(self, first: CallPart, output_index: int, request_id: str, emit: Emit) -> None:
        self.index = first.index
        self._first = first
        self._emit = emit
        self._id = f"fc_{output_index}_{request_id}"
        self._where = {"item_id": self._id, "output_index": output_index}
        self._place = {"output_index": output_index}
        self._arguments: list[str] = []
        emit("response.output_item.added", **self._place, item=self._item("in_progress"))

    def add(self, arguments: str) -> None:
        if arguments:
            self._arguments.append(arguments)
            self._emit("response.function_call_arguments.delta", **self._where, delta=arguments)

    def done(self, status: ItemStatus) -> OutputItem:
        item = self._item(status)
        more = {"name": item.name, "arguments": item.arguments}
        self._emit("response.function_call_arguments.done", **self._where, **more)
        self._emit("response.output_item.done", **self._place, item=item)
        return item

    def _item(self, status: ItemStatus) -> FunctionCallItem:
        return FunctionCallItem(self._id, status, self._first.call_id, self._first.name, "".join(self._arguments))
