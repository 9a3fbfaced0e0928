"""MXFP4 checkpoints, which is how gpt-oss is published: kept as they are where kernels exist, else dequantised aloud.

Rules:
- An expert's matrix is stored as ``*_blocks``, two 4-bit numbers a byte, and ``*_scales``, a power of two for 32 numbers.
  All else is bfloat16.
- Products of MXFP4 need transformers' Triton kernels: a CUDA device, and the packages triton and kernels. Without them
  transformers would dequantise in silence; here it is asked to, and whoever starts the engine reads what that takes.
- What cannot fit is refused before it is tried: 120b takes 0.06 TB on disk and 0.22 TB dequantised.

Source: OCP Microscaling Formats 1.0; transformers, ``integrations/mxfp4.py``.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import msgspec
import psutil
import torch
import transformers
from transformers.utils.import_utils import is_kernels_available, is_triton_available

from gptoss.errors import ModelLoadError

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# transformers is only partly typed.

NUMBERS_PER_BYTE = 2
HEADER_BYTES_MAX = 100 << 20
TRITON_MIN = "3.4.0"
CAPABILITY_MIN = (7, 5)


class _Entry(msgspec.Struct, frozen=True):
    """What a safetensors header says of a tensor."""

    shape: list[int]


class WeightForm(msgspec.Struct, frozen=True):
    """A way to load a checkpoint's weights.

    Attributes:
        options: further arguments of ``from_pretrained``.
        note: for people; empty where there is nothing to say.
    """

    options: dict[str, Any] = {}
    note: str = ""


def weight_forms(
    folder: Path, config: Mapping[str, Any], dtype: torch.dtype, device: torch.device
) -> tuple[WeightForm, ...]:
    """Ways to load the weights in ``folder``, best first.

    Raises:
        ModelLoadError: a weight file is broken, or the weights must be dequantised and do not fit then.
    """
    if not is_mxfp4(config):
        return (WeightForm(),)
    missing = _missing_for_kernels(device)
    stored = () if missing else (WeightForm(note="MXFP4 weights as stored, with transformers' Triton kernels"),)
    needed = count_parameters(folder) * dtype.itemsize
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
    size = f"{needed / 1e9:.1f} GB in {str(dtype).removeprefix('torch.')}"
    if needed > free:
        if stored:
            return stored
        raise ModelLoadError(
            f"{folder} has MXFP4 weights, which must be dequantised, {missing}: "
            f"they take {size}, and {device} has {free / 1e9:.1f} GB free"
        )
    reason = f", {missing}" if missing else ""
    options = {"quantization_config": cast("Any", transformers).Mxfp4Config(dequantize=True)}
    return (*stored, WeightForm(options, f"MXFP4 weights dequantised{reason}: they take {size}"))


def is_mxfp4(config: Mapping[str, Any]) -> bool:
    """Whether a ``config.json`` says that the weights are MXFP4."""
    quantization: Any = config.get("quantization_config")
    return isinstance(quantization, dict) and cast("dict[str, Any]", quantization).get("quant_method") == "mxfp4"


def count_parameters(folder: Path) -> int:
    """Numbers in the safetensors files of ``folder``, those of MXFP4 matrices as if they were dequantised.

    Raises:
        ModelLoadError: a file is broken.
    """
    total = 0
    for path in folder.glob("*.safetensors"):
        for name, entry in _header(path).items():
            if name.endswith("_blocks"):
                total += NUMBERS_PER_BYTE * math.prod(entry.shape)
            elif not name.endswith("_scales"):
                total += math.prod(entry.shape)
    return total


def _header(path: Path) -> dict[str, _Entry]:
    try:
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            text = file.read(size) if 0 < size <= HEADER_BYTES_MAX else b""
        entries = msgspec.json.decode(text, type=dict[str, msgspec.Raw])
        return {
            name: msgspec.json.decode(entry, type=_Entry) for name, entry in entries.items() if name != "__metadata__"
        }
    except (OSError, msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ModelLoadError(f"cannot load {path}: it is not a safetensors file: {error}") from None


def _missing_for_kernels(device: torch.device) -> str:
    """Why MXFP4 cannot be computed with as it is; empty if it can."""
    if device.type != "cuda":
        return f"since there are no kernels for them on a {device.type}"
    if torch.cuda.get_device_capability(device) < CAPABILITY_MIN:
        return f"since {torch.cuda.get_device_name(device)} is too old for their kernels"
    packages = {"triton": is_triton_available(TRITON_MIN), "kernels": is_kernels_available()}
    lacking = [name for name, is_there in packages.items() if not is_there]
    return f"since {' and '.join(lacking)} is not installed" if lacking else ""
