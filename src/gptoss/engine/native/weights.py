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

LANES = 16
DEPTH = 32
INT8_MAX = 127
INT4_MAX = 15
SCALE_MIN = 2.0**-14
"""The least that float16 holds in full."""
QUANTISE_AT_ONCE = 1 << 20
"""Weights; bounds what quantising takes besides."""

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
            stored, scales = _stored(linear.weight.detach(), form)
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


def quantise(weight: torch.Tensor, form: WeightFormat) -> tuple[torch.Tensor, torch.Tensor]:
    """A matrix as whole numbers.

    Returns:
        the numbers ``[outputs, inputs]`` in 8 bits each, and of each 32 of them scale and, in int4, minimum
        ``[outputs, inputs / 32, 1 or 2]`` in float16.
    """
    blocks = weight.float().view(weight.shape[0], -1, DEPTH)
    if form == "int8":
        step = (blocks.abs().amax(dim=-1, keepdim=True) / INT8_MAX).clamp_min(SCALE_MIN)
        whole = torch.round(blocks / step)
        fitted = (whole * blocks).sum(-1, keepdim=True) / whole.square().sum(-1, keepdim=True).clamp_min(1.0)
        return whole.to(torch.int8).view_as(weight), fitted.clamp_min(SCALE_MIN).half()
    least, most = blocks.amin(dim=-1, keepdim=True), blocks.amax(dim=-1, keepdim=True)
    whole = torch.round((blocks - least) / ((most - least) / INT4_MAX).clamp_min(SCALE_MIN))
    middle, blocks_middle = whole.mean(-1, keepdim=True), blocks.mean(-1, keepdim=True)
    centred = whole - middle
    fitted = (centred * blocks).sum(-1, keepdim=True) / centred.square().sum(-1, keepdim=True).clamp_min(SCALE_MIN)
    scale = fitted.clamp_min(SCALE_MIN).half()
    minimum = (blocks_middle - scale.float() * middle).half()
    return whole.to(torch.int8).view_as(weight), torch.cat([scale, minimum], dim=-1)


def _stored(weight: torch.Tensor, form: WeightFormat) -> tuple[torch.Tensor, torch.Tensor]:
    """What ``gptoss_pack`` takes, and the scales of each output's blocks."""
    if form == "bfloat16":
        return weight.to(torch.bfloat16).contiguous(), torch.empty(weight.shape[0], weight.shape[1] // DEPTH, 0)
    pieces = [quantise(piece, form) for piece in weight.split(max(1, QUANTISE_AT_ONCE // weight.shape[1]))]
    return torch.cat([whole for whole, _ in pieces]), torch.cat([scales for _, scales in pieces])


def _bias(linear: nn.Linear) -> torch.Tensor | None:
    bias: Any = linear.bias
    return None if bias is None else bias.detach().float()


def _by_block(values: torch.Tensor) -> torch.Tensor:
    """``[outputs, ...]`` as ``[blocks of 16 outputs, ..., 16]``, with zeros for outputs that are not there."""
    padded = values.new_zeros(round_up(values.shape[0], LANES), *values.shape[1:])
    padded[: values.shape[0]] = values
    return padded.unflatten(0, (-1, LANES)).movedim(1, -1)
