"""The chat itself: what is typed goes to the server or is a command, what comes back goes to the screen.

Rules:
- Ctrl-C stops an answer and never the program; what had come of it stays part of the conversation. Ctrl-D leaves.
- What is piped in is one question. An answer that goes to no terminal is plain text and nothing beside it.
"""

import asyncio
import contextlib
import signal
import sys
import termios
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console
from rich.text import Text

from gptoss.cli.chat_commands import COMMANDS, Leave, run_command
from gptoss.cli.chat_screen import MarkdownScreen, PlainScreen, Screen
from gptoss.cli.chat_server import server_of
from gptoss.cli.chat_talk import ChatOptions, Talk
from gptoss.config import Settings, load_settings
from gptoss.errors import GptossError

EXIT_FAILED = 1
STATE_FILE = "chat_history"


async def run_chat(options: ChatOptions) -> int:
    """Chat until it is over; returns the exit status.

    Raises:
        GptossError: there is no server to talk to.
    """
    settings = load_settings({"model": options.spec}).settings
    notes = Console(stderr=True, highlight=False)
    async with server_of(options, settings, notes) as client:
        models = await client.models()
        model = options.model or (models[0] if models else "")
        talk = Talk(client, model, options)
        if not sys.stdin.isatty():
            return await _answer_once(talk, sys.stdin.read())
        await _converse(talk, settings, notes)
        return 0


async def _answer_once(talk: Talk, text: str) -> int:
    if not text.strip():
        raise GptossError("nothing was piped in; pipe a message, or run gptoss chat in a terminal")
    console = Console()
    answer = await talk.ask(text, MarkdownScreen(console) if console.is_terminal else PlainScreen(sys.stdout))
    return 0 if answer.text or answer.finish_reason else EXIT_FAILED


# ---------------------------------------------------------------- in a terminal


class Prompt(Protocol):
    """Where lines are typed."""

    async def prompt_async(self, message: str) -> str:
        """The next line. Raises ``EOFError`` at the end, ``KeyboardInterrupt`` for Ctrl-C."""
        ...


async def _converse(talk: Talk, settings: Settings, notes: Console) -> None:
    console = Console(highlight=False)
    plain = not console.is_terminal
    console.print(f"[bold]{talk.model}[/] at {talk.client.url}   [dim]/help  /quit  Ctrl-C stops an answer[/]\n")
    prompt = _prompt(settings.data_path / STATE_FILE)
    while True:
        try:
            text = (await prompt.prompt_async("> ")).strip()
        except KeyboardInterrupt:
            continue
        except EOFError:
            return
        if not text:
            continue
        try:
            if text.startswith("/"):
                await run_command(talk, text, console)
                continue
            screen: Screen = PlainScreen(sys.stdout) if plain else MarkdownScreen(console)
            await _answer(talk, text, screen, console)
        except Leave:
            return
        except GptossError as error:
            notes.print(Text(error.message, "red"))


async def _answer(talk: Talk, text: str, screen: Screen, console: Console) -> None:
    asking = asyncio.ensure_future(talk.ask(text, screen))
    with _interrupting(asking.cancel), _unheard_keys():
        await asyncio.wait({asking})
    if asking.cancelled():
        console.print("[yellow]stopped[/]\n")
        return
    answer = asking.result()
    if not console.is_terminal:
        return
    parts = [f"{answer.completion_tokens} tokens", f"first after {answer.first_s:.2f} s"]
    if answer.tokens_per_s:
        parts.append(f"{answer.tokens_per_s:.1f} tokens/s")
    if answer.finish_reason != "stop":
        parts.append(f"ended by {answer.finish_reason or 'nothing'}")
    console.print(f"[dim]{' · '.join([*parts, answer.request_id])}[/]\n")


@contextlib.contextmanager
def _interrupting(stop: Callable[[], object]) -> Generator[None]:
    """Ctrl-C calls ``stop`` while the context lasts."""
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGINT, stop)
    try:
        yield
    finally:
        loop.remove_signal_handler(signal.SIGINT)
        signal.signal(signal.SIGINT, signal.default_int_handler)


@contextlib.contextmanager
def _unheard_keys() -> Generator[None]:
    """What is typed while the context lasts shows nowhere, where it would tear the answer; the next prompt gets it."""
    descriptor = sys.stdin.fileno()
    before = termios.tcgetattr(descriptor)
    quiet = termios.tcgetattr(descriptor)
    quiet[3] &= ~(termios.ECHO | termios.ICANON)  # the local modes; Ctrl-C goes on to be a signal
    termios.tcsetattr(descriptor, termios.TCSADRAIN, quiet)
    try:
        yield
    finally:
        termios.tcsetattr(descriptor, termios.TCSADRAIN, before)


def _prompt(history: Path) -> Prompt:
    """Lines with editing, history and the names of commands; Alt-Enter goes on in the next line."""
    from prompt_toolkit import PromptSession  # noqa: PLC0415 - slow to import, and of use in a terminal only
    from prompt_toolkit.completion import WordCompleter  # noqa: PLC0415 - as above
    from prompt_toolkit.history import FileHistory, InMemoryHistory  # noqa: PLC0415 - as above
    from prompt_toolkit.key_binding import KeyBindings  # noqa: PLC0415 - as above

    keys = KeyBindings()

    @keys.add("escape", "enter")
    def _(event: Any) -> None:
        event.current_buffer.insert_text("\n")

    try:
        history.parent.mkdir(parents=True, exist_ok=True)
        history.touch(mode=0o600)
        kept: Any = FileHistory(str(history))
    except OSError:
        kept = InMemoryHistory()
    completer = WordCompleter(list(COMMANDS), sentence=True)
    session: PromptSession[str] = PromptSession(
        history=kept, completer=completer, complete_while_typing=True, key_bindings=keys
    )
    return session
