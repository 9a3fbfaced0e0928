"""Request headers that name things: validated before anything echoes, journals or logs them.

A bad value is never a reason to refuse a request; it is replaced or ignored.
"""

import re

from aiohttp import web

from gptoss.http.context import CONTEXT, REQUEST_ID
from gptoss.messages.commands import AdmissionNote
from gptoss.messages.trace_context import parse_traceparent

ADMISSION_HEADER = "X-Admission"
CHAT_PREFIX = "chatcmpl-"
TEXT_PREFIX = "cmpl-"
RESPONSE_PREFIX = "resp_"
_NAME = re.compile(r"[\w.-]{1,128}", re.ASCII)


def wanted_request_id(request: web.Request) -> str:
    """The caller's ``X-Request-ID`` where it is well formed, else empty."""
    return _name_header(request, "X-Request-ID")


def session_id(request: web.Request) -> str:
    """The caller's ``X-Session-ID`` where it is well formed, else empty."""
    return _name_header(request, "X-Session-ID")


def traceparent(request: web.Request) -> str:
    """The caller's W3C ``traceparent`` where it is valid, else empty."""
    given = request.headers.get("traceparent", "")
    return given if parse_traceparent(given) else ""


def response_request_id(request: web.Request) -> str:
    """The id that goes out as ``X-Request-ID``: the submitted request's, else the caller's own or a fresh one."""
    named = request.get(REQUEST_ID)
    if named is None:
        named = request.app[CONTEXT].gateway.name_request(wanted_request_id(request))
        request[REQUEST_ID] = named
    return named


def admission_value(note: AdmissionNote) -> str:
    """How a request was let in or refused, as the header tells it: ``shrink; max_tokens=64; pressure=0.83; ...``."""
    numbers = {
        "max_tokens": note.max_tokens,
        "kv_bytes": note.kv_bytes,
        "pressure": round(note.pressure, 3),
        "running": note.running,
        "slots": note.slots,
        "queued": note.queued,
        "waited_ms": round(note.waited_ms),
    }
    return "; ".join([note.action, *(f"{name}={value}" for name, value in numbers.items())])


def path_request_ids(request: web.Request) -> tuple[str, ...]:
    """What the ``request_id`` of the path may mean: that id, or the one inside an answer's ``id``."""
    written = request.match_info["request_id"]
    prefixes = (CHAT_PREFIX, TEXT_PREFIX, RESPONSE_PREFIX)
    return (written, *(written.removeprefix(prefix) for prefix in prefixes if written.startswith(prefix)))


def _name_header(request: web.Request, name: str) -> str:
    value = request.headers.get(name, "")
    return value if _NAME.fullmatch(value) else ""
