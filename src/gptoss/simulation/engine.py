"""The fake engine behind a driver in virtual time, with a device that can fail.

Rules:
- The driver keeps the port's contract whatever the device does: one terminal event a request, unless the engine is
  lost; events in order; ``EngineExited`` exactly once and last. So what goes wrong behind it is the system's fault.
- Commands and events take some time on their way, as on a socket. The engine takes commands between two steps.
"""

import asyncio
from collections import deque
from collections.abc import Callable

import msgspec

from gptoss.clock import NS_PER_S, Clock, SeededRng
from gptoss.engine import port
from gptoss.fake_engine import FakeEngine, FakeOptions
from gptoss.messages.plan import RowFailure

PIPE_S = 0.0005
ORDER_S = 1e-7  # timers of the very same time have no order
LOAD_S = (0.02, 0.4)
EXIT_KILLED = -9
EXIT_LOAD_FAILED = 66


class Device(msgspec.Struct):
    """A device as it is now; faults change it, and each engine on it suffers them.

    Attributes:
        slow: steps take so many times longer.
        late_s: events are so much later.
        memory_share: of the KV budget, what is really there.
        row_failure: what becomes of the first row of the next step.
        fails_to_load: the next engine cannot load the model.
        lives_s: every engine dies so long after it has loaded, until its executor is given up; negative for none.
    """

    name: str
    options: FakeOptions
    step_s: float
    slow: float = 1.0
    late_s: float = 0.0
    memory_share: float = 1.0
    row_failure: RowFailure = ""
    fails_to_load: bool = False
    lives_s: float = -1.0
    engine: "SimulatedDriver | None" = None

    @property
    def kept_sessions(self) -> dict[str, int]:
        """What its engine keeps of sessions, in bytes; nothing if none lives."""
        return {} if self.engine is None else self.engine.kept_sessions


class SimulatedDriver:
    """``engine.port.EngineDriver`` in virtual time."""

    def __init__(self, device: Device, loop: asyncio.AbstractEventLoop, clock: Clock, rng: SeededRng) -> None:
        self._device = device
        self._loop = loop
        self._clock = clock
        self._rng = rng
        self._commands: deque[port.EngineCommand] = deque()
        self._engine: FakeEngine
        self._sink: Callable[[port.EngineEvent], None]
        self._is_loaded = False
        self._is_busy = False
        self._is_gone = False
        self._hangs = False
        self._arrives_s = 0.0

    # ---- the port

    def start(self, load: port.Load, sink: Callable[[port.EngineEvent], None]) -> None:
        """See ``engine.port.EngineDriver``."""
        self._sink = sink
        self._engine = FakeEngine(load, self._device.options)
        self._device.engine = self
        self._loop.call_later(self._rng.between(*LOAD_S), self._load, load)

    def send(self, command: port.EngineCommand) -> None:
        """See ``engine.port.EngineDriver``."""
        if not self._is_gone:
            self._commands.append(command)
            self._loop.call_later(PIPE_S, self._tick)

    def kill(self) -> None:
        """See ``engine.port.EngineDriver``."""
        self._exit(EXIT_KILLED, "killed by SIGKILL")

    @property
    def kept_sessions(self) -> dict[str, int]:
        """What the engine keeps of sessions, in bytes; nothing of one that hangs, which is not told any more."""
        return {} if self._is_gone or self._hangs else dict(self._engine.sessions)

    # ---- faults

    def die(self) -> None:
        """Crash."""
        self._exit(EXIT_KILLED, "killed by SIGKILL")

    def hang(self) -> None:
        """Do and answer nothing more, until killed."""
        self._hangs = True

    # ---- its life

    def _load(self, load: port.Load) -> None:
        if self._hangs or self._is_gone:
            return
        self._emit(port.LoadProgressed(stage="weights", done=1, total=1))
        if self._device.lives_s >= 0:
            self._loop.call_later(self._device.lives_s, self.die)
        if self._device.fails_to_load:
            self._device.fails_to_load = False
            self._emit(port.LoadFailed(code="model_load_failed", message="the device has a fault"))
            self._exit(EXIT_LOAD_FAILED, "the model could not be loaded")
            return
        self._tell(self._engine.handle(load))
        self._is_loaded = True
        self._tick()

    def _tick(self) -> None:
        """Take the commands that are there, then begin a step if there is work and none is running."""
        if self._is_busy or self._hangs or self._is_gone or not self._is_loaded:
            return
        while self._commands:
            command = self._commands.popleft()
            if isinstance(command, port.Shutdown):
                self._exit(0, "shut down")
                return
            self._tell(self._engine.handle(command))
        if self._engine.has_work:
            self._is_busy = True
            duration_s = self._device.step_s * self._device.slow * self._rng.between(0.5, 1.5)
            self._loop.call_later(duration_s, self._end_step, self._clock.monotonic_ns(), duration_s)

    def _end_step(self, started_ns: int, duration_s: float) -> None:
        self._is_busy = False
        if self._hangs or self._is_gone:
            return
        device = self._device
        self._engine.kv_budget_bytes = int(device.options.kv_budget_bytes * device.memory_share)
        failures: dict[str, RowFailure] = {}
        if device.row_failure:
            failures[self._rng.pick(self._engine.request_ids)] = device.row_failure
            device.row_failure = ""
        duration_ns = int(duration_s * NS_PER_S)
        self._tell(self._engine.step(started_ns=started_ns, duration_ns=duration_ns, failures=failures))
        self._tick()

    def _exit(self, exit_code: int, reason: str) -> None:
        if not self._is_gone:
            self._is_gone = True
            self._emit(port.EngineExited(exit_code=exit_code, reason=reason))

    def _tell(self, events: list[port.EngineEvent]) -> None:
        for event in events:
            self._emit(event)

    def _emit(self, event: port.EngineEvent) -> None:
        # In order, each a little later than it was said.
        wanted_s = self._loop.time() + PIPE_S * self._rng.uniform() + self._device.late_s
        self._arrives_s = max(self._arrives_s + ORDER_S, wanted_s)
        self._loop.call_at(self._arrives_s, self._sink, event)
