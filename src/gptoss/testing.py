"""Public fakes for tests and load tests: engines without a model, a renderer without a tokenizer.

``FakeDriver`` keeps every rule of ``engine.port``: one terminal event a request, tokens only in steps, cancel within a
step, resumption after delivered tokens. Token ``i`` of a request is a function of its seed and position, so a resumed
stream goes on as it would have. ``ScriptedDriver`` is the same engine saying given tokens of a real tokenizer.
"""

import queue
import threading
from collections.abc import Callable, Sequence
from typing import Any

import msgspec
from tokenizers import Tokenizer

from gptoss.clock import SystemClock
from gptoss.engine import port
from gptoss.engine.answer_port import Dialect
from gptoss.engine.detokenizer import Detokenizer
from gptoss.engine.dialect import TaggedDialect
from gptoss.engine.tagged_output import TagFormat
from gptoss.messages.model import EngineCapabilities, FinishReason, KvLayout, ModelFingerprint

FAKE_MODEL = "fake"
FAKE_VOCAB = 1000
IDLE_WAIT_S = 0.5


class FakeOptions(msgspec.Struct, frozen=True, kw_only=True):
    """What a fake engine is like.

    Attributes:
        step_s: how long a step takes, in seconds.
        die_at_step: the engine exits with -9 at this step, once for each driver; 0 never.
        kv_budget_bytes: what its capabilities say; one token costs ``2`` bytes.
    """

    step_s: float = 0.0
    die_at_step: int = 0
    max_batch_size: int = 8
    max_model_len: int = 4096
    kv_budget_bytes: int = 1_000_000
    vocab_size: int = FAKE_VOCAB
    eos_token_ids: tuple[int, ...] = (0,)


def fake_token(seed: int, position: int) -> int:
    """The token that a fake engine produces."""
    return (seed * 31 + position * 7) % FAKE_VOCAB


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
        return tuple(f"t{token_id} " for token_id in token_ids)


class _Running:
    def __init__(self, submit: port.Submit) -> None:
        self.submit = submit
        self.produced = len(submit.output_token_ids)
        self.prefilled = False
        self.end: FinishReason | None = None
        self.stop_reason: str | int | None = None
        self.rest = ""


