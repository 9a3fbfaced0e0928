"""Linear layers for CPUs whose rows do not depend on each other; see ``packed_product``."""

import torch
from torch import nn

from gptoss.engine.packed_experts import pack_experts
from gptoss.engine.packed_product import pack, packed_product


class PackedLinear(nn.Module):
    """``nn.Linear`` for inference on a CPU."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        # A plain attribute: an opaque tensor is no parameter, cannot be copied, saved or moved.
        self._packed = pack(linear.weight)
        self._bias = linear.bias.detach() if linear.bias is not None else None  # pyright: ignore[reportUnnecessaryComparison]

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """``rows @ weight.T + bias`` for ``[..., in]``, as ``[..., out]``."""
        return packed_product(rows, self._packed, self._bias)


def pack_linears(model: nn.Module) -> int:
    """Replace every ``nn.Linear`` below ``model``, its experts and routers; their own weights are freed.

    Returns:
        how many modules were replaced.
    """
    count = pack_experts(model)
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear:
                setattr(parent, name, PackedLinear(child))
                count += 1
    return count
