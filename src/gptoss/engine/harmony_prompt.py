"""Conversations as prompts for gpt-oss, by the harmony library.

    system      what the model is, the date, ``Reasoning: low|medium|high``, the channels
    developer   the caller's system messages as instructions, and the tools as namespace ``functions``
    then        user, assistant (analysis, commentary, calls, final) and tool messages in turn

Rules:
- Special tokens that a message, a name or a schema spells are ordinary text: the library encodes all content as such.
- Thoughts of the assistant are kept only as long as no final answer follows them: they belong to the tool calls of the turn
  that is going on. The library would keep those of the second turn.
- Nothing is downloaded: oss-harmony carries the vocabulary in itself, where openai-harmony would fetch it. It is held
  against the model's own tokenizer once, at load.
- Imported only for such models: the library takes half a second.
"""

import importlib.metadata
import re
from collections.abc import Iterator
from typing import Any, cast

import openai_harmony as harmony
from tokenizers import Tokenizer

from gptoss.engine.panics import panics_become
from gptoss.engine.port import ChatMessage
from gptoss.errors import ModelLoadError, RequestError

Json = dict[str, Any]

LIBRARY = f"oss-harmony {importlib.metadata.version('oss-harmony')}"
PROBE = (
    "<|start|>system<|message|>Straße 12345 naïve 日本語の文章 привет \U0001f5fc\r\n\t  def f(x):\n    return {'a': [x]}<|end|>"
    "<|start|>assistant<|channel|>commentary to=functions.f <|constrain|>json<|call|><|return|><|endoftext|>"
)
"""Of many scripts and all of the structure: two vocabularies that agree on this are one."""
REFERENCES_MAX = 200
DEFINITIONS = ("$defs", "definitions")
CALL_TYPE = "<|constrain|>json"
HarmonyError = cast("type[Exception]", harmony.HarmonyError)  # pyright: ignore[reportUnknownMemberType] - the library's extension has no types
EFFORTS = {
    "low": harmony.ReasoningEffort.LOW,
    "": harmony.ReasoningEffort.MEDIUM,
    "medium": harmony.ReasoningEffort.MEDIUM,
    "high": harmony.ReasoningEffort.HIGH,
}

_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")


def load_encoding(tokenizer: Tokenizer) -> harmony.HarmonyEncoding:
    """The library's encoding.

    Raises:
        ModelLoadError: ``tokenizer`` gives other ids to text than the library does.
    """
    try:
        encoding = harmony.load_harmony_encoding(harmony.HarmonyEncodingName.HARMONY_GPT_OSS)
    except HarmonyError as error:
        raise ModelLoadError(f"the harmony library cannot load its vocabulary: {error}") from None
    theirs = encoding.encode(PROBE, allowed_special="all")
    if tokenizer.encode(PROBE, add_special_tokens=False).ids != theirs:
        raise ModelLoadError("the tokenizer has harmony's special tokens, but its vocabulary is not the one of gpt-oss")
    return encoding


class HarmonyPrompt:
    """Renders conversations. Thread-safe.

    Args:
        tokenizer: of the model; its vocabulary must be the one of gpt-oss.

    Attributes:
        library: name and version of what renders.
    """

    library = LIBRARY

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._encoding = load_encoding(tokenizer)
        self._config = harmony.RenderConversationConfig(auto_drop_analysis=False)

    def render(
        self,
        messages: tuple[ChatMessage, ...],
        tools: tuple[Json, ...],
        *,
        date: str,
        reasoning_effort: str,
        add_generation_prompt: bool = True,
    ) -> tuple[int, ...]:
        """Token ids of the conversation, up to where the assistant's next message begins unless that is not wanted.

        Raises:
            RequestError: a message cannot be said in harmony.
        """
        if reasoning_effort not in EFFORTS:
            raise RequestError(
                f"reasoning_effort is {reasoning_effort!r}; this model knows low, medium and high",
                param="reasoning_effort",
            )
        system = (
            harmony.SystemContent.new()
            .with_reasoning_effort(EFFORTS[reasoning_effort])
            .with_conversation_start_date(date)
        )
        said = [harmony.Message.from_role_and_content(harmony.Role.SYSTEM, system)]
        num_leading = next((i for i, each in enumerate(messages) if each.role != "system"), len(messages))
        said += _developer("\n\n".join(each.content or "" for each in messages[:num_leading]), tools)
        said += _turns(messages[num_leading:])
        conversation = harmony.Conversation.from_messages(said)
        refused = RequestError("the harmony library fails on these messages", param="messages")
        try:
            with panics_become(refused):
                return self._tokens(conversation, add_generation_prompt=add_generation_prompt)
        except (HarmonyError, UnicodeError) as error:
            raise RequestError(f"the messages cannot be rendered: {str(error)[:200]}", param="messages") from None

    def _tokens(self, conversation: harmony.Conversation, *, add_generation_prompt: bool) -> tuple[int, ...]:
        if not add_generation_prompt:
            return tuple(self._encoding.render_conversation(conversation, config=self._config))
        role = harmony.Role.ASSISTANT
        return tuple(self._encoding.render_conversation_for_completion(conversation, role, config=self._config))


