"""How a model's family writes thoughts and tool calls: the parser of its output and the grammar that binds it.

    family    thoughts                       calls                                            known by
    harmony   channel ``analysis``           channel ``commentary to=functions.f``            its special tokens
    hermes    <think> or alike, if it has    <tool_call>{"name", "arguments"}</tool_call>     its chat template
    mistral   [THINK], if it has             [TOOL_CALLS][{...}] or [TOOL_CALLS]f[ARGS]{...}  template or tokens
    llama     as above                       {"name", "parameters"}; ... , <|python_tag|>     template or tokens
    plain     none                           none                                             nothing of all this

A dialect is chosen with the renderer, from what the model's folder says, and never from a request.
"""

from collections.abc import Mapping
from typing import Any, cast

from tokenizers import Tokenizer

from gptoss.engine import harmony_output as harmony
from gptoss.engine.answer_port import Dialect, OutputParser
from gptoss.engine.call_ids import CallIds
from gptoss.engine.grammar import HEADER, check_grammar, format_rule, json_rule, lazy_until, literal
from gptoss.engine.harmony_output import HarmonyParser
from gptoss.engine.tagged_output import CallTags, TagFormat, TaggedParser
from gptoss.errors import RequestError
from gptoss.messages.answer import AnswerShape

THINK_TAGS = (("<think>", "</think>"), ("[THINK]", "[/THINK]"), ("<seed:think>", "</seed:think>"))
HERMES = CallTags(opening="<tool_call>", closing="</tool_call>")
MISTRAL = CallTags(opening="[TOOL_CALLS]", id_chars=9)
LLAMA = CallTags(opening="<|python_tag|>", is_bare_json=True)
ARGS = "[ARGS]"
TAGS_INSIDE_CALLS = (ARGS, "[CALL_ID]")
HARMONY_TOKENS = {
    "<|start|>": harmony.START,
    "<|channel|>": harmony.CHANNEL,
    "<|message|>": harmony.MESSAGE,
    "<|constrain|>": harmony.CONSTRAIN,
    "<|end|>": harmony.END,
    "<|call|>": harmony.CALL,
    "<|return|>": harmony.RETURN,
    "<|endoftext|>": harmony.ENDOFTEXT,
}
# Other tags or another syntax between the same ones: calls in these would be misread.
_NOT_HERMES = ("<arg_key>", "<function=")
_SPACE = r"/[ \n]{0,2}/"

Tools = tuple[dict[str, Any], ...]


def choose_dialect(tokenizer: Tokenizer, template: str) -> Dialect:
    """The dialect of the model with this tokenizer and chat template (empty without one)."""
    added = {token.content: token_id for token_id, token in tokenizer.get_added_tokens_decoder().items()}
    if HARMONY_TOKENS.items() <= added.items():
        return HarmonyDialect()
    known = template + "\n".join(added)
    think = next((pair for pair in THINK_TAGS if pair[1] in known), None)
    calls = None
    if HERMES.opening in template and not any(sign in template for sign in _NOT_HERMES):
        calls = HERMES
    elif MISTRAL.opening in known:
        calls = MISTRAL
    elif LLAMA.opening in known or '"parameters"' in template:
        calls = LLAMA
    special = {
        token.content: token_id for token_id, token in tokenizer.get_added_tokens_decoder().items() if token.special
    }
    return TaggedDialect(TagFormat(think=think, calls=calls), special)


def tool_names(tools: Tools, shape: AnswerShape) -> frozenset[str]:
    """Names of the tools that may be called."""
    if shape.tool_choice == "none":
        return frozenset()
    return frozenset(str(_function(tool).get("name", "")) for tool in tools)


