"""``gptoss chat``: what appears, what is part of the conversation, and that Ctrl-C stops an answer and no more."""

import asyncio
import io
import os
import pty
import re
import signal
import subprocess
import sys
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

import gptoss
from gptoss.app import ServingSystem
from gptoss.cli.chat_client import ChatClient
from gptoss.cli.chat_commands import Leave, run_command
from gptoss.cli.chat_screen import MarkdownScreen, PlainScreen, end_of_blocks
from gptoss.cli.chat_talk import ChatOptions, Talk
from gptoss.clock import SystemClock
from gptoss.config import Settings
from gptoss.engine.model_source import PreparedModel
from gptoss.errors import GptossError
from gptoss.http.server import serve
from gptoss.messages import events as ev
from gptoss.testing import FAKE_MODEL, FakeDriver, FakeOptions, FakeRenderer

MODEL = PreparedModel(folder="", model_name=FAKE_MODEL, source="test", max_model_len=4096)
COLOUR = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


@asynccontextmanager
async def serving(options: FakeOptions | None = None) -> AsyncGenerator[tuple[ServingSystem, str]]:
    settings = Settings(journal="memory", devices="cpu")
    async with ServingSystem(
        settings, drivers=lambda _: FakeDriver(options), renderer=FakeRenderer(), model=MODEL
    ) as system:
        await system.ready(10.0)
        server = await serve(gptoss.make_app(system), "127.0.0.1", 0)
        yield system, server.url
        await server.close()


@pytest.fixture
async def talk() -> AsyncIterator[Talk]:
    async with serving() as (_, url):
        client = ChatClient(f"{url}/v1/", None, SystemClock())
        yield Talk(client, FAKE_MODEL, ChatOptions(system="Be brief.", max_tokens=3))
        await client.close()


# ---------------------------------------------------------------- the conversation


async def test_an_answer_becomes_part_of_the_conversation(talk: Talk) -> None:
    shown = io.StringIO()
    answer = await talk.ask("hello there", PlainScreen(shown))
    assert shown.getvalue() == answer.text + "\n"
    assert answer.text.count("t") == answer.completion_tokens == 3
    assert answer.finish_reason == "length"
    assert answer.request_id.startswith("req_")
    await talk.ask("again", PlainScreen(shown))
    assert [turn["role"] for turn in talk.turns] == ["user", "assistant", "user", "assistant"]


async def test_what_was_not_answered_is_not_part_of_it(talk: Talk) -> None:
    talk.fields["temperature"] = 9
    shown = io.StringIO()
    with pytest.raises(GptossError, match="temperature"):
        await talk.ask("hello", PlainScreen(shown))
    assert (talk.turns, shown.getvalue()) == ([], "")


async def test_cancelling_keeps_what_came_and_stops_the_server() -> None:
    async with serving(FakeOptions(step_s=0.01)) as (system, url):
        client = ChatClient(url, None, SystemClock())
        talk = Talk(client, FAKE_MODEL, ChatOptions(max_tokens=2000))
        shown = io.StringIO()
        asking = asyncio.ensure_future(talk.ask("hello", PlainScreen(shown)))
        async with asyncio.timeout(5):
            while "t" not in shown.getvalue():
                await asyncio.sleep(0.01)
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
        assert talk.turns[-1] == {"role": "assistant", "content": shown.getvalue()[:-1]}
        async with asyncio.timeout(5):
            while not any(isinstance(r.event, ev.RequestCancelled) for r in system.journal.read()):
                await asyncio.sleep(0.01)
        await client.close()


@pytest.mark.parametrize("url", ["http://127.0.0.1:1", "http://", "nonsense"])
async def test_no_server_is_one_clear_error(url: str) -> None:
    client = ChatClient(url, None, SystemClock())
    with pytest.raises(GptossError, match="no server answers"):
        await client.models()
    await client.close()


# ---------------------------------------------------------------- commands


