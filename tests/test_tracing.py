"""Traces of a whole server: from a client's ``traceparent`` over HTTP to a collector that decodes OTLP."""

import asyncio
import statistics
import time
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from collector import Collector, unused_url, wait_until

from gptoss.actors.generation import GenerateRequest
from gptoss.app import ServingSystem
from gptoss.config import Settings, load_settings
from gptoss.engine.model_source import PreparedModel
from gptoss.engine.port import ChatMessage
from gptoss.http.server import serve
from gptoss.messages import events as ev
from gptoss.messages.sampling import SamplingParams
from gptoss.replay.verify import verify
from gptoss.serving_context import make_app
from gptoss.telemetry.recording import JournalRecording
from gptoss.testing import FAKE_MODEL, FakeDriver, FakeOptions, FakeRenderer

MODEL = PreparedModel(folder="", model_name=FAKE_MODEL, source="test", max_model_len=4096)
TRACE_ID, PARENT_ID = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


@asynccontextmanager
async def serving(url: str, **settings: Any) -> AsyncGenerator[ServingSystem]:
    values: dict[str, Any] = {"journal": "memory", "trace_ratio": 1.0, **settings}
    system = ServingSystem(
        Settings(devices="cpu", otlp_endpoint=url, **values),
        drivers=lambda _: FakeDriver(FakeOptions(step_s=0.001)),
        renderer=FakeRenderer(),
        model=MODEL,
    )
    async with system:
        await system.ready(10)
        yield system


async def generate(system: ServingSystem, tokens: int = 4) -> None:
    request = GenerateRequest(
        messages=(ChatMessage(role="user", content="canary-secret"),),
        sampling=SamplingParams(max_tokens=tokens, stop=("canary-stop",), ignore_eos=True),
    )
    async for _ in system.submit(request):
        pass


async def post(port: int, body: dict[str, Any], headers: dict[str, str]) -> tuple[int, str]:
    async with (
        aiohttp.ClientSession() as session,
        session.post(f"http://127.0.0.1:{port}/v1/chat/completions", json=body, headers=headers) as answer,
    ):
        await answer.read()
        return answer.status, answer.headers.get("traceparent", "")


async def test_a_clients_trace_goes_through_the_server_to_the_collector() -> None:
    with Collector() as collector:
        async with serving(collector.url) as system:
            server = await serve(make_app(system), "127.0.0.1", 0)
            body = {
                "messages": [{"role": "user", "content": "canary-secret"}],
                "max_tokens": 4,
                "n": 2,
                "temperature": 0.5,
                "stop": ["canary-stop"],
            }
            headers = {"traceparent": f"00-{TRACE_ID}-{PARENT_ID}-01", "X-Session-ID": "session-1"}
            status, given_back = await post(server.port, body, headers)
            bad_status, _ = await post(server.port, {"messages": "no"}, headers)
            await server.close()
        spans = collector.spans
    assert (status, bad_status) == (200, 400)
    assert {span.trace_id.hex() for span in spans} == {TRACE_ID}
    roots = [span for span in spans if span.parent_span_id.hex() == PARENT_ID]
    assert {span.name for span in roots} == {"POST /v1/chat/completions"}
    ran = next(span for span in roots if span.span_id.hex() == given_back.split("-")[2])
    assert given_back == f"00-{TRACE_ID}-{ran.span_id.hex()}-01"
    chats = [span for span in spans if span.parent_span_id == ran.span_id]
    assert [span.name for span in chats] == [f"chat {FAKE_MODEL}"] * 2
    for chat in chats:
        below = [span.name for span in spans if span.parent_span_id == chat.span_id]
        assert below == ["render", "queue", "route", "prefill", "decode"]
        attributes = {one.key: one.value for one in chat.attributes}
        assert attributes["gen_ai.conversation.id"].string_value == "session-1"
        assert attributes["gen_ai.usage.output_tokens"].int_value == 4
        assert attributes["gen_ai.request.temperature"].double_value == 0.5
    assert len({span.span_id for span in spans}) == len(spans)
    assert b"canary" not in b"".join(request.SerializeToString() for request in collector.requests)


async def test_embedded_requests_have_traces_and_every_export_is_counted() -> None:
    with Collector() as collector:
        async with serving(collector.url) as system:
            await generate(system)
            journal = system.journal
        names = [span.name for span in collector.spans]
    assert names == ["embedded", f"chat {FAKE_MODEL}", "render", "queue", "route", "prefill", "decode"]
    reported = [record.event for record in journal.read() if isinstance(record.event, ev.SpansExported)]
    assert reported == [ev.SpansExported(exported=7, refused=0, overflowed=0)]


async def test_a_collector_that_is_down_is_seen_in_the_metrics_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "0.2")
    monkeypatch.setattr("gptoss.telemetry.observer.PERIOD_S", 0.1)
    async with serving(unused_url()) as system:
        await generate(system)
        async with asyncio.timeout(20):
            while b'gptoss_trace_spans_dropped_total{reason="refused"} 7.0' not in system.metrics.render()[0]:
                await asyncio.sleep(0.05)
        assert system.projection.stats()["traces"] == {"exported": 0, "dropped": 7}
        assert system.projection.readiness(system.system.now_ns(), system.journal.health).ready


async def test_a_bad_collector_takes_no_time_from_the_event_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    """Processor time of the loop's thread for the same requests, without a collector and with one that is down."""
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "0.2")

    async def spent_s(url: str) -> float:
        async with serving(url, trace_ratio=0.0, trace_errors=True) as system:
            await generate(system)
            began = time.thread_time()
            for _ in range(10):
                await generate(system, tokens=16)
            return time.thread_time() - began

    down = unused_url()
    without = statistics.median([await spent_s("") for _ in range(3)])
    with_bad = statistics.median([await spent_s(down) for _ in range(3)])
    assert with_bad < 2 * without


async def test_a_replay_exports_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Collector() as collector:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.url)
        assert load_settings().settings.otlp_endpoint == collector.url
        async with serving(collector.url, journal="segments", data_dir=str(tmp_path)) as system:
            await generate(system)
        assert wait_until(lambda: len(collector.spans) == 7)
        replayed = verify(JournalRecording(tmp_path / "journal"))
        assert (replayed.first, replayed.requests) == (None, 1)
        assert len(collector.spans) == 7
