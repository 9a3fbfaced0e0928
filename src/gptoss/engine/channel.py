"""An engine's socket as the event loop's side sees it: frames of ``engine.wire``, without a thread.

Rules:
- Nothing here blocks. Commands of one turn of the loop go out together, for each system call wakes the other side; what the
  socket does not take at once waits, and goes out as it empties.
- Events reach the sink on the loop, in order. The end, or what was wrong, is told once, after them.
- An engine that is ``BACKLOG_BYTES_MAX`` behind with its commands, or says what is no message, is at fault.
"""

import asyncio
import socket
import threading
import traceback
from collections.abc import Callable

from gptoss.engine.port import EngineCommand, EngineEvent
from gptoss.engine.wire import EventFrames, frame
from gptoss.errors import EngineProtocolError

READ_BYTES = 1 << 18
BACKLOG_BYTES_MAX = 64 << 20


class EngineChannel:
    """One engine's socket.

    Args:
        channel: taken over, and closed at the end.
        on_event: gets each event.
        on_end: told once that nothing more comes: with an empty text when the other side closed, else with the fault.
    """

    def __init__(
        self, channel: socket.socket, on_event: Callable[[EngineEvent], None], on_end: Callable[[str], None]
    ) -> None:
        channel.setblocking(False)
        self._channel = channel
        self._on_event = on_event
        self._on_end = on_end
        self._loop = asyncio.get_running_loop()
        self._thread = threading.get_ident()
        self._frames = EventFrames()
        self._backlog = bytearray()
        self._is_open = True
        self._loop.add_reader(channel, self._read)

    def send(self, command: EngineCommand) -> None:
        """Send a command, from any thread; dropped once the other side is gone."""
        if threading.get_ident() == self._thread:
            self._send(command)
        else:
            self._loop.call_soon_threadsafe(self._send, command)

    def finish(self) -> None:
        """The other side is known to be gone: read what it left, and tell the end."""
        while self._is_open and self._read():
            pass
        self._end("")

    def _send(self, command: EngineCommand) -> None:
        if not self._is_open:
            return
        try:
            data = frame(command)
        except EngineProtocolError as error:
            self._end(error.message)
            return
        if not self._backlog:
            self._loop.call_soon(self._write)
        self._backlog += data
        if len(self._backlog) > BACKLOG_BYTES_MAX:
            self._end(f"the engine left {len(self._backlog)} bytes of commands unread")

    def _write(self) -> None:
        if not self._is_open:
            return
        try:
            sent = self._channel.send(self._backlog)
        except BlockingIOError:
            sent = 0
        except OSError:
            sent = len(self._backlog)  # the other side is gone: the reader will tell
        del self._backlog[:sent]
        if self._backlog:
            self._loop.add_writer(self._channel, self._write)
        else:
            self._loop.remove_writer(self._channel)

    def _read(self) -> bool:
        """Take in what has come; False when there was nothing."""
        try:
            data = self._channel.recv(READ_BYTES)
        except BlockingIOError:
            return False
        except OSError:
            data = b""
        if not data:
            self._end("")
            return False
        try:
            for event in self._frames.push(data):
                self._on_event(event)
        except EngineProtocolError as error:
            self._end(error.message)
        except Exception as error:  # noqa: BLE001 - the loop's edge: whoever waits must hear of the engine's end
            traceback.print_exc()
            self._end(f"the event sink raised {type(error).__name__}")
        return True

    def _end(self, fault: str) -> None:
        if not self._is_open:
            return
        self._is_open = False
        self._loop.remove_reader(self._channel)
        self._loop.remove_writer(self._channel)
        self._channel.close()
        self._backlog.clear()
        self._on_end(fault)
