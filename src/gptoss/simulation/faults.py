"""What each kind of fault does to the world, at its time."""

import asyncio
from collections.abc import Callable

from gptoss.actors.directory import request_name
from gptoss.simulation.clients import Client
from gptoss.simulation.engine import Device, SimulatedDriver
from gptoss.simulation.probe import NAME, Question
from gptoss.simulation.scenario import Fault, FaultKind
from gptoss.simulation.world import World
from gptoss.telemetry.telemetry_actor import CatchUp

ASK_TIMEOUT_S = 1.0
ANY_REQUEST = "request"
"""As the target of ``actor_crashes``: the oldest request that runs then."""


REQUEST_PREFIX = request_name("")


class Poison:
    """A message that no actor can handle; a decider cannot even journal it."""


async def happen(world: World, fault: Fault) -> None:
    """Let a fault happen now, and end if it ends."""
    if fault.kind in DEVICE_FAULTS:
        await _on_device(world.devices[fault.target], fault)
    elif fault.kind in CLIENT_FAULTS:
        client = world.clients.get(fault.target)
        if client is not None:
            CLIENT_FAULTS[fault.kind](client, fault)
    else:
        await WORLD_FAULTS[fault.kind](world, fault)


# ---------------------------------------------------------------- devices


async def _on_device(device: Device, fault: Fault) -> None:
    begin, end = DEVICE_FAULTS[fault.kind]
    begin(device, fault)
    if end is not None:
        await asyncio.sleep(fault.amount)
        end(device, fault)


def _set(name: str, value: object) -> Callable[[Device, Fault], None]:
    return lambda device, _: setattr(device, name, value)


def _engine(act: Callable[[SimulatedDriver], None]) -> Callable[[Device, Fault], None]:
    def on_engine(device: Device, _: Fault) -> None:
        if device.engine is not None:
            act(device.engine)

    return on_engine


def _break(device: Device, fault: Fault) -> None:
    device.lives_s = fault.amount
    if device.engine is not None:
        device.engine.die()


Change = Callable[[Device, Fault], None]
DEVICE_FAULTS: dict[FaultKind, tuple[Change, Change | None]] = {
    "engine_dies": (_engine(SimulatedDriver.die), None),
    "engine_hangs": (_engine(SimulatedDriver.hang), None),
    "engine_slow": (_set("slow", 20.0), _set("slow", 1.0)),
    "engine_late": (_set("late_s", 0.05), _set("late_s", 0.0)),
    "engine_short_of_memory": (_set("memory_share", 0.05), _set("memory_share", 1.0)),
    "row_fails": (_set("row_failure", "not_finite"), None),
    "row_without_memory": (_set("row_failure", "memory"), None),
    "device_breaks": (_break, None),
    "load_fails": (_set("fails_to_load", True), None),
}

# ---------------------------------------------------------------- clients


def _read_slowly(client: Client, fault: Fault) -> None:
    client.delay_s = fault.amount


CLIENT_FAULTS: dict[FaultKind, Callable[[Client, Fault], None]] = {
    "client_cancels": lambda client, _: client.cancel(),
    "client_disconnects": lambda client, _: client.disconnect(),
    "client_stalls": lambda client, _: client.stall(),
    "client_reads_slowly": _read_slowly,
}

# ---------------------------------------------------------------- everything else


async def _disk_fails(world: World, _: Fault) -> None:
    world.disk.fails = True


async def _disk_slow(world: World, fault: Fault) -> None:
    world.disk.extra_s = 0.2
    await asyncio.sleep(fault.amount)
    world.disk.extra_s = 0.0


async def _renderer_slow(world: World, fault: Fault) -> None:
    world.renderer.slow_s = fault.amount
    await asyncio.sleep(0.2)
    world.renderer.slow_s = 0.0


async def _renderer_refuses(world: World, _: Fault) -> None:
    world.renderer.fault = "refuses"


async def _renderer_crashes(world: World, _: Fault) -> None:
    world.renderer.fault = "crashes"


async def _actor_crashes(world: World, fault: Fault) -> None:
    directory = world.serving.directory
    name = next(iter(directory.names(REQUEST_PREFIX)), "") if fault.target == ANY_REQUEST else fault.target
    directory.tell(name, Poison())


async def _ask(world: World, fault: Fault) -> None:
    name, question = NAME, Question(fault.target, fault.amount)
    if fault.target == "catch_up":
        name, question = "telemetry", CatchUp()
    ref = world.serving.directory.get(name)
    if ref is not None:
        world.asks.append((fault.target, ref.ask(question, timeout_s=ASK_TIMEOUT_S)))


async def _drain(world: World, fault: Fault) -> None:
    await world.serving.drain(fault.amount)


async def _executor_restarts(world: World, fault: Fault) -> None:
    world.serving.restart_executor(fault.target, origin="simulation")


async def _settings_change(world: World, fault: Fault) -> None:
    whole = isinstance(getattr(world.settings, fault.target), int)
    value = int(fault.amount) if whole else fault.amount
    world.serving.change_settings({fault.target: value}, origin="simulation")


async def _process_dies(world: World, _: Fault) -> None:
    world.is_dead = True
    world.over.set()


WORLD_FAULTS = {
    "disk_fails": _disk_fails,
    "disk_slow": _disk_slow,
    "renderer_slow": _renderer_slow,
    "renderer_refuses": _renderer_refuses,
    "renderer_crashes": _renderer_crashes,
    "actor_crashes": _actor_crashes,
    "ask": _ask,
    "drain": _drain,
    "process_dies": _process_dies,
    "executor_restarts": _executor_restarts,
    "settings_change": _settings_change,
}
