"""Which callers may talk to a server that has no keys: a web page in somebody's browser may not.

- ``Host`` must be a name of this machine when the server is bound to loopback. A page that rebinds its own name to
  127.0.0.1 (DNS rebinding) still sends that name.
- ``Origin``, which browsers add to what pages send, must be this server itself for anything but reading. No answer
  carries CORS headers, so pages elsewhere cannot read either.
"""

import ipaddress
from urllib.parse import urlsplit

from aiohttp import web
from aiohttp.typedefs import Handler

from gptoss.config import Settings
from gptoss.http.context import CONTEXT
from gptoss.http.errors import envelope, json_response

LOCAL_NAMES = frozenset({"localhost", "127.0.0.1", "::1"})
_READING = frozenset({"GET", "HEAD", "OPTIONS"})


def default_hosts(settings: Settings) -> frozenset[str]:
    """Names that ``Host`` may hold: this machine's for a loopback bind, any (empty) for a public one."""
    return LOCAL_NAMES | {settings.host.lower()} if is_loopback(settings.host) else frozenset()


@web.middleware
async def admit_callers(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Refuse a foreign ``Host`` with 421 and a foreign ``Origin`` with 403."""
    context = request.app[CONTEXT]
    allowed = default_hosts(context.settings) if context.allowed_hosts is None else context.allowed_hosts
    host = request.headers.get("Host")
    if allowed and host is not None and _host_name(host) not in allowed:
        message = f"Host {host[:128]!a} is not a name of this server; use one of {', '.join(sorted(allowed))}"
        return json_response(envelope(421, message, code="host_not_allowed"), status=421)
    origin = request.headers.get("Origin")
    if origin is not None and request.method not in _READING and origin.partition("://")[2] != host:
        message = f"Origin {origin[:128]!a} is not this server; pages of other sites may not call it"
        return json_response(envelope(403, message, code="origin_not_allowed"), status=403)
    return await handler(request)


def is_loopback(host: str) -> bool:
    """Whether a name or an address is this machine's own; a name that is neither is not."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _host_name(host: str) -> str:
    """The name in a ``Host`` header, without its port; empty when it is malformed."""
    try:
        return (urlsplit(f"//{host}").hostname or "").lower()
    except ValueError:
        return ""
