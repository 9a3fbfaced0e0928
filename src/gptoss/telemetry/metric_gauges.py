"""What the gauges show: put anew for each exposition, from what the newest records said."""

import msgspec

from gptoss.clock import NS_PER_MS, NS_PER_S
from gptoss.messages.events import GpuReading, HostObserved
from gptoss.telemetry.books import Books
from gptoss.telemetry.executor_view import ExecutorView, model_of
from gptoss.telemetry.metric_catalogue import Catalogue


class Present(msgspec.Struct, frozen=True, kw_only=True):
    """What holds now, beside the books: requests in the queue, and the newest reading of the machine."""

    queued: int
    host: HostObserved | None


def put_gauges(families: Catalogue, books: Books, present: Present) -> None:
    """Bring every gauge up to date."""
    views = list(books.executors.views.values())
    model_name = next((name for view in views if (name := model_of(view))), "")
    if model_name:
        families.waiting.put((model_name, "all"), present.queued)
    families.sessions.put((), len(books.sessions.book.sessions))
    for view in views:
        families.ready.put((view.name,), view.state == "ready")
        if view.capabilities is not None:
            _put_memory(families, view)
    if present.host is not None:
        _put_host(families, present.host)
        _put_engines(families, present.host, views)
        for gpu in present.host.gpus:
            _put_gpu(families, gpu)


def _put_memory(families: Catalogue, view: ExecutorView) -> None:
    labels = (model_of(view), view.name)
    families.running.put(labels, len(view.running))
    families.kv_usage.put(labels, view.kv_bytes_in_use / view.kv_budget_bytes if view.kv_budget_bytes else 0)
    families.kv_in_use.put((view.name,), view.kv_bytes_in_use)
    families.prefix_bytes.put((view.name,), view.prefix_cache_bytes)
    if view.memory_used_bytes and not view.device.startswith("cpu"):
        # What the engine sees of its device; NVML's reading, where there is one, comes later and counts.
        families.gpu_memory.put((view.device.rpartition(":")[2],), view.memory_used_bytes)


def _put_host(families: Catalogue, host: HostObserved) -> None:
    families.process_cpu.put((), host.cpu_s)
    families.process_memory.put((), host.rss_bytes)
    families.process_fds.put((), host.open_fds)
    families.process_threads.put((), host.num_threads)
    families.loop_late.put((), host.loop_late_ms * NS_PER_MS / NS_PER_S)
    families.host_cpu.put((), host.host_cpu_percent / 100)
    families.host_load.put((), host.load_1m)
    families.host_free.put((), host.memory_available_bytes)
    families.host_memory.put((), host.memory_total_bytes)
    families.disk_free.put((), host.disk_free_bytes)


def _put_engines(families: Catalogue, host: HostObserved, views: list[ExecutorView]) -> None:
    """Of the children, those that are engines."""
    children = {child.pid: child for child in host.children}
    families.engine_memory.clear()
    for view in views:
        child = children.get(view.pid)
        if child is not None:
            families.engine_cpu.put((view.name,), child.cpu_s)
            families.engine_memory.put((view.name,), child.rss_bytes)


def _put_gpu(families: Catalogue, gpu: GpuReading) -> None:
    labels = (str(gpu.index),)
    families.gpu_busy.put(labels, gpu.busy_percent)
    families.gpu_memory.put(labels, gpu.memory_used_bytes)
    families.gpu_total.put(labels, gpu.memory_total_bytes)
    families.gpu_power.put(labels, gpu.power_w)
    families.gpu_heat.put(labels, gpu.temperature_c)
