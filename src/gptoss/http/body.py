"""Request bodies: bytes off the wire, bounded in size and time, before anyone parses them."""

import asyncio
from typing import TypeVar

from aiohttp import web

from gptoss.errors import BodyTimeout, BodyTooLarge, RequestError, UnsupportedMedia

MIB = 1 << 20

Body = TypeVar("Body", bytes, bytearray)


async def read_json_body(request: web.Request, *, limit_bytes: int, timeout_s: float) -> bytes:
    """The whole body of a JSON request.

    Raises:
        UnsupportedMedia: it is not ``application/json``, or it is compressed.
        BodyTooLarge: it is longer than ``limit_bytes``, announced or found.
        BodyTimeout: it had not arrived after ``timeout_s`` seconds.
        RequestError: its transfer encoding is broken.
    """
    if request.content_type != "application/json":
        raise UnsupportedMedia(f"Content-Type is {request.content_type!a}; it must be application/json")
    encoding = request.headers.get("Content-Encoding", "identity")
    if encoding.lower() != "identity":
        raise UnsupportedMedia(f"Content-Encoding {encoding!a} is not accepted; send the body as it is")
    if (request.content_length or 0) > limit_bytes:
        raise _too_large(limit_bytes)
    try:
        if request.content.is_eof():  # as nearly always: a short body comes with the headers
            return _bounded(request.content.read_nowait(), limit_bytes)
        async with asyncio.timeout(timeout_s):
            return await _read(request, limit_bytes)
    except TimeoutError:
        raise BodyTimeout(f"the body did not arrive within {timeout_s:g} s") from None
    except web.RequestPayloadError as error:
        raise RequestError(f"the body cannot be read: {error}", param="body") from None


async def _read(request: web.Request, limit_bytes: int) -> bytes:
    body = bytearray()
    while chunk := await request.content.readany():
        body += chunk
        _bounded(body, limit_bytes)
    return bytes(body)


def _bounded(body: Body, limit_bytes: int) -> Body:
    if len(body) > limit_bytes:
        raise _too_large(limit_bytes)
    return body


def _too_large(limit_bytes: int) -> BodyTooLarge:
    return BodyTooLarge(f"the body is larger than {limit_bytes} bytes", param="body")
