"""What a run consists of, as data: it can be generated from a seed, shrunk, written to a file and run again.

A scenario holds everything that happens to the system from outside, and when. The seed decides the rest: whose turn is
next, how long things take, ids and draws. Running the same scenario twice gives the same journal, byte for byte.
"""

from pathlib import Path
from typing import Literal

import msgspec

from gptoss.errors import ConfigError

FaultKind = Literal[
    "engine_dies",
    "engine_hangs",
    "engine_slow",
    "engine_late",
    "engine_short_of_memory",
    "row_fails",
    "row_without_memory",
    "load_fails",
    "device_breaks",
    "disk_fails",
    "disk_slow",
    "renderer_slow",
    "renderer_refuses",
    "renderer_crashes",
    "client_cancels",
    "client_disconnects",
    "client_stalls",
    "client_reads_slowly",
    "actor_crashes",
    "ask",
    "drain",
    "process_dies",
]


class Fault(msgspec.Struct, frozen=True, omit_defaults=True):
    """Something that goes wrong, or is done, at a time.

    Attributes:
        at_ms: virtual milliseconds since the start.
        kind: what happens.
        target: a device for ``engine_``, ``row_`` and ``load_`` faults; an arrival's name for ``client_`` and
            ``renderer_`` faults; an actor's name; for ``ask`` what is asked for, see ``probe``.
        amount: seconds that it lasts or waits; for ``device_breaks`` how long each engine lives.
        on: of a ``client_`` fault: it happens right after the first event of this type of its request, whenever that is.
    """

    at_ms: float
    kind: FaultKind
    target: str = ""
    amount: float = 0.0
    on: str = ""


class Arrival(msgspec.Struct, frozen=True, omit_defaults=True):
    """A request that comes in.

    Attributes:
        name: of the arrival; faults refer to it.
        request_id: the id that the client wishes for; several arrivals may wish for the same.
        user: whom the client acts for: the tenant.
        flaw: a reason why it must be refused: ``empty`` has no messages, ``model`` names another model.
    """

    name: str
    at_ms: float
    prompt_tokens: int
    max_tokens: int | None
    seed: int
    priority: int = 0
    timeout_s: float | None = None
    request_id: str = ""
    session_id: str = ""
    user: str = ""
    flaw: Literal["", "empty", "model"] = ""


class Shape(msgspec.Struct, frozen=True, kw_only=True):
    """The system that is run, and how evenly.

    Attributes:
        step_ms: how long an engine step takes, about.
        lag: probability that an actor's turn is put off.
        first_is_larger: the first executor has four times the memory of the others.
        prefix_cache_bytes: of each engine; sessions may keep half of it.
        session_idle_s, ageing_s: as the settings.
        heeds_pressure: whether the levels of pressure are on.
    """

    executors: int = 1
    slots: int = 4
    kv_budget_bytes: int = 2000
    max_queue: int = 16
    request_timeout_s: float = 20.0
    queue_timeout_s: float = 5.0
    step_timeout_s: float = 2.0
    step_ms: float = 5.0
    lag: float = 0.0
    first_is_larger: bool = False
    prefix_cache_bytes: int = 0
    session_idle_s: float = 180.0
    ageing_s: float = 10.0
    heeds_pressure: bool = True

    def budget_of(self, device: str) -> int:
        """KV bytes of one executor."""
        return self.kv_budget_bytes * (4 if self.first_is_larger and device == self.devices[0] else 1)

    @property
    def devices(self) -> tuple[str, ...]:
        """Names of the devices, which are also the executors' names."""
        return tuple(f"cuda:{index}" for index in range(self.executors))


class Scenario(msgspec.Struct, frozen=True):
    """One run.

    Attributes:
        rebuilds_views: whether the projections are folded again and compared, which takes a quarter of the time.
    """

    seed: int
    shape: Shape
    arrivals: tuple[Arrival, ...]
    faults: tuple[Fault, ...] = ()
    rebuilds_views: bool = True

    @property
    def dies(self) -> bool:
        """Whether the process dies in it: then nothing is asked of the end but what is on the disk."""
        return any(fault.kind == "process_dies" for fault in self.faults)


def write_scenario(scenario: Scenario, file: Path) -> None:
    """Write a scenario as JSON."""
    file.write_bytes(msgspec.json.format(msgspec.json.encode(scenario)) + b"\n")


def read_scenario(file: Path) -> Scenario:
    """Read what ``write_scenario`` wrote.

    Raises:
        ConfigError: the file cannot be read or is no scenario.
    """
    try:
        return msgspec.json.decode(file.read_bytes(), type=Scenario)
    except OSError as error:
        raise ConfigError(f"cannot read the scenario {file}: {error.strerror}") from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file} is not a scenario: {error}") from None
