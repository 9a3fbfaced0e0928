"""A real server on a loopback port in front of a scripted gateway: what a script puts is what a client sees."""

import asyncio
import io
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Any, cast

import aiohttp
import msgspec
import pytest

from gptoss.actors.batch_actor import BatchWork
from gptoss.actors.batches import Batches
from gptoss.actors.generation import Delta, GenerateRequest, Generation, Notice, Outcome, Usage
from gptoss.actors.rendering import Rendering
from gptoss.actors.system import System
from gptoss.clock import SystemClock
from gptoss.config import Settings
from gptoss.errors import GptossError, RequestNotFound
from gptoss.http.context import EventAsk, HttpContext, HttpTiming, MadeBundle
from gptoss.http.headers import _NAME
from gptoss.http.routes import make_app
from gptoss.http.server import ConnectionBounds, RunningServer, serve
from gptoss.messages.batch import Batch
from gptoss.messages.commands import CancelReason, Command
from gptoss.telemetry.bundle_order import BundleOrder
from gptoss.testing import FakeRenderer

Script = Callable[[Generation], Awaitable[None]]
USAGE = Usage(prompt_tokens=7, completion_tokens=2, cached_tokens=3)


async def hello(generation: Generation) -> None:
    """Admit, two deltas, end."""
    generation.prompt_tokens = USAGE.prompt_tokens
    generation.put_admitted(16)
    for token, text in enumerate(("Hello", " world")):
        await asyncio.sleep(0)
        generation.put(Delta(text=text, token_ids=(token,)))
        await asyncio.sleep(0.005)
    generation.end(Outcome(finish_reason="stop", usage=USAGE))


class Threads:
    """As much of a system as rendering needs."""

    clock = SystemClock()
    now_ns = clock.monotonic_ns
    run_in_thread = staticmethod(asyncio.to_thread)


