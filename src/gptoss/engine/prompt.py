"""From messages to token ids, with the model's own tokenizer and chat template.

Rules:
- Imports neither torch nor transformers: the control plane renders prompts and must start fast.
- For ordinary content the ids equal those of transformers' ``apply_chat_template``.
- A special token written inside a message, a tool or a name is ordinary text, whatever the template does with it:
  the text is marked with private-use characters before rendering, and what is marked is encoded as text after it. Marks
  are chosen so that they do not occur in the input; a token that lost one of its two marks still counts as marked.
- Only tokens that the tokenizer calls special are neutralised. Others, such as ``<think>`` in some models, are part of
  what a conversation legitimately repeats.
- Pure and thread-safe: one tokenizer reads special tokens, a second never does, and neither is changed after loading.
"""

import hashlib
import itertools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import msgspec
from tokenizers import Tokenizer

from gptoss.engine.answer_port import Dialect
from gptoss.engine.chat_template import PRIVATE_FIRST, PRIVATE_LAST, ChatTemplate, TemplateRefused
from gptoss.engine.dialect import HarmonyDialect, choose_dialect
from gptoss.engine.port import ChatMessage, RenderedPrompt
from gptoss.errors import ModelLoadError, RequestError

if TYPE_CHECKING:
    from gptoss.engine.harmony_prompt import HarmonyPrompt

Json = dict[str, Any]


def load_renderer(folder: str, tokenizer_folder: str | None = None) -> "TokenizerRenderer":
    """The renderer of a prepared model.

    Args:
        folder: the model's folder.
        tokenizer_folder: where ``tokenizer.json`` and the template are, when that is another folder.

    Raises:
        ModelLoadError: a file is missing or unreadable, or the chat template does not compile.
    """
    home = Path(tokenizer_folder or folder)
    settings = _read_json(home / "tokenizer_config.json")
    special_tokens = _named_tokens(_read_json(home / "special_tokens_map.json")) | _named_tokens(settings)
    tokenizer = load_tokenizer(str(home))
    return TokenizerRenderer(
        tokenizer,
        _textual(load_tokenizer(str(home))),
        templates={name: ChatTemplate(source) for name, source in _template_sources(home, settings).items()},
        special_tokens=special_tokens,
        eos_token_ids=eos_token_ids(folder, tokenizer, tokenizer_folder),
    )


def load_tokenizer(folder: str) -> Tokenizer:
    """The tokenizer of ``folder``, without the truncation and padding that its file may ask for.

    Raises:
        ModelLoadError: ``tokenizer.json`` is missing or unreadable.
    """
    path = Path(folder) / "tokenizer.json"
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # noqa: BLE001 - the edge to the Rust library, which raises bare exceptions
        raise ModelLoadError(f"cannot read {path}: {str(error)[:200]}") from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def eos_token_ids(folder: str, tokenizer: Tokenizer, tokenizer_folder: str | None = None) -> tuple[int, ...]:
    """Every token that ends a generation, ascending: what the generation config, the config and the tokenizer name."""
    found: set[int] = set()
    config = _read_json(Path(folder) / "config.json")
    text_config = config.get("text_config")
    sources = [_read_json(Path(folder) / "generation_config.json"), config]
    if isinstance(text_config, dict):
        sources.append(cast("Json", text_config))
    for source in sources:
        value = source.get("eos_token_id")
        values = cast("list[Any]", value) if isinstance(value, list) else [value]
        found.update(item for item in values if isinstance(item, int))
    eos = _named_tokens(_read_json(Path(tokenizer_folder or folder) / "tokenizer_config.json")).get("eos_token")
    token_id = tokenizer.token_to_id(eos) if eos else None
    return tuple(sorted(found if token_id is None else found | {token_id}))


