"""The live system as the HTTP surface sees it: queries of the projections, each brought up to date first."""

import asyncio
import contextlib
import tempfile
from typing import Any

import msgspec
from aiohttp import web

from gptoss.app import ServingSystem
from gptoss.clock import NS_PER_S
from gptoss.config import PROFILES, live_settings
from gptoss.errors import ActorError, JournalError, Overloaded, RequestNotFound
from gptoss.http.context import EventAsk, HttpContext, MadeBundle
from gptoss.http.routes import make_app as make_http_app
from gptoss.messages.codec import as_json
from gptoss.node import VERSION
from gptoss.telemetry.bundle import Maker, make_bundle
from gptoss.telemetry.bundle_format import file_name
from gptoss.telemetry.bundle_order import BundleOrder
from gptoss.telemetry.bundle_redact import bundle_key
from gptoss.telemetry.delays import story
from gptoss.telemetry.event_tail import EventPage, EventQuery, EventTail
from gptoss.telemetry.exposition import content_type_for
from gptoss.telemetry.recording import JournalRecording, LiveRecording, Recording
from gptoss.telemetry.request_records import request_records
from gptoss.telemetry.segments import SegmentJournal
from gptoss.telemetry.system_snapshot import system_snapshot

FOLLOWERS_MAX = 16
FOLLOW_EVERY_S = 0.1


class EventPages:
    """Answers those who follow the log: a bounded number of them wait at once, and one at a time reads."""

    def __init__(self, serving: ServingSystem) -> None:
        self._serving = serving
        self._tail = EventTail(serving.journal)
        self._reading = asyncio.Lock()
        self._followers = 0

    async def page(self, ask: EventAsk) -> dict[str, Any]:
        """See ``EventAsk``.

        Raises:
            Overloaded: too many wait already.
        """
        if self._followers >= FOLLOWERS_MAX:
            raise Overloaded(f"{FOLLOWERS_MAX} callers follow the events already; try again")
        self._followers += 1
        try:
            found = await self._wait(ask)
        finally:
            self._followers -= 1
        return {
            "boot": found.boot,
            "next": found.next,
            "newest": found.newest,
            "wall_offset_ns": self._serving.projection.wall_offset_ns,
            "events": [as_json(record) for record in found.records],
        }

    async def _wait(self, ask: EventAsk) -> EventPage:
        query = EventQuery(types=ask.types, stream=ask.stream)
        after = self._tail.newest if ask.after is None else ask.after
        end_ns = self._serving.system.now_ns() + int(ask.wait_s * NS_PER_S)
        while True:
            async with self._reading:
                found = await asyncio.to_thread(self._tail.page, query, after=after, limit=ask.limit)
            is_late = self._serving.system.now_ns() >= end_ns or self._serving.draining
            if found.records or ask.after is None or is_late:
                return found
            after = found.next
            if after >= found.newest:
                await asyncio.sleep(FOLLOW_EVERY_S)


class Scrapes:
    """Expositions of the metrics. Who asks while another is answered gets one that was begun after they asked.

    While requests run every exposition is another, and a hundred scrapers that come at once would each stop the event
    loop for one.
    """

    def __init__(self, serving: ServingSystem) -> None:
        self._serving = serving
        self._lock = asyncio.Lock()
        self._begun = 0
        self._newest: dict[str, tuple[int, bytes]] = {}
        """Content type -> which exposition it was, and its body."""

    async def scrape(self, accept: str) -> tuple[bytes, str]:
        """The body and its content type."""
        asked, content_type = self._begun, content_type_for(accept)
        async with self._lock:
            number, body = self._newest.get(content_type, (0, b""))
            if number <= asked:
                self._begun += 1
                number = self._begun
                await self._serving.caught_up()
                body, _ = self._serving.metrics.render(accept)
                self._newest[content_type] = (number, body)
        return body, content_type


