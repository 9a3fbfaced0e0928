"""For operators: cancelling a request, the newest requests, one request's events, debug bundles."""

import asyncio
import contextlib
import re

from aiohttp import web

from gptoss.errors import RequestError, RequestNotFound
from gptoss.http.context import CONTEXT, MadeBundle
from gptoss.http.errors import STREAM_STARTED, json_response
from gptoss.http.headers import path_request_ids
from gptoss.telemetry.bundle_order import parse_order

RECENT_DEFAULT = 100
RECENT_MAX = 1000
CHUNK_BYTES = 2**18
_COUNT = re.compile(r"[0-9]{1,4}")


async def cancel(request: web.Request) -> web.StreamResponse:
    """``POST /cancel/{request_id}``: 200 when the request ran and was told to stop, 404 otherwise."""
    for request_id in path_request_ids(request):
        if request.app[CONTEXT].gateway.cancel(request_id):
            return json_response({"id": request_id, "object": "request", "status": "cancelling"})
    raise _unknown(request, "no running request has")


async def recent_requests(request: web.Request) -> web.StreamResponse:
    """``GET /admin/requests?limit=N``: the newest requests, open ones first."""
    written = request.query.get("limit", str(RECENT_DEFAULT))
    if not _COUNT.fullmatch(written) or not 1 <= int(written) <= RECENT_MAX:
        raise RequestError(f"limit is {written[:32]!a}; it must be between 1 and {RECENT_MAX}", param="limit")
    return json_response({"object": "list", "data": request.app[CONTEXT].recent_requests(int(written))})


async def request_events(request: web.Request) -> web.StreamResponse:
    """``GET /admin/requests/{request_id}/events``: everything recorded about one request, in order."""
    for request_id in path_request_ids(request):
        if events := await request.app[CONTEXT].events(request_id):
            return json_response({"request_id": request_id, "events": events})
    raise _unknown(request, "no request has")


async def debug_bundle(request: web.Request) -> web.StreamResponse:
    """``GET /admin/debug/bundle``: the flight recorder's bundle, or with ``format=json`` a snapshot of the system."""
    context, query = request.app[CONTEXT], dict(request.query)
    written = query.pop("format", "zip")
    if written == "json":
        return json_response(await context.snapshot())
    if written != "zip":
        raise RequestError(f"format is {written[:32]!a}; it must be zip or json", param="format")
    return await _send(request, await context.bundle(parse_order(query)))


async def request_bundle(request: web.Request) -> web.StreamResponse:
    """``GET /admin/debug/bundle/{request_id}``: the bundle of one request and all that decided about it."""
    for request_id in path_request_ids(request):
        order = parse_order(request.query, (request_id,))
        with contextlib.suppress(RequestNotFound):
            return await _send(request, await request.app[CONTEXT].bundle(order))
    raise _unknown(request, "no request has")


async def _send(request: web.Request, bundle: MadeBundle) -> web.StreamResponse:
    response = web.StreamResponse(
        headers={
            "Content-Type": "application/zip",
            "Content-Length": str(bundle.size),
            "Content-Disposition": f'attachment; filename="{bundle.name}"',
            "Cache-Control": "no-store",
        }
    )
    with bundle.file as file:
        await response.prepare(request)
        request[STREAM_STARTED] = True
        while chunk := await asyncio.to_thread(file.read, CHUNK_BYTES):
            await response.write(chunk)
        await response.write_eof()
    return response


def _unknown(request: web.Request, claim: str) -> RequestNotFound:
    return RequestNotFound(f"{claim} the id {request.match_info['request_id'][:128]!a}", param="request_id")
