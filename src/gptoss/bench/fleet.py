"""Fake engines for load tests, all in one process of their own.

Rules:
- As with a real engine, steps are computed elsewhere: here remain the sockets and their frames, which are part of what the
  control plane costs. One process for all of them, for 64 would be more than the machine has room for.
- ``EngineExited`` comes once and last, as ``engine.port`` asks. Engines cannot be killed one by one.
"""

import contextlib
import socket
import subprocess
import sys
from collections.abc import Callable
from typing import Self

import psutil

from gptoss.engine.channel import EngineChannel
from gptoss.engine.memory_model import kv_bytes
from gptoss.engine.port import EngineCommand, EngineDriver, EngineEvent, EngineExited, Load
from gptoss.fake_engine import FAKE_LAYOUT

PLENTY_OF_TOKENS = 1 << 40
EXIT_WAIT_S = 5.0


class FakeFleet:
    """``count`` fake engines. Leave the context when no executor uses them any more.

    Args:
        count: how many.
        step_ms: how long a step takes, in milliseconds; 0 is as fast as it can be planned.
        kv_tokens: tokens that each has KV memory for; 0 is more than anybody asks for.
    """

    def __init__(self, count: int, *, step_ms: float = 0.0, kv_tokens: int = 0) -> None:
        pairs = [socket.socketpair() for _ in range(count)]
        self._channels = [ours for ours, _ in pairs]
        fds = [theirs.fileno() for _, theirs in pairs]
        budget = kv_bytes(FAKE_LAYOUT, kv_tokens or PLENTY_OF_TOKENS)
        command = [sys.executable, "-m", "gptoss.bench.fake_worker", "--fds", ",".join(map(str, fds))]
        command += ["--step-ms", str(step_ms), "--kv-bytes", str(budget)]
        self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, pass_fds=fds)  # noqa: S603 - a fixed command
        for _, theirs in pairs:
            theirs.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for channel in self._channels:
            channel.close()
        try:
            self._process.wait(EXIT_WAIT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def driver(self, _: str) -> EngineDriver:
        """The driver of the next engine; see ``engine.port.DriverFactory``."""
        return _ChannelDriver(self._channels.pop())

    @property
    def processor_s(self) -> float:
        """Processor time of the engines so far, in seconds."""
        return processor_s(self._process.pid)


def processor_s(pid: int) -> float:
    """Processor time of a process so far, in seconds; 0 when it is gone."""
    try:
        times = psutil.Process(pid).cpu_times()
    except psutil.Error:
        return 0.0
    return times.user + times.system


class _ChannelDriver:
    """``engine.port.EngineDriver`` over a socket whose other end is served already."""

    def __init__(self, socket_: socket.socket) -> None:
        self._socket = socket_
        self._channel: EngineChannel

    def start(self, load: Load, sink: Callable[[EngineEvent], None]) -> None:
        """See ``engine.port.EngineDriver``."""

        def end(fault: str) -> None:
            sink(EngineExited(exit_code=0, reason=fault or "shut down"))

        self._channel = EngineChannel(self._socket, sink, end)
        self._channel.send(load)

    def send(self, command: EngineCommand) -> None:
        """See ``engine.port.EngineDriver``."""
        self._channel.send(command)

    def kill(self) -> None:
        """See ``engine.port.EngineDriver``: its process goes on for the other engines."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