async def said_by(talk: Talk, *lines: str) -> str:
    console = Console(file=io.StringIO(), width=100)
    for line in lines:
        await run_command(talk, line, console)
    file: Any = console.file
    return file.getvalue()


async def test_settings_are_sent_until_they_are_taken_back(talk: Talk) -> None:
    assert "temperature 0.2" in await said_by(talk, "/set temperature 0.2", "/set reasoning_effort low")
    assert talk.fields == {"max_tokens": 3, "temperature": 0.2, "reasoning_effort": "low"}
    await said_by(talk, "/set temperature", "/set max_tokens")
    assert talk.fields == {"reasoning_effort": "low"}
    with pytest.raises(GptossError, match="cannot be set"):
        await said_by(talk, "/set colour blue")


async def test_system_and_new(talk: Talk) -> None:
    await talk.ask("hello", PlainScreen(io.StringIO()))
    assert "Be [bold] brief" in await said_by(talk, "/new", "/system Be [bold] brief")
    assert (talk.turns, talk.system) == ([], "Be [bold] brief")
    assert "none" in await said_by(talk, "/system -")


async def test_help_names_every_command_and_quit_leaves(talk: Talk) -> None:
    told = await said_by(talk, "/help")
    assert all(f"/{name}" in told for name in ("help", "new", "system", "set", "why", "bundle", "quit"))
    with pytest.raises(Leave):
        await said_by(talk, "/quit")
    with pytest.raises(GptossError, match="no command /nothing"):
        await said_by(talk, "/nothing")


async def test_why_and_bundle_are_of_the_last_answer(
    talk: Talk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(GptossError, match="nothing was asked"):
        await said_by(talk, "/why")
    answer = await talk.ask("hello", PlainScreen(io.StringIO()))
    told = await said_by(talk, "/why")
    assert "prefill" in told
    assert "completed" in told
    assert answer.request_id in await said_by(talk, "/bundle")
    assert len(list(tmp_path.glob("*.zip"))) == 1


# ---------------------------------------------------------------- the screen

MARKDOWN = "# Head\n\nSome **bold** text.\n\n```py\nx = 1\n\ny = 2\n```\n\n- one\n- two\n"


def drawn(pieces: list[str], *, width: int = 60, thoughts: str = "") -> str:
    console = Console(file=io.StringIO(), width=width, height=10, force_terminal=True, color_system=None)
    screen = MarkdownScreen(console)
    if thoughts:
        screen.add("reasoning", thoughts)
    for piece in pieces:
        screen.add("content", piece)
    screen.end()
    file: Any = console.file
    return file.getvalue()


def test_what_stays_is_the_same_however_it_came() -> None:
    def lines(text: str) -> list[str]:
        return [line.rstrip() for line in COLOUR.sub("", text).splitlines() if line.strip()]

    whole = lines(drawn([MARKDOWN]))
    assert any("bold" in line and "**" not in line for line in whole)
    # What a refresh drew and took back is still in the file: every line that stays stands there in its order.
    grown = iter(lines(drawn(list(MARKDOWN))))
    assert all(line in grown for line in whole)


def test_a_models_control_characters_reach_no_terminal() -> None:
    evil = "a\x1b]0;owned\x07b\x9b2Jc\rd"
    for out in (drawn([evil]), drawn([], thoughts=evil)):
        assert "\x1b]" not in out
        assert "\x07" not in out
        assert "\x9b" not in out


def test_thoughts_stand_before_what_is_said() -> None:
    text = COLOUR.sub("", drawn(["So: 4"], thoughts="two and [bold]two"))
    assert text.index("two and [bold]two") < text.index("So: 4")


def test_plain_text_has_no_thoughts_and_no_colours() -> None:
    shown = io.StringIO()
    screen = PlainScreen(shown)
    screen.add("reasoning", "hm")
    screen.add("content", "**4**")
    screen.end()
    assert shown.getvalue() == "**4**\n"


@pytest.mark.parametrize(
    ("text", "done"),
    [
        ("a", ""),
        ("a\n\nb", "a\n\n"),
        ("```\na\n\nb", ""),
        ("```\na\n\nb\n```\nc", "```\na\n\nb\n```\n"),
        ("~~~\n```\n\n~~~\n", "~~~\n```\n\n~~~\n"),
        ("````\n```\n\n", ""),
    ],
)
def test_blocks_end_at_empty_lines_outside_of_code(text: str, done: str) -> None:
    assert text[: end_of_blocks(text)] == done


@given(st.text(alphabet="ab`~ \n-1.", max_size=60))
def test_what_was_printed_for_good_never_changes(text: str) -> None:
    ends = [end_of_blocks(text[:place]) for place in range(len(text) + 1)]
    assert ends == sorted(ends)


# ---------------------------------------------------------------- the whole command


def run(*arguments: str, piped: str, env: dict[str, str]) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "gptoss", "chat", *arguments]
    return subprocess.run(command, input=piped, env=env, capture_output=True, text=True, timeout=50, check=False)