class TaggedDialect:
    """Tags in the text.

    Args:
        tags: of the family.
        special: ids of the model's special tokens; a tag among them has no text in the output.
    """

    def __init__(self, tags: TagFormat, special: Mapping[str, int]) -> None:
        self._tags = tags
        self._special = special
        wanted = {*(tags.think or ()), *TAGS_INSIDE_CALLS}
        if tags.calls:
            wanted |= {tags.calls.opening, tags.calls.closing}
        self._texts = {token_id: text for text, token_id in special.items() if text in wanted}

    def opens_reasoning(self, prompt: str) -> bool:
        """See ``engine.port.Dialect``."""
        return self._tags.think is not None and prompt.rstrip().endswith(self._tags.think[0])

    def parser(self, tools: Tools, shape: AnswerShape, *, opens_reasoning: bool, request_id: str) -> OutputParser:
        """See ``engine.port.Dialect``."""
        ids = CallIds(request_id, self._tags.calls.id_chars if self._tags.calls else 0)
        return TaggedParser(self._tags, tool_names(tools, shape), self._texts, ids, is_reasoning=opens_reasoning)

    def grammar(self, tools: Tools, shape: AnswerShape, *, opens_reasoning: bool) -> str:
        """See ``engine.port.Dialect``."""
        if not needs_grammar(tools, shape, has_calls=self._tags.calls is not None):
            return ""
        must_call = shape.tool_choice in ("required", "named")
        if must_call and self._tags.calls is None:
            raise RequestError("this model has no form for tool calls that could be enforced", param="tool_choice")
        has_calls = self._tags.calls is not None and shape.tool_choice != "none" and bool(tools)
        rules = [f"SPACE: {_SPACE}", r"TEXT: /(.|\n)*/"]
        start = ""
        if self._tags.think:
            opening, closing = self._tags.think
            self._until(rules, "thought", closing)
            start = "thought SPACE " if opens_reasoning else f"({self._tag(opening)} thought SPACE)? "
        if has_calls:
            rules += self._call_rules(tools, shape)
        if must_call:
            start += "calls"
        elif shape.format:
            rules.append(f"formatted: {format_rule(shape.format)}")
            start += "(formatted | calls)" if has_calls else "formatted"
        else:
            start += self._free_with_calls(rules)
        grammar = HEADER + f"start: {start}\n" + "".join(f"{rule}\n" for rule in rules)
        check_grammar(grammar, grammar_param(shape))
        return grammar

    def _call_rules(self, tools: Tools, shape: AnswerShape) -> list[str]:
        """``calls``: the calls of an answer; ``rest``: the same without the tag that opens them."""
        tags = self._tags.calls
        assert tags is not None
        is_bare = tags is MISTRAL and ARGS in self._special
        key = "parameters" if tags is LLAMA else "arguments"
        rules: list[str] = []
        wanted = wanted_tools(tools, shape)
        for index, (name, schema) in enumerate(wanted):
            rules.append(f"args_{index}: {json_rule(schema, 'tools')}")
            head = literal(f'{{"name": "{name}", "{key}": ')
            body = f"{literal(name)} {self._tag(ARGS)} args_{index}" if is_bare else f'{head} args_{index} "}}"'
            rules.append(f"call_{index}: {body}")
        rules.append("call: " + " | ".join(f"call_{index}" for index in range(len(wanted))))
        opening = self._tag(tags.opening)
        if tags is LLAMA:
            first, again, end, opening = "call", '";" SPACE call', "", ""
        elif tags is MISTRAL and not is_bare:
            first, again, end = '"[" call', '"," SPACE call', '"]"'
        else:
            first, end = "call" if is_bare else f"SPACE call SPACE {self._tag(tags.closing)}", ""
            again = f"SPACE {opening} {first}"
        is_one = shape.tool_choice == "named" or not shape.parallel_calls
        more = "" if is_one else f"({again})*"
        return [*rules, f"rest: {first} {more} {end}", f"calls: {opening} rest"]

    def _free_with_calls(self, rules: list[str]) -> str:
        """Free text in which a call, once it begins, keeps to its schema."""
        if self._tags.calls is LLAMA:
            rules.append(r"PLAIN: /[^{\s](.|\n)*/")
            return "(PLAIN | calls)"
        assert self._tags.calls is not None
        self._until(rules, "before_calls", self._tags.calls.opening)
        return "(TEXT | before_calls rest)"

    def _until(self, rules: list[str], name: str, tag: str) -> None:
        """Add the rule of anything up to a tag, with it."""
        if tag in self._special:
            rules.append(f"{name}: TEXT {self._tag(tag)}")
        else:
            rules.append(f"{name}[lazy]: {lazy_until(tag)}")

    def _tag(self, tag: str) -> str:
        token_id = self._special.get(tag)
        return literal(tag) if token_id is None else f"<[{token_id}]>"


