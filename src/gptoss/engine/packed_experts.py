"""Mixtures of experts with packed weights, for CPUs: the products of ``packed_product``.

Rules:
- How many rows of a step meet in one expert depends on everybody's tokens. transformers' grouped product changes its
  order of summation with that number, here every expert is a ``packed_product``: a token's result depends on nobody.
- The results of a token's experts are added in the order of its own ranking, in float32.
- Routers multiply by a bare parameter. ``PackedWeight`` takes its place and answers ``functional.linear``; whatever else
  a router does with its weight sees the plain tensor.
- Only experts that transformers describes by its own decorator are packed; other models keep their code.

Source: transformers, ``integrations/moe.py`` (``use_experts_implementation`` and what it says of a module).
"""

from typing import Any

import torch
from torch import nn
from torch.nn import functional

from gptoss.engine.packed_product import pack, packed_product

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# torch is only partly typed.


class PackedExperts(nn.Module):
    """The experts of one layer.

    Args:
        experts: transformers' module; its matrices are freed, its gate stays in use.
    """

    def __init__(self, experts: Any) -> None:
        super().__init__()
        first = "gate_up_proj" if experts.has_gate else "up_proj"
        self._up, self._up_bias = _pack_each(experts, first)
        self._down, self._down_bias = _pack_each(experts, "down_proj")
        self._activate = experts._apply_gate if experts.has_gate else experts.act_fn  # noqa: SLF001 - the model's own

    def forward(self, rows: torch.Tensor, expert_ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Send each row through its experts.

        Args:
            rows: ``[T, hidden]``.
            expert_ids: ``[T, K]``.
            weights: of each expert's result, ``[T, K]``.

        Returns:
            ``[T, hidden]``.
        """
        count, ranks = expert_ids.shape
        flat_ids = expert_ids.reshape(-1)
        order = torch.argsort(flat_ids, stable=True)
        sizes = torch.bincount(flat_ids, minlength=len(self._up)).tolist()
        results = rows.new_empty((count * ranks, rows.shape[1]))
        for expert, places in enumerate(order.split(sizes)):
            if sizes[expert]:
                inner = packed_product(rows[places // ranks], self._up[expert], self._up_bias[expert])
                results[places] = packed_product(self._activate(inner), self._down[expert], self._down_bias[expert])
        scaled = results.view(count, ranks, -1).float() * weights.float()[..., None]
        total = scaled[:, 0]
        for rank in range(1, ranks):
            total = total + scaled[:, rank]
        return total.to(rows.dtype)


class PackedWeight:
    """Stands for a weight ``[out, in]`` in ``functional.linear``; the tensor itself for everything else."""

    def __init__(self, plain: torch.Tensor) -> None:
        self.plain = plain
        self.packed = pack(plain)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.plain, name)

    @classmethod
    def __torch_function__(cls, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Answer torch's call of ``func`` with a weight of this class among its arguments."""
        named: dict[str, Any] = kwargs or {}
        if func is functional.linear and not named.keys() - {"bias"} and isinstance(args[1], cls):
            rows, weight, *bias = args
            return packed_product(rows, weight.packed, bias[0] if bias else named.get("bias"))
        return func(*map(_plain, args), **{name: _plain(value) for name, value in named.items()})


def pack_experts(model: nn.Module) -> int:
    """Replace the experts below ``model`` and the weights of their routers. Returns how many layers had experts."""
    count = 0
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if _is_known(child):
                setattr(parent, name, PackedExperts(child))
                count += 1
            elif type(child).__name__.endswith("Router"):
                _pack_router(child)
    return count


def _is_known(module: Any) -> bool:
    """Whether transformers' decorator describes ``module`` as experts that are two products with a gate between."""
    flags = ("has_gate", "has_bias", "is_transposed", "has_post_expert_norm")
    return (
        all(hasattr(module, name) for name in (*flags, "num_experts", "down_proj")) and not module.has_post_expert_norm
    )


def _pack_router(router: Any) -> None:
    weight = dict(router.named_parameters(recurse=False)).get("weight")
    if weight is not None and weight.ndim == 2:  # noqa: PLR2004 - a matrix
        del router.weight  # the name is free then for what is no parameter
        router.weight = PackedWeight(weight.detach())


def _pack_each(experts: Any, name: str) -> tuple[list[torch.Tensor], list[torch.Tensor | None]]:
    """The packed matrix and the bias of each expert; the module's own matrices are freed."""
    matrices = getattr(experts, name).detach()
    packed = [pack(matrix.t() if experts.is_transposed else matrix) for matrix in matrices]
    setattr(experts, name, None)
    if not experts.has_bias:
        return packed, [None] * len(packed)
    return packed, list(getattr(experts, f"{name}_bias").detach().unbind(0))


def _plain(value: Any) -> Any:
    return value.plain if isinstance(value, PackedWeight) else value
