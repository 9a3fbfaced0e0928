"""Runs the model on the chunks of a step, and picks the way to run a given model.

Rules:
- ``PackedRunner`` puts all chunks of a step into one forward, ``[1, T]``, over this engine's KV slots.
- ``GenericRunner`` runs one request at a time with transformers' own cache. Slow, but it takes any model.
- ``choose_runner`` trusts neither the model nor this code: the packed way is taken only if it gives the logits of
  the model's own eager attention, over a prompt in two chunks, decoding steps and a stranger in the batch.
- ``run_isolated`` makes a failure the failure of the chunk at fault: it halves the step until the chunk stands alone.
"""

import inspect
from collections.abc import Sequence
from typing import Any, Protocol, cast

import torch
from transformers import DynamicCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from gptoss.engine.attention import (
    ATTENTION_NAME,
    Chunk,
    GeometryProbe,
    PackedRows,
    UnsupportedAttentionError,
    slot_attention,
)
from gptoss.engine.kv_cache import KvGeometry, KvSlot
from gptoss.engine.memory_model import kv_bytes
from gptoss.engine.packed_linear import pack_linears
from gptoss.messages.model import KvLayout

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# torch and transformers are only partly typed.

MIN_ROWS = 4
"""Rows of a matrix product fall into bit classes by their number (1, 2-3, 4 and more): fewer are padded to this."""

PARITY_TOKENS = 20
PARITY_DECODES = 3
PARITY_TOLERANCE = {torch.float32: 2e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}
"""Largest norm of the difference, relative to the norm of the eager logits."""


class Slot(Protocol):
    """KV memory of one request; ``num_bytes`` is what it occupies."""

    num_bytes: int


class Runner(Protocol):
    """Runs chunks.

    Attributes:
        layout: KV geometry, exact for ``memory_model.kv_bytes``.
        is_batched: a step is one forward; otherwise each chunk is run alone.
        is_row_invariant: the bits of a row do not depend on how its request was cut into chunks.
    """

    layout: KvLayout
    is_batched: bool
    is_row_invariant: bool

    @property
    def geometry(self) -> KvGeometry | None:
        """Of its slots if they are ``KvSlot``, which the prefix cache can copy from and to; None if not."""
        ...

    def new_slot(self, tokens: int) -> Slot:
        """KV memory for a request of at most ``tokens`` positions."""
        ...

    def forward(self, chunks: Sequence[Chunk]) -> list[torch.Tensor | None]:
        """Run the chunks.

        Returns:
            for each chunk the logits of its last ``num_logits`` rows, ``[num_logits, vocab]``, or None if that is 0.
        """
        ...


class PackedRunner:
    """All chunks of a step in one forward."""

    is_batched = True
    is_row_invariant = False

    def __init__(self, model: Any, geometry: KvGeometry) -> None:
        self._model = model
        self.geometry = geometry
        self.layout = geometry.layout
        self.dtype = geometry.dtype

    def new_slot(self, tokens: int) -> Slot:
        """See ``Runner``."""
        return KvSlot(self.geometry, tokens)

    @torch.inference_mode()
    def forward(self, chunks: Sequence[Chunk]) -> list[torch.Tensor | None]:
        """See ``Runner``."""
        order = sorted(range(len(chunks)), key=lambda index: len(chunks[index].token_ids) > 1)
        ordered = [chunks[index] for index in order]
        token_ids: list[int] = []
        positions: list[int] = []
        kept: list[int] = []
        wanting: list[int] = []
        for index, chunk in zip(order, ordered, strict=True):
            token_ids += chunk.token_ids
            positions += range(chunk.start, chunk.start + len(chunk.token_ids))
            if chunk.num_logits:
                kept += range(len(token_ids) - chunk.num_logits, len(token_ids))
                wanting.append(index)
        padding = max(0, MIN_ROWS - len(token_ids))
        kept += kept[:1] * (MIN_ROWS - len(kept))
        device = self.geometry.device
        logits = self._model(
            input_ids=torch.tensor([token_ids + [0] * padding], device=device),
            position_ids=torch.tensor([positions + [0] * padding], device=device),
            use_cache=False,
            logits_to_keep=torch.tensor(kept or [0], device=device),
            packed=PackedRows(ordered, padding),
        ).logits[0]
        rows: list[torch.Tensor | None] = [None] * len(chunks)
        first = 0
        for index in wanting:
            rows[index] = logits[first : first + chunks[index].num_logits]
            first += chunks[index].num_logits
        return rows


class GenericSlot:
    """transformers' cache of one request, counted as what the request may grow to."""

    def __init__(self, config: Any, num_bytes: int) -> None:
        self.cache: Any = DynamicCache(config=config)
        self.num_bytes = num_bytes


class GenericRunner:
    """One request at a time, with transformers' own cache."""

    is_batched = False
    is_row_invariant = False

    def __init__(self, model: Any, layout: KvLayout, device: torch.device) -> None:
        self._model = model
        self._device = device
        self.layout = layout
        self.geometry = None
        self._takes_last_only = "logits_to_keep" in inspect.signature(model.forward).parameters

    def new_slot(self, tokens: int) -> Slot:
        """See ``Runner``."""
        return GenericSlot(self._model.config, kv_bytes(self.layout, tokens))

    @torch.inference_mode()
    def forward(self, chunks: Sequence[Chunk]) -> list[torch.Tensor | None]:
        """See ``Runner``."""
        rows: list[torch.Tensor | None] = []
        for chunk in chunks:
            positions = torch.arange(chunk.start, chunk.start + len(chunk.token_ids), device=self._device)
            options: dict[str, Any] = {"logits_to_keep": chunk.num_logits or 1} if self._takes_last_only else {}
            logits = self._model(
                input_ids=torch.tensor([list(chunk.token_ids)], device=self._device),
                position_ids=positions[None],
                past_key_values=chunk.slot.cache,
                use_cache=True,
                **options,
            ).logits
            rows.append(logits[0, -chunk.num_logits :] if chunk.num_logits else None)
        return rows


