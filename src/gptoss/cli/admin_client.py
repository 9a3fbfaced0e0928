"""Questions to a running server over HTTP, and records back from the JSON of its answers."""

import contextlib
import http.client
import urllib.error
import urllib.request
from collections.abc import Generator, Mapping
from typing import Any, TypeVar

import msgspec

from gptoss.config import Settings
from gptoss.errors import ConfigError, GptossError, JournalError, NotReady, RequestNotFound
from gptoss.messages.codec import EVENT_TYPES
from gptoss.messages.envelope import Meta, Record

TIMEOUT_S = 10.0
BODY_BYTES_MAX = 256 * 2**20

T = TypeVar("T")


def get_json(url: str, path: str, kind: type[T], *, timeout_s: float = TIMEOUT_S) -> T:
    """What a running server answers.

    Args:
        url: of the server, such as ``http://127.0.0.1:8000``.
        path: of the question, with its query.
        kind: of the answer.
        timeout_s: how long it may take.

    Raises:
        GptossError: as ``answer_of`` does, or what answers is no gptoss server.
    """
    with answer_of(url, path, timeout_s=timeout_s) as answer:
        body = answer.read(BODY_BYTES_MAX + 1)
    address = f"{url.rstrip('/')}{path}"
    if len(body) > BODY_BYTES_MAX:
        raise GptossError(f"{address} answers with more than {BODY_BYTES_MAX >> 20} MiB")
    try:
        return msgspec.json.decode(body, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError):
        raise GptossError(f"{address} answers with something else than it should; is it a gptoss server?") from None


@contextlib.contextmanager
def answer_of(url: str, path: str, *, timeout_s: float = TIMEOUT_S) -> Generator[http.client.HTTPResponse]:
    """A running server's answer, to be read within the context.

    Raises:
        ConfigError: ``url`` is none.
        RequestNotFound: the server does not know what the path names.
        NotReady: nothing answers there, or it breaks off.
        GptossError: what answers is no gptoss server, or it refuses the question.
    """
    if not url.startswith(("http://", "https://")):
        raise ConfigError(f"--url is {url!r}; it must begin with http:// or https://")
    address = f"{url.rstrip('/')}{path}"
    # No proxy: a server under debugging is near, and an environment meant for the internet must not hide it.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(address, timeout=timeout_s) as answer:
            yield answer
    except urllib.error.HTTPError as error:
        with error:
            code, message = _error_of(error.read(4096))
        if code == RequestNotFound.code:
            raise RequestNotFound(f"the server at {url} says: {message}") from None
        if code:
            raise GptossError(f"the server at {url} refuses: {message}") from None
        raise GptossError(f"{address} answers {error.code}; is it a gptoss server?") from None
    except (OSError, http.client.HTTPException) as error:
        cause = error.reason if isinstance(error, urllib.error.URLError) else error
        raise NotReady(f"no server answers at {url} ({cause})") from None


def default_server(settings: Settings) -> str | None:
    """The address of the server at the default address; None if none answers there and there is a journal to read instead.

    Raises:
        NotReady: there is neither.
        GptossError: what answers is no gptoss server.
    """
    url = f"http://127.0.0.1:{settings.port}"
    try:
        get_json(url, "/health/live", dict[str, Any])
    except NotReady:
        if not settings.journal_path.is_dir():
            raise NotReady(
                f"no server answers at {url} and there is no journal in {settings.journal_path}; pass --url or --data-dir"
            ) from None
        return None
    return url


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


def _error_of(body: bytes) -> tuple[str, str]:
    """Code and message of an error answer; empty when it is none of gptoss's."""
    try:
        error = msgspec.json.decode(body)["error"]
        return str(error["code"]), str(error["message"])
    except (msgspec.DecodeError, UnicodeDecodeError, KeyError, TypeError):
        return "", ""
