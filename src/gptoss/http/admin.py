"""For operators: cancelling a request, the newest requests, one request's events, the system's debug bundle."""

import re

from aiohttp import web

from gptoss.errors import RequestError, RequestNotFound
from gptoss.http.context import CONTEXT
from gptoss.http.errors import json_response
from gptoss.http.headers import path_request_ids

RECENT_DEFAULT = 100
RECENT_MAX = 1000
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
    """``GET /admin/debug/bundle``: a snapshot of the whole system."""
    return json_response(await request.app[CONTEXT].snapshot())


def _unknown(request: web.Request, claim: str) -> RequestNotFound:
    return RequestNotFound(f"{claim} the id {request.match_info['request_id'][:128]!a}", param="request_id")
