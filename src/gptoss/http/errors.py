"""Every failure as OpenAI's error body, in one place.

``{"error": {"message", "type", "param", "code"}}``: ``code`` is the error's stable code, ``type`` one of
``invalid_request_error`` (other 4xx), ``rate_limit_error`` (429) and ``server_error`` (5xx). ``Overloaded`` carries
``Retry-After``, and what admission refused has its numbers under ``admission``. Foreign exceptions are mapped here and nowhere else.
"""

import logging
import math
from http import HTTPStatus
from typing import Any

import msgspec
from aiohttp import web
from aiohttp.typedefs import Handler

from gptoss.errors import (
    BodyTimeout,
    BodyTooLarge,
    GptossError,
    MethodNotAllowed,
    NotFound,
    Overloaded,
    RequestError,
)
from gptoss.http.headers import ADMISSION_HEADER, admission_value
from gptoss.messages.commands import AdmissionNote

JSON = "application/json"
STREAM_STARTED: web.RequestKey[bool] = web.RequestKey("stream_started", bool)

_log = logging.getLogger("gptoss.http")


def error_body(error: GptossError) -> dict[str, Any]:
    """OpenAI's error body."""
    body = envelope(
        error.status, error.message, param=error.param if isinstance(error, RequestError) else None, code=error.code
    )
    note = _admission(error)
    if note is not None:
        body["error"]["admission"] = msgspec.to_builtins(note)
    return body


def envelope(status: int, message: str, *, param: str | None = None, code: str) -> dict[str, Any]:
    """OpenAI's error body from its parts; ``status`` decides the ``type``."""
    if status == HTTPStatus.TOO_MANY_REQUESTS:
        kind = "rate_limit_error"
    else:
        kind = "server_error" if _is_server_fault(status) else "invalid_request_error"
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def json_response(data: Any, *, status: int = 200, headers: dict[str, str] | None = None) -> web.Response:
    """A JSON answer that nobody stores."""
    response = web.Response(body=msgspec.json.encode(data), status=status, content_type=JSON)
    response.headers["Cache-Control"] = "no-store"
    response.headers.update(headers or {})
    return response


def error_response(error: GptossError) -> web.Response:
    """The answer that tells of ``error``."""
    response = json_response(error_body(error), status=error.status)
    note = _admission(error)
    if note is not None:
        response.headers[ADMISSION_HEADER] = admission_value(note)
    if isinstance(error, Overloaded):
        response.headers["Retry-After"] = str(max(1, math.ceil(error.retry_after_s)))
    if isinstance(error, (BodyTimeout, BodyTooLarge)):
        # The rest of the body may still be on its way; the connection cannot carry another request.
        response.force_close()
    return response


@web.middleware
async def answer_errors(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Turn every exception of the handlers into an answer. The outermost edge: nothing escapes as aiohttp's text."""
    try:
        return await handler(request)
    except GptossError as error:
        if _is_server_fault(error.status):
            _log.warning("%s %s: %s: %s", request.method, request.rel_url.raw_path, error.code, error.message)
        return error_response(error)
    except web.HTTPMethodNotAllowed as error:
        allowed = ", ".join(sorted(error.allowed_methods))
        refusal = MethodNotAllowed(f"{error.method} is not allowed here; allowed: {allowed}")
        response = error_response(refusal)
        response.headers["Allow"] = allowed
        return response
    except web.HTTPNotFound:
        return error_response(NotFound(f"there is nothing at {request.rel_url.raw_path!a}"))
    except web.HTTPException as error:
        return json_response(envelope(error.status, error.reason, code="http_error"), status=error.status)
    except Exception as error:
        if isinstance(error, ConnectionError) or request.get(STREAM_STARTED):
            raise  # nobody is left to be told, or half an answer is out: aiohttp closes the connection
        _log.exception("%s %s failed", request.method, request.rel_url.raw_path)
        message = "the server failed on this request; its log has the cause"
        return json_response(envelope(500, message, code="internal_error"), status=500)


def _admission(error: GptossError) -> AdmissionNote | None:
    return error.admission if isinstance(error, Overloaded) else None


def _is_server_fault(status: int) -> bool:
    return status >= HTTPStatus.INTERNAL_SERVER_ERROR
