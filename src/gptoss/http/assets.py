"""``GET /assets/NAME``: the files of the page, read once and sent as they are.

Rules:
- Names are those of the files that the package holds: nothing a client writes is ever a path.
- An answer is good until the file changes: a strong ETag, the hash of its bytes, which a browser asks with each time.
"""

import functools
import hashlib
from importlib.resources import files
from importlib.resources.abc import Traversable

import msgspec
from aiohttp import web

from gptoss.errors import NotFound

MEDIA_TYPES = {
    "css": "text/css",
    "js": "text/javascript",
    "mjs": "text/javascript",
    "svg": "image/svg+xml",
    "txt": "text/plain",
}
HEADERS = {"Cache-Control": "no-cache", "Content-Security-Policy": "default-src 'none'; sandbox"}


class Asset(msgspec.Struct, frozen=True):
    """A file of the page; ``etag`` is without its quotes."""

    body: bytes
    media_type: str
    etag: str


async def asset(request: web.Request) -> web.StreamResponse:
    """One file, or 304 where the client has it already."""
    found = assets().get(request.match_info["name"])
    if found is None:
        raise NotFound(f"there is nothing at {request.rel_url.raw_path!a}")
    known = request.if_none_match or ()
    if any(tag.value in {found.etag, "*"} for tag in known):
        response = web.Response(status=304, headers=HEADERS)
    else:
        response = web.Response(body=found.body, content_type=found.media_type, charset="utf-8", headers=HEADERS)
    response.etag = found.etag
    return response


@functools.cache
def assets() -> dict[str, Asset]:
    """All files, by their names below ``/assets/``."""
    return dict(_below(files("gptoss.http").joinpath("assets"), ""))


def _below(folder: Traversable, prefix: str) -> list[tuple[str, Asset]]:
    found: list[tuple[str, Asset]] = []
    for entry in folder.iterdir():
        if entry.is_dir():
            found += _below(entry, f"{prefix}{entry.name}/")
        elif (media_type := MEDIA_TYPES.get(entry.name.rpartition(".")[2])) is not None:
            body = entry.read_bytes()
            found.append((prefix + entry.name, Asset(body, media_type, hashlib.sha256(body).hexdigest())))
    return found
