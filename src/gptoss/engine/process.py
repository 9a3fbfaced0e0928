"""An engine in a process of its own, which is how a device is owned in production.

Rules:
- Start it on the event loop; nothing blocks there. Commands and events pass through the loop (``EngineChannel``), so a token is
  handed from thread to thread nowhere.
- ``EngineExited`` comes exactly once and last, after the process was reaped, whatever ended it: shut down, killed,
  crashed, a broken frame, a sink that raised, or a spawn that failed.
- One thread spawns the process and waits for its end. It lives as long as the process, for the kernel kills the process
  should that thread go.
"""

import asyncio
import contextlib
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable

from gptoss.engine.channel import EngineChannel
from gptoss.engine.loop import EXIT_LOAD_FAILED
from gptoss.engine.port import EngineCommand, EngineEvent, EngineExited, Load
from gptoss.engine.ranks import EXIT_RANK_LOST

EXIT_WAIT_S = 5.0
EXIT_NOT_SPAWNED = 71


class ProcessDriver:
    """``engine.port.EngineDriver`` over a child process.

    Args:
        device: gives the thread its name.
    """

    def __init__(self, device: str = "cpu") -> None:
        self._device = device
        self._lock = threading.Lock()  # guards the next two: kill() may come before the process is there
        self._process: subprocess.Popen[bytes] | None = None
        self._is_killed = False
        self._fault = ""
        self._loop: asyncio.AbstractEventLoop
        self._channel: EngineChannel
        self._sink: Callable[[EngineEvent], None]

    def start(self, load: Load, sink: Callable[[EngineEvent], None]) -> None:
        """See ``engine.port.EngineDriver``."""
        self._loop = asyncio.get_running_loop()
        self._sink = sink
        ours, theirs = socket.socketpair()
        self._channel = EngineChannel(ours, sink, self._channel_ended)
        self._channel.send(load)
        threading.Thread(target=self._live, args=(theirs,), name=f"engine-{self._device}", daemon=True).start()

    def send(self, command: EngineCommand) -> None:
        """See ``engine.port.EngineDriver``."""
        self._channel.send(command)

    def kill(self) -> None:
        """See ``engine.port.EngineDriver``; SIGKILL."""
        with self._lock:
            self._is_killed = True
            if self._process is not None:
                self._process.kill()

    # ---- on the loop

    def _channel_ended(self, fault: str) -> None:
        """The process closed its end, or did what it may not: it has to go."""
        self._fault = fault
        if fault:
            self.kill()
        else:
            self._loop.call_later(EXIT_WAIT_S, self.kill)

    def _exited(self, exit_code: int, reason: str) -> None:
        self._channel.finish()
        self._sink(EngineExited(exit_code=exit_code, reason=self._fault or reason))

    # ---- on the thread

    def _live(self, theirs: socket.socket) -> None:
        try:
            with theirs:
                process = self._spawn(theirs.fileno())
            exit_code = process.wait()
            reason = _describe(exit_code)
        except OSError as error:
            exit_code, reason = EXIT_NOT_SPAWNED, f"cannot start the engine process: {error}"
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody is left to be told
            self._loop.call_soon_threadsafe(self._exited, exit_code, reason)

    def _spawn(self, descriptor: int) -> "subprocess.Popen[bytes]":
        command = [sys.executable, "-m", "gptoss.engine.worker", "--fd", str(descriptor)]
        with self._lock:
            self._process = subprocess.Popen(  # noqa: S603 - a fixed command
                command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, pass_fds=(descriptor,)
            )
            if self._is_killed:
                self._process.kill()
            return self._process


def _describe(exit_code: int) -> str:
    if exit_code < 0:
        return f"killed by {signal.Signals(-exit_code).name}"
    if exit_code == 0:
        return "shut down"
    return _EXITS.get(exit_code, f"exited with status {exit_code}")


_EXITS = {EXIT_LOAD_FAILED: "the model could not be loaded", EXIT_RANK_LOST: "one of its ranks was lost"}
