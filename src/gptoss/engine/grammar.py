"""Grammars for constrained answers, as text in llguidance's Lark, and the check that they may be used.

Rules:
- A grammar describes the whole answer, thoughts and tags included, so that the end of the text is allowed exactly where
  the answer is complete. ``engine.dialect`` puts it together from what is here.
- A grammar is refused before admission, in the server's process and off its event loop: too large, too deep, or more than
  the compiler's own bounds on work allow. What passed here compiles in the engine in a fraction of that bound.
- Schemas mean what the library implements of JSON Schema draft 2020-12; a keyword that it does not implement is refused by
  name, never ignored. ``oneOf`` is allowed only where its alternatives exclude each other.
- White space inside JSON is allowed up to a bound: a model that never ends its white space would never end its answer.

Source: llguidance, docs/syntax.md and docs/json_schema.md; it was chosen over xgrammar because its work is bounded by
fuel and not by a clock, it refuses what it does not implement, and a mask costs a fraction of a step without any
precomputation for a new schema.
"""

import functools
import json
import re
from typing import Any, cast

import msgspec
from llguidance import LLMatcher, LLParserLimits
from llguidance._lib import regex_to_lark

from gptoss.engine.panics import panics_become
from gptoss.errors import EngineError, RequestError
from gptoss.messages.answer import AnswerFormat

SCHEMA_BYTES_MAX = 64 * 1024
SCHEMA_DEPTH_MAX = 32
REGEX_CHARS_MAX = 4096
CHOICES_MAX = 1024
CHOICE_CHARS_MAX = 65_536
GRAMMAR_CHARS_MAX = 512 * 1024
CHECKED_MAX = 256
JSON_SPACE = r"[ \n\r\t]{0,24}"

HEADER = "%llguidance {}\n"


def parser_limits() -> LLParserLimits:
    """Bounds on the work of the library, for checking and for running alike: about 50 ms to compile, 15 ms for a mask."""
    return LLParserLimits(
        initial_lexer_fuel=1_000_000,
        step_lexer_fuel=200_000,
        step_max_items=50_000,
        max_lexer_states=50_000,
        max_grammar_size=200_000,
        verbose_errors=False,
    )


def check_grammar(grammar: str, param: str) -> None:
    """Refuse a grammar that does not compile within the bounds.

    Raises:
        RequestError: with the compiler's reason; ``param`` is the field that asked for it.
    """
    if len(grammar) > GRAMMAR_CHARS_MAX:
        raise RequestError(f"{param}: the grammar is longer than {GRAMMAR_CHARS_MAX} characters", param=param)
    fault = _fault(grammar)
    if fault:
        raise RequestError(f"{param} cannot be enforced: {fault}", param=param)


@functools.lru_cache(maxsize=CHECKED_MAX)
def _fault(grammar: str) -> str:
    """What is wrong with a grammar, in one line and without the client's own text; nothing if it can be used."""
    try:
        with panics_become(EngineError("the compiler failed on it")):
            message = LLMatcher.validate_grammar(grammar, limits=parser_limits())
    except EngineError as error:
        return error.message
    if not message or message.startswith("WARNING"):
        return ""
    # A refusal stands in the log. The library quotes what it read, and below its first line draws where it stands.
    faults = re.findall(r"^error: (.+)$", message, re.MULTILINE) or [message.splitlines()[0]]
    first = re.sub(r"^at \d+\(\d+\): ", "", faults[0])
    return re.sub(r"`[^`]*`|'[^']*'|/.*/", "...", first)[:200]


def format_rule(wanted: AnswerFormat) -> str:
    """The right-hand side that matches the visible text of an answer.

    Raises:
        RequestError: the format is malformed or beyond its bounds.
    """
    match wanted.kind:
        case "json":
            return json_rule(_schema(wanted.text, wanted.param), wanted.param)
        case "regex":
            if not 0 < len(wanted.text) <= REGEX_CHARS_MAX:
                raise RequestError(
                    f"{wanted.param}: a regular expression has 1 to {REGEX_CHARS_MAX} characters", param=wanted.param
                )
            return f"/{regex_to_lark(wanted.text)}/"
        case "choice":
            return _choice_rule(wanted)


def json_rule(schema: Any, param: str) -> str:
    """The right-hand side that matches JSON of ``schema``, a decoded JSON schema.

    Raises:
        RequestError: it is no schema, or beyond its bounds.
    """
    if not isinstance(schema, dict):
        raise RequestError(f"{param}: a JSON schema is an object", param=param)
    if _depth(cast("Any", schema)) > SCHEMA_DEPTH_MAX:
        raise RequestError(f"{param}: the schema nests more than {SCHEMA_DEPTH_MAX} levels deep", param=param)
    options = {"whitespace_pattern": JSON_SPACE}
    text = json.dumps({**cast("dict[str, Any]", schema), "x-guidance": options}, ensure_ascii=True)
    if len(text) > SCHEMA_BYTES_MAX:
        raise RequestError(f"{param}: the schema is longer than {SCHEMA_BYTES_MAX} bytes", param=param)
    return f"%json {text}"


def literal(text: str) -> str:
    """A terminal that matches exactly ``text``."""
    return json.dumps(text, ensure_ascii=False)


def lazy_until(text: str) -> str:
    """The pattern of anything up to the first ``text``, with it; for a rule that is marked ``[lazy]``."""
    special = r"\/[](){}.*+?|^$"
    return r"/(.|\n)*" + "".join(f"\\{char}" if char in special else char for char in text) + "/"


def _choice_rule(wanted: AnswerFormat) -> str:
    choices = wanted.choices
    if not 0 < len(choices) <= CHOICES_MAX or sum(map(len, choices)) > CHOICE_CHARS_MAX or not all(choices):
        raise RequestError(
            f"{wanted.param}: a choice has 1 to {CHOICES_MAX} answers, none empty, of {CHOICE_CHARS_MAX} characters in all",
            param=wanted.param,
        )
    return " | ".join(map(literal, choices))


def _schema(text: str, param: str) -> Any:
    if len(text) > SCHEMA_BYTES_MAX:
        raise RequestError(f"{param}: the schema is longer than {SCHEMA_BYTES_MAX} bytes", param=param)
    try:
        return msgspec.json.decode(text)
    except (msgspec.DecodeError, UnicodeError, RecursionError):
        raise RequestError(f"{param}: the schema is not valid JSON", param=param) from None


def _depth(value: Any) -> int:
    """How deep arrays and objects nest; counted without recursion, since a request chose the depth."""
    deepest = 0
    pending: list[tuple[Any, int]] = [(value, 1)]
    while pending:
        item, depth = pending.pop()
        if isinstance(item, dict | list):
            deepest = max(deepest, depth)
            inner = cast("dict[str, Any]", item).values() if isinstance(item, dict) else cast("list[Any]", item)
            pending += [(each, depth + 1) for each in inner]
    return deepest
