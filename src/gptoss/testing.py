"""Public fakes for tests and load tests.

Time that stands still, an engine without a model on a thread, one that says given tokens, a renderer without a tokenizer, and a way to wait until a
system has nothing left to do. The engine's rules are in ``gptoss.fake_engine``.
"""

import asyncio
import queue
import threading
from collections.abc import Callable, Sequence
from typing import Any

from tokenizers import Tokenizer

from gptoss.actors.system import System
from gptoss.clock import NS_PER_S, SystemClock
from gptoss.engine import port
from gptoss.engine.answer_port import Dialect
from gptoss.engine.detokenizer import Detokenizer
from gptoss.engine.dialect import TaggedDialect
from gptoss.engine.tagged_output import TagFormat
from gptoss.fake_engine import FAKE_VOCAB, FakeEngine, FakeOptions, FakeSequence, fake_text, fake_token

__all__ = [
    "FAKE_MODEL",
    "FakeDriver",
    "FakeEngine",
    "FakeOptions",
    "FakeRenderer",
    "ManualClock",
    "ScriptedDriver",
    "fake_text",
    "fake_token",
    "run_until_idle",
]

FAKE_MODEL = "fake"
IDLE_WAIT_S = 0.5


class ManualClock:
    """A clock that moves only when it is told to."""

    def __init__(self, monotonic_ns: int = NS_PER_S, wall_ns: int = 1_700_000_000 * NS_PER_S) -> None:
        self._monotonic_ns = monotonic_ns
        self._wall_offset_ns = wall_ns - monotonic_ns

    def monotonic_ns(self) -> int:
        """See ``gptoss.clock.Clock``."""
        return self._monotonic_ns

    def wall_ns(self) -> int:
        """See ``gptoss.clock.Clock``."""
        return self._monotonic_ns + self._wall_offset_ns

    def thread_ns(self) -> int:
        """See ``gptoss.clock.Clock``: all time is work."""
        return self._monotonic_ns

    def advance_ns(self, duration_ns: int) -> None:
        """Let time pass; it never goes back."""
        if duration_ns < 0:
            raise ValueError(f"a clock cannot go back, by {duration_ns} ns")
        self._monotonic_ns += duration_ns


async def run_until_idle(system: System, timeout_s: float = 10.0, *, poll_s: float = 0.002) -> None:
    """Wait until no request runs, no letter waits and nothing is being handled.

    Raises:
        TimeoutError: that did not come about within ``timeout_s`` seconds.
    """
    async with asyncio.timeout(timeout_s):
        while not system.is_idle():  # noqa: ASYNC110 - idleness has no single moment at which to tell
            await asyncio.sleep(poll_s)


class FakeRenderer:
    """One token for each word; token ids come back as ``t<id>`` and a space."""

    dialect: Dialect = TaggedDialect(TagFormat(), {})
    vocab_size = FAKE_VOCAB
    takes_reasoning_effort = False

    def render_chat(
        self,
        messages: tuple[port.ChatMessage, ...],
        *,
        tools: tuple[dict[str, Any], ...],
        date: str,
        reasoning_effort: str = "",
        add_generation_prompt: bool = True,
    ) -> port.RenderedPrompt:
        """See ``engine.port.Renderer``."""
        del tools, date, reasoning_effort, add_generation_prompt
        words = " ".join(message.content or "" for message in messages)
        return port.RenderedPrompt(token_ids=self.encode(words) or (0,), template="fake")

    def encode(self, text: str, *, add_special_tokens: bool = True) -> tuple[int, ...]:
        """See ``engine.port.Renderer``."""
        del add_special_tokens
        return tuple(len(word) % FAKE_VOCAB for word in text.split())

    def decode(self, token_ids: tuple[int, ...], *, skip_special_tokens: bool = True) -> str:
        """See ``engine.port.Renderer``."""
        del skip_special_tokens
        return "".join(self.pieces(token_ids))

    def pieces(self, token_ids: tuple[int, ...]) -> tuple[str, ...]:
        """See ``engine.port.Renderer``."""
        return tuple(map(fake_text, token_ids))


