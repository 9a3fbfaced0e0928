"""What the machine says of itself: this process, its children, processors, memory, disk and, through NVML, GPUs.

Read on a thread now and then and journaled as ``HostObserved``, so that metrics and bundles have it from there. GPUs need the
extra ``gpu`` (nvidia-ml-py) and a driver; without them, and where a single figure cannot be had, the rest is read.
"""

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import psutil

from gptoss.messages.events import GpuReading, HostObserved, ProcessReading

CHILDREN_MAX = 64

T = TypeVar("T")


class HostReader:
    """Reads the machine; from one thread at a time.

    Args:
        folder: where the journal is; its disk is what free space is read of.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = next((path for path in (folder, *folder.parents) if path.exists()), Path("/"))
        self._process = psutil.Process()
        self._nvml = _load_nvml()
        psutil.cpu_percent(None)  # the first call only sets the mark that the next measures from

    def read(self, loop_late_ms: float = 0.0) -> HostObserved:
        """A reading of everything.

        Args:
            loop_late_ms: how late the event loop woke up for it.
        """
        process, memory = self._process, psutil.virtual_memory()
        with process.oneshot():
            times = process.cpu_times()
            return HostObserved(
                cpu_s=round(times.user + times.system, 3),
                rss_bytes=process.memory_info().rss,
                open_fds=process.num_fds(),
                num_threads=process.num_threads(),
                loop_late_ms=round(loop_late_ms, 3),
                children=self._children(),
                host_cpu_percent=psutil.cpu_percent(None),
                load_1m=round(psutil.getloadavg()[0], 2),
                memory_available_bytes=memory.available,
                memory_total_bytes=memory.total,
                disk_free_bytes=psutil.disk_usage(str(self._folder)).free,
                gpus=self._gpus(),
            )

    def _children(self) -> tuple[ProcessReading, ...]:
        found: list[ProcessReading] = []
        for child in self._process.children(recursive=True)[:CHILDREN_MAX]:
            with suppress(psutil.Error), child.oneshot():  # it may be gone by now
                times = child.cpu_times()
                found.append(ProcessReading(child.pid, round(times.user + times.system, 3), child.memory_info().rss))
        return tuple(found)

    def _gpus(self) -> tuple[GpuReading, ...]:
        nvml = self._nvml
        if nvml is None:
            return ()
        try:
            handles = [nvml.nvmlDeviceGetHandleByIndex(index) for index in range(nvml.nvmlDeviceGetCount())]
            return tuple(_gpu(nvml, index, handle) for index, handle in enumerate(handles))
        except nvml.NVMLError:
            return ()


def _gpu(nvml: Any, index: int, handle: Any) -> GpuReading:
    def tell(read: Callable[[], T], otherwise: T) -> T:
        try:
            return read()
        except nvml.NVMLError:  # not every model, and no slice of one, has every sensor
            return otherwise

    memory = nvml.nvmlDeviceGetMemoryInfo(handle)
    return GpuReading(
        index,
        str(nvml.nvmlDeviceGetName(handle)),
        float(tell(lambda: nvml.nvmlDeviceGetUtilizationRates(handle).gpu, 0)),
        int(memory.used),
        int(memory.total),
        tell(lambda: nvml.nvmlDeviceGetPowerUsage(handle) / 1000, 0.0),
        float(tell(lambda: nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU), 0)),
    )


def _load_nvml() -> Any:
    """NVML, started; None without the package, the driver, or a GPU."""
    try:
        import pynvml  # noqa: PLC0415 - of the extra ``gpu``
    except ImportError:
        return None
    nvml: Any = pynvml
    try:
        nvml.nvmlInit()
    except nvml.NVMLError:
        return None
    return nvml
