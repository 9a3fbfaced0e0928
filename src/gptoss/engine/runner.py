"""Runs the model on the chunks of a step.

Rules:
- ``PackedRunner`` puts all chunks of a step into one forward, ``[1, T]``, over this engine's KV slots or pages.
- ``GenericRunner`` runs one request at a time with transformers' own cache. Slow, but it takes any model.
"""

import inspect
import traceback
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from transformers import DynamicCache

from gptoss.engine.attention import Chunk, PackedRows, SlotDecodes
from gptoss.engine.kv_cache import KvGeometry, KvSlot
from gptoss.engine.kv_pages import PagedKv, PagePool
from gptoss.engine.memory_model import kv_bytes
from gptoss.engine.paged_attention import PagedDecodes
from gptoss.engine.ranks import EXIT_RANK_LOST
from gptoss.messages.model import KvLayout

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# torch and transformers are only partly typed.

MIN_ROWS = 4
"""Rows of a matrix product fall into bit classes by their number (1, 2-3, 4 and more): fewer are padded to this."""


class Slot(Protocol):
    """KV memory of one request; ``num_bytes`` is what it occupies."""

    num_bytes: int


class Runner(Protocol):
    """Runs chunks.

    Attributes:
        layout: KV geometry, exact for ``memory_model.kv_bytes``.
        is_batched: a step is one forward; otherwise each chunk is run alone.
        is_row_invariant: the bits of a row do not depend on how its request was cut into chunks.
        is_batch_invariant: nor, with the same cuts, on which other requests are in the step.
    """

    layout: KvLayout
    is_batched: bool
    is_row_invariant: bool
    is_batch_invariant: bool

    @property
    def geometry(self) -> KvGeometry | None:
        """Of its slots if they are ``RequestKv``, which the prefix cache can copy from and to; None if not."""
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
    """All chunks of a step in one forward.

    On a CPU a row has the same bits in any company: linear layers are packed for that, and attention is each request's
    own. The matrix products of other devices are chosen by the number of rows.

    Args:
        model: with this engine's attention set.
        geometry: of the model.
        pool: to take KV memory from; None gives each request a slot of its own.
    """

    is_batched = True
    is_row_invariant = False

    def __init__(self, model: Any, geometry: KvGeometry, pool: PagePool | None = None) -> None:
        self._model = model
        self.geometry = geometry
        self.pool = pool
        self.layout = pool.layout if pool else geometry.layout
        self.dtype = geometry.dtype
        # Of matrices that are cut over several processes the parts are not packed.
        self.is_batch_invariant = geometry.device.type == "cpu" and geometry.shards == 1
        is_on_one = set(geometry.devices) == {geometry.device}
        self._index_device = (
            geometry.device if is_on_one else torch.device("cpu")
        )  # an index fits any device from there

    def new_slot(self, tokens: int) -> Slot:
        """See ``Runner``."""
        return PagedKv(self.pool, tokens) if self.pool else KvSlot(self.geometry, tokens)

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
            logits_to_keep=torch.tensor(kept or [0], device=self._index_device),
            packed=PackedRows(ordered, padding, PagedDecodes if self.pool else SlotDecodes),
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
    is_batch_invariant = True

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
            for layer in chunk.slot.cache.layers:  # a run that failed half-way left some of them longer
                if layer.get_seq_length() > chunk.start:
                    layer.crop(chunk.start - layer.get_seq_length())
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


class LockstepRunner:
    """The runner of one rank. Whatever it raises ends the process: the other ranks wait in the middle of the same forward."""

    def __init__(self, runner: Runner) -> None:
        self._runner = runner
        self.layout = runner.layout
        self.is_batched = runner.is_batched
        self.is_row_invariant = runner.is_row_invariant
        self.is_batch_invariant = runner.is_batch_invariant
        self.geometry = runner.geometry

    def new_slot(self, tokens: int) -> Slot:
        """See ``Runner``."""
        return self._runner.new_slot(tokens)

    def forward(self, chunks: Sequence[Chunk]) -> list[torch.Tensor | None]:
        """See ``Runner``."""
        try:
            return self._runner.forward(chunks)
        except Exception:  # noqa: BLE001 - see the class
            traceback.print_exc()
            raise SystemExit(EXIT_RANK_LOST) from None
