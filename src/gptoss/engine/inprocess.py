"""An engine on a thread of this process, for tests and embedding.

Rules:
- One daemon thread loads, steps and calls the sink. ``send`` only puts into a bounded queue.
- A thread cannot be killed: after ``kill`` nothing more is told but ``EngineExited``, and that comes as soon as the step
  or the loading in progress is over. Who needs more takes ``ProcessDriver``.
- torch's thread count is the process's own affair and is left alone, unless the load asks for one.
"""

import queue
import threading
import traceback
from collections.abc import Callable

from gptoss.clock import Clock, SystemClock
from gptoss.engine.loop import COMMANDS_MAX, EXIT_LOAD_FAILED, serve
from gptoss.engine.port import EngineCommand, EngineEvent, EngineExited, Load, Shutdown

EXIT_KILLED = -9
EXIT_CRASHED = 70


class _KilledError(BaseException):
    """Ends the loop from inside ``emit``."""


class InProcessDriver:
    """``engine.port.EngineDriver`` on a thread.

    Args:
        device: gives the thread its name.
        clock: for times.
    """

    def __init__(self, device: str = "cpu", clock: Clock | None = None) -> None:
        self._device = device
        self._clock = clock or SystemClock()
        self._commands: queue.Queue[EngineCommand] = queue.Queue(COMMANDS_MAX)
        self._is_killed = False

    def start(self, load: Load, sink: Callable[[EngineEvent], None]) -> None:
        """See ``engine.port.EngineDriver``."""
        threading.Thread(target=self._run, args=(load, sink), name=f"engine-{self._device}", daemon=True).start()

    def send(self, command: EngineCommand) -> None:
        """See ``engine.port.EngineDriver``; an engine that is ``COMMANDS_MAX`` commands behind is killed."""
        try:
            self._commands.put_nowait(command)
        except queue.Full:
            self.kill()

    def kill(self) -> None:
        """See ``engine.port.EngineDriver`` and this module's rules."""
        self._is_killed = True
        try:
            self._commands.put_nowait(Shutdown())  # ends a loop that waits for work
        except queue.Full:
            self._commands.get_nowait()  # nobody will miss it, and the loop must find the last one
            self._commands.put_nowait(Shutdown())

    def _run(self, load: Load, sink: Callable[[EngineEvent], None]) -> None:
        def emit(*events: EngineEvent) -> None:
            for event in events:
                if self._is_killed:
                    raise _KilledError
                sink(event)

        exit_code, reason = EXIT_KILLED, "killed"
        try:
            exit_code = serve(load, self._commands, emit, self._clock, owns_process=False)
            reason = "the model could not be loaded" if exit_code == EXIT_LOAD_FAILED else "shut down"
        except _KilledError:
            pass
        except Exception as error:  # noqa: BLE001 - the thread's edge: whoever waits must hear of its end
            traceback.print_exc()
            exit_code, reason = EXIT_CRASHED, f"crashed: {type(error).__name__}: {error}"
        if self._is_killed:
            exit_code, reason = EXIT_KILLED, "killed"
        sink(EngineExited(exit_code=exit_code, reason=reason))
