"""Server-sent events: one response that is written as it grows, and the client at its other end.

Rules:
- A frame goes out whole, in one write. Silence of ``keepalive_s`` is broken by a comment.
- A client that is gone shows as ``ConnectionError``; one that takes nothing for ``stall_s`` as ``TimeoutError``, and
  its connection is aborted, because a polite close would wait for it.
- "Takes nothing" is measured: bytes wait, here or in the kernel's send queue, and none of them was acknowledged. The
  send queue counts because a token stream is so thin that it can fit into kernel buffers for minutes.

Plain ``web.StreamResponse`` rather than aiohttp-sse, which was weighed: that starts a task a stream for its pings,
splits and re-encodes text that is already framed, and only sees a stall once its own buffer is full.
"""

import array
import asyncio
import contextlib
import fcntl
import socket
import termios

from aiohttp import web

from gptoss.clock import NS_PER_MS, NS_PER_S, Clock
from gptoss.http.errors import STREAM_STARTED

KEEPALIVE = b": keepalive\n\n"
# A write of less than this into an empty transport stays below its high-water mark (64 KiB), so it cannot block.
_UNBLOCKED_BYTES = 32_768
_CHECK_NS = NS_PER_S // 4


class ClientConnection:
    """The client of one request: is it there, and does it take what it is sent?

    Args:
        request: the request that is being answered.
        clock: monotonic time for stalls.
        stall_s: how long the client may take nothing while something waits for it.
    """

    def __init__(self, request: web.Request, clock: Clock, stall_s: float) -> None:
        self._request = request
        self._clock = clock
        self._stall_s = stall_s
        self._sent_bytes = 0
        self._taken_bytes = 0
        self._progress_ns = self._checked_ns = clock.monotonic_ns()

    @property
    def is_gone(self) -> bool:
        """Whether the connection is closed or closing."""
        transport = self._request.transport
        return transport is None or transport.is_closing()

    @property
    def stalled_ms(self) -> float:
        """Milliseconds since the client was last seen to take something or to have nothing left to take."""
        return (self._clock.monotonic_ns() - self._progress_ns) / NS_PER_MS

    def check(self) -> None:
        """Look at the client now.

        Raises:
            ConnectionError: it is gone.
            TimeoutError: it has taken nothing for ``stall_s`` seconds.
        """
        transport = self._request.transport
        if transport is None or transport.is_closing():
            raise ConnectionResetError("the client is gone")
        self._checked_ns = self._clock.monotonic_ns()
        waiting = transport.get_write_buffer_size() + _unacknowledged(transport.get_extra_info("socket"))
        taken = self._sent_bytes - waiting
        if not waiting or taken > self._taken_bytes:
            self._progress_ns = self._checked_ns
        self._taken_bytes = taken
        if self.stalled_ms > self._stall_s * 1000:
            raise TimeoutError(f"the client has taken nothing for {self.stalled_ms:.0f} ms")

    async def write(self, response: web.StreamResponse, data: bytes) -> None:
        """Send ``data``. Raises as ``check`` does."""
        if self._clock.monotonic_ns() - self._checked_ns >= _CHECK_NS:
            self.check()
        self._sent_bytes += len(data)
        transport = self._request.transport
        if transport is not None and not transport.get_write_buffer_size() and len(data) < _UNBLOCKED_BYTES:
            await response.write(data)
            return
        async with asyncio.timeout(self._stall_s):
            await response.write(data)

    async def finish(self, response: web.StreamResponse) -> None:
        """End ``response`` in order. Raises as ``check`` does."""
        async with asyncio.timeout(self._stall_s):
            await response.write_eof()

    def abort(self) -> None:
        """Drop the connection without waiting for what it has not taken."""
        if self._request.transport is not None:
            self._request.transport.abort()


def _unacknowledged(sock: socket.socket | None) -> int:
    """Bytes in the kernel's send queue that the other side has not acknowledged; 0 where that cannot be known."""
    queued = array.array("i", [0])
    if sock is not None:
        with contextlib.suppress(OSError):
            fcntl.ioctl(sock.fileno(), termios.TIOCOUTQ, queued)
    return queued[0]


class SseStream:
    """One ``text/event-stream`` response.

    Args:
        request: the request that is being answered.
        client: its connection.
        clock: monotonic time for keepalives.
        keepalive_s: silence after which a comment goes out.
    """

    def __init__(self, request: web.Request, client: ClientConnection, clock: Clock, keepalive_s: float) -> None:
        self._request = request
        self._client = client
        self._clock = clock
        self._keepalive_ns = int(keepalive_s * NS_PER_S)
        self._written_ns = 0
        self.response = web.StreamResponse(
            headers={"Content-Type": "text/event-stream", "Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        )

    async def open(self) -> None:
        """Send the headers; they leave together with the first frame."""
        self._request[STREAM_STARTED] = True
        await self.response.prepare(self._request)

    async def send(self, frames: bytes) -> None:
        """Send whole frames. Raises as ``ClientConnection.check`` does."""
        await self._client.write(self.response, frames)
        self._written_ns = self._clock.monotonic_ns()

    async def idle(self) -> None:
        """Called while there is nothing to send: watches the client and keeps the connection alive.

        Raises:
            ConnectionError, TimeoutError: as ``ClientConnection.check``.
        """
        self._client.check()
        if self._clock.monotonic_ns() - self._written_ns >= self._keepalive_ns:
            await self.send(KEEPALIVE)

    async def close(self) -> None:
        """End the stream in order. Raises as ``ClientConnection.check`` does."""
        await self._client.finish(self.response)
