"""Matrix products over weights laid out for oneDNN, for CPUs.

Rules:
- A row's result has the same bits whatever the number of rows: that is what makes a request's tokens independent of its
  neighbours. MKL's GEMM, which ``nn.Linear`` takes in float32, changes its order of summation with the number of rows
  (1, 2-12, 16 and more). oneDNN does so between 1 row and 2, so a single row is doubled; and with AMX, which it uses
  for bfloat16, between 32 rows and 33, so there it gets at most 32 at a time.
- oneDNN has no bfloat16 for CPUs without AVX-512. There the weight stays as it is, and torch's own loops sum each number
  by itself, again but for a single row.
- They are faster as well from two rows on. Measured on two cores without bfloat16 instructions, 576 x 1536, microseconds
  at 1, 8 and 136 rows: float32 99, 154, 1023 packed against 77, 213, 786 plain; bfloat16 59, 269, 4090 packed against
  95, 398, 3977 plain. With AMX, taking 256 rows by 32 costs 1.5 to 2 times what taking them at once does.
"""

from typing import Any, cast

import torch
from torch.nn import functional

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# torch is only partly typed.

AMX_ROWS = 32
"""Rows of a product up to which AMX sums in one order."""


def pack(weight: torch.Tensor) -> torch.Tensor:
    """``weight``, ``[out, in]``, as oneDNN wants it for ``packed_product``: opaque, it cannot be read or moved."""
    if weight.dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():  # noqa: SLF001 - as below
        return weight.detach().contiguous()
    return torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous())  # noqa: SLF001 - no public name


def packed_product(rows: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """``rows @ weight.T + bias``, each row with the same bits whatever the others.

    Args:
        rows: ``[..., T, in]``; what precedes ``T`` is 1.
        packed: by ``pack``.
        bias: ``[out]``.

    Returns:
        ``[..., T, out]``.
    """
    count = rows.shape[-2]
    if count == 1:
        return _product(rows.expand(*rows.shape[:-2], 2, -1).contiguous(), packed, bias)[..., :1, :]
    if count <= AMX_ROWS or not _takes_amx(rows):
        return _product(rows, packed, bias)
    sizes = [AMX_ROWS] * (count // AMX_ROWS) + ([count % AMX_ROWS] if count % AMX_ROWS else [])
    if sizes[-1] == 1:
        sizes[-2:] = [AMX_ROWS - 1, 2]
    return torch.cat([_product(part, packed, bias) for part in rows.split(sizes, dim=-2)], dim=-2)


def _product(rows: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    if not packed.is_mkldnn:
        return functional.linear(rows, packed, bias)
    return torch.ops.mkldnn._linear_pointwise(rows, packed, bias, "none", [], "")  # noqa: SLF001 - no public name


def _takes_amx(rows: torch.Tensor) -> bool:
    return rows.dtype == torch.bfloat16 and bool(cast("Any", torch.cpu)._is_amx_tile_supported())  # noqa: SLF001