class FakeGateway:
    """Submits to a script instead of actors, and remembers everything it was told."""

    served_model = "demo"
    max_model_len = 4096

    def __init__(self) -> None:
        self.rendering = Rendering(cast("System", Threads()), FakeRenderer())
        self.script: Script = hello
        self.submitted: list[GenerateRequest] = []
        self.rejected: list[tuple[str, str, str]] = []
        self.cancelled: list[tuple[str, CancelReason]] = []
        self.notices: list[Notice] = []
        self.orders: list[BundleOrder] = []
        self.stalled_ms = 0.0
        self.over = asyncio.Event()
        self.running: dict[str, Generation] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._count = 0

    def name_request(self, wanted: str) -> str:
        if _NAME.fullmatch(wanted) and wanted not in self.running:
            return wanted
        self._count += 1
        return f"req_{self._count}"

    def submit(self, request: GenerateRequest) -> Generation:
        self.submitted.append(request)
        name = self.name_request(request.request_id)
        generation = Generation(
            request_id=name,
            model=self.served_model,
            created_s=1_700_000_000,
            on_cancel=lambda reason: self._stop(name, reason),
            on_notice=lambda notice, ms: self._notice(name, notice, ms),
        )
        self.running[name] = generation
        task = asyncio.create_task(self._run(generation))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return generation

    def reject(self, error: GptossError, *, endpoint: str, request_id: str = "", traceparent: str = "") -> str:
        del traceparent
        name = self.name_request(request_id)
        self.rejected.append((error.code, endpoint, name))
        return name

    def cancel(self, request_id: str) -> bool:
        if request_id not in self.running:
            return False
        self._stop(request_id, "client")
        return True

    async def bundle(self, order: BundleOrder) -> MadeBundle:
        self.orders.append(order)
        if order.selection.request_ids not in {(), ("known",)}:
            raise RequestNotFound("no such request", param="request_id")
        data = b"bundle!" * 100_000
        return MadeBundle(io.BytesIO(data), len(data), "all.zip")

    async def close(self) -> None:
        for task in tuple(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _run(self, generation: Generation) -> None:
        try:
            await self.script(generation)
        finally:
            self.running.pop(generation.request_id, None)

    def _stop(self, name: str, reason: CancelReason) -> None:
        self.cancelled.append((name, reason))
        if name in self.running:
            self.running.pop(name).end(Outcome(finish_reason="cancelled", usage=USAGE))
        self.over.set()

    def _notice(self, name: str, notice: Notice, stalled_ms: float) -> None:
        self.notices.append(notice)
        if notice != "first_byte":
            self.stalled_ms = stalled_ms
            self._stop(name, "disconnect" if notice == "disconnect" else "slow_client")


class PaperDesk:
    """Decides about batches and runs none of them."""

    def __init__(self) -> None:
        self._decider = Batches(1)
        self._state = self._decider.initial()

    @property
    def batches(self) -> Mapping[str, Batch]:
        return self._state.batches

    async def order(self, command: Command) -> None:
        for event in self._decider.decide(self._state, command):
            self._state = self._decider.evolve(self._state, event)

    @classmethod
    async def open(cls, work: BatchWork) -> "PaperDesk":
        await work.restore([])
        return cls()


class House:
    """The server under test and a client for it."""

    def __init__(self, gateway: FakeGateway, context: HttpContext, server: RunningServer) -> None:
        self.gateway = gateway
        self.context = context
        self.server = server
        self.port = server.port
        self.url = server.url
        self.orders = gateway.orders
        self.session = aiohttp.ClientSession(self.url)

    async def chat(self, *, headers: dict[str, str] | None = None, **fields: Any) -> tuple[int, dict[str, Any]]:
        body = {"model": "demo", "messages": [{"role": "user", "content": "Hi"}], **fields}
        return await self.post(msgspec.json.encode(body), headers=headers)

    async def ask(self, path: str, **fields: Any) -> tuple[int, dict[str, Any]]:
        return await self.post(msgspec.json.encode(fields), path=path)

    async def post(
        self, body: bytes | io.BytesIO, *, headers: dict[str, str] | None = None, path: str = "/v1/chat/completions"
    ) -> tuple[int, dict[str, Any]]:
        sent = {"Content-Type": "application/json", **(headers or {})}
        async with self.session.post(path, data=body, headers=sent) as response:
            assert response.content_type == "application/json"
            return response.status, await response.json()

    async def stream(self, **fields: Any) -> bytes:
        messages = [{"role": "user", "content": "Hi"}]
        return await self.stream_of("/v1/chat/completions", model="demo", messages=messages, **fields)

    async def stream_of(self, path: str, **fields: Any) -> bytes:
        async with self.session.post(path, json={"stream": True, **fields}) as response:
            assert response.status == 200
            assert response.headers["Content-Type"] == "text/event-stream"
            return await response.read()

    async def canary(self) -> None:
        """The server still serves."""
        status, body = await self.chat()
        assert status == 200
        assert body["choices"][0]["message"]["content"] == "Hello world"

    async def raw(self, data: bytes) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """A bare connection that has sent ``data``."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        writer.write(data)
        await writer.drain()
        return reader, writer


def chat_bytes(**fields: Any) -> bytes:
    """A whole HTTP request for a chat completion."""
    body = msgspec.json.encode({"messages": [{"role": "user", "content": "Hi"}], **fields})
    head = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body


@pytest.fixture(name="chat_bytes")
def chat_bytes_fixture() -> Callable[..., bytes]:
    return chat_bytes


@pytest.fixture
def settings() -> Settings:
    return Settings(client_stall_s=0.4)


@pytest.fixture
def timing() -> HttpTiming:
    return HttpTiming(body_s=0.3, poll_s=0.05)


@pytest.fixture
def gateway() -> FakeGateway:
    return FakeGateway()


@pytest.fixture
def context(gateway: FakeGateway, settings: Settings, timing: HttpTiming) -> HttpContext:
    async def metrics(accept: str) -> tuple[bytes, str]:
        return f"# accept {accept}\n".encode(), "text/plain; version=0.0.4; charset=utf-8"

    async def events(request_id: str) -> list[dict[str, Any]]:
        return [{"type": "RequestReceived", "pos": 0}] if request_id == "known" else []

    async def story(request_id: str) -> dict[str, Any] | None:
        return {"timeline": {"request_id": "known"}} if request_id == "known" else None

    async def event_page(ask: EventAsk) -> dict[str, Any]:
        return {"ask": msgspec.to_builtins(ask)}

    async def snapshot() -> dict[str, Any]:
        return {"stats": {}, "raw": b"\x00\xff"}

    return HttpContext(
        gateway=gateway,
        settings=settings,
        clock=SystemClock(),
        health=lambda: {"status": "healthy"},
        readiness=lambda: (True, "ready"),
        stats=lambda: {"gpu_routing": {}},
        memory_stats=lambda: {"memory_pressure": 0.0},
        metrics=metrics,
        recent_requests=lambda limit: [{"request_id": "known"}][:limit],
        live=lambda after, limit: {"after": after, "limit": limit},
        events=events,
        story=story,
        event_page=event_page,
        snapshot=snapshot,
        bundle=gateway.bundle,
        draining=lambda: False,
        open_batches=PaperDesk.open,
        default_temperature=0.7,
        timing=timing,
    )


@pytest.fixture
async def open_house(gateway: FakeGateway, context: HttpContext) -> AsyncIterator[Callable[..., Awaitable[House]]]:
    """Starts servers, with fields of the context replaced, and stops them at the end."""
    houses: list[House] = []

    async def start(**changes: Any) -> House:
        replaced = msgspec.structs.replace(context, **changes)
        bounds = ConnectionBounds(header_s=0.3, linger_s=0.5, shutdown_s=0.05)
        house = House(gateway, replaced, await serve(make_app(replaced), "127.0.0.1", 0, bounds=bounds))
        houses.append(house)
        return house

    yield start
    for house in houses:
        await house.session.close()
        await house.server.close()
    await gateway.close()


@pytest.fixture
async def house(open_house: Callable[..., Awaitable[House]]) -> House:
    return await open_house()
