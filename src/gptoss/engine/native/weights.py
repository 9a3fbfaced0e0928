"""Weights in the layout of ``kernels.cpp``: blocks of 32 inputs x 16 outputs, bfloat16 or int8 with a scale an output.

``int8`` rounds each weight to 255 steps between plus and minus the largest of its output's row; activations stay as
they are, so a request's result still depends on nobody else.
"""

import ctypes
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import nn

from gptoss.engine.native.memory import Arena

LANES = 16
DEPTH = 32
INT8_MAX = 127

WeightFormat = Literal["bfloat16", "int8"]


class WeightsStruct(ctypes.Structure):
    """``Weights`` of ``kernels.cpp``."""

    _fields_ = (
        ("blocks", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("outputs", ctypes.c_int32),
        ("inputs", ctypes.c_int32),
    )


class PackedWeights:
    """One matrix, or several of the same inputs below each other or interleaved by blocks of 16 outputs.

    Args:
        library: the kernels.
        arena: where the blocks go.
        linears: layers whose outputs are wanted together.
        form: how a weight is stored.
        interleaved: outputs 0-15 of each, then 16-31 of each and so on; else one after the other.

    Attributes:
        num_bytes: what blocks, scales and bias occupy.
    """

    def __init__(
        self,
        library: ctypes.CDLL,
        arena: Arena,
        linears: Sequence[nn.Linear],
        form: WeightFormat,
        *,
        interleaved: bool = False,
    ) -> None:
        inputs = linears[0].in_features
        outputs = [linear.out_features for linear in linears]
        if any(linear.in_features != inputs for linear in linears) or any(n % LANES for n in outputs[:-1]):
            raise ValueError(f"matrices of {[tuple(linear.weight.shape) for linear in linears]} do not go together")
        width = 1 if form == "int8" else 2
        column_blocks = [-(-count // LANES) for count in outputs]
        depth = -(-inputs // DEPTH) * DEPTH
        self._blocks = arena.take(sum(column_blocks) * LANES * depth * width)
        self._scales = torch.zeros(sum(column_blocks) * LANES) if form == "int8" else None
        has_bias = any(_bias(linear) is not None for linear in linears)
        self._bias = torch.zeros(sum(column_blocks) * LANES) if has_bias else None
        first = 0
        for index, linear in enumerate(linears):
            step = len(linears) if interleaved else 1
            start = index if interleaved else first
            stored, scales = _quantise(linear.weight.detach()) if form == "int8" else (linear.weight.detach(), None)
            stored = stored.to(torch.int8 if form == "int8" else torch.bfloat16).contiguous()
            library.gptoss_pack(
                ctypes.c_void_p(stored.data_ptr()),
                ctypes.c_int64(inputs),
                outputs[index],
                inputs,
                width,
                start,
                step,
                ctypes.c_void_p(self._blocks.data_ptr()),
            )
            _place(self._scales, scales, start, step)
            _place(self._bias, _bias(linear), start, step)
            first += column_blocks[index]
        self.struct = WeightsStruct(
            blocks=self._blocks.data_ptr(),
            scales=0 if self._scales is None else self._scales.data_ptr(),
            bias=0 if self._bias is None else self._bias.data_ptr(),
            outputs=sum(column_blocks) * LANES,
            inputs=inputs,
        )
        self.num_bytes = sum(
            part.numel() * part.element_size() for part in (self._blocks, self._scales, self._bias) if part is not None
        )


def _quantise(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """``weight`` as whole numbers of -127 to 127 and the scale of each output."""
    scales = weight.float().abs().amax(dim=1).clamp_min(1e-12) / INT8_MAX
    return torch.round(weight.float() / scales[:, None]), scales


def _bias(linear: nn.Linear) -> torch.Tensor | None:
    bias: Any = linear.bias
    return None if bias is None else bias.detach().float()


def _place(target: torch.Tensor | None, values: torch.Tensor | None, start: int, step: int) -> None:
    """Put the numbers of each output where its block is."""
    if target is None or values is None:
        return
    padded = torch.zeros(-(-values.numel() // LANES) * LANES)
    padded[: values.numel()] = values
    target.view(-1, LANES)[start : start + (padded.numel() // LANES - 1) * step + 1 : step] = padded.view(-1, LANES)
