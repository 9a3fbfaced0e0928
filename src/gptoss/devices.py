"""From the settings ``devices`` and ``gpu_mode`` to executors: which devices each one has and how it is called.

    single    a whole model on each device: as many executors
    pipeline  some layers on each device, one executor over all of them
    tensor    a part of every layer on each device, one executor over all of them
    auto      single if the model fits one device, else pipeline

Devices that are joined by ``+`` are one executor beside the others, by pipeline unless ``gpu_mode`` is tensor.
"""

import re
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, TypeAlias

import msgspec

from gptoss.errors import ConfigError

GpuMode: TypeAlias = Literal["auto", "single", "pipeline", "tensor"]

_ITEM = re.compile(r"(cpu|cuda)(?::(\d+))?")
_NVIDIA = Path("/proc/driver/nvidia/gpus")
MAX_EXECUTORS = 64
MAX_JOINED = 16
WEIGHTS_SHARE = 0.8
"""Part of a GPU's memory that weights may fill for ``auto`` to say that they fit; the rest is for KV memory."""
NVIDIA_SMI = ("nvidia-smi", "--query-gpu=index,memory.total", "--format=csv,noheader,nounits")
NVIDIA_SMI_S = 10.0
BYTES_PER_MB = 1024 * 1024


class Device(msgspec.Struct, frozen=True, kw_only=True):
    """One executor: its name, such as ``cpu:0``, and the torch devices that it drives, joined by ``+`` if several."""

    executor: str
    device: str
    mode: Literal["pipeline", "tensor"] = "pipeline"

    @property
    def devices(self) -> tuple[str, ...]:
        """Each device."""
        return tuple(self.device.split("+"))


def parse_devices(devices: str, gpu_mode: GpuMode = "single", *, fits_one: bool = True) -> tuple[Device, ...]:
    """The executors that the settings ask for.

    ``auto`` takes every NVIDIA GPU or else the CPU; ``cpu:2`` is two CPU executors; ``cuda:0,cuda:1`` names GPUs;
    ``cuda:0+cuda:1`` joins them.

    Args:
        devices: the setting.
        gpu_mode: the setting.
        fits_one: whether the model fits a single device, for ``auto``.

    Raises:
        ConfigError: a device is none of these or named twice, or the two settings do not go together.
    """
    groups = _groups(devices)
    if not any(len(group) > 1 for group in groups):
        joins = gpu_mode in {"pipeline", "tensor"} or (gpu_mode == "auto" and not fits_one and len(groups) > 1)
        if joins and len(groups) == 1:
            raise ConfigError(f"gpu_mode is {gpu_mode!r}, which needs several devices; devices is {devices!r}")
        groups = [tuple(name for group in groups for name in group)] if joins else groups
    elif gpu_mode == "single":
        raise ConfigError(f"gpu_mode is 'single', but devices is {devices!r}, which joins some by +")
    if max(map(len, groups)) > MAX_JOINED:
        raise ConfigError(f"devices is {devices!r}; at most {MAX_JOINED} devices can be one executor")
    mode = "tensor" if gpu_mode == "tensor" else "pipeline"
    return tuple(Device(executor="+".join(group), device=_torch_names(group), mode=mode) for group in groups)


def weights_fit_one(weights_bytes: int, memory_bytes: Sequence[int]) -> bool:
    """Whether a model fits the smallest of some GPUs; True when nothing is known of them."""
    return not memory_bytes or weights_bytes <= WEIGHTS_SHARE * min(memory_bytes)


def gpu_memory_bytes(names: Sequence[str]) -> tuple[int, ...]:
    """Memory of the GPUs with these names, as the driver says; empty when it cannot be asked. Takes up to some seconds."""
    try:
        said = subprocess.run(NVIDIA_SMI, capture_output=True, text=True, timeout=NVIDIA_SMI_S, check=True)  # noqa: S603 - fixed
        rows = [line.split(",") for line in said.stdout.splitlines() if line.strip()]
        total = {f"cuda:{int(index)}": int(megabytes) * BYTES_PER_MB for index, megabytes in rows}
    except (OSError, ValueError, subprocess.SubprocessError):
        return ()
    return tuple(total[name] for name in names if name in total)


def _groups(devices: str) -> list[tuple[str, ...]]:
    """The names of each executor's devices."""
    if devices == "auto":
        gpus = len(list(_NVIDIA.iterdir())) if _NVIDIA.is_dir() else 0
        return [(f"cuda:{index}",) for index in range(gpus)] or [("cpu:0",)]
    groups: list[tuple[str, ...]] = []
    num_cpus = 0
    for item in devices.split(","):
        parts = [_ITEM.fullmatch(part.strip()) for part in item.split("+")]
        names: list[str] = []
        for match in parts:
            if match is None or (len(parts) > 1 and match[1] == "cpu" and match[2]):
                raise ConfigError(
                    f"devices is {devices!r}; give auto, cpu, cpu:2, a list such as cuda:0,cuda:1, or cuda:0+cuda:1"
                )
            if match[1] == "cuda":
                names.append(f"cuda:{int(match[2] or 0)}")
                continue
            count = min(int(match[2] or 1), MAX_EXECUTORS + 1)
            names += [f"cpu:{num_cpus + index}" for index in range(count)]
            num_cpus += count
        groups += [tuple(names)] if len(parts) > 1 else [(name,) for name in names]
    every = [name for group in groups for name in group]
    if not groups or len(every) > MAX_EXECUTORS or len(set(every)) < len(every):
        raise ConfigError(f"devices is {devices!r}; it must name 1 to {MAX_EXECUTORS} devices, each once")
    return groups


def _torch_names(group: tuple[str, ...]) -> str:
    # All CPU executors drive the one CPU.
    return "+".join("cpu" if name.startswith("cpu") else name for name in group)
