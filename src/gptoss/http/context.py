"""What the HTTP surface needs from the system around it, as one value that ``app`` fills.

Handlers see nothing else of the system: they decode, submit or cancel through the gateway, and frame.
"""

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import IO, Any, NamedTuple, Protocol

import msgspec
from aiohttp import web

from gptoss.actors.batch_actor import BatchWork
from gptoss.actors.generation import GenerateRequest, Generation
from gptoss.actors.rendering import Rendering
from gptoss.clock import Clock, IdSource, SystemIds
from gptoss.config import Settings
from gptoss.errors import GptossError
from gptoss.messages.batch import Batch
from gptoss.messages.commands import AdmissionNote, Command
from gptoss.messages.trace_context import TraceContext
from gptoss.telemetry.bundle_order import BundleOrder


class RequestGateway(Protocol):
    """The front door of the actor system; ``actors.gateway.Gateway`` is the live one."""

    @property
    def served_model(self) -> str:
        """The name under which the model is served."""
        ...

    @property
    def max_model_len(self) -> int:
        """Tokens that prompt and output may have together; 0 until a model is loaded."""
        ...

    @property
    def rendering(self) -> Rendering:
        """Prompts and texts without a request."""
        ...

    def name_request(self, wanted: str) -> str:
        """``wanted`` where it is a valid id that is free, else a fresh one."""
        ...

    def submit(self, request: GenerateRequest) -> Generation:
        """Start a request; refusals and failures come through the returned ``Generation``."""
        ...

    def reject(self, error: GptossError, *, endpoint: str, request_id: str = "", traceparent: str = "") -> str:
        """Record a request that was refused before it could be submitted; returns its id."""
        ...

    def cancel(self, request_id: str) -> bool:
        """Stop a running request; False when no such request runs."""
        ...


class BatchDesk(Protocol):
    """Where batches are ordered; ``actors.batch_actor.BatchDesk`` is the live one."""

    @property
    def batches(self) -> Mapping[str, Batch]:
        """Everything that is known, oldest first."""
        ...

    async def order(self, command: Command) -> None:
        """Have a command carried out; what it led to is on disk when this returns."""
        ...


class MadeBundle(NamedTuple):
    """A debug bundle in a file that has no name any more: ``file`` stands at its beginning; whoever has it closes it."""

    file: IO[bytes]
    size: int
    name: str


class HttpTiming(msgspec.Struct, frozen=True, kw_only=True):
    """How long the HTTP surface waits, in seconds.

    Attributes:
        body_s: for a whole request body; after it 408.
        keepalive_s: silence of a stream after which it sends a comment.
        poll_s: how often a waiting handler looks at its client; bounds how late a disconnect is seen where the
            embedder's server does not cancel handlers.
    """

    body_s: float = 30.0
    keepalive_s: float = 15.0
    poll_s: float = 1.0


class EventAsk(msgspec.Struct, frozen=True, kw_only=True):
    """Which records are asked for.

    Attributes:
        after: only positions above this; None asks for none yet, only where the journal is now.
        limit: at most so many.
        wait_s: how long to wait for the first.
        types: only these types of event; empty leaves out those that come all the time.
        stream: only this stream.
    """

    after: int | None = None
    limit: int = 100
    wait_s: float = 0.0
    types: frozenset[str] = frozenset()
    stream: str = ""


async def _nothing_to_wait_for() -> None:
    """Of queries that always know everything."""


class HttpContext(msgspec.Struct, frozen=True, kw_only=True):
    """The system as handlers see it.

    Attributes:
        default_temperature: for requests that name none.
        caught_up: waits, for a little at most, until the queries below know all that has been recorded: who has had an answer
            finds it there.
        health, readiness, stats, memory_stats: queries of the live projection; readiness is (ready, reason).
        metrics: ``Accept`` header -> (exposition, content type).
        recent_requests: limit -> newest requests.
        live: (second, limit) -> what a live view shows: the seconds since, health, stats, memory, newest requests.
        events: request id -> its records, JSON-ready; empty when unknown.
        story: request id -> its timeline and what delayed it, JSON-ready; None when unknown.
        event_page: newest records, JSON-ready; see ``EventAsk``.
        snapshot: the system's state as one JSON document.
        bundle: makes the debug bundle that was ordered.
        restart_executor: replaces the engine of the executor with this name; False when there is none.
        change_settings: changes settings of the running server, by name; returns those that are others than before.
        live_settings: all that can change so, with their values.
        draining: whether new requests are refused because the server stops.
        open_batches: begins to run batches with this work; returns where they are ordered.
        data_folder: where files and responses are kept; None keeps them for as long as the application.
        ids: names files and batches.
        allowed_hosts: names that ``Host`` may hold; empty allows any, None derives them from the bind address.
    """

    gateway: RequestGateway
    settings: Settings
    clock: Clock
    health: Callable[[], dict[str, Any]]
    readiness: Callable[[], tuple[bool, str]]
    stats: Callable[[], dict[str, Any]]
    memory_stats: Callable[[], dict[str, Any]]
    metrics: Callable[[str], Awaitable[tuple[bytes, str]]]
    recent_requests: Callable[[int], list[dict[str, Any]]]
    live: Callable[[int, int], dict[str, Any]]
    events: Callable[[str], Awaitable[list[dict[str, Any]]]]
    story: Callable[[str], Awaitable[dict[str, Any] | None]]
    event_page: Callable[[EventAsk], Awaitable[dict[str, Any]]]
    snapshot: Callable[[], Awaitable[dict[str, Any]]]
    bundle: Callable[[BundleOrder], Awaitable[MadeBundle]]
    draining: Callable[[], bool]
    open_batches: Callable[[BatchWork], Awaitable[BatchDesk]]
    data_folder: Path | None = None
    ids: IdSource = SystemIds()
    caught_up: Callable[[], Awaitable[None]] = _nothing_to_wait_for
    restart_executor: Callable[[str], bool] = lambda _: False
    change_settings: Callable[[dict[str, Any]], tuple[str, ...]] = lambda _: ()
    live_settings: Callable[[], dict[str, Any]] = dict[str, Any]
    default_temperature: float = 1.0
    allowed_hosts: frozenset[str] | None = None
    timing: HttpTiming = HttpTiming()


CLOSING: web.AppKey[asyncio.Event] = web.AppKey("closing", asyncio.Event)
"""Set once the server closes its connections itself, so that a cut one is not taken for a client that left."""
BATCHES: web.AppKey[BatchDesk] = web.AppKey("batches", BatchDesk)
CONTEXT: web.AppKey[HttpContext] = web.AppKey("context", HttpContext)
ADMISSION: web.RequestKey[AdmissionNote] = web.RequestKey("admission", AdmissionNote)
"""How the call was let in."""
REQUEST_ID: web.RequestKey[str] = web.RequestKey("request_id", str)
TRACE: web.RequestKey[TraceContext] = web.RequestKey("trace", TraceContext)