def run_isolated(runner: Runner, chunks: Sequence[Chunk]) -> tuple[list[torch.Tensor | None], dict[int, str]]:
    """Run a step so that a failing chunk fails alone.

    Returns:
        the logits of each chunk, and for the index of each failed one what went wrong.
    """
    if not runner.is_batched and len(chunks) > 1:
        return _join([run_isolated(runner, [chunk]) for chunk in chunks])
    try:
        return runner.forward(chunks), {}
    except Exception as error:  # noqa: BLE001 - the edge to model code and kernels, which can raise anything
        message = " ".join(f"{type(error).__name__}: {error}".split())[:300]
    # Outside of the handler the exception is gone, and with it the frames that pin the step's tensors.
    if len(chunks) == 1:
        return [None], {0: message}
    half = len(chunks) // 2
    return _join([run_isolated(runner, chunks[:half]), run_isolated(runner, chunks[half:])])


def _join(
    parts: list[tuple[list[torch.Tensor | None], dict[int, str]]],
) -> tuple[list[torch.Tensor | None], dict[int, str]]:
    rows: list[torch.Tensor | None] = []
    failures: dict[int, str] = {}
    for part_rows, part_failures in parts:
        failures |= {len(rows) + index: message for index, message in part_failures.items()}
        rows += part_rows
    return rows, failures


def choose_runner(model: Any, layout: KvLayout, device: torch.device) -> tuple[Runner, tuple[str, ...]]:
    """The fastest runner that gives this model's logits, and notes on the choice.

    Args:
        model: a transformers causal LM in evaluation mode, loaded with eager attention.
        layout: KV geometry that its config states, for the generic runner.
        device: where it is.
    """
    native = model.config._attn_implementation  # noqa: SLF001 - transformers offers no other way to read it
    prompt = [(7919 * index + 13) % vocab_size(model) for index in range(PARITY_TOKENS + PARITY_DECODES)]
    expected = _eager_logits(model, prompt, device)
    if device.type == "cpu":
        pack_linears(model)
    try:
        ALL_ATTENTION_FUNCTIONS.register(ATTENTION_NAME, cast("Any", slot_attention))
        model.set_attn_implementation(ATTENTION_NAME)
        runner = PackedRunner(model, _probe_geometry(model, device))
        _check_parity(runner, prompt, expected)
    except Exception as error:  # noqa: BLE001 - whatever the model cannot do in slots, it can do in the generic runner
        model.set_attn_implementation(native)
        cause = " ".join(str(error).split())[:200]
        return GenericRunner(model, layout, device), (f"generic runner, one request at a time: {cause}",)
    return runner, ()


def vocab_size(model: Any) -> int:
    """Token ids that the model has an embedding for."""
    return int(model.get_input_embeddings().num_embeddings)


@torch.inference_mode()
def _eager_logits(model: Any, prompt: list[int], device: torch.device) -> torch.Tensor:
    """Logits after the parity prompt and after each of the decoding steps, ``[1 + PARITY_DECODES, vocab]``."""
    logits = model(input_ids=torch.tensor([prompt], device=device), use_cache=False).logits
    return logits[0, PARITY_TOKENS - 1 :].float()


@torch.inference_mode()
def _probe_geometry(model: Any, device: torch.device) -> KvGeometry:
    probe = GeometryProbe()
    rows = torch.zeros((1, MIN_ROWS), dtype=torch.long, device=device)
    model(input_ids=rows, position_ids=rows, use_cache=False, logits_to_keep=1, packed=probe)
    return KvGeometry(probe.layers(), probe.dtype, device)


def _check_parity(runner: PackedRunner, prompt: list[int], expected: torch.Tensor) -> None:
    """Run ``prompt`` in two chunks and single tokens, with a stranger beside it.

    Raises:
        UnsupportedAttentionError: the logits are not the eager ones.
    """
    slot, strange_slot = runner.new_slot(len(prompt)), runner.new_slot(len(prompt))
    stops = [PARITY_TOKENS // 2 - 1, *range(PARITY_TOKENS, len(prompt) + 1)]
    start = 0
    found: list[torch.Tensor] = []
    for stop in stops:
        mine = Chunk(slot=slot, token_ids=prompt[start:stop], start=start, num_logits=1)
        stranger = Chunk(slot=strange_slot, token_ids=prompt[::-1][start:stop], start=start, num_logits=0)
        logits, _ = runner.forward([mine, stranger])
        assert logits is not None
        found.append(logits.float())
        start = stop
    gap = (torch.cat(found[1:]) - expected).norm() / expected.norm()
    allowed = PARITY_TOLERANCE.get(runner.dtype, max(PARITY_TOLERANCE.values()))
    if not gap <= allowed:
        raise UnsupportedAttentionError(f"logits differ from eager attention by {gap:.1e} of their norm")