class FakeDriver:
    """An engine without a model, on one thread."""

    def __init__(self, options: FakeOptions | None = None) -> None:
        self.options = options or FakeOptions()
        self.seen: list[port.EngineCommand] = []
        self._commands: queue.SimpleQueue[port.EngineCommand | None] = queue.SimpleQueue()
        self._running: dict[str, _Running] = {}
        self._step = 0
        self._killed = threading.Event()
        self._gone = threading.Event()
        self._clock = SystemClock()
        self._sink: Callable[[port.EngineEvent], None]

    # ---- the port

    def start(self, load: port.Load, sink: Callable[[port.EngineEvent], None]) -> None:
        """See ``engine.port.EngineDriver``."""
        self._sink = sink
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

    def join(self, timeout_s: float) -> bool:
        """See ``engine.port.EngineDriver``."""
        return self._gone.wait(timeout_s)

    # ---- its life

    def _live(self) -> None:
        exit_code = 0
        while not self._killed.is_set():
            if not self._take_commands():
                break
            if self._running:
                self._step += 1
                if self._step == self.options.die_at_step:
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
                command = self._commands.get(block=not self._running, timeout=IDLE_WAIT_S)
            except queue.Empty:
                return True
            if command is None or isinstance(command, port.Shutdown):
                return False
            self.seen.append(command)
            self._obey(command)

    def _obey(self, command: port.EngineCommand) -> None:
        match command:
            case port.Load():
                self._sink(self._loaded(command))
            case port.Submit():
                self._running[command.request_id] = _Running(command)
            case port.Cancel():
                running = self._running.pop(command.request_id, None)
                if running is not None:
                    self._finish(running, "cancelled")
            case port.Snapshot():
                status = port.EngineStatus(
                    nonce=command.nonce,
                    step=self._step,
                    waiting=0,
                    running=len(self._running),
                    kv_bytes_in_use=0,
                    memory_bytes=0,
                    device_memory_total_bytes=0,
                )
                self._sink(status)
            case _:
                pass

    def _one_step(self) -> None:
        started_ns = self._clock.monotonic_ns()
        if self.options.step_s:
            self._killed.wait(self.options.step_s)
        rows: list[port.StepRow] = []
        for running in self._running.values():
            submit = running.submit
            token, text = self._produce(running)
            running.produced += 1
            if running.end is None and running.produced >= (submit.sampling.max_tokens or 1):
                running.end = "length"
            prefilled = 0 if running.prefilled else len(submit.prompt_token_ids)
            running.prefilled = True
            rows.append(
                port.StepRow(
                    request_id=submit.request_id,
                    attempt=submit.attempt,
                    token_ids=(token,),
                    text=text,
                    prefilled=prefilled,
                    ended=running.produced >= (submit.sampling.max_tokens or 1),
                )
            )
        step = port.StepDone(
            step=self._step,
            started_ns=started_ns,
            duration_ns=self._clock.monotonic_ns() - started_ns,
            rows=tuple(rows),
            waiting=0,
            running=len(rows),
            kv_bytes_in_use=0,
        )
        self._sink(step)
        for request_id, running in list(self._running.items()):
            if running.end is not None:
                del self._running[request_id]
                self._finish(running, running.end)

    def _produce(self, running: _Running) -> tuple[int, str]:
        """The next token of a request, and its text."""
        token = fake_token(running.submit.sampling.seed or 0, running.produced)
        return token, f"t{token} "

    def _finish(self, running: _Running, reason: FinishReason) -> None:
        submit = running.submit
        finished = port.Finished(
            request_id=submit.request_id,
            attempt=submit.attempt,
            reason=reason,
            text=running.rest,
            prompt_tokens=len(submit.prompt_token_ids),
            completion_tokens=running.produced,
            stop_reason=running.stop_reason,
        )
        self._sink(finished)

    def _loaded(self, load: port.Load) -> port.Loaded:
        options = self.options
        capabilities = EngineCapabilities(
            model_name=load.model_name,
            architecture="Fake",
            vocab_size=options.vocab_size,
            max_model_len=options.max_model_len,
            max_batch_size=options.max_batch_size,
            kv_budget_bytes=options.kv_budget_bytes,
            kv_layout=KvLayout(
                full_layers=1, sliding_layers=0, sliding_window=0, kv_heads=1, head_dim=1, dtype_bytes=1
            ),
            weights_bytes=0,
            device=load.device,
            dtype="float32",
            num_threads=1,
            eos_token_ids=options.eos_token_ids,
        )
        fingerprint = ModelFingerprint(weights="", tokenizer="", chat_template="", config="")
        return port.Loaded(capabilities=capabilities, fingerprint=fingerprint, load_ms=0.0, pid=0)


class ScriptedDriver(FakeDriver):
    """An engine that says what it is given, one token a step, through the detokenizer of a real engine.

    What follows the script's end, should the script not end with an end token, is the first end token.

    Args:
        tokenizer: spells the tokens.
        script: the tokens of the answer to a submit.
        options: with the end tokens and the vocabulary of the model that is played.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        script: Callable[[port.Submit], Sequence[int]],
        options: FakeOptions,
    ) -> None:
        super().__init__(options)
        self._tokenizer = tokenizer
        self._script = script
        self._texts: dict[str, Detokenizer] = {}

    def _produce(self, running: _Running) -> tuple[int, str]:
        submit = running.submit
        if not running.prefilled:
            self._texts[submit.request_id] = Detokenizer(self._tokenizer, submit.sampling.stop, submit.prompt_token_ids)
            self._texts[submit.request_id].replay(submit.output_token_ids)
        detokenizer = self._texts[submit.request_id]
        script = self._script(submit)
        token = script[running.produced] if running.produced < len(script) else self.options.eos_token_ids[0]
        if token in self.options.eos_token_ids and not submit.sampling.ignore_eos:
            running.end, running.stop_reason = "stop", token
            return token, detokenizer.finish()
        piece = detokenizer.push(token)
        if piece.stopped is not None:
            running.end, running.stop_reason = "stop", piece.stopped
        elif running.produced + 1 >= (submit.sampling.max_tokens or 1):
            running.rest = detokenizer.finish()
        return token, piece.text
