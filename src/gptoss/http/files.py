"""``/v1/files``: upload, list, retrieve, read and delete the files that batches are made of."""

import asyncio
from typing import IO, Any, Literal

import aiohttp
import msgspec
from aiohttp import BodyPartReader, web
from aiohttp.http_exceptions import HttpProcessingError

from gptoss.clock import NS_PER_S
from gptoss.errors import BodyTimeout, NotReady, RequestError, UnsupportedMedia
from gptoss.http.body import MIB
from gptoss.http.context import BATCHES, CONTEXT
from gptoss.http.errors import json_response
from gptoss.http.file_store import FILES, FileNote, FileStore, new_file_id
from gptoss.http.paging import page_of

PURPOSE = "batch"
UPLOAD_S = 3600.0
"""A whole upload may take so long, as long as bytes keep coming."""
CHUNK_BYTES = 2**18
FIELD_BYTES_MAX = 1024
LIST_MAX = 10_000


class FileBody(msgspec.Struct, frozen=True, kw_only=True):
    """A file."""

    id: str
    object: Literal["file"] = "file"
    bytes: int
    created_at: int
    filename: str
    purpose: str
    status: Literal["processed"] = "processed"
    expires_at: None = None
    status_details: None = None


class FileList(msgspec.Struct, frozen=True, kw_only=True):
    """The answer of ``GET /v1/files``."""

    object: Literal["list"] = "list"
    data: list[FileBody]
    first_id: str | None
    last_id: str | None
    has_more: bool


class FileDeleted(msgspec.Struct, frozen=True, kw_only=True):
    """The answer of ``DELETE /v1/files/{file_id}``."""

    id: str
    object: Literal["file"] = "file"
    deleted: bool = True


async def upload(request: web.Request) -> web.StreamResponse:
    """``POST /v1/files``: a form with ``purpose`` and ``file``."""
    context, store = request.app[CONTEXT], request.app[FILES]
    if context.draining():
        raise NotReady("the server is shutting down and takes no new files", retry_after_s=5.0)
    if request.content_type != "multipart/form-data":
        raise UnsupportedMedia(f"Content-Type is {request.content_type!a}; it must be multipart/form-data")
    if (request.content_length or 0) > store.file_bytes_max + MIB:
        store.check_room(request.content_length or 0)
    file_id = new_file_id(context.ids)
    with store.part(file_id) as part:
        form = _Form(request, part, store)
        try:
            async with asyncio.timeout(UPLOAD_S):
                await form.read()
        except TimeoutError:
            raise BodyTimeout("the file did not arrive in time") from None
        except (ValueError, AssertionError, RuntimeError, aiohttp.ClientError, HttpProcessingError) as error:
            raise RequestError(f"the body is no form that can be read: {error!s:.200}", param="body") from None
        note = FileNote(
            id=file_id,
            bytes=form.num_bytes,
            created_at=context.clock.wall_ns() // NS_PER_S,
            filename=form.filename_or_refusal(),
            purpose=form.purpose_or_refusal(),
        )
        await asyncio.to_thread(store.keep, note, part)
    return json_response(_body(note))


async def list_files(request: web.Request) -> web.StreamResponse:
    """``GET /v1/files?purpose=P&limit=N&order=asc|desc&after=ID``."""
    purpose = request.query.get("purpose")
    notes = [note for note in request.app[FILES].notes if purpose in (None, note.purpose)]
    page = page_of(request.query, notes, lambda note: note.id, limit_max=LIST_MAX, limit_default=LIST_MAX)
    bodies = [_body(note) for note in page.entries]
    return json_response(FileList(data=bodies, first_id=page.first_id, last_id=page.last_id, has_more=page.has_more))


async def retrieve(request: web.Request) -> web.StreamResponse:
    """``GET /v1/files/{file_id}``."""
    return json_response(_body(request.app[FILES].note(request.match_info["file_id"])))


async def content(request: web.Request) -> web.StreamResponse:
    """``GET /v1/files/{file_id}/content``."""
    store = request.app[FILES]
    note = store.note(request.match_info["file_id"])
    file = await asyncio.to_thread(store.path(note.id).open, "rb")
    with file:
        response = web.StreamResponse(headers={"Content-Type": "application/octet-stream", "Cache-Control": "no-store"})
        response.content_length = note.bytes
        await response.prepare(request)
        while chunk := await asyncio.to_thread(file.read, CHUNK_BYTES):
            await response.write(chunk)
        await response.write_eof()
    return response


async def delete(request: web.Request) -> web.StreamResponse:
    """``DELETE /v1/files/{file_id}``; what an open batch reads is kept."""
    store = request.app[FILES]
    note = store.note(request.match_info["file_id"])
    for batch in request.app[BATCHES].batches.values():
        if batch.input_file_id == note.id and not batch.is_over:
            raise RequestError(f"{batch.batch_id} still reads {note.id}; cancel it first", param="file_id")
    await asyncio.to_thread(store.delete, note.id)
    return json_response(FileDeleted(id=note.id))


class _Form:
    """A form that is being read, its file written as it comes."""

    def __init__(self, request: web.Request, part: IO[bytes], store: FileStore) -> None:
        self._request = request
        self._part = part
        self._store = store
        self._quiet_s = request.app[CONTEXT].timing.body_s
        self._filename: str | None = None
        self._purpose: str | None = None
        self.num_bytes = 0

    async def read(self) -> None:
        reader = await self._request.multipart()
        while (field := await self._timely(reader.next())) is not None:
            if not isinstance(field, BodyPartReader):
                raise RequestError("the form has a part of parts; send plain fields", param="body")
            await self._take(field)

    def filename_or_refusal(self) -> str:
        if self._filename is None:
            raise RequestError("file: this field is required", param="file")
        return self._filename

    def purpose_or_refusal(self) -> str:
        if self._purpose is None:
            raise RequestError("purpose: this field is required", param="purpose")
        if self._purpose != PURPOSE:
            raise RequestError(f"purpose is {self._purpose[:64]!a}; only {PURPOSE!r} is supported", param="purpose")
        return self._purpose

    async def _take(self, field: BodyPartReader) -> None:
        name = field.name or ""
        if name == "file":
            if self._filename is not None:
                raise RequestError("file: the form has two; send one", param="file")
            self._filename = (field.filename or "upload.jsonl")[:255]
            await self._take_file(field)
            return
        value = bytearray()
        while chunk := await self._timely(field.read_chunk(FIELD_BYTES_MAX)):
            value += chunk
            if len(value) > FIELD_BYTES_MAX:
                raise RequestError(f"{name[:64]}: the field is too long", param=name[:64])
        if name == "purpose":
            self._purpose = bytes(value).decode()
        elif name.startswith("expires_after"):
            raise RequestError("expires_after is not supported; files stay until they are deleted", param=name[:64])

    async def _take_file(self, field: BodyPartReader) -> None:
        while chunk := await self._timely(field.read_chunk(CHUNK_BYTES)):
            self.num_bytes += len(chunk)
            self._store.check_room(self.num_bytes)
            await asyncio.to_thread(self._part.write, chunk)

    async def _timely(self, reading: Any) -> Any:
        async with asyncio.timeout(self._quiet_s):
            return await reading


def _body(note: FileNote) -> FileBody:
    return FileBody(
        id=note.id,
        bytes=note.bytes,
        created_at=note.created_at,
        filename=note.filename,
        purpose=note.purpose,
    )
