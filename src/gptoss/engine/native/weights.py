"""Weights in the layout of ``kernels.cpp``: blocks of 32 inputs x 16 outputs, in bfloat16 or packed.

Rules:
- ``int8``: each 32 inputs of an output as whole numbers of -127 to 127 times a scale.
- ``int4``: each 32 inputs of an output as a minimum and whole numbers of 0 to 15 times a scale. These are the blocks of
  GGUF's Q4_0 and Q4_1: a model that comes from such a file gets the file's own numbers back, however it was stored in
  between. The ``lm_head``, which is often the embedding too, is kept in int8, as these files do.
- Scale and minimum are those that fit the rounded weights best, in float16.
"""

import ctypes
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import nn

from gptoss.engine.native.memory import Arena, round_up

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# torch is only partly typed.

LANES = 16
DEPTH = 32

WeightFormat = Literal["bfloat16", "int8", "int4"]
BITS: dict[WeightFormat, int] = {"bfloat16": 16, "int8": 8, "int4": 4}
_SCALE_NUMBERS: dict[WeightFormat, int] = {"bfloat16": 0, "int8": 1, "int4": 2}


class WeightsStruct(ctypes.Structure):
    """``Weights`` of ``kernels.cpp``."""

    _fields_ = (
        ("blocks", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("outputs", ctypes.c_int32),
        ("inputs", ctypes.c_int32),
        ("bits", ctypes.c_int32),
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
        is_whole = inputs % DEPTH == 0 and not any(n % LANES for n in outputs[:-1])
        if not is_whole or any(linear.in_features != inputs for linear in linears):
            raise ValueError(f"matrices of {[tuple(linear.weight.shape) for linear in linears]} do not go together")
        bits, numbers = BITS[form], _SCALE_NUMBERS[form]
        column_blocks = [round_up(count, LANES) // LANES for count in outputs]
        rows = sum(column_blocks) * LANES
        self._blocks = arena.take(rows * inputs * bits // 8)
        scales_room = arena.take(rows * inputs // DEPTH * numbers * 2)
        self._scales = scales_room.view(torch.float16).view(sum(column_blocks), inputs // DEPTH, numbers, LANES)
        self._bias: torch.Tensor | None = None
        if any(_bias(linear) is not None for linear in linears):
            self._bias = torch.zeros(sum(column_blocks), LANES)
        first = 0
        for index, linear in enumerate(linears):
            step = len(linears) if interleaved else 1
            start = index if interleaved else first
            stored, scales = _stored(library, linear.weight.detach(), form)
            library.gptoss_pack(
                ctypes.c_void_p(stored.data_ptr()),
                outputs[index],
                inputs,
                bits,
                start,
                step,
                ctypes.c_void_p(self._blocks.data_ptr()),
            )
            mine = slice(start, start + (column_blocks[index] - 1) * step + 1, step)
            self._scales[mine] = _by_block(scales)
            bias = _bias(linear)
            if self._bias is not None and bias is not None:
                self._bias[mine] = _by_block(bias)
            first += column_blocks[index]
        self.struct = WeightsStruct(
            blocks=self._blocks.data_ptr(),
            scales=self._scales.data_ptr(),
            bias=0 if self._bias is None else self._bias.data_ptr(),
            outputs=rows,
            inputs=inputs,
            bits=bits,
        )
        self.num_bytes = sum(
            part.numel() * part.element_size() for part in (self._blocks, self._scales, self._bias) if part is not None
        )


def quantise(library: ctypes.CDLL, weight: torch.Tensor, form: WeightFormat) -> tuple[torch.Tensor, torch.Tensor]:
    """A bfloat16 matrix as whole numbers.

    Returns:
        the numbers ``[outputs, inputs]`` in 8 bits each, and of each 32 of them scale and, in int4, minimum
        ``[outputs, inputs / 32, 1 or 2]`` in float16.
    """
    weight = weight.to(torch.bfloat16).contiguous()
    outputs, inputs = weight.shape
    whole = torch.empty(outputs, inputs, dtype=torch.uint8)
    scales = torch.empty(outputs, inputs // DEPTH, _SCALE_NUMBERS[form], dtype=torch.float16)
    library.gptoss_quantise(
        ctypes.c_void_p(weight.data_ptr()),
        ctypes.c_int64(scales.shape[0] * scales.shape[1]),
        BITS[form],
        ctypes.c_void_p(whole.data_ptr()),
        ctypes.c_void_p(scales.data_ptr()),
    )
    return whole, scales


def _stored(library: ctypes.CDLL, weight: torch.Tensor, form: WeightFormat) -> tuple[torch.Tensor, torch.Tensor]:
    """What ``gptoss_pack`` takes, and the scales of each output's blocks."""
    if form == "bfloat16":
        return weight.to(torch.bfloat16).contiguous(), torch.empty(weight.shape[0], weight.shape[1] // DEPTH, 0)
    return quantise(library, weight, form)


def _bias(linear: nn.Linear) -> torch.Tensor | None:
    bias: Any = linear.bias
    return None if bias is None else bias.detach().float()


def _by_block(values: torch.Tensor) -> torch.Tensor:
    """``[outputs, ...]`` as ``[blocks of 16 outputs, ..., 16]``, with zeros for outputs that are not there."""
    padded = values.new_zeros(round_up(values.shape[0], LANES), *values.shape[1:])
    padded[: values.shape[0]] = values
    return padded.unflatten(0, (-1, LANES)).movedim(1, -1)
