"""Wire -> ``AnswerShape``: what tools may be called and what form the answer must have.

Rules:
- At most one form: ``response_format``, one of vLLM's ``guided_*`` fields or ``structured_outputs``.
- A form that cannot be enforced is refused by name. Grammars written by the client (``guided_grammar``, structural tags)
  are not taken.
- The older ``functions`` and ``function_call`` are refused with a word on what to send instead.
"""

from collections.abc import Sequence
from typing import Any

import msgspec

from gptoss.errors import RequestError
from gptoss.http.schema import ChatCompletionRequest, NamedToolChoice, StructuredOutputs, Tool
from gptoss.messages.answer import AnswerFormat, AnswerShape, ToolChoice

TOOLS_MAX = 128
ANY_OBJECT = '{"type":"object"}'


def wanted_tools(wire: ChatCompletionRequest) -> tuple[dict[str, Any], ...]:
    """The tools of a request, as chat templates take them.

    Raises:
        RequestError: there are too many, or two have one name.
    """
    for name, instead in (("functions", "tools"), ("function_call", "tool_choice")):
        if getattr(wire, name) not in (None, "none", "auto", []):
            raise RequestError(f"{name} is the older form of {instead} and not supported; send {instead}", param=name)
    return checked_tools(wire.tools or [])


def checked_tools(tools: Sequence[Tool]) -> tuple[dict[str, Any], ...]:
    """Tools as chat templates take them.

    Raises:
        RequestError: there are too many, or two have one name.
    """
    if len(tools) > TOOLS_MAX:
        raise RequestError(f"tools has {len(tools)} entries; at most {TOOLS_MAX} are allowed", param="tools")
    names = [tool.function.name for tool in tools]
    twice = next((name for index, name in enumerate(names) if name in names[:index]), None)
    if twice is not None:
        raise RequestError(f"tools has two functions named {twice!r}", param="tools")
    return tuple(msgspec.to_builtins(tool) for tool in tools)


def answer_shape(wire: ChatCompletionRequest) -> AnswerShape:
    """What the answer may be made of.

    Raises:
        RequestError: ``param`` names the field that cannot be honoured.
    """
    choice, name = tool_choice_of(wire.tool_choice, [tool.function.name for tool in wire.tools or []])
    return AnswerShape(
        tool_choice=choice,
        tool_name=name,
        parallel_calls=wire.parallel_tool_calls is not False,
        format=_format(wire),
    )


def tool_choice_of(choice: str | NamedToolChoice | None, names: Sequence[str]) -> tuple[ToolChoice, str]:
    """Whether tools may or must be called, and which one, if only one may.

    Args:
        choice: as the client wrote it.
        names: of the tools that are offered.

    Raises:
        RequestError: it asks for a tool that is not there, or for something else.
    """
    if choice in (None, "none", "auto"):
        return ("auto" if names and choice != "none" else "none"), ""
    if not names:
        raise RequestError("tool_choice asks for a call, but there are no tools", param="tool_choice")
    if choice == "required":
        return "required", ""
    if not isinstance(choice, NamedToolChoice) or choice.type != "function" or choice.function is None:
        raise RequestError(
            "tool_choice must be 'none', 'auto', 'required' or {'type': 'function', 'function': {'name': ...}}",
            param="tool_choice",
        )
    if choice.function.name not in names:
        raise RequestError(f"tool_choice names {choice.function.name!r}, which is not in tools", param="tool_choice")
    return "named", choice.function.name


def _format(wire: ChatCompletionRequest) -> AnswerFormat | None:
    found: list[AnswerFormat] = []
    if wire.response_format is not None and wire.response_format.type != "text":
        wanted = wire.response_format
        schema = None if wanted.json_schema is None else wanted.json_schema.schema_
        found.append(json_format(wanted.type, schema, "response_format", "response_format.json_schema.schema"))
    if wire.guided_json is not None:
        found.append(AnswerFormat(kind="json", text=_schema_text(wire.guided_json), param="guided_json"))
    if wire.guided_regex is not None:
        found.append(AnswerFormat(kind="regex", text=wire.guided_regex, param="guided_regex"))
    if wire.guided_choice is not None:
        found.append(AnswerFormat(kind="choice", choices=tuple(wire.guided_choice), param="guided_choice"))
    if wire.structured_outputs is not None:
        found += _structured(wire.structured_outputs)
    if len(found) > 1:
        raise RequestError(
            f"{found[0].param} and {found[1].param} both bind the answer; send one", param=found[1].param
        )
    return found[0] if found else None


def json_format(kind: str, schema: dict[str, Any] | None, param: str, schema_param: str) -> AnswerFormat:
    """The form that OpenAI calls ``json_object`` or ``json_schema``.

    Args:
        kind: which of the two.
        schema: of the second.
        param: the field that asks for it.
        schema_param: the field of the schema.

    Raises:
        RequestError: it is neither, or the schema is missing.
    """
    if kind == "json_object":
        return AnswerFormat(kind="json", text=ANY_OBJECT, param=param)
    if kind != "json_schema":
        raise RequestError(
            f"{param}.type is {kind[:64]!r}; it must be 'text', 'json_object' or 'json_schema'", param=f"{param}.type"
        )
    if schema is None:
        raise RequestError(f"{schema_param} is missing", param=schema_param)
    return AnswerFormat(kind="json", text=_schema_text(schema), param=param)


def _structured(wanted: StructuredOutputs) -> list[AnswerFormat]:
    param = "structured_outputs"
    for name in ("grammar", "structural_tag"):
        if getattr(wanted, name) is not None:
            raise RequestError(f"{param}.{name} is not supported; use json, regex or choice", param=f"{param}.{name}")
    found: list[AnswerFormat] = []
    if wanted.json is not None:
        found.append(AnswerFormat(kind="json", text=_schema_text(wanted.json), param=f"{param}.json"))
    if wanted.json_object:
        found.append(AnswerFormat(kind="json", text=ANY_OBJECT, param=f"{param}.json_object"))
    if wanted.regex is not None:
        found.append(AnswerFormat(kind="regex", text=wanted.regex, param=f"{param}.regex"))
    if wanted.choice is not None:
        found.append(AnswerFormat(kind="choice", choices=tuple(wanted.choice), param=f"{param}.choice"))
    if not found:
        raise RequestError(f"{param} names no form; give json, regex or choice", param=param)
    return found


def _schema_text(schema: str | dict[str, Any]) -> str:
    return schema if isinstance(schema, str) else msgspec.json.encode(schema).decode()
