"""Where ``gptoss events`` looks: a running server, the folder of a journal, or a bundle. All answer the same questions."""

import contextlib
import urllib.parse
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any, Protocol

import msgspec

from gptoss.cli.admin_client import default_server, get_json, record_from_json
from gptoss.config import Settings
from gptoss.errors import GptossError, RequestNotFound
from gptoss.messages.envelope import Record
from gptoss.telemetry.delays import Story, story
from gptoss.telemetry.event_tail import SCAN_MAX, EventQuery
from gptoss.telemetry.newest import ANCHOR_WITHIN, Dated, Newest, RequestFilter, first_offset_ns, unix_s
from gptoss.telemetry.recording import Recording
from gptoss.telemetry.request_records import RecordingSource, RecordSource, request_records
from gptoss.telemetry.request_view import RequestRow
from gptoss.telemetry.segment_reader import SegmentReader
from gptoss.telemetry.segment_tail import SegmentTail

SERVER_REQUESTS_MAX = 1000
PAGE_EVENTS = 500
WAIT_S = 20


class EventSource(Protocol):
    """Answers about requests and events.

    Attributes:
        name: what it is, in words.
    """

    name: str

    def requests(self, wanted: RequestFilter, limit: int) -> list[RequestRow]:
        """The newest wanted requests, newest first."""
        ...

    def events(self, query: EventQuery, limit: int) -> list[Dated]:
        """The newest wanted events, oldest first."""
        ...

    def records(self, request_id: str) -> list[Record]:
        """Everything that names a request, and its steps.

        Raises:
            RequestNotFound: it is not known here.
        """
        ...

    def story(self, request_id: str) -> Story:
        """A request's timeline and what delayed it. Raises as ``records`` does."""
        ...

    def follow(self, query: EventQuery) -> Iterator[list[Dated]]:
        """What comes from now on, for ever; empty lists in between.

        Raises:
            GptossError: nothing more can come from here.
        """
        ...


def open_source(url: str | None, data_dir: str | None, settings: Settings) -> EventSource:
    """The server at ``url``, or the journal of ``data_dir``; with neither, whatever the settings lead to.

    Raises:
        NotReady: there is neither a server nor a journal.
        JournalError: there is no journal in ``data_dir``.
    """
    if url is None and data_dir is None:
        url = default_server(settings)
    return JournalSource(settings.journal_path) if url is None else ServerSource(url)


class _Recorded:
    """What a journal's folder and a bundle have in common."""

    def __init__(self, name: str, source: RecordSource) -> None:
        self.name = name
        self._source = source

    def records(self, request_id: str) -> list[Record]:
        """See ``EventSource``."""
        found = request_records(self._source, request_id)
        if not found:
            raise RequestNotFound(f"{self.name} knows no request {request_id}")
        return found

    def story(self, request_id: str) -> Story:
        """See ``EventSource``."""
        self.records(request_id)
        return story(self._source, request_id)


class JournalSource(_Recorded):
    """A journal's folder; its server may be running or gone."""

    def __init__(self, folder: Path) -> None:
        self._reader = SegmentReader(folder)
        super().__init__(f"the journal in {folder}", self._reader)
        self._folder = folder

    def requests(self, wanted: RequestFilter, limit: int) -> list[RequestRow]:
        """See ``EventSource``."""
        return Newest.in_journal(self._reader).requests(wanted, limit)

    def events(self, query: EventQuery, limit: int) -> list[Dated]:
        """See ``EventSource``."""
        return Newest.in_journal(self._reader).events(query, limit)

    def follow(self, query: EventQuery) -> Iterator[list[Dated]]:
        """See ``EventSource``."""
        tail = SegmentTail(self._folder)
        boot, offset_ns = "", None
        while True:
            found: list[Dated] = []
            for record in tail.look():
                if record.meta.boot != boot:
                    boot = record.meta.boot
                    offset_ns = first_offset_ns(self._reader.read(boot=boot, limit=ANCHOR_WITHIN))
                if query.wants(record):
                    found.append(Dated(record, unix_s(record, offset_ns)))
            yield found