@pytest.fixture
def env(tmp_path: Path) -> dict[str, str]:
    return {**os.environ, "GPTOSS_DATA_DIR": str(tmp_path), "TERM": "xterm"}


async def test_what_is_piped_in_is_answered_in_plain_text(env: dict[str, str]) -> None:
    async with serving() as (_, url):
        done = await asyncio.to_thread(run, "--url", url, "--max-tokens", "3", piped="hello\n", env=env)
        assert (done.returncode, done.stderr) == (0, "")
        assert re.fullmatch(r"(t[0-9]+ ){3}\n", done.stdout)
        empty = await asyncio.to_thread(run, "--url", url, piped=" \n", env=env)
        assert (empty.returncode, empty.stdout) == (1, "")
        assert "nothing was piped in" in empty.stderr


class Terminal:
    """A person at a terminal."""

    def __init__(self, arguments: list[str], env: dict[str, str]) -> None:
        self._own, other = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "gptoss", "chat", *arguments],
            stdin=other,
            stdout=other,
            stderr=other,
            env=env,
            start_new_session=True,
            preexec_fn=self._take_terminal,  # noqa: PLW1509 - the child only sets its terminal
        )
        os.close(other)
        os.set_blocking(self._own, False)
        self.seen = ""

    @staticmethod
    def _take_terminal() -> None:
        import fcntl
        import termios

        fcntl.ioctl(0, termios.TIOCSCTTY, 0)

    def type(self, text: str) -> None:
        os.write(self._own, text.encode())

    def until(self, is_there: Callable[[str], bool], seconds: float = 60.0) -> None:
        """Read until something is on the screen."""
        end = time.monotonic() + seconds
        while not is_there(self.seen):
            assert time.monotonic() < end, self.seen
            try:
                data = os.read(self._own, 65_536)
            except BlockingIOError:
                time.sleep(0.02)
                continue
            if b"\x1b[6n" in data:
                self.type("\x1b[1;1R")  # where the cursor is, as a terminal answers
            self.seen += COLOUR.sub("", data.decode(errors="replace"))

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGKILL)
        self.process.wait()
        os.close(self._own)


@pytest.mark.timeout(240)
async def test_a_person_at_a_terminal_stops_an_answer_and_goes_on(env: dict[str, str]) -> None:
    def person(url: str) -> int:
        terminal = Terminal(["--url", url, "--max-tokens", "2000"], env)
        try:
            terminal.until(lambda seen: "/help" in seen and ">" in seen)
            terminal.type("hello there\r")
            terminal.until(lambda seen: re.search(r"t[0-9]+ ", seen) is not None)
            terminal.type("\x03")
            terminal.until(lambda seen: "stopped" in seen)
            terminal.type("/why\r")
            terminal.until(lambda seen: "cancelled" in seen)
            terminal.type("\x03")
            terminal.type("/quit\r")
            return terminal.process.wait(10)
        finally:
            terminal.close()

    async with serving(FakeOptions(step_s=0.01)) as (_, url):
        assert await asyncio.to_thread(person, url) == 0
