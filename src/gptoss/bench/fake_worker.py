"""The process that plays engines: ``python -m gptoss.bench.fake_worker --fds 5,6,7``.

Each descriptor is one engine's socket, with a thread that serves it as ``gptoss.engine.worker`` serves a real one. The process
ends when all of them have been told to, or the other ends are gone.
"""

import argparse
import contextlib
import functools
import queue
import signal
import socket
import sys
import threading
import time

from gptoss.clock import Clock, SystemClock
from gptoss.engine.loop import COMMANDS_MAX, run
from gptoss.engine.port import CoreCommand, EngineCommand, EngineEvent, Load, Shutdown
from gptoss.engine.wire import FrameReader, write_frames
from gptoss.fake_engine import FakeEngine, FakeOptions

MAX_MODEL_LEN = 1_000_000


class _PacedCore:
    """A ``FakeEngine`` whose steps take their time."""

    def __init__(self, engine: FakeEngine, clock: Clock, step_s: float) -> None:
        self._engine = engine
        self._clock = clock
        self._step_s = step_s

    def has_work(self) -> bool:
        """See ``engine.loop.Core``."""
        return self._engine.has_work

    def handle(self, command: CoreCommand) -> list[EngineEvent]:
        """See ``engine.loop.Core``."""
        return self._engine.handle(command)

    def step(self) -> list[EngineEvent]:
        """See ``engine.loop.Core``."""
        started_ns = self._clock.monotonic_ns()
        if self._step_s:
            time.sleep(self._step_s)
        return self._engine.step(started_ns=started_ns, duration_ns=self._clock.monotonic_ns() - started_ns)


def main() -> None:
    """Serve every engine."""
    parser = argparse.ArgumentParser(prog="gptoss.bench.fake_worker")
    parser.add_argument("--fds", required=True)
    parser.add_argument("--step-ms", type=float, default=0.0)
    parser.add_argument("--kv-bytes", type=int, required=True)
    arguments = parser.parse_args()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which then ends the engines
    options = FakeOptions(step_s=arguments.step_ms / 1000, kv_budget_bytes=arguments.kv_bytes)
    threads = [
        threading.Thread(target=_serve, args=(socket.socket(fileno=int(fd)), options))
        for fd in arguments.fds.split(",")
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def _serve(channel: socket.socket, options: FakeOptions) -> None:
    reader = FrameReader(channel)
    load = reader.command()
    if not isinstance(load, Load):
        return
    commands: queue.Queue[EngineCommand] = queue.Queue(COMMANDS_MAX)
    threading.Thread(target=_read, args=(reader, commands), daemon=True).start()
    clock = SystemClock()
    engine = FakeEngine(load, _as_asked(options, load))

    emit = functools.partial(write_frames, channel)
    with contextlib.suppress(OSError), channel:  # the other side is gone
        emit(*engine.handle(load))
        run(_PacedCore(engine, clock, options.step_s), commands, emit)
        channel.shutdown(socket.SHUT_RDWR)


def _read(reader: FrameReader, commands: "queue.Queue[EngineCommand]") -> None:
    while (command := reader.command()) is not None:
        commands.put(command)
    commands.put(Shutdown())


def _as_asked(options: FakeOptions, load: Load) -> FakeOptions:
    """``options`` with the bounds that the server set."""
    return FakeOptions(
        step_s=options.step_s,
        kv_budget_bytes=options.kv_budget_bytes,
        max_batch_size=load.max_batch_size,
        max_model_len=load.max_model_len or MAX_MODEL_LEN,
    )


if __name__ == "__main__":
    sys.exit(main())