class FakeDriver:
    """A ``FakeEngine`` on a thread; ``seen`` holds the commands that it took."""

    def __init__(self, options: FakeOptions | None = None) -> None:
        self.options = options or FakeOptions()
        self.seen: list[port.EngineCommand] = []
        self._commands: queue.SimpleQueue[port.EngineCommand | None] = queue.SimpleQueue()
        self._killed = threading.Event()
        self._gone = threading.Event()
        self._clock = SystemClock()
        self._engine: FakeEngine
        self._sink: Callable[[port.EngineEvent], None]

    # ---- the port

    def start(self, load: port.Load, sink: Callable[[port.EngineEvent], None]) -> None:
        """See ``engine.port.EngineDriver``."""
        self._sink = sink
        self._engine = self._make_engine(load)
        self._commands.put(load)
        threading.Thread(target=self._live, name="fake-engine", daemon=True).start()

    def send(self, command: port.EngineCommand) -> None:
        """See ``engine.port.EngineDriver``."""
        if not self._gone.is_set():
            self._commands.put(command)

    def kill(self) -> None:
        """See ``engine.port.EngineDriver``."""
        self._killed.set()
        self._commands.put(None)

    def _make_engine(self, load: port.Load) -> FakeEngine:
        return FakeEngine(load, self.options)

    # ---- its life

    def _live(self) -> None:
        exit_code = 0
        while not self._killed.is_set():
            if not self._take_commands():
                break
            if self._engine.has_work:
                if self._engine.step_number + 1 == self.options.die_at_step:
                    exit_code = -9
                    break
                self._one_step()
        if self._killed.is_set():
            exit_code = -9
        self._gone.set()
        self._sink(port.EngineExited(exit_code=exit_code, reason="killed" if exit_code else "shut down"))

    def _take_commands(self) -> bool:
        """Take what waits, or wait when idle; False at the end."""
        while True:
            try:
                command = self._commands.get(block=not self._engine.has_work, timeout=IDLE_WAIT_S)
            except queue.Empty:
                return True
            if command is None or isinstance(command, port.Shutdown):
                return False
            self.seen.append(command)
            self._tell(self._engine.handle(command))

    def _one_step(self) -> None:
        started_ns = self._clock.monotonic_ns()
        if self.options.step_s:
            self._killed.wait(self.options.step_s)
        duration_ns = self._clock.monotonic_ns() - started_ns
        self._tell(self._engine.step(started_ns=started_ns, duration_ns=duration_ns))

    def _tell(self, events: list[port.EngineEvent]) -> None:
        for event in events:
            self._sink(event)


class ScriptedDriver(FakeDriver):
    """An engine that says what it is given, one token a step, through the detokenizer of a real engine.

    After the end of a script that does not end with an end token comes the first end token.

    Args:
        tokenizer: spells the tokens.
        script: the tokens of the answer to a submit.
        options: with the end tokens and the vocabulary of the model that is played.
    """

    def __init__(
        self, tokenizer: Tokenizer, script: Callable[[port.Submit], Sequence[int]], options: FakeOptions
    ) -> None:
        super().__init__(options)
        self._tokenizer = tokenizer
        self._script = script

    def _make_engine(self, load: port.Load) -> FakeEngine:
        return _ScriptedEngine(load, self.options, self._tokenizer, self._script)


class _ScriptedEngine(FakeEngine):
    def __init__(
        self,
        load: port.Load,
        options: FakeOptions,
        tokenizer: Tokenizer,
        script: Callable[[port.Submit], Sequence[int]],
    ) -> None:
        super().__init__(load, options)
        self._end_ids = options.eos_token_ids
        self._tokenizer = tokenizer
        self._script = script
        self._texts: dict[tuple[str, int], Detokenizer] = {}

    def produce(self, sequence: FakeSequence) -> tuple[int, str]:
        submit = sequence.submit
        script = self._script(submit)
        token = script[sequence.produced] if sequence.produced < len(script) else self._end_ids[0]
        text = self._text_of(submit)
        if token in self._end_ids and not submit.sampling.ignore_eos:
            sequence.end, sequence.stop_reason = "stop", token
            return token, text.finish()
        piece = text.push(token)
        if piece.stopped is not None:
            sequence.end, sequence.stop_reason = "stop", piece.stopped
        elif sequence.produced + 1 >= sequence.max_tokens:
            sequence.rest = text.finish()
        return token, piece.text

    def _text_of(self, submit: port.Submit) -> Detokenizer:
        key = (submit.request_id, submit.attempt)
        if key not in self._texts:
            self._texts[key] = Detokenizer(self._tokenizer, submit.sampling.stop, submit.prompt_token_ids)
            self._texts[key].replay(submit.output_token_ids)
        return self._texts[key]
