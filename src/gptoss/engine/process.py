"""An engine in a process of its own, which is how a device is owned in production.

Rules:
- Nothing here blocks its caller: one thread spawns the process, reads its events and calls the sink; another writes
  commands, from a bounded queue. An engine that is ``COMMANDS_MAX`` commands behind is killed.
- ``EngineExited`` comes exactly once and last, after the process was reaped, whatever ended it: shut down, killed,
  crashed, a broken frame, a sink that raised, or a spawn that failed.
- The reading thread lives as long as the process: the kernel kills the process should that thread go.
"""

import contextlib
import queue
import signal
import socket
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable

from gptoss.engine.loop import COMMANDS_MAX, EXIT_LOAD_FAILED
from gptoss.engine.port import EngineCommand, EngineEvent, EngineExited, Load
from gptoss.engine.ranks import EXIT_RANK_LOST
from gptoss.engine.wire import FrameReader, write_frame
from gptoss.errors import EngineProtocolError

EXIT_WAIT_S = 5.0
EXIT_NOT_SPAWNED = 71


class ProcessDriver:
    """``engine.port.EngineDriver`` over a child process.

    Args:
        device: gives the threads their names.
    """

    def __init__(self, device: str = "cpu") -> None:
        self._device = device
        self._commands: queue.Queue[EngineCommand | None] = queue.Queue(COMMANDS_MAX)
        self._lock = threading.Lock()  # guards the next two: kill() may come before the process is there
        self._process: subprocess.Popen[bytes] | None = None
        self._is_killed = False
        self._exited = threading.Event()

    def start(self, load: Load, sink: Callable[[EngineEvent], None]) -> None:
        """See ``engine.port.EngineDriver``."""
        self._commands.put_nowait(load)
        threading.Thread(target=self._run, args=(sink,), name=f"engine-{self._device}", daemon=True).start()

    def send(self, command: EngineCommand) -> None:
        """See ``engine.port.EngineDriver``."""
        try:
            self._commands.put_nowait(command)
        except queue.Full:
            self.kill()

    def kill(self) -> None:
        """See ``engine.port.EngineDriver``; SIGKILL."""
        with self._lock:
            self._is_killed = True
            if self._process is not None:
                self._process.kill()

    def join(self, timeout_s: float) -> bool:
        """See ``engine.port.EngineDriver``."""
        return self._exited.wait(timeout_s)

    def _run(self, sink: Callable[[EngineEvent], None]) -> None:
        ours, theirs = socket.socketpair()
        try:
            with ours:
                try:
                    with theirs:
                        process = self._spawn(theirs.fileno())
                except OSError as error:
                    sink(EngineExited(exit_code=EXIT_NOT_SPAWNED, reason=f"cannot start the engine process: {error}"))
                    return
                threading.Thread(target=self._write, args=(ours,), name=f"to-{self._device}", daemon=True).start()
                fault = _relay(FrameReader(ours), sink)
                exit_code = _reap(process, at_once=bool(fault))
            sink(EngineExited(exit_code=exit_code, reason=fault or _describe(exit_code)))
        finally:
            self._exited.set()
            self._stop_writer()

    def _spawn(self, descriptor: int) -> "subprocess.Popen[bytes]":
        command = [sys.executable, "-m", "gptoss.engine.worker", "--fd", str(descriptor)]
        with self._lock:
            self._process = subprocess.Popen(  # noqa: S603 - a fixed command
                command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, pass_fds=(descriptor,)
            )
            if self._is_killed:
                self._process.kill()
            return self._process

    def _write(self, channel: socket.socket) -> None:
        with contextlib.suppress(OSError):  # the process is gone: the reading thread tells
            while (command := self._commands.get()) is not None:
                try:
                    write_frame(channel, command)
                except EngineProtocolError:
                    traceback.print_exc()
                    self.kill()

    def _stop_writer(self) -> None:
        with contextlib.suppress(queue.Full):  # a full queue keeps the writer awake, and its next write fails
            self._commands.put_nowait(None)


def _relay(reader: FrameReader, sink: Callable[[EngineEvent], None]) -> str:
    """Pass events on until the process closes its end. Returns what went wrong, or nothing."""
    try:
        while (event := reader.event()) is not None:
            sink(event)
    except EngineProtocolError as error:
        return error.message
    except Exception as error:  # noqa: BLE001 - the thread's edge: whoever waits must hear of the engine's end
        traceback.print_exc()
        return f"the event sink raised {type(error).__name__}"
    finally:
        reader.close()
    return ""


def _reap(process: "subprocess.Popen[bytes]", *, at_once: bool) -> int:
    """Wait for the process to end, and end it if it does not."""
    if at_once:
        process.kill()
    try:
        return process.wait(EXIT_WAIT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait()


def _describe(exit_code: int) -> str:
    if exit_code < 0:
        return f"killed by {signal.Signals(-exit_code).name}"
    if exit_code == 0:
        return "shut down"
    return _EXITS.get(exit_code, f"exited with status {exit_code}")


_EXITS = {EXIT_LOAD_FAILED: "the model could not be loaded", EXIT_RANK_LOST: "one of its ranks was lost"}
