"""For operators: cancelling a request, the newest requests and events, one request's life, debug bundles."""

import asyncio
import contextlib
import re

from aiohttp import web

from gptoss.errors import RequestError, RequestNotFound
from gptoss.http.context import CONTEXT, EventAsk, MadeBundle
from gptoss.http.errors import STREAM_STARTED, json_response
from gptoss.http.headers import path_request_ids
from gptoss.messages.codec import EVENT_TYPES
from gptoss.telemetry.bundle_order import parse_order

RECENT_DEFAULT = 100
RECENT_MAX = 1000
LIVE_DEFAULT = 40
WAIT_S_MAX = 30
POSITION_MAX = 2**63 - 1
CHUNK_BYTES = 2**18
_NUMBER = re.compile(r"-1|[0-9]{1,19}")


async def cancel(request: web.Request) -> web.StreamResponse:
    """``POST /cancel/{request_id}``: 200 when the request ran and was told to stop, 404 otherwise."""
    for request_id in path_request_ids(request):
        if request.app[CONTEXT].gateway.cancel(request_id):
            return json_response({"id": request_id, "object": "request", "status": "cancelling"})
    raise _unknown(request, "no running request has")


async def recent_requests(request: web.Request) -> web.StreamResponse:
    """``GET /admin/requests?limit=N``: the newest requests, open ones first."""
    limit = _number(request, "limit", 1, RECENT_MAX, RECENT_DEFAULT)
    context = request.app[CONTEXT]
    await context.caught_up()
    return json_response({"object": "list", "data": context.recent_requests(limit)})


async def live(request: web.Request) -> web.StreamResponse:
    """``GET /admin/live?after=SECOND&limit=N``: what a live view shows; ``now`` is the ``after`` of the next call."""
    after = _number(request, "after", 0, POSITION_MAX)
    limit = _number(request, "limit", 0, RECENT_MAX, LIVE_DEFAULT)
    context = request.app[CONTEXT]
    await context.caught_up()
    return json_response(context.live(after, limit))


async def request_events(request: web.Request) -> web.StreamResponse:
    """``GET /admin/requests/{request_id}/events``: everything recorded about one request, in order."""
    for request_id in path_request_ids(request):
        if events := await request.app[CONTEXT].events(request_id):
            return json_response({"request_id": request_id, "events": events})
    raise _unknown(request, "no request has")


async def request_timeline(request: web.Request) -> web.StreamResponse:
    """``GET /admin/requests/{request_id}/timeline``: a request's phases on one time axis, and what delayed it."""
    for request_id in path_request_ids(request):
        if (story := await request.app[CONTEXT].story(request_id)) is not None:
            return json_response(story)
    raise _unknown(request, "no request has")


async def events(request: web.Request) -> web.StreamResponse:
    """``GET /admin/events?after=POS&limit=N&wait=S&type=T&stream=NAME``: records of this boot, oldest first.

    Without ``after`` it says where the journal is. ``wait`` holds the answer back until there is something in it.
    ``next`` is the ``after`` of the next call; another ``boot`` than before means that the server was restarted.
    """
    query = request.query
    ask = EventAsk(
        after=_number(request, "after", -1, POSITION_MAX) if "after" in query else None,
        limit=_number(request, "limit", 1, RECENT_MAX, RECENT_DEFAULT),
        wait_s=_number(request, "wait", 0, WAIT_S_MAX, 0),
        types=frozenset(query.getall("type", [])),
        stream=query.get("stream", ""),
    )
    if unknown := sorted(ask.types - EVENT_TYPES.keys()):
        raise RequestError(f"type {unknown[0][:64]!a} is no event; docs/events.md lists them", param="type")
    return json_response(await request.app[CONTEXT].event_page(ask))


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


def _number(request: web.Request, name: str, least: int, most: int, default: int = 0) -> int:
    """A whole number of the query, within its bounds."""
    written = request.query.get(name, str(default))
    if not _NUMBER.fullmatch(written) or not least <= int(written) <= most:
        raise RequestError(f"{name} is {written[:32]!a}; it must be between {least} and {most}", param=name)
    return int(written)


def _unknown(request: web.Request, claim: str) -> RequestNotFound:
    return RequestNotFound(f"{claim} the id {request.match_info['request_id'][:128]!a}", param="request_id")
