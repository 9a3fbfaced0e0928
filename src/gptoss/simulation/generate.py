"""Scenarios from seeds.

Each seed draws a system, a workload and a few kinds of faults (not all at once: a system on which everything fails at
once mostly refuses, and hides what goes wrong in the details).
"""

from collections.abc import Callable

import msgspec

from gptoss.actors.directory import DECIDER_NAMES, executor_name
from gptoss.clock import SeededRng
from gptoss.simulation.faults import ANY_REQUEST
from gptoss.simulation.probe import KINDS
from gptoss.simulation.scenario import Arrival, Fault, FaultKind, Scenario, Shape

SPAN_MS = 2000.0
"""Faults happen within this time, and so do most arrivals."""
RUSH_MS = (700.0, 702.0)
"""When everyone comes at once: the engines have loaded by then."""
CALM_AGEING_S = 600.0
"""No tenant waits for so long: nobody goes next for its patience."""
VIEWS_EVERY = 4
"""In one of so many seeds the projections are rebuilt."""
MEMORY_FOR_TOKENS = (60, 200, 600, 2000)
STAGES = (
    "RequestReceived",
    "PromptRendered",
    "MemoryRequested",
    "ReservationGranted",
    "Enqueued",
    "RequestAdmitted",
    "RouteDecided",
    "ExecutorAccepted",
    "FirstTokenProduced",
    "AttemptRetried",
)
"""Events of a request at which its client may do something, where a time would seldom hit the moment."""
CRASHES_MAX = 2
"""Of one decider: a third within a minute is one too many for its supervisor, and then nothing more is served."""


def generate(seed: int) -> Scenario:
    """The scenario of a seed."""
    rng = SeededRng(f"{seed}/scenario")
    is_crowded = rng.happens(0.25)
    shape = _shape(rng, is_crowded=is_crowded)
    span_ms = RUSH_MS if rng.happens(0.3) else (0.0, SPAN_MS)
    number = rng.pick((12, 16) if is_crowded else (1, 4, 8, 12))
    arrivals = tuple(_arrival(rng, index, span_ms, is_long=is_crowded) for index in range(number))
    shape, arrivals = _with_tenants(SeededRng(f"{seed}/tenants"), shape, arrivals)
    return Scenario(seed, shape, arrivals, _faults(rng, shape, arrivals), rebuilds_views=seed % VIEWS_EVERY == 0)


def _shape(rng: SeededRng, *, is_crowded: bool) -> Shape:
    return Shape(
        executors=1 if is_crowded else rng.pick((1, 1, 2, 3)),
        slots=rng.pick((1, 2) if is_crowded else (1, 2, 4, 8)),
        kv_budget_bytes=2 * rng.pick((200, 600) if is_crowded else MEMORY_FOR_TOKENS),
        max_queue=64 if is_crowded else rng.pick((1, 4, 64)),
        request_timeout_s=rng.pick((2.0, 10.0, 20.0)),
        queue_timeout_s=rng.pick((0.3, 5.0)),
        step_timeout_s=2.0,
        step_ms=rng.pick((5.0, 20.0) if is_crowded else (1.0, 5.0, 20.0)),
        lag=rng.pick((0.0, 0.2, 0.6)),
    )


def _with_tenants(rng: SeededRng, shape: Shape, arrivals: tuple[Arrival, ...]) -> tuple[Shape, tuple[Arrival, ...]]:
    """The same with tenants, one of them with most of the requests, and with engines that keep sessions."""
    tenants = rng.pick((("",), ("", "a"), ("a", "a", "a", "b"), ("a", "b", "c")))
    shape = msgspec.structs.replace(
        shape,
        first_is_larger=shape.executors > 1 and rng.happens(0.5),
        prefix_cache_bytes=shape.kv_budget_bytes // 2 if rng.happens(0.6) else 0,
        session_idle_s=rng.pick((0.2, 2.0, 180.0)),
        heeds_pressure=rng.happens(0.6),
        ageing_s=rng.pick((0.2, CALM_AGEING_S, CALM_AGEING_S)),
    )
    return shape, tuple(msgspec.structs.replace(each, user=rng.pick(tenants)) for each in arrivals)


def _arrival(rng: SeededRng, index: int, span_ms: tuple[float, float], *, is_long: bool) -> Arrival:
    return Arrival(
        name=f"r{index}",
        at_ms=round(rng.between(*span_ms), 3),
        prompt_tokens=rng.pick((1, 3, 20, 20, 50, 150)) if rng.happens(0.97) else 2000,
        max_tokens=rng.pick((60, 80) if is_long else (1, 2, 5, 20, 40)) if rng.happens(0.95) else None,
        seed=rng.below(1000),
        priority=rng.pick((0, 0, 0, -1, 1)),
        timeout_s=rng.between(0.05, 1.5) if rng.happens(0.15) else None,
        request_id=rng.pick(("mine", "yours")) if rng.happens(0.1) else "",
        session_id=rng.pick(("", "s1", "s2")),
        flaw=rng.pick(("empty", "model")) if rng.happens(0.03) else "",
    )