def _developer(instructions: str, tools: tuple[Json, ...]) -> list[harmony.Message]:
    if not instructions and not tools:
        return []
    content = harmony.DeveloperContent.new()
    if instructions:
        content = content.with_instructions(instructions)
    if tools:
        content = content.with_function_tools([_tool(tool) for tool in tools])
    return [harmony.Message.from_role_and_content(harmony.Role.DEVELOPER, content)]


def _tool(tool: Json) -> harmony.ToolDescription:
    function: Any = tool.get("function")
    details = cast("Json", function) if isinstance(function, dict) else {}
    name = _checked_name(str(details.get("name", "")))
    parameters: Any = details.get("parameters")
    schema = inlined(cast("Json", parameters)) if isinstance(parameters, dict) else None
    return harmony.ToolDescription(name=name, description=str(details.get("description") or ""), parameters=schema)


def _turns(messages: tuple[ChatMessage, ...]) -> Iterator[harmony.Message]:
    last_final = max(
        (i for i, each in enumerate(messages) if each.role == "assistant" and not each.tool_calls), default=-1
    )
    called: dict[str, str] = {}  # call id -> name
    for index, message in enumerate(messages):
        if message.role == "system":
            yield from _developer(message.content or "", ())
        elif message.role == "assistant":
            called |= {str(call.get("id", "")): _call(call)[0] for call in message.tool_calls}
            yield from _assistant(message, keeps_thoughts=index > last_final)
        elif message.role == "tool":
            name = message.name or called.get(message.tool_call_id or "")
            if name is None:
                raise RequestError(
                    f"a tool message answers call {message.tool_call_id!r}, which no message before it made",
                    param="messages",
                )
            author = harmony.Author.new(harmony.Role.TOOL, f"functions.{_checked_name(name)}")
            answer = harmony.Message.from_author_and_content(author, message.content or "")
            yield answer.with_channel("commentary").with_recipient("assistant")
        else:
            yield harmony.Message.from_role_and_content(harmony.Role.USER, message.content or "")


def _assistant(message: ChatMessage, *, keeps_thoughts: bool) -> Iterator[harmony.Message]:
    def said(text: str) -> harmony.Message:
        return harmony.Message.from_role_and_content(harmony.Role.ASSISTANT, text)

    if message.reasoning and keeps_thoughts:
        yield said(message.reasoning).with_channel("analysis")
    if message.content or not message.tool_calls:
        yield said(message.content or "").with_channel("commentary" if message.tool_calls else "final")
    for call in message.tool_calls:
        name, arguments = _call(call)
        made = said(arguments).with_channel("commentary").with_recipient(f"functions.{name}")
        yield made.with_content_type(CALL_TYPE)


def _call(call: Json) -> tuple[str, str]:
    function: Any = call.get("function")
    details = cast("Json", function) if isinstance(function, dict) else {}
    return _checked_name(str(details.get("name", ""))), str(details.get("arguments") or "{}")


def _checked_name(name: str) -> str:
    """``name``, which stands in a header and so must not hold anything that means something there."""
    if not _NAME.fullmatch(name):
        raise RequestError(f"the tool name {name[:80]!r} is not of the form [A-Za-z0-9_-]{{1,64}}", param="tools")
    return name


def inlined(schema: Json) -> Json:
    """``schema`` with its local references replaced by what they name, because the library shows them as ``any``.

    A reference inside of what it names itself stays, and so does everything after ``REFERENCES_MAX`` of them.
    """
    left = [REFERENCES_MAX]
    definitions = {
        f"#/{key}/{name}": value
        for key in DEFINITIONS
        if isinstance(schema.get(key), dict)
        for name, value in cast("Json", schema[key]).items()
    }

    def walk(value: Any, inside: frozenset[str]) -> Any:
        if isinstance(value, list):
            return [walk(item, inside) for item in cast("list[Any]", value)]
        if not isinstance(value, dict):
            return value
        fields = cast("Json", value)
        target = fields.get("$ref")
        if isinstance(target, str) and target in definitions and target not in inside and left[0] > 0:
            left[0] -= 1
            others = {key: item for key, item in fields.items() if key not in ("$ref", *DEFINITIONS)}
            found = walk(definitions[target], inside | {target})
            return {**cast("Json", found), **others} if isinstance(found, dict) else found
        return {key: walk(item, inside) for key, item in fields.items() if key not in DEFINITIONS}

    return cast("Json", walk(schema, frozenset()))
