"""The commands of a chat: lines that begin with a slash."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
from rich.console import Console
from rich.markup import escape

from gptoss.cli import bundle_source
from gptoss.cli.chat_talk import Talk
from gptoss.cli.event_source import ServerSource
from gptoss.errors import GptossError
from gptoss.telemetry.timeline_text import render_story

SETTABLE = (
    "temperature", "top_p", "top_k", "min_p", "max_tokens", "seed", "stop", "presence_penalty", "frequency_penalty",
    "repetition_penalty", "reasoning_effort",
)  # fmt: skip


class Leave(Exception):
    """The chat is over; no error."""


async def run_command(talk: Talk, line: str, console: Console) -> None:
    """Carry out a command.

    Raises:
        Leave: it was the last.
        GptossError: it cannot be carried out.
    """
    name, _, rest = line.partition(" ")
    command = COMMANDS.get(name)
    if command is None:
        raise GptossError(f"there is no command {name}; /help lists them")
    await command[0](talk, rest.strip(), console)


async def _help(talk: Talk, rest: str, console: Console) -> None:
    del talk, rest
    for name, (_, usage, text) in COMMANDS.items():
        console.print(f"  [bold]{escape(f'{name} {usage}'.strip()):<24}[/] {text}")
    console.print("  [dim]Alt-Enter begins a new line, Ctrl-C stops an answer, Ctrl-D leaves[/]\n")


async def _new(talk: Talk, rest: str, console: Console) -> None:
    del rest
    talk.turns.clear()
    console.print("[dim]a new conversation[/]\n")


async def _system(talk: Talk, rest: str, console: Console) -> None:
    if rest:
        talk.system = "" if rest == "-" else rest
    console.print(f"[dim]system:[/] {escape(talk.system) or '[dim]none[/]'}\n")


async def _set(talk: Talk, rest: str, console: Console) -> None:
    name, _, value = rest.partition(" ")
    if name and name not in SETTABLE:
        raise GptossError(f"{name} cannot be set; there are {', '.join(SETTABLE)}")
    if name and value.strip():
        talk.fields[name] = _value(value.strip())
    elif name:
        talk.fields.pop(name, None)
    shown = ", ".join(f"{key} {value}" for key, value in talk.fields.items())
    console.print(f"[dim]set:[/] {escape(shown) or '[dim]nothing; the server decides[/]'}\n")


async def _bundle(talk: Talk, rest: str, console: Console) -> None:
    del rest
    target = bundle_source.Created(None, force=False)
    query = {"request": _request_id(talk), "content": "tokens"}
    path, _ = await asyncio.to_thread(bundle_source.create_from_server, talk.client.url, query, target)
    console.print(f"{path}   [dim]gptoss replay {path}[/]\n", soft_wrap=True)


async def _why(talk: Talk, rest: str, console: Console) -> None:
    del rest
    story = await asyncio.to_thread(ServerSource(talk.client.url).story, _request_id(talk))
    color = console.is_terminal and not console.no_color
    console.file.write(render_story(story, width=console.width, color=color) + "\n")


async def _quit(talk: Talk, rest: str, console: Console) -> None:
    del talk, rest, console
    raise Leave


def _request_id(talk: Talk) -> str:
    if talk.last is None or not talk.last.request_id:
        raise GptossError("nothing was asked yet")
    return talk.last.request_id


def _value(written: str) -> Any:
    try:
        return msgspec.json.decode(written)
    except (msgspec.DecodeError, ValueError, RecursionError):
        return written


COMMANDS: dict[str, tuple[Callable[[Talk, str, Console], Awaitable[None]], str, str]] = {
    "/help": (_help, "", "this list"),
    "/new": (_new, "", "forget what was said and begin anew"),
    "/system": (_system, "[TEXT]", "instructions before the conversation; - for none"),
    "/set": (_set, "[NAME [VALUE]]", "how answers are made: /set temperature 0.2; without a value its default"),
    "/why": (_why, "", "what happened with the last answer, phase by phase"),
    "/bundle": (_bundle, "", "save the debug bundle of the last answer"),
    "/quit": (_quit, "", "leave; so does Ctrl-D"),
}
"""Name -> what it does, its arguments, and what it says in /help."""
