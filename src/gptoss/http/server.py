"""The listening socket and its connections: bounds that aiohttp leaves to whoever runs it.

- A request's headers must be complete ``header_s`` after their first byte, however slowly they drip; an idle
  connection may stay for ``idle_s``, longer than reverse proxies keep theirs.
- TCP keepalive finds a silent half-open connection in about 14 s, before the first SSE comment (15 s) would put data
  in flight and so suspend the probes. With data in flight ``sse`` finds it by its unacknowledged bytes. For the same
  reason TCP_USER_TIMEOUT stays unset: it would replace the count of probes.
- Bytes that are no HTTP get OpenAI's error body too. Compressed bodies are not unpacked. Handlers are cancelled when
  their client goes.
"""

import asyncio
import errno
import logging
import socket
from http import HTTPStatus
from typing import Any

import msgspec
from aiohttp import web

from gptoss.errors import ConfigError
from gptoss.http.errors import envelope, json_response

AUTO_PORT_TRIES = 100
BACKLOG = 1024
_KEEPALIVE_OPTIONS = (("TCP_KEEPIDLE", 5), ("TCP_KEEPINTVL", 3), ("TCP_KEEPCNT", 3))

_log = logging.getLogger("gptoss.http")


class ConnectionBounds(msgspec.Struct, frozen=True, kw_only=True):
    """How long a connection may take, in seconds.

    Attributes:
        header_s: from the first byte of a request's headers to their last.
        idle_s: between requests.
        linger_s: for the rest of a body that was refused.
        shutdown_s: for running handlers to end by themselves once the server closes.
    """

    header_s: float = 10.0
    idle_s: float = 75.0
    linger_s: float = 5.0
    shutdown_s: float = 1.0


DEFAULT_BOUNDS = ConnectionBounds()


class RunningServer:
    """A server that accepts connections.

    Attributes:
        host, port: where; ``port`` is the one it got.
    """

    def __init__(self, runner: web.AppRunner, host: str, port: int) -> None:
        self._runner = runner
        self.host = host
        self.port = port

    @property
    def url(self) -> str:
        """Its address for people, without a trailing slash."""
        return f"http://{f'[{self.host}]' if ':' in self.host else self.host}:{self.port}"

    async def close(self) -> None:
        """Accept no more, give running handlers ``shutdown_s`` seconds, then cancel them. Idempotent."""
        await self._runner.cleanup()


async def serve(
    app: web.Application,
    host: str,
    port: int,
    *,
    auto_port: bool = False,
    bounds: ConnectionBounds = DEFAULT_BOUNDS,
) -> RunningServer:
    """Serve ``app``.

    Args:
        app: the application, this package's or one that mounts it.
        host: address or name to bind.
        port: port to bind; 0 lets the system choose.
        auto_port: take the next free port when this one is in use.
        bounds: of each connection.

    Raises:
        ConfigError: the address cannot be bound; names it and says what to do.
    """
    sock = await _bind(host, port, auto_port=auto_port)
    runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=bounds.shutdown_s, access_log=None)
    try:
        await runner.setup()
        await _BoundedSite(runner, sock, bounds).start()
    except BaseException:
        sock.close()
        await runner.cleanup()
        raise
    return RunningServer(runner, host, sock.getsockname()[1])


class _BoundedSite(web.BaseSite):
    """Accepts connections of ``_BoundedConnection``."""

    def __init__(self, runner: web.AppRunner, sock: socket.socket, bounds: ConnectionBounds) -> None:
        super().__init__(runner, backlog=BACKLOG)
        self._sock = sock
        self._bounds = bounds

    @property
    def name(self) -> str:
        host, port = self._sock.getsockname()[:2]
        return f"http://{host}:{port}"

    async def start(self) -> None:
        await super().start()
        server = self._runner.server
        assert server is not None
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(
            lambda: _BoundedConnection(server, loop, self._bounds), sock=self._sock, backlog=self._backlog
        )


class _BoundedConnection(web.RequestHandler):
    """One connection whose headers have a deadline, and whose protocol errors are answered in JSON."""

    def __init__(self, server: web.Server, loop: asyncio.AbstractEventLoop, bounds: ConnectionBounds) -> None:
        super().__init__(
            server,
            loop=loop,
            access_log=None,  # type: ignore[arg-type] - aiohttp takes None for "no access log"
            keepalive_timeout=bounds.idle_s,
            lingering_time=bounds.linger_s,
            auto_decompress=False,
        )
        self._header_s = bounds.header_s
        self._header_deadline: asyncio.TimerHandle | None = None

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        is_partial = bool(data) and not self._messages and not self._request_in_progress
        if not is_partial:
            self._clear_deadline()
        elif self._header_deadline is None:
            self._header_deadline = self._loop.call_later(self._header_s, self.force_close)

    def connection_lost(self, exc: BaseException | None) -> None:
        self._clear_deadline()
        super().connection_lost(exc)

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = HTTPStatus.INTERNAL_SERVER_ERROR,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        if status >= HTTPStatus.INTERNAL_SERVER_ERROR or request.writer.output_size:
            return super().handle_error(request, status, exc, message)
        text = (message or "the request is not valid HTTP").partition("\n")[0].rstrip(":")
        response = json_response(envelope(status, text, code="bad_http"), status=status)
        response.force_close()
        return response

    def _clear_deadline(self) -> None:
        if self._header_deadline is not None:
            self._header_deadline.cancel()
            self._header_deadline = None


async def _bind(host: str, port: int, *, auto_port: bool) -> socket.socket:
    try:
        found: list[Any] = await asyncio.get_running_loop().getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
    except socket.gaierror as error:
        raise ConfigError(f"host {host!r} is not an address of this machine: {error.strerror}") from None
    # "localhost" may resolve to both families; IPv4 is where clients look first.
    family, _, _, _, address = min(found, key=lambda entry: entry[0] != socket.AF_INET)
    last = min(port + AUTO_PORT_TRIES, 65_536) if auto_port and port else port + 1
    for candidate in range(port, last):
        sock = _listening_socket(family)
        try:
            sock.bind((address[0], candidate, *address[2:]))
        except OSError as error:
            sock.close()
            if error.errno == errno.EADDRINUSE and auto_port:
                continue
            raise _cannot_bind(host, candidate, error) from None
        if candidate != port:
            _log.info("port %d is in use; listening on %d", port, candidate)
        return sock
    raise ConfigError(f"no free port from {port} to {last - 1} on {host}; choose another with --port")


def _listening_socket(family: int) -> socket.socket:
    """A socket whose options its connections inherit."""
    sock = socket.socket(family, socket.SOCK_STREAM)
    sock.setblocking(False)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in _KEEPALIVE_OPTIONS:
        if hasattr(socket, name):
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
    return sock


def _cannot_bind(host: str, port: int, error: OSError) -> ConfigError:
    if error.errno == errno.EADDRINUSE:
        return ConfigError(f"port {port} on {host} is in use; choose another with --port, or pass --auto-port")
    return ConfigError(f"cannot listen on {host} port {port}: {error.strerror}; choose another --host or --port")
