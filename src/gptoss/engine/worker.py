"""The process that owns a device: ``python -m gptoss.engine.worker --fd N``.

Rules:
- ``N`` is a socket inherited from the driver: commands in, events out. Its end means that the driver's process is gone,
  and this one exits at once, even in the middle of a step. On Linux the kernel sees to it besides.
- Signals that a terminal or a service manager sends to the whole group are ignored: the parent decides when to end.
- Standard output goes to standard error, so nothing that a library prints gets in anybody's way.
- This module imports nothing heavy, so that all of the above holds before the model stack loads.
"""

import argparse
import ctypes
import functools
import os
import queue
import signal
import socket
import sys
import threading
from collections.abc import Callable
from typing import TypeVar

from gptoss.clock import SystemClock
from gptoss.engine.loop import COMMANDS_MAX, serve
from gptoss.engine.port import EngineCommand, Load
from gptoss.engine.wire import FrameReader, write_frames
from gptoss.errors import EngineProtocolError

T = TypeVar("T")
EXIT_PROTOCOL = 76
_PR_SET_PDEATHSIG = 1


def main() -> int:
    """Serve the driver on the other end of ``--fd``. Returns the exit status."""
    parser = argparse.ArgumentParser(prog="gptoss.engine.worker")
    parser.add_argument("--fd", type=int, required=True)
    channel = socket.socket(fileno=parser.parse_args().fd)
    settle_process()
    reader = FrameReader(channel)
    load = reader.command()
    if load is None:
        return 0
    if not isinstance(load, Load):
        sys.stderr.write(f"engine worker: the first command is {type(load).__name__}, not Load\n")
        return EXIT_PROTOCOL
    commands: queue.Queue[EngineCommand] = queue.Queue(COMMANDS_MAX)
    threading.Thread(target=read_on, args=(reader.command, commands), name="commands", daemon=True).start()
    return serve(load, commands, functools.partial(write_frames, channel), SystemClock(), owns_process=True)


def settle_process() -> None:
    """Keep the module's rules on signals and standard output."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    os.dup2(2, 1)
    _die_with_parent()


def read_on(read: Callable[[], T | None], commands: "queue.Queue[T]") -> None:
    """Feed the loop until the other side is gone, then end the process: the loop may be deep inside a step."""
    try:
        while (command := read()) is not None:
            commands.put_nowait(command)
    except (EngineProtocolError, queue.Full) as error:
        sys.stderr.write(f"engine worker: {type(error).__name__}: {error}\n")
        sys.stderr.flush()
        os._exit(EXIT_PROTOCOL)
    os._exit(0)


def _die_with_parent() -> None:
    """Have the kernel kill this process when the driver's thread ends, for when this one cannot notice."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(main())
