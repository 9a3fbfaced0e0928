"""Server-sent events: one response that is written as it grows, and the client at its other end.

Rules:
- Silence of ``keepalive_s`` is broken by a comment, between frames and never inside one.
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

MS_PER_S = 1000
KEEPALIVE = b": keepalive\n\n"
# At most this much waits in the transport before a write, and at most this much is written at once: together less than
# its high-water mark (64 KiB), so that no write ever blocks and a stall is always seen by ``check``.
_BACKLOG_BYTES = 24_576
_BACKLOG_POLL_S = 0.05
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
        if self.stalled_ms >= self._stall_s * MS_PER_S:
            raise TimeoutError(f"the client has taken nothing for {self.stalled_ms:.0f} ms")

    async def write(self, response: web.StreamResponse, data: bytes) -> None:
        """Send ``data`` once the client has room for it. Raises as ``check`` does."""
        if self._clock.monotonic_ns() - self._checked_ns >= _CHECK_NS:
            self.check()
        if len(data) <= _BACKLOG_BYTES and self._backlog_bytes() <= _BACKLOG_BYTES:  # as nearly always
            self._sent_bytes += len(data)
            await response.write(data)
            return
        for start in range(0, len(data), _BACKLOG_BYTES):
            await self._wait_below(_BACKLOG_BYTES)
            part = data[start : start + _BACKLOG_BYTES]
            self._sent_bytes += len(part)
            await response.write(part)

    async def finish(self, response: web.StreamResponse, last: bytes) -> None:
        """End ``response`` with ``last``, in one piece where there is room, and see it on its way. Raises as ``check``."""
        if len(last) > _BACKLOG_BYTES:
            await self.write(response, last)
            last = b""
        await self._wait_below(_BACKLOG_BYTES)
        self._sent_bytes += len(last)
        await response.write_eof(last)
        await self._wait_below(0)

    def _backlog_bytes(self) -> int:
        transport = self._request.transport
        return transport.get_write_buffer_size() if transport is not None else 0

    async def _wait_below(self, limit_bytes: int) -> None:
        while self._backlog_bytes() > limit_bytes:
            self.check()
            await asyncio.sleep(_BACKLOG_POLL_S)

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
        """Send whole frames, if there are any. Raises as ``ClientConnection.check`` does."""
        if not frames:
            return
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

    async def close(self, frames: bytes) -> None:
        """End the stream in order, with its last frames. Raises as ``ClientConnection.check`` does."""
        await self._client.finish(self.response, frames)