def make_app(serving: ServingSystem) -> web.Application:
    """An aiohttp application for a started ``ServingSystem``; mount it under any prefix with ``add_subapp``."""
    return make_http_app(http_context(serving))


def http_context(serving: ServingSystem) -> HttpContext:
    """What handlers need, filled from a started ``ServingSystem``."""
    projection, journal, system = serving.projection, serving.journal, serving.system
    one_at_a_time = asyncio.Lock()

    async def events(request_id: str) -> list[dict[str, Any]]:
        return await asyncio.to_thread(lambda: [as_json(r) for r in request_records(journal, request_id)])

    async def story_of(request_id: str) -> dict[str, Any] | None:
        try:
            found = await asyncio.to_thread(story, journal, request_id)
        except RequestNotFound:
            return None
        return msgspec.to_builtins(found)

    async def caught_up() -> None:
        with contextlib.suppress(ActorError):  # under overload what is known now is better than nothing
            await serving.caught_up()

    async def snapshot() -> dict[str, Any]:
        await serving.caught_up()
        return system_snapshot(
            projection=projection,
            metrics=serving.metrics,
            settings=serving.settings,
            journal=journal.health,
            now_ns=system.now_ns(),
        )

    async def bundle(order: BundleOrder) -> MadeBundle:
        async with one_at_a_time:
            return await asyncio.to_thread(_make_bundle, serving, order)

    def readiness() -> tuple[bool, str]:
        state = projection.readiness(system.now_ns(), journal.health)
        return state.ready, state.reason

    return HttpContext(
        gateway=serving.gateway,
        caught_up=caught_up,
        settings=serving.settings,
        clock=serving.clock,
        health=lambda: projection.health(system.now_ns(), journal.health),
        readiness=readiness,
        stats=lambda: projection.stats(system.now_ns()),
        memory_stats=projection.memory_stats,
        metrics=Scrapes(serving).scrape,
        recent_requests=projection.recent_requests,
        live=lambda after, limit: projection.live(system.now_ns(), after=after, limit=limit, journal=journal.health),
        events=events,
        story=story_of,
        event_page=EventPages(serving).page,
        snapshot=snapshot,
        bundle=bundle,
        draining=lambda: serving.draining,
        open_batches=serving.open_batches,
        data_folder=serving.settings.data_path if serving.settings.journal == "segments" else None,
        ids=serving.surroundings.ids,
        restart_executor=lambda name: serving.restart_executor(name, origin="http"),
        change_settings=lambda changes: serving.change_settings(changes, origin="http"),
        live_settings=lambda: live_settings(serving.settings),
        default_temperature=PROFILES[serving.settings.profile].temperature,
    )


def _make_bundle(serving: ServingSystem, order: BundleOrder) -> MadeBundle:
    """Cut a bundle out of the live journal, on a thread, into a file that is gone when it is closed."""
    # Beside the journal, where there is one: the system's own place for such files may be memory.
    folder = serving.settings.data_path if serving.settings.journal == "segments" else None
    maker = Maker(
        key=bundle_key(serving.node_key),
        created_ns=serving.clock.wall_ns(),
        created_by=f"gptoss {VERSION}",
        spool_folder=folder,
    )
    try:
        file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 - whoever gets it closes it
        try:
            manifest = make_bundle(file, _recorded(serving), order, maker)
            size = file.tell()
            file.seek(0)
        except BaseException:
            file.close()
            raise
    except OSError as error:
        raise JournalError(f"cannot write a bundle in {folder or tempfile.gettempdir()}: {error.strerror}") from None
    return MadeBundle(file, size, file_name(manifest))


def _recorded(serving: ServingSystem) -> Recording:
    """All that is recorded by now: from the disk, which knows where it has what, unless it lacks something."""
    if isinstance(serving.journal, SegmentJournal) and serving.journal.flush():
        return JournalRecording(serving.settings.journal_path)
    return LiveRecording(serving.journal)
