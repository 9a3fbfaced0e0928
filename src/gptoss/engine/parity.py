"""Does a runner compute what the model computes? Compared on a short text, before anybody is served.

Rules:
- The model's own answer is its eager attention, without a cache, the whole text at once. A runner gets the text in two
  chunks and decoding steps, with a stranger beside it.
- First the logits are compared, and ``TOLERANCE`` settles it for nearly every model.
- In a mixture of experts a rounding can send a token to another expert, and then two right computations differ by more
  than some wrong ones. Such a runner gets a second look: its logits may differ by ``TOLERANCE_MAX``, but every part of
  every layer, given what the model itself gave it, must give what the model's part gave, and the parts must run in the
  model's order. There errors cannot grow from layer to layer. What attends must be right in every row; of the other parts
  half of the rows may be off, which is what a tie between two experts does to one.

Measured on random gpt-oss of 12 layers and 16 experts in bfloat16, three scales of weights: the logits of a right runner
differ by 0.14 to 0.30 of their norm, those of one without sinks by 0.39 to 1.03, so a bound on logits alone cannot tell
them apart. Part by part it can: a right attention differs by at most 0.02, one without sinks by 2 or more.
"""

from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

import msgspec
import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from gptoss.engine.attention import Chunk
from gptoss.engine.runner import Runner

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# torch and transformers are only partly typed.

PROMPT_TOKENS = 20
DECODES = 3
REQUESTS = 2
TOLERANCE = {torch.float32: 2e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}
"""Largest norm of a difference, relative to the norm of what the model gives, by dtype."""
TOLERANCE_PACKED = {"int8": 0.2, "int4": 0.5}
"""Of packed weights: a model that was neither trained nor stored in 4 bits is some way from itself in them."""
TOLERANCE_MAX = 0.7
"""Of logits at a second look; those of another text or of a wrong head differ by more than 1."""


class ParityError(Exception):
    """A runner's numbers are not those of the model."""


class _Part:
    """A module of a layer: what the model gave it and what it gave back, ``[T, ...]`` each."""

    def __init__(self, name: str, module: nn.Module) -> None:
        self.name = name
        self.module = module
        self.attends = hasattr(module, "layer_idx")
        self.given: torch.Tensor | None = None
        self.gave: torch.Tensor | None = None
        self.differences: list[torch.Tensor] = []

    def note(self, given: torch.Tensor, gave: torch.Tensor) -> None:
        self.given, self.gave = given[0], gave.view(given.shape[1], -1)

    def compare(self, gave: torch.Tensor, count: int, rows: slice) -> None:
        assert self.gave is not None
        expected = self.gave[rows].float()
        found = gave.view(count, -1)[: len(expected)].float()
        self.differences.append((found - expected).norm(dim=1) / expected.norm(dim=1))


class Reference:
    """What a model gives.

    Args:
        model: with eager attention.
        device: where it is.

    Attributes:
        prompt: the text.
        length: of the text in tokens.
    """

    def __init__(self, model: Any, device: torch.device) -> None:
        vocab_size = int(model.get_input_embeddings().num_embeddings)
        self.length = PROMPT_TOKENS + DECODES
        self.prompt = [(7919 * index + 13) % vocab_size for index in range(self.length)]
        self._device = device
        self._parts = [
            _Part(f"{path}.{name}", child)
            for path, layer in model.named_modules()
            if isinstance(layer, GradientCheckpointingLayer)
            for name, child in layer.named_children()
        ]
        self._order: list[str] = []
        with _hooked(self._parts, self._order, None):
            self._logits = self._eager_logits(model)

    def check_logits(self, runner: Runner, tolerance: float) -> float:
        """How far a runner's logits are from the model's, relative to these.

        Raises:
            ParityError: that is more than ``tolerance``.
        """
        gap = float((self._run(runner, lambda rows: None) - self._logits).norm() / self._logits.norm())
        if not gap <= tolerance:
            raise ParityError(f"logits differ from eager attention by {gap:.1e} of their norm")
        return gap

    def check_parts(self, runner: Runner, tolerance: float) -> None:
        """See the module's second look.

        Args:
            runner: runs the modules of the model that this was made from.
            tolerance: for each part.

        Raises:
            ParityError: some part gives something else than the model's.
        """
        current = _Rows()
        order: list[str] = []
        with _hooked(self._parts, order, current):
            self._run(runner, current.set)
        if order[: len(self._order)] != self._order:
            raise ParityError("logits differ from eager attention, and layers run in another order")
        seen = [part for part in self._parts if part.differences]
        if not any(part.attends for part in seen):
            raise ParityError("logits differ from eager attention, and its layers cannot be compared one by one")
        for part in seen:
            rows = torch.cat(part.differences)
            gap = float(rows.max() if part.attends else rows.median())
            if not gap <= tolerance:
                raise ParityError(f"{part.name} differs from the model's by {gap:.1e} of its norm")

    @torch.inference_mode()
    def _eager_logits(self, model: Any) -> torch.Tensor:
        """Logits after the prompt and after each of the decoding steps, ``[1 + DECODES, vocab]``."""
        logits = model(input_ids=torch.tensor([self.prompt], device=self._device), use_cache=False).logits
        return logits[0, PROMPT_TOKENS - 1 :].float()

    def _run(self, runner: Runner, announce: Callable[[slice], None]) -> torch.Tensor:
        slot, strange_slot = runner.new_slot(self.length), runner.new_slot(self.length)
        stops = [PROMPT_TOKENS // 2 - 1, *range(PROMPT_TOKENS, self.length + 1)]
        start = 0
        found: list[torch.Tensor] = []
        for stop in stops:
            announce(slice(start, stop))
            mine = Chunk(slot=slot, token_ids=self.prompt[start:stop], start=start, num_logits=1)
            theirs = Chunk(slot=strange_slot, token_ids=self.prompt[::-1][start:stop], start=start, num_logits=0)
            logits, _ = runner.forward([mine, theirs])
            assert logits is not None
            found.append(logits.float())
            start = stop
        return torch.cat(found[1:])


class _Rows(msgspec.Struct):
    """Rows of the text that are being computed."""

    now: slice = slice(0, 0)

    def set(self, rows: slice) -> None:
        self.now = rows


@contextmanager
def _hooked(parts: list[_Part], order: list[str], rows: _Rows | None) -> Generator[None]:
    """While the block runs, note what the parts are given and give; with ``rows``, give them that and compare.

    ``order`` grows by the name of each part that runs.
    """

    def before(part: _Part) -> Callable[..., Any]:
        def hook(_module: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> Any:
            if rows is None or part.given is None:
                return None
            given = _hidden(args, named).clone()
            expected = part.given[rows.now]
            given[0, : len(expected)] = expected
            return ((given, *args[1:]), named) if args else (args, {**named, "hidden_states": given})

        return hook

    def after(part: _Part) -> Callable[..., None]:
        def hook(_module: nn.Module, args: tuple[Any, ...], named: dict[str, Any], out: Any) -> None:
            order.append(part.name)
            given, gave = _hidden(args, named), out[0] if isinstance(out, tuple) else out
            if rows is None:
                part.note(given, gave)
            elif part.given is not None:
                part.compare(gave, given.shape[1], rows.now)

        return hook

    handles = [part.module.register_forward_pre_hook(before(part), with_kwargs=True) for part in parts]
    handles += [part.module.register_forward_hook(after(part), with_kwargs=True) for part in parts]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _hidden(args: tuple[Any, ...], named: dict[str, Any]) -> torch.Tensor:
    """The rows that a module is given, ``[1, T, hidden]``."""
    return args[0] if args else named["hidden_states"]
