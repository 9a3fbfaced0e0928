"""The engine's contract with the rest of the system: what goes in, what comes out, and who drives it.

Rules that every engine keeps:
- ``Load`` is answered by ``LoadProgressed`` zero or more times, then ``Loaded`` or ``LoadFailed``.
- Every ``Submit`` is answered by exactly one terminal event, ``Finished`` or ``Failed``, with the same request id and
  attempt, unless the engine itself is lost (``EngineExited``), which ends everything it had.
- Tokens arrive only inside ``StepDone`` and only as increments. After a request's terminal event it has no more rows.
- A request may lose its KV memory to another and wait again (``StepDone.preemptions``). Its tokens go on as if nothing
  had been; only ``prefilled`` counts again what is computed again.
- ``Cancel`` takes effect within two steps and is answered by ``Finished`` with reason ``cancelled``; cancelling what is
  unknown or already over does nothing. ``Cancel``, ``Drain``, ``Snapshot`` and ``Shutdown`` are idempotent.
- Results of a request depend on its prompt, settings and seed, never on who shares the batch. The noise of a draw is a
  function of (seed, absolute position, token), so ``Submit`` with ``output_token_ids`` resumes a stream where it broke.

This module imports no torch: the control plane and the fakes see only what is here.
"""

from collections.abc import Callable
from typing import Any, Literal, Protocol, TypeAlias

import msgspec

from gptoss.engine.answer_port import Dialect
from gptoss.messages.model import DeviceMemory, EngineCapabilities, FinishReason, ModelFingerprint, Summation
from gptoss.messages.plan import Preemption, RowFailure, Start
from gptoss.messages.sampling import SamplingParams