class RecordingView(_Recorded):
    """A recording that is complete, such as a bundle."""

    def __init__(self, recording: Recording, name: str) -> None:
        super().__init__(name, RecordingSource(recording))
        self._recording = recording

    def requests(self, wanted: RequestFilter, limit: int) -> list[RequestRow]:
        """See ``EventSource``."""
        return Newest.in_recording(self._recording).requests(wanted, limit)

    def events(self, query: EventQuery, limit: int) -> list[Dated]:
        """See ``EventSource``."""
        return Newest.in_recording(self._recording).events(query, limit)

    def follow(self, query: EventQuery) -> Iterator[list[Dated]]:
        """Nothing ever comes."""
        raise GptossError(f"{self.name} is complete: there is nothing to follow")


class _Page(msgspec.Struct, frozen=True):
    boot: str
    next: int
    newest: int
    events: list[dict[str, Any]]
    wall_offset_ns: int | None = None

    def dated(self) -> list[Dated]:
        records = map(record_from_json, self.events)
        return [Dated(record, unix_s(record, self.wall_offset_ns)) for record in records]


class _Events(msgspec.Struct, frozen=True):
    events: list[dict[str, Any]]


class _Rows(msgspec.Struct, frozen=True):
    data: list[RequestRow]


class ServerSource:
    """A running server; it tells of its own run only."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.name = f"the server at {url}"

    def requests(self, wanted: RequestFilter, limit: int) -> list[RequestRow]:
        """See ``EventSource``; a server remembers its last thousand."""
        rows = get_json(self.url, f"/admin/requests?limit={SERVER_REQUESTS_MAX}", _Rows).data
        newest = sorted(rows, key=lambda row: -(row.received_unix_s or 0.0))
        return [row for row in newest if wanted.wants(row)][:limit]

    def events(self, query: EventQuery, limit: int) -> list[Dated]:
        """See ``EventSource``."""
        newest = get_json(self.url, "/admin/events", _Page).newest
        found: list[Dated] = []
        end, width = newest, SCAN_MAX
        while end >= 0 and len(found) < limit:
            start = max(-1, end - width)
            found = [*self._between(query, start, end), *found]
            end = start
        return found[-limit:]

    def _between(self, query: EventQuery, after: int, end: int) -> list[Dated]:
        found: list[Dated] = []
        while after < end:
            page = self._page(query, after)
            found += [dated for dated in page.dated() if dated.record.meta.pos <= end]
            if page.next <= after:
                break
            after = page.next
        return found

    def records(self, request_id: str) -> list[Record]:
        """See ``EventSource``."""
        return [record_from_json(fields) for fields in self._ask(request_id, "events", _Events).events]

    def story(self, request_id: str) -> Story:
        """See ``EventSource``."""
        return self._ask(request_id, "timeline", Story)

    def _ask(self, request_id: str, what: str, kind: type[Any]) -> Any:
        try:
            return get_json(self.url, f"/admin/requests/{urllib.parse.quote(request_id, safe='')}/{what}", kind)
        except RequestNotFound:
            raise RequestNotFound(f"{self.name} knows no request {request_id}") from None

    def follow(self, query: EventQuery) -> Iterator[list[Dated]]:
        """See ``EventSource``."""
        page = get_json(self.url, "/admin/events", _Page)
        boot, after = page.boot, page.next
        while True:
            page = self._page(query, after, wait_s=WAIT_S)
            if page.boot != boot:  # Another run of the server: from its beginning on.
                boot, after = page.boot, -1
                continue
            after = page.next
            yield page.dated()

    def _page(self, query: EventQuery, after: int, *, wait_s: int = 0) -> _Page:
        asked = [("after", str(after)), ("limit", str(PAGE_EVENTS)), ("wait", str(wait_s)), ("stream", query.stream)]
        asked += [("type", name) for name in sorted(query.types)]
        return get_json(self.url, f"/admin/events?{urllib.parse.urlencode(asked)}", _Page, timeout_s=wait_s + 10.0)


@contextlib.contextmanager
def open_bundle(path: Path) -> Generator[EventSource]:
    """A bundle, while the context lasts. Raises ``BundleError`` or ``UnsupportedSchema``."""
    from gptoss.telemetry.bundle_reader import BundleReader  # noqa: PLC0415 - see gptoss.cli.main

    with BundleReader(path) as reader:
        yield RecordingView(reader, f"the bundle {path}")