def _faults(rng: SeededRng, shape: Shape, arrivals: tuple[Arrival, ...]) -> tuple[Fault, ...]:
    faults: list[Fault] = []
    for kind, (probability, make) in KINDS_OF_FAULTS.items():
        if rng.happens(probability):
            faults += make(rng, kind, shape, arrivals)
    return tuple(sorted(faults, key=lambda fault: fault.at_ms))


Maker = Callable[[SeededRng, FaultKind, Shape, tuple[Arrival, ...]], list[Fault]]


def _on_devices(most: int, amount_s: float = 0.0) -> Maker:
    def make(rng: SeededRng, kind: FaultKind, shape: Shape, arrivals: tuple[Arrival, ...]) -> list[Fault]:
        # Mostly while something runs; else while the engines load, or rest.
        return [
            Fault(
                _soon_after(rng, rng.pick(arrivals)) if rng.happens(0.7) else _when(rng),
                kind,
                rng.pick(shape.devices),
                round(rng.uniform() * amount_s, 3),
            )
            for _ in range(1 + rng.below(most))
        ]

    return make


def _to_clients(amount_s: float = 0.0) -> Maker:
    def make(rng: SeededRng, kind: FaultKind, _: Shape, arrivals: tuple[Arrival, ...]) -> list[Fault]:
        chosen = [arrival for arrival in arrivals if rng.happens(0.5)]
        # At any stage: before it is admitted, in line, at its prompt, in the middle, after its end.
        return [
            Fault(
                _soon_after(rng, arrival),
                kind,
                arrival.name,
                round(rng.uniform() * amount_s, 3),
                rng.pick(STAGES) if rng.happens(0.4) else "",
            )
            for arrival in chosen
        ]

    return make


def _somewhen(most: int, amount_s: float = 0.0) -> Maker:
    def make(rng: SeededRng, kind: FaultKind, _: Shape, __: tuple[Arrival, ...]) -> list[Fault]:
        return [Fault(_when(rng), kind, "", round(rng.uniform() * amount_s, 3)) for _ in range(1 + rng.below(most))]

    return make


def _in_the_middle(rng: SeededRng, kind: FaultKind, _: Shape, arrivals: tuple[Arrival, ...]) -> list[Fault]:
    return [Fault(_soon_after(rng, rng.pick(arrivals)), kind)]


def _crashes(rng: SeededRng, kind: FaultKind, shape: Shape, _: tuple[Arrival, ...]) -> list[Fault]:
    names = [ANY_REQUEST, *DECIDER_NAMES, *(executor_name(device) for device in shape.devices)]
    chosen = [name for name in names if rng.happens(0.4)]
    return [Fault(_when(rng), kind, name) for name in chosen for _ in range(1 + rng.below(CRASHES_MAX))]


def _asks(rng: SeededRng, kind: FaultKind, _: Shape, __: tuple[Arrival, ...]) -> list[Fault]:
    begin_ms = _when(rng)
    return [
        Fault(round(begin_ms + rng.uniform() * rng.pick((1.0, 300.0)), 3), kind, rng.pick(KINDS), rng.uniform() * 2)
        for _ in range(4 + rng.below(12))
    ]


def _soon_after(rng: SeededRng, arrival: Arrival) -> float:
    return round(arrival.at_ms + rng.pick((0.01, 5.0, 12.0, 12.0, 100.0, 500.0)) * rng.uniform(), 3)


def _when(rng: SeededRng) -> float:
    return round(rng.uniform() * SPAN_MS, 3)


KINDS_OF_FAULTS: dict[FaultKind, tuple[float, Maker]] = {
    "engine_dies": (0.3, _on_devices(3)),
    "engine_hangs": (0.12, _on_devices(1)),
    "engine_slow": (0.1, _on_devices(2, 0.5)),
    "engine_late": (0.1, _on_devices(2, 0.5)),
    "engine_short_of_memory": (0.15, _on_devices(2, 0.5)),
    "row_fails": (0.15, _on_devices(3)),
    "row_without_memory": (0.15, _on_devices(3)),
    "device_breaks": (0.08, _on_devices(1, 0.1)),
    "load_fails": (0.05, _on_devices(1)),
    "disk_fails": (0.05, _somewhen(1)),
    "disk_slow": (0.1, _somewhen(2, 0.5)),
    "renderer_slow": (0.1, _somewhen(3, 0.3)),
    "renderer_refuses": (0.1, _somewhen(2)),
    "renderer_crashes": (0.1, _somewhen(2)),
    "client_cancels": (0.5, _to_clients()),
    "client_disconnects": (0.25, _to_clients()),
    "client_stalls": (0.1, _to_clients()),
    "client_reads_slowly": (0.1, _to_clients(0.2)),
    "actor_crashes": (0.2, _crashes),
    "ask": (0.4, _asks),
    "drain": (0.08, _somewhen(1, 1.0)),
    "process_dies": (0.12, _in_the_middle),
}
"""How likely a kind is to occur in a scenario, and how its faults are drawn."""