class _Wire(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """A message of the engine protocol; on the socket it is msgpack with its class name as tag."""


# ---------------------------------------------------------------- commands


class Load(_Wire, frozen=True, kw_only=True):
    """Take the device and load the model from a local folder.

    Attributes:
        folder: prepared model folder: ``config.json``, safetensors weights, ``tokenizer.json``.
        device: ``cpu``, ``cuda:0`` and so on; several are joined by ``+``, as in ``cuda:0+cuda:1``.
        mode: how the model lies on several devices: ``pipeline`` has some layers on each, ``tensor`` a part of every layer.
        kv_budget_bytes: 0 lets the engine derive it from free memory.
        prefix_cache_bytes: the part of it that cached prefixes may take while no request needs it. 0 is half of it;
            negative is none.
        session_bytes_max: what may be kept of one session between its turns, within the prefix cache; 0 keeps none.
        num_threads: 0 lets the engine choose.
        speculation: ``ngram`` guesses tokens that stood in the request before, where the runner can verify guesses
            without a change of bits.
        kernels: ``native`` insists on this package's CPU kernels, ``torch`` leaves them out.
        quantization: ``int8`` or ``int4`` packs weights; only with the CPU kernels.
        kv_layout: ``slots``, contiguous for each request, or ``paged``, from one pool; ``auto`` is slots on a CPU.
        cache_folder: where compiled kernels are kept; empty is the user's cache folder.
        summation: of the CPU kernels; ``auto`` is the fastest on this machine. Another repeats another machine's bits.
    """

    folder: str
    model_name: str
    device: str = "cpu"
    mode: Literal["pipeline", "tensor"] = "pipeline"
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    max_batch_size: int = 16
    max_model_len: int = 0
    kv_budget_bytes: int = 0
    prefix_cache_bytes: int = 0
    session_bytes_max: int = 0
    speculation: Literal["off", "ngram"] = "off"
    num_threads: int = 0
    kernels: Literal["auto", "native", "torch"] = "auto"
    quantization: Literal["none", "int8", "int4"] = "none"
    cache_folder: str = ""
    kv_layout: Literal["auto", "slots", "paged"] = "auto"
    summation: Summation = "auto"


class Submit(_Wire, frozen=True, kw_only=True):
    """Run one request.

    Attributes:
        attempt: distinguishes retries of the same request; echoed in every answer.
        output_token_ids: tokens that an earlier attempt already delivered; generation goes on after them, and
            neither their ids nor their text are sent again.
        sampling: ``seed`` and ``max_tokens`` are set by now; ``max_tokens`` counts from the start of the output.
        priority: lower runs first, and may take the place of a higher one.
        deadline_ns: on this machine's monotonic clock; among equal priorities the earliest runs first. 0 is none. The
            engine does not enforce it: whoever submits cancels.
        cache_salt: requests share cached prefixes only with those of the same salt; tenants have different ones.
        session_id: what is computed is kept for the next request of this session, in place of what was kept before.
        grammar: bounds every token of the output; empty leaves it free. Checked by ``engine.grammar`` beforehand.
    """

    request_id: str
    attempt: int
    prompt_token_ids: tuple[int, ...]
    sampling: SamplingParams
    output_token_ids: tuple[int, ...] = ()
    priority: int = 0
    deadline_ns: int = 0
    cache_salt: str = ""
    grammar: str = ""
    session_id: str = ""


class Cancel(_Wire, frozen=True, kw_only=True):
    """Stop one request."""

    request_id: str


class Drain(_Wire, frozen=True, kw_only=True):
    """Finish what runs, take nothing new; answered by ``Drained`` when idle."""


class DropSession(_Wire, frozen=True, kw_only=True):
    """Keep nothing more for this session: what is cached of it becomes a cached prefix as any other. Idempotent."""

    session_id: str


class Snapshot(_Wire, frozen=True, kw_only=True):
    """Ask for an ``EngineStatus`` with the same nonce; doubles as a liveness probe."""

    nonce: int


class Shutdown(_Wire, frozen=True, kw_only=True):
    """Release the device and exit."""


CoreCommand: TypeAlias = Submit | Cancel | Drain | DropSession | Snapshot
"""What a loaded engine takes between two steps."""
EngineCommand: TypeAlias = Load | CoreCommand | Shutdown


# ---------------------------------------------------------------- events


class LoadProgressed(_Wire, frozen=True, kw_only=True):
    """Loading goes on. ``done`` of ``total`` in ``unit``; ``total`` 0 means unknown."""

    stage: str
    done: int
    total: int
    unit: str = "bytes"


class Loaded(_Wire, frozen=True, kw_only=True):
    """The engine is ready."""

    capabilities: EngineCapabilities
    fingerprint: ModelFingerprint
    load_ms: float
    pid: int
    notes: tuple[str, ...] = ()


class LoadFailed(_Wire, frozen=True, kw_only=True):
    """The model cannot be served; the engine exits after this. ``code`` is one of ``gptoss.errors``."""

    code: str
    message: str


class TokenLogprob(msgspec.Struct, frozen=True, kw_only=True):
    """Log-probability of the chosen token under the model's own distribution, with the best alternatives.

    Attributes:
        text: the token as text; ``raw`` its bytes, since a token need not be whole UTF-8.
        top: (token id, logprob, text, raw) of the best alternatives, best first.
    """

    token_id: int
    logprob: float
    text: str
    raw: bytes
    top: tuple[tuple[int, float, str, bytes], ...] = ()


class StepRow(msgspec.Struct, frozen=True, kw_only=True, array_like=True, gc=False):
    """What one step did for one request: the row of the plan, and what came of it.

    Attributes:
        token_ids: tokens produced in this step (empty for a row that only prefilled or failed).
        text: text that became final: held back while it may be part of a stop string or an unfinished character.
        text_lengths: of several tokens, how many characters of ``text`` came with each.
        prefilled: prompt tokens computed in this step.
        start, num_tokens, num_logits, num_draft: as planned, see ``messages.plan.PlannedRow``.
        failure: why its model run counts for nothing. With ``memory`` it is tried again; otherwise ``Failed`` follows.
        ended: this is its last row; ``Finished`` or ``Failed`` follows.
    """

    request_id: str
    attempt: int
    token_ids: tuple[int, ...] = ()
    text: str = ""
    prefilled: int = 0
    logprobs: tuple[TokenLogprob, ...] = ()
    start: int = 0
    num_tokens: int = 0
    num_logits: int = 0
    num_draft: int = 0
    failure: RowFailure = ""
    ended: bool = False
    text_lengths: tuple[int, ...] = ()


class StepDone(_Wire, frozen=True, kw_only=True):
    """One step of the batch: its plan and its outcome. Times are nanoseconds of this machine's monotonic clock.

    Attributes:
        rows: every planned row, in the plan's order.
        kv_bytes_in_use: held by running requests; ``prefix_cache_bytes`` come on top, within the same budget.
        submits_taken: how many submits the engine took since the step before, refused and repeated ones included; the
            plan was made after them.
        refused: planned to start, but the device had no memory; they are back in line, or ``Failed`` follows.
        preemptions, starts, prefill_tokens_max, prefill_ms_per_token, kv_budget_bytes: see ``messages.plan.StepPlan``.
    """

    step: int
    started_ns: int
    duration_ns: int
    rows: tuple[StepRow, ...]
    waiting: int
    running: int
    kv_bytes_in_use: int
    prefix_cache_bytes: int = 0
    submits_taken: int = 0
    preemptions: tuple[Preemption, ...] = ()
    starts: tuple[Start, ...] = ()
    refused: tuple[str, ...] = ()
    prefill_tokens_max: int = 0
    prefill_ms_per_token: float = 0.0
    kv_budget_bytes: int = 0


class Finished(_Wire, frozen=True, kw_only=True):
    """Terminal: the request ended as it should.

    Attributes:
        text: text still held back at the end (never part of a stop string).
        completion_tokens: tokens generated over all attempts, the end-of-sequence token included.
        cached_tokens: of the prompt, those taken from the prefix cache.
        stop_reason: the stop string or token id that ended it, if one did.
        session_tokens: its first tokens that are kept for its session, and ``session_bytes`` what they take.
    """

    request_id: str
    attempt: int
    reason: FinishReason
    text: str = ""
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0
    stop_reason: str | int | None = None
    session_tokens: int = 0
    session_bytes: int = 0


class Failed(_Wire, frozen=True, kw_only=True):
    """Terminal: the request cannot be served; the others go on. ``code`` is one of ``gptoss.errors``."""

    request_id: str
    attempt: int
    code: str
    message: str


class EngineStatus(_Wire, frozen=True, kw_only=True):
    """Answer to ``Snapshot``. ``memory_bytes`` is the process's resident memory, or the device's on a GPU.

    ``free_bytes`` is what the device still has, -1 if that is not known. Of an engine over several devices the other
    two are sums, and ``devices`` has each.
    """

    nonce: int
    step: int
    waiting: int
    running: int
    kv_bytes_in_use: int
    memory_bytes: int
    device_memory_total_bytes: int
    free_bytes: int = -1
    prefix_cache_bytes: int = 0
    devices: tuple[DeviceMemory, ...] = ()


class Drained(_Wire, frozen=True, kw_only=True):
    """Nothing runs and nothing new is taken."""


class EngineExited(_Wire, frozen=True, kw_only=True):
    """The engine is gone; the driver says so exactly once, last. ``exit_code`` is negative for a signal."""

    exit_code: int
    reason: str


EngineEvent: TypeAlias = (
    LoadProgressed | Loaded | LoadFailed | StepDone | Finished | Failed | EngineStatus | Drained | EngineExited
)


# ---------------------------------------------------------------- drivers


class EngineDriver(Protocol):
    """One engine as its executor sees it, on the event loop. Methods never block; all but ``start`` from any thread."""

    def start(self, load: Load, sink: Callable[[EngineEvent], None]) -> None:
        """Start the engine and send it ``load``. Events reach ``sink`` in order, all from one thread: the loop's or another."""
        ...

    def send(self, command: EngineCommand) -> None:
        """Send a command; a command to an engine that is gone is dropped (``EngineExited`` has told)."""
        ...

    def kill(self) -> None:
        """End the engine at once, without its cooperation; ``EngineExited`` follows."""
        ...


DriverFactory: TypeAlias = Callable[[str], EngineDriver]
"""Makes the driver for a device name such as ``cpu`` or ``cuda:0``."""


# ---------------------------------------------------------------- prompts


class ChatMessage(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One message of a conversation, as chat templates expect it."""

    role: str
    content: str | None = None
    name: str | None = None
    reasoning: str | None = None
    tool_calls: tuple[dict[str, Any], ...] = ()
    tool_call_id: str | None = None


class RenderedPrompt(msgspec.Struct, frozen=True, kw_only=True):
    """A prompt as token ids, ready for ``Submit``.

    Attributes:
        template: sha256 of the template that made it, or the name and version of the library that did.
        opens_reasoning: it ends inside of a thought, which the answer goes on with.
        grammar: of the answer; empty if nothing binds it.
    """

    token_ids: tuple[int, ...]
    template: str
    opens_reasoning: bool = False
    grammar: str = ""


class Renderer(Protocol):
    """Turns messages into token ids. Pure and thread-safe: the same input gives the same ids, on every machine."""

    @property
    def dialect(self) -> Dialect:
        """How the answers of this model are to be read."""
        ...

    @property
    def vocab_size(self) -> int:
        """Token ids are below this."""
        ...

    @property
    def takes_reasoning_effort(self) -> bool:
        """Whether ``reasoning_effort`` changes anything."""
        ...

    def render_chat(
        self,
        messages: tuple[ChatMessage, ...],
        *,
        tools: tuple[dict[str, Any], ...],
        date: str,
        reasoning_effort: str = "",
        add_generation_prompt: bool = True,
    ) -> RenderedPrompt:
        """Apply the model's chat template.

        Args:
            messages: the conversation.
            tools: OpenAI tool definitions, may be empty.
            date: today as ``YYYY-MM-DD``; templates that print a date get this one.
            reasoning_effort: how much to think, for templates that take it; empty leaves it to the template.
            add_generation_prompt: end with the beginning of the assistant's turn.

        Raises:
            RequestError: the template refuses these messages.
        """
        ...

    def encode(self, text: str, *, add_special_tokens: bool = True) -> tuple[int, ...]:
        """Token ids of plain text; special tokens written in it are ordinary text.

        Args:
            text: any text.
            add_special_tokens: begin with the tokens that the tokenizer itself puts first, such as BOS.

        Raises:
            RequestError: the text is not valid Unicode.
        """
        ...

    def decode(self, token_ids: tuple[int, ...], *, skip_special_tokens: bool = True) -> str:
        """Text of token ids. Raises ``RequestError`` for an id that no vocabulary has."""
        ...

    def pieces(self, token_ids: tuple[int, ...]) -> tuple[str, ...]:
        """Each token as the tokenizer's vocabulary writes it."""
        ...
