"""From the ``devices`` setting to executors: which device each one has and how it is called."""

import re
from pathlib import Path

import msgspec

from gptoss.errors import ConfigError

_ITEM = re.compile(r"(cpu|cuda)(?::(\d+))?")
_NVIDIA = Path("/proc/driver/nvidia/gpus")
MAX_CPU_EXECUTORS = 64


class Device(msgspec.Struct, frozen=True, kw_only=True):
    """One executor: its name, such as ``cpu:0``, and the torch device that it drives."""

    executor: str
    device: str


def parse_devices(devices: str) -> tuple[Device, ...]:
    """The executors that ``devices`` asks for.

    ``auto`` takes every NVIDIA GPU or else the CPU; ``cpu:2`` is two CPU executors; ``cuda:0,cuda:1`` names GPUs.

    Raises:
        ConfigError: it is none of these, or names a device twice.
    """
    if devices == "auto":
        gpus = len(list(_NVIDIA.iterdir())) if _NVIDIA.is_dir() else 0
        names = [f"cuda:{index}" for index in range(gpus)]
        return tuple(Device(executor=name, device=name) for name in names) or _cpus(1)
    found: list[Device] = []
    for item in devices.split(","):
        match = _ITEM.fullmatch(item.strip())
        if match is None:
            raise ConfigError(f"devices is {devices!r}; give auto, cpu, cpu:2, or a list such as cuda:0,cuda:1")
        kind, number = match.groups()
        if kind == "cpu":
            found += _cpus(int(number) if number else 1)
        else:
            name = f"cuda:{number or 0}"
            found.append(Device(executor=name, device=name))
    if not found or len(found) > MAX_CPU_EXECUTORS or len({device.executor for device in found}) < len(found):
        raise ConfigError(f"devices is {devices!r}; it must name 1 to {MAX_CPU_EXECUTORS} devices, each once")
    return tuple(found)


def _cpus(count: int) -> tuple[Device, ...]:
    if count > MAX_CPU_EXECUTORS:
        raise ConfigError(f"devices asks for {count} CPU executors; at most {MAX_CPU_EXECUTORS} are allowed")
    return tuple(Device(executor=f"cpu:{index}", device="cpu") for index in range(count))
