"""The executors of a system: made from its settings, restarted when an operator wants it, tuned when settings change."""

import contextlib
import functools
import os
from collections.abc import Callable
from pathlib import Path

from gptoss.actors.directory import DECIDER_NAMES, Directory, executor_name
from gptoss.actors.executor import ExecutorActor, ExecutorConfig
from gptoss.actors.executor_orders import STOP_TIMEOUT_S, RestartExecutor, StopEngine, TuneExecutor
from gptoss.actors.supervisor import Supervision
from gptoss.actors.system import System
from gptoss.config import BYTES_PER_MB, PROFILES, Settings
from gptoss.devices import Device, gpu_memory_bytes, parse_devices, weights_fit_one
from gptoss.engine.model_source import PreparedModel
from gptoss.engine.port import DriverFactory, Load
from gptoss.errors import ActorError
from gptoss.messages.commands import ChangeSettings

EXECUTOR_SUPERVISION = Supervision(max_restarts=5, within_s=120.0, backoff_s=0.2, backoff_max_s=10.0)


class Fleet:
    """All executors of one system.

    Args:
        system: that runs them.
        directory: that knows them.
        drivers: makes their engines' drivers.
        settings: those in force, whenever they are asked for.
    """

    def __init__(
        self, system: System, directory: Directory, drivers: DriverFactory, settings: Callable[[], Settings]
    ) -> None:
        self._system = system
        self._directory = directory
        self._drivers = drivers
        self._settings = settings
        self.devices: tuple[Device, ...] = ()

    def plan(self, model: PreparedModel) -> None:
        """Decide which executors there are. May ask the GPU driver, which takes up to some seconds."""
        settings = self._settings()
        fits_one = settings.gpu_mode != "auto" or _fits_one(settings.devices, model)
        self.devices = parse_devices(settings.devices, settings.gpu_mode, fits_one=fits_one)

    def start(self, model: PreparedModel) -> None:
        """Start every executor that was planned."""
        supervisor = self._system.supervisor("executors", EXECUTOR_SUPERVISION)
        for device in self.devices:
            make = functools.partial(self._make, model, device)
            name = executor_name(device.executor)
            self._directory.add(name, self._system.spawn(make, name=name, supervisor=supervisor))

    async def stop(self) -> None:
        """Have every engine end in peace, or be killed; returns once they are gone."""
        refs = [self._directory.get(executor_name(device.executor)) for device in self.devices]
        asks = [ref.ask(StopEngine(), timeout_s=2 * STOP_TIMEOUT_S) for ref in refs if ref is not None]
        for ask in asks:
            with contextlib.suppress(ActorError):  # its executor is gone, and the engine with it
                await ask

    def restart(self, executor: str, *, origin: str) -> bool:
        """Replace an executor's engine, without refusing anybody; False when there is no such executor."""
        order = RestartExecutor(origin=origin, timeout_s=self._settings().drain_timeout_s)
        return self._directory.tell(executor_name(executor), order)

    def tune(self, change: ChangeSettings, cause: int) -> None:
        """Tell every decider and every executor of settings that have changed; ``cause`` is the record that says so."""
        for name in DECIDER_NAMES:
            self._directory.tell(name, change, cause=cause)
        order = TuneExecutor(step_timeout_s=self._settings().step_timeout_s)
        for device in self.devices:
            self._directory.tell(executor_name(device.executor), order)

    def _make(self, model: PreparedModel, device: Device) -> ExecutorActor:
        return ExecutorActor(self._config(model, device), self._drivers, self._directory)

    def _config(self, model: PreparedModel, device: Device) -> ExecutorConfig:
        settings = self._settings()
        num_engines = sum(len(each.devices) if each.mode == "tensor" else 1 for each in self.devices)
        load = Load(
            folder=model.folder,
            model_name=settings.served_model_name or model.model_name,
            device=device.device,
            mode=device.mode,
            dtype=settings.dtype,
            max_batch_size=settings.max_batch_size or PROFILES[settings.profile].max_batch_size,
            max_model_len=settings.max_model_len,
            kv_budget_bytes=settings.kv_budget_mb * BYTES_PER_MB,
            prefix_cache_bytes=settings.prefix_cache_mb * BYTES_PER_MB,
            session_bytes_max=settings.session_kv_mb * BYTES_PER_MB,
            speculation=settings.speculation,
            kernels=settings.kernels,
            quantization=settings.quantization,
            kv_layout=settings.kv_layout,
            cache_folder=str(settings.cache_path),
            num_threads=settings.num_threads or max(1, (os.cpu_count() or 1) // num_engines),
        )
        return ExecutorConfig(
            executor=device.executor,
            load=load,
            step_timeout_s=settings.step_timeout_s,
            keep_content=settings.content != "none",
        )


def _fits_one(devices: str, model: PreparedModel) -> bool:
    """Whether each of the GPUs that are named can hold the model."""
    names = [name for device in parse_devices(devices, "auto") for name in device.devices if name != "cpu"]
    if len(names) <= 1:
        return True
    weights = sum(path.stat().st_size for path in Path(model.folder).glob("*.safetensors"))
    return weights_fit_one(weights, gpu_memory_bytes(names))
