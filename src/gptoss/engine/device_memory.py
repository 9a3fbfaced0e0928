"""How much memory is in use, as a device's own driver says, or the system of a process on a CPU."""

from collections.abc import Iterable
from typing import Any

import psutil
import torch

from gptoss.messages.model import DeviceMemory


def memory_of(devices: Iterable[torch.device]) -> dict[str, Any]:
    """The fields of an ``EngineStatus`` that tell of the memory of some devices."""
    each = readings(devices)
    return {
        "memory_bytes": sum(reading.used_bytes for reading in each),
        "device_memory_total_bytes": sum(reading.total_bytes for reading in each),
        "free_bytes": sum(reading.free_bytes for reading in each),
        "devices": each if len(each) > 1 else (),
    }


def readings(devices: Iterable[torch.device]) -> tuple[DeviceMemory, ...]:
    """A reading of each GPU among some devices; of CPUs one of this process, whatever their number."""
    distinct = dict.fromkeys(devices)
    found = tuple(_of_gpu(device) for device in distinct if device.type == "cuda")
    if found:
        return found
    used, host = psutil.Process().memory_info().rss, psutil.virtual_memory()
    return (DeviceMemory(device="cpu", used_bytes=used, total_bytes=host.total, free_bytes=host.available),)


def _of_gpu(device: torch.device) -> DeviceMemory:
    free, total = torch.cuda.mem_get_info(device)
    return DeviceMemory(device=str(device), used_bytes=total - free, total_bytes=total, free_bytes=free)