class TokenizerRenderer:
    """``engine.port.Renderer`` over a Hugging Face tokenizer; ``load_renderer`` makes one.

    Args:
        tokenizer: reads special tokens in text.
        textual: the same tokenizer, set to take them as text.
        templates: by name; ``default``, and for some models ``tool_use``.
        special_tokens: ``bos_token`` and its kind, by the names that templates use.

    Attributes:
        tokenizer: the first of the two; do not change it.
        vocab_size: tokens of the tokenizer, added ones included.
        special_ids: ids of the special tokens.
        eos_token_ids: ids that end a generation.
        dialect: how the model's answers are read.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        textual: Tokenizer,
        *,
        templates: dict[str, ChatTemplate],
        special_tokens: dict[str, str],
        eos_token_ids: tuple[int, ...],
    ) -> None:
        added = tokenizer.get_added_tokens_decoder()
        special = {token_id: token.content for token_id, token in added.items() if token.special and token.content}
        self.tokenizer = tokenizer
        self.vocab_size = tokenizer.get_vocab_size(with_added_tokens=True)
        self.special_ids = frozenset(special)
        self.eos_token_ids = eos_token_ids
        self._templates = templates
        self._hashes = {name: hashlib.sha256(t.source.encode()).hexdigest() for name, t in templates.items()}
        self._special_tokens = special_tokens
        self._textual = textual
        longest_first = sorted(special.values(), key=len, reverse=True)
        self._special = "|".join(map(re.escape, longest_first)) or "(?!)"
        self._special_pattern = re.compile(self._special)
        self.dialect: Dialect = choose_dialect(tokenizer, "\n".join(template.source for template in templates.values()))
        self._harmony = _harmony(tokenizer) if isinstance(self.dialect, HarmonyDialect) else None
        uses_effort = any(template.uses_reasoning_effort for template in templates.values())
        self.takes_reasoning_effort = self._harmony is not None or uses_effort
        # SentencePiece tokenizers put a space before whatever starts a string; see _encode_piece.
        self._adds_prefix = tokenizer.encode("a", add_special_tokens=False).tokens[0].startswith("\u2581")

    def render_chat(
        self,
        messages: tuple[ChatMessage, ...],
        *,
        tools: tuple[dict[str, Any], ...],
        date: str,
        reasoning_effort: str = "",
        add_generation_prompt: bool = True,
    ) -> RenderedPrompt:
        """See ``engine.port.Renderer``."""
        if self._harmony:
            ids = self._harmony.render(
                messages,
                tools,
                date=date,
                reasoning_effort=reasoning_effort,
                add_generation_prompt=add_generation_prompt,
            )
            return RenderedPrompt(token_ids=ids, template=self._harmony.library)
        name = "tool_use" if tools and "tool_use" in self._templates else "default"
        template = self._templates.get(name)
        if template is None:
            raise RequestError("this model has no chat template; use /v1/completions", param="messages")
        if tools and not template.uses_tools:
            raise RequestError("the chat template of this model has no place for tools", param="tools")
        conversation: list[Json] = [_template_message(message) for message in messages]
        variables: Json = {"messages": conversation, "tools": list(tools) or None, "documents": None}
        start, end = _free_marks(variables)
        given = {**self._special_tokens, **self._mark(variables, start, end)}
        given["add_generation_prompt"] = add_generation_prompt
        if reasoning_effort:
            given["reasoning_effort"] = reasoning_effort
        try:
            text = template.render(given, date=date)
        except TemplateRefused as error:
            raise RequestError(f"the chat template refuses these messages: {error}", param="messages") from None
        return RenderedPrompt(
            token_ids=tuple(self._encode_marked(text, start, end)),
            template=self._hashes[name],
            opens_reasoning=self.dialect.opens_reasoning(text),
        )

    def encode(self, text: str, *, add_special_tokens: bool = True) -> tuple[int, ...]:
        """See ``engine.port.Renderer``."""
        return tuple(self._encode(self._textual, text, add_special_tokens=add_special_tokens))

    def decode(self, token_ids: tuple[int, ...], *, skip_special_tokens: bool = True) -> str:
        """See ``engine.port.Renderer``."""
        try:
            return self.tokenizer.decode(token_ids, skip_special_tokens=skip_special_tokens)
        except OverflowError:
            raise RequestError("a token id is negative or above 4294967295", param="tokens") from None

    def pieces(self, token_ids: tuple[int, ...]) -> tuple[str, ...]:
        """See ``engine.port.Renderer``."""
        return tuple(self.tokenizer.id_to_token(token_id) or "" for token_id in token_ids)

    def _mark(self, value: Any, start: str, end: str) -> Any:
        """``value`` with every special token inside its strings, keys included, between ``start`` and ``end``."""
        if isinstance(value, str):
            return self._special_pattern.sub(lambda match: f"{start}{match[0]}{end}", value)
        if isinstance(value, dict):
            pairs = cast("Json", value).items()
            return {self._mark(key, start, end): self._mark(item, start, end) for key, item in pairs}
        if isinstance(value, list | tuple):
            return [self._mark(item, start, end) for item in cast("list[Any]", value)]
        return value

    def _encode_marked(self, text: str, start: str, end: str) -> list[int]:
        # A template can cut a string between a token and one of its marks: one mark is enough, and a lone mark is
        # dropped but keeps the text on its two sides from joining into a token.
        pattern = re.compile(f"{start}({self._special}){end}?|({self._special}){end}|[{start}{end}]")
        ids: list[int] = []
        position = 0
        for match in pattern.finditer(text):
            ids += self._encode_piece(self.tokenizer, text[position : match.start()], is_first=position == 0)
            ids += self._encode_piece(self._textual, match[1] or match[2] or "", is_first=match.start() == 0)
            position = match.end()
        return ids + self._encode_piece(self.tokenizer, text[position:], is_first=position == 0)

    def _encode_piece(self, tokenizer: Tokenizer, piece: str, *, is_first: bool) -> list[int]:
        if not piece:
            return []
        if is_first or not self._adds_prefix:
            return self._encode(tokenizer, piece)
        # Behind a line break no prefix space is added; the break's own ids are taken off again.
        newline = self._encode(tokenizer, "\n")
        ids = self._encode(tokenizer, "\n" + piece)
        return ids[len(newline) :] if ids[: len(newline)] == newline else self._encode(tokenizer, piece)

    @staticmethod
    def _encode(tokenizer: Tokenizer, text: str, *, add_special_tokens: bool = False) -> list[int]:
        try:
            # The batch call releases the GIL, so that a long prompt does not stall the event loop; encode() holds it.
            return tokenizer.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids
        except (TypeError, UnicodeEncodeError):
            raise RequestError(
                "the text holds a lone surrogate, which is not valid Unicode", param="messages"
            ) from None


def _harmony(tokenizer: Tokenizer) -> "HarmonyPrompt":
    from gptoss.engine.harmony_prompt import HarmonyPrompt  # noqa: PLC0415 - half a second, for gpt-oss alone

    return HarmonyPrompt(tokenizer)


def _textual(tokenizer: Tokenizer) -> Tokenizer:
    tokenizer.encode_special_tokens = True
    return tokenizer


def _template_message(message: ChatMessage) -> Json:
    """The message under the names that templates read; absent fields are left out, as transformers does."""
    fields: Json = {"role": message.role}
    if message.reasoning is not None:
        fields |= dict.fromkeys(("reasoning", "reasoning_content", "thinking"), message.reasoning)
    for name in ("content", "name", "tool_call_id"):
        value = getattr(message, name)
        if value is not None:
            fields[name] = value
    if message.tool_calls:
        fields["tool_calls"] = [_template_call(call) for call in message.tool_calls]
    return fields


def _template_call(call: Json) -> Json:
    """A tool call with its arguments as an object: templates print them as JSON and would quote a string again."""
    function = call.get("function")
    if not isinstance(function, dict):
        return call
    details = cast("Json", function)
    arguments = details.get("arguments")
    if not isinstance(arguments, str):
        return call
    try:
        return {**call, "function": {**details, "arguments": msgspec.json.decode(arguments)}}
    except (msgspec.DecodeError, UnicodeError, RecursionError):
        return call


def _free_marks(variables: Json) -> tuple[str, str]:
    """Two private-use characters that occur nowhere in the input."""
    used = {char for text in _strings(variables) for char in re.findall(f"[{PRIVATE_FIRST}-{PRIVATE_LAST}]", text)}
    free = (chr(code) for code in range(ord(PRIVATE_FIRST), ord(PRIVATE_LAST) + 1) if chr(code) not in used)
    start, end = next(free, None), next(free, None)
    if start is None or end is None:
        raise RequestError("the messages use every private-use character that rendering needs", param="messages")
    return start, end


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for pair in cast("Json", value).items():
            yield from itertools.chain(_strings(pair[0]), _strings(pair[1]))
    elif isinstance(value, list | tuple):
        for item in cast("list[Any]", value):
            yield from _strings(item)


def _template_sources(home: Path, settings: Json) -> dict[str, str]:
    path = home / "chat_template.jinja"
    if path.exists():
        return {"default": _read_text(path)}
    given = settings.get("chat_template")
    if isinstance(given, str):
        return {"default": given}
    if isinstance(given, list):
        named = cast("list[dict[str, str]]", given)
        return {item["name"]: item["template"] for item in named if "name" in item and "template" in item}
    return {}


def _named_tokens(settings: Json) -> dict[str, str]:
    """``bos_token`` and its kind, which templates read by name; each is a string or an object that holds one."""
    tokens: dict[str, str] = {}
    for name, value in settings.items():
        content: Any = cast("Json", value).get("content") if isinstance(value, dict) else value
        if name.endswith("_token") and isinstance(content, str):
            tokens[name] = content
    return tokens


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ModelLoadError(f"cannot read {path}: {error}") from None


def _read_json(path: Path) -> Json:
    """The object in ``path``; empty when there is no such file."""
    if not path.exists():
        return {}
    try:
        return msgspec.json.decode(_read_text(path), type=Json)
    except (msgspec.DecodeError, RecursionError) as error:
        raise ModelLoadError(f"{path} is not a JSON object: {error}") from None
