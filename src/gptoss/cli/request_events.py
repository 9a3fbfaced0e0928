"""The recorded events of one request, from a running server or from a journal folder."""

import http.client
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from gptoss.errors import GptossError, JournalError, NotReady, RequestNotFound
from gptoss.messages.codec import EVENT_TYPES
from gptoss.messages.envelope import Meta, Record
from gptoss.telemetry.request_records import request_records
from gptoss.telemetry.segment_reader import SegmentReader

TIMEOUT_S = 10.0
BODY_BYTES_MAX = 256 * 2**20


class _Body(msgspec.Struct, frozen=True):
    events: list[dict[str, Any]]


def find_records(request_id: str, *, url: str | None, folder: Path | None) -> tuple[list[Record], str]:
    """The records of a request, and in words where they are from: a server or, if none answers, a journal's folder.

    Args:
        request_id: which request.
        url: of the server; None asks none.
        folder: of the journal; None reads none.

    Raises:
        RequestNotFound: the place that was read does not know the request.
        NotReady: there is neither a server nor a journal.
        GptossError: what is there cannot be read.
    """
    if url is not None:
        try:
            return read_server(url, request_id), f"the server at {url}"
        except NotReady:
            if folder is None:
                raise
            if not folder.is_dir():
                raise NotReady(
                    f"no server answers at {url} and there is no journal in {folder}; pass --url or --data-dir"
                ) from None
    if folder is None:
        raise NotReady("neither a server nor a journal was named")
    return read_folder(folder, request_id), f"the journal in {folder}"


def read_server(url: str, request_id: str) -> list[Record]:
    """The records of a request as a running server tells them.

    Args:
        url: of the server, such as ``http://127.0.0.1:8000``.
        request_id: which request.

    Raises:
        RequestNotFound: the server does not know the request.
        NotReady: nothing answers there.
        GptossError: what answers is no gptoss server.
    """
    if not url.startswith(("http://", "https://")):
        raise GptossError(f"url is {url!r}; it must begin with http:// or https://")
    address = f"{url.rstrip('/')}/admin/requests/{urllib.parse.quote(request_id, safe='')}/events"
    # No proxy: a server under debugging is near, and an environment meant for the internet must not hide it.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(address, timeout=TIMEOUT_S) as answer:
            body = answer.read(BODY_BYTES_MAX + 1)
    except urllib.error.HTTPError as error:
        with error:
            code = _error_code(error.read(4096))
        if code == RequestNotFound.code:
            raise RequestNotFound(f"the server at {url} knows no request {request_id}") from None
        raise GptossError(f"{address} answers {error.code}; is it a gptoss server?") from None
    except (OSError, http.client.HTTPException) as error:
        cause = error.reason if isinstance(error, urllib.error.URLError) else error
        raise NotReady(f"no server answers at {url} ({cause})") from None
    if len(body) > BODY_BYTES_MAX:
        raise GptossError(f"{address} answers with more than {BODY_BYTES_MAX >> 20} MiB")
    try:
        return [record_from_json(fields) for fields in msgspec.json.decode(body, type=_Body).events]
    except (msgspec.DecodeError, UnicodeDecodeError):
        raise GptossError(f"{address} answers with something else than events; is it a gptoss server?") from None


def read_folder(folder: Path, request_id: str) -> list[Record]:
    """The records of a request from a journal's folder; the server may be running or gone.

    Raises:
        RequestNotFound: no record in the folder names the request.
        JournalError: there is no journal, or it is corrupt.
    """
    records = request_records(SegmentReader(folder), request_id)
    if not records:
        raise RequestNotFound(f"the journal in {folder} knows no request {request_id}")
    return records


def record_from_json(fields: Mapping[str, Any]) -> Record:
    """The inverse of ``codec.as_json``.

    Raises:
        JournalError: the fields are no record, or its event is of a type or version that this program does not know.
    """
    try:
        meta = msgspec.convert([fields[name] for name in Meta.__struct_fields__], Meta)
        cls = EVENT_TYPES[meta.type]
        if meta.version != cls.VERSION:
            raise JournalError(f"the server's {meta.type} has version {meta.version}; this program has {cls.VERSION}")
        data = dict(fields["data"])
        values = [_packed(cls, name, data[name]) for name in cls.__struct_fields__ if name in data]
        return Record(meta, msgspec.convert(values, cls, str_keys=True))
    except KeyError as error:
        raise JournalError(f"not a record that this program knows: {error} is missing or unknown") from None
    except (msgspec.ValidationError, TypeError, ValueError) as error:
        raise JournalError(f"not a record: {error}") from None


def _packed(cls: type[msgspec.Struct], name: str, value: Any) -> Any:
    """``as_json`` unpacks what an event holds in packed form, such as a consumed command."""
    return msgspec.Raw(msgspec.msgpack.encode(value)) if cls.__annotations__.get(name) is msgspec.Raw else value


def _error_code(body: bytes) -> str:
    try:
        return str(msgspec.json.decode(body)["error"]["code"])
    except (msgspec.DecodeError, UnicodeDecodeError, KeyError, TypeError):
        return ""
