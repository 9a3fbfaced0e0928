"""Readings of the machine: this process, its children, and GPUs through NVML."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

from gptoss.telemetry import host
from gptoss.telemetry.host import HostReader


def test_this_process_and_this_machine_are_read(tmp_path: Path) -> None:
    reading = HostReader(tmp_path / "not" / "there" / "yet").read(2.5)
    process = psutil.Process()
    assert 0 < reading.cpu_s <= sum(process.cpu_times()[:2]) + 0.01
    assert reading.rss_bytes == pytest.approx(process.memory_info().rss, rel=0.2)
    assert reading.open_fds > 0
    assert reading.num_threads >= 1
    assert reading.loop_late_ms == 2.5
    assert 0 <= reading.host_cpu_percent <= 100
    assert 0 < reading.memory_available_bytes < reading.memory_total_bytes
    assert reading.disk_free_bytes > 0


def test_children_are_read_by_their_pid() -> None:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        found = {one.pid: one for one in HostReader(Path("/")).read().children}
        assert found[child.pid].rss_bytes > 0
    finally:
        child.communicate(b"\n")


class Nvml:
    """NVML with one GPU that lacks a sensor."""

    NVML_TEMPERATURE_GPU = 0

    class NVMLError(Exception):
        pass

    def nvmlDeviceGetCount(self) -> int:  # noqa: N802 - NVML\'s own name
        return 1

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:  # noqa: N802 - NVML\'s own name
        return index

    def nvmlDeviceGetName(self, _: int) -> str:  # noqa: N802 - NVML\'s own name
        return "H100"

    def nvmlDeviceGetMemoryInfo(self, _: int) -> Any:  # noqa: N802 - NVML\'s own name
        return type("Memory", (), {"used": 3, "total": 10})

    def nvmlDeviceGetUtilizationRates(self, _: int) -> Any:  # noqa: N802 - NVML\'s own name
        return type("Rates", (), {"gpu": 81})

    def nvmlDeviceGetPowerUsage(self, _: int) -> int:  # noqa: N802 - NVML\'s own name
        return 350_500

    def nvmlDeviceGetTemperature(self, *_: int) -> int:  # noqa: N802 - NVML\'s own name
        raise self.NVMLError


def test_a_gpu_without_a_sensor_tells_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "_load_nvml", Nvml)
    (gpu,) = HostReader(Path("/")).read().gpus
    assert (gpu.index, gpu.name, gpu.busy_percent, gpu.power_w, gpu.temperature_c) == (0, "H100", 81.0, 350.5, 0.0)
    assert (gpu.memory_used_bytes, gpu.memory_total_bytes) == (3, 10)


def test_without_nvml_there_are_no_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert HostReader(Path("/")).read().gpus == ()