class HarmonyDialect:
    """gpt-oss."""

    def opens_reasoning(self, prompt: str) -> bool:
        """See ``engine.port.Dialect``."""
        del prompt
        return False

    def parser(self, tools: Tools, shape: AnswerShape, *, opens_reasoning: bool, request_id: str) -> OutputParser:
        """See ``engine.port.Dialect``."""
        del opens_reasoning
        return HarmonyParser(tool_names(tools, shape), CallIds(request_id))

    def grammar(self, tools: Tools, shape: AnswerShape, *, opens_reasoning: bool) -> str:
        """See ``engine.port.Dialect``."""
        del opens_reasoning
        if not needs_grammar(tools, shape):
            return ""
        channel, message = f"<[{harmony.CHANNEL}]>", f"<[{harmony.MESSAGE}]>"
        rules = [
            r"TEXT: /(.|\n)*/",
            f'more: (analysis | preamble) <[{harmony.END}]> <[{harmony.START}]> "assistant"',
            f'analysis: {channel} "analysis" {message} TEXT',
            f'preamble: {channel} "commentary" {message} TEXT',
        ]
        if shape.format:
            rules[1] = rules[1].replace("(analysis | preamble)", "analysis")  # the visible text is the format's alone
            rules.append(f"formatted: {format_rule(shape.format)}")
        ends: list[str] = []
        if shape.tool_choice not in ("required", "named"):
            rules.append(f'final: {channel} "final" {message} {"formatted" if shape.format else "TEXT"}')
            ends.append("final")
        if tools and shape.tool_choice != "none":
            for index, (name, schema) in enumerate(wanted_tools(tools, shape)):
                rules.append(f"args_{index}: {json_rule(schema, 'tools')}")
                to = literal(f"commentary to={harmony.NAMESPACE}{name}")
                kind = f'" "? <[{harmony.CONSTRAIN}]> "json"'
                rules.append(f"call_{index}: {channel} {to} {kind} {message} args_{index}")
                ends.append(f"call_{index}")
        grammar = HEADER + f"start: more* ({' | '.join(ends)})\n" + "".join(f"{rule}\n" for rule in rules)
        check_grammar(grammar, grammar_param(shape))
        return grammar


# ---------------------------------------------------------------- what a request's tools ask of a grammar


def needs_grammar(tools: Tools, shape: AnswerShape, *, has_calls: bool = True) -> bool:
    """Whether anything of the answer is bound. Without a form for calls, a strict tool binds nothing."""
    if shape.format or shape.tool_choice in ("required", "named"):
        return True
    return has_calls and shape.tool_choice == "auto" and any(_function(tool).get("strict") for tool in tools)


def wanted_tools(tools: Tools, shape: AnswerShape) -> list[tuple[str, Any]]:
    """Name and schema of the arguments of each tool that may be called.

    Where calling is left to the model, the arguments of a tool that is not strict may be any object.
    """
    found: list[tuple[str, Any]] = []
    for function in map(_function, tools):
        name = str(function.get("name", ""))
        if shape.tool_choice == "named" and name != shape.tool_name:
            continue
        is_bound = function.get("strict") or shape.tool_choice in ("required", "named")
        schema = function.get("parameters") if is_bound else None
        found.append((name, schema or {"type": "object"}))
    if not found:
        raise RequestError(f"tool_choice names {shape.tool_name!r}, which is not in tools", param="tool_choice")
    return found


def grammar_param(shape: AnswerShape) -> str:
    """The field to blame for a grammar that cannot be used."""
    return shape.format.param if shape.format else "tools"


def _function(tool: dict[str, Any]) -> dict[str, Any]:
    function = tool.get("function")
    return cast("dict[str, Any]", function) if isinstance(function, dict) else {}
