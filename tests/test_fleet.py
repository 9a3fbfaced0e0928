"""Several executors under one roof: restarts that refuse nobody, losses that heal, settings that change meanwhile."""

import asyncio
import re
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from aiohttp.test_utils import TestClient, TestServer

import gptoss
from gptoss.actors.directory import DECIDER_NAMES
from gptoss.actors.generation import GenerateRequest, Generation
from gptoss.app import ServingSystem
from gptoss.config import Settings, load_settings
from gptoss.engine import port
from gptoss.engine.model_source import PreparedModel
from gptoss.engine.port import ChatMessage
from gptoss.errors import ConfigError, GptossError
from gptoss.messages import events as ev
from gptoss.messages.codec import encode_record
from gptoss.messages.envelope import Event
from gptoss.messages.sampling import SamplingParams
from gptoss.replay.verify import verify
from gptoss.server import reload_settings
from gptoss.telemetry.bundle_redact import Redacted
from gptoss.telemetry.projection import Projection
from gptoss.telemetry.recording import LiveRecording
from gptoss.testing import FAKE_MODEL, FakeDriver, FakeOptions, FakeRenderer, fake_token, run_until_idle

MODEL = PreparedModel(folder="", model_name=FAKE_MODEL, source="test", max_model_len=4096)
STEP_S = 0.004


def request(content: str = "hello there", *, seed: int = 3, max_tokens: int = 5, **fields: Any) -> GenerateRequest:
    sampling = SamplingParams(max_tokens=max_tokens, seed=seed)
    return GenerateRequest(messages=(ChatMessage(role="user", content=content),), sampling=sampling, **fields)


@asynccontextmanager
async def serving(
    make: Callable[[], FakeDriver] | None = None, **settings: Any
) -> AsyncGenerator[tuple[ServingSystem, list[FakeDriver]]]:
    made: list[FakeDriver] = []

    def driver(_: str) -> FakeDriver:
        made.append(make() if make else FakeDriver(FakeOptions(step_s=STEP_S)))
        return made[-1]

    values: dict[str, Any] = {"journal": "memory", "devices": "cpu:2", **settings}
    system = ServingSystem(Settings(**values), drivers=driver, renderer=FakeRenderer(), model=MODEL)
    async with system:
        await system.ready(10.0)
        await until(system, lambda: all(each["state"] == "ready" for each in health(system)))
        yield system, made


async def until(system: ServingSystem, condition: Callable[[], object]) -> None:
    async with asyncio.timeout(15.0):
        while True:
            await system.caught_up()
            if condition():
                return
            await asyncio.sleep(0.01)


def health(system: ServingSystem) -> list[dict[str, Any]]:
    return system.projection.health(system.system.now_ns())["executors"]


def events(system: ServingSystem, *kinds: type[Event]) -> list[Any]:
    return [record.event for record in system.journal.read() if isinstance(record.event, kinds)]


async def tokens(generation: Generation) -> list[int]:
    return [token async for delta in generation for token in delta.token_ids]


def expected(seed: int, count: int) -> list[int]:
    return [fake_token(seed, position) for position in range(count)]


async def same(system: ServingSystem) -> None:
    await run_until_idle(system.system)
    assert verify(LiveRecording(system.journal)).same


# ---------------------------------------------------------------- routing


async def test_requests_spread_and_stats_say_where_and_why() -> None:
    async with serving() as (system, _):
        generations = [system.submit(request(seed=n, max_tokens=20)) for n in range(8)]
        await asyncio.gather(*map(tokens, generations))
        await system.caught_up()
        routing = system.projection.stats()["gpu_routing"]
        assert routing["enabled"]
        assert routing["decisions"] == 8
        assert {name: each["count"] for name, each in routing["by_executor"].items()} == {"cpu:0": 4, "cpu:1": 4}
        assert routing["by_kind"]["single_gpu"] == {"count": 8, "share": 1.0}
        await same(system)


async def test_a_prompt_goes_back_to_the_executor_that_has_its_beginning() -> None:
    long = " ".join(f"word{n}" for n in range(200))
    async with serving() as (system, _):
        busy = system.submit(request(max_tokens=400))  # takes cpu:0, so that the first of the pair takes cpu:1
        await until(system, lambda: events(system, ev.ExecutorAccepted))
        for tail in ("one", "two"):
            assert await tokens(system.submit(request(f"{long} {tail}"))) == expected(3, 5)
        busy.cancel()
        chosen = [each for each in events(system, ev.RouteDecided) if each.prefix_hmacs]
        assert [(each.executor, each.reason) for each in chosen] == [("cpu:1", "least_loaded"), ("cpu:1", "prefix")]
        assert len(chosen[0].prefix_hmacs) == 2  # of 64 and of 128 tokens
        assert chosen[0].prefix_hmacs == chosen[1].prefix_hmacs
        await same(system)


async def test_tenants_do_not_share_beginnings() -> None:
    long = " ".join(f"word{n}" for n in range(100))
    async with serving() as (system, _):
        asked: list[dict[str, Any]] = [{}, {"cache_salt": "a"}, {"cache_salt": "b"}, {"user": "a"}, {"user": "b"}]
        for whose in (*asked, asked[-1]):
            await tokens(system.submit(request(long, **whose)))
        hashes = [each.prefix_hmacs for each in events(system, ev.RouteDecided)]
        assert hashes[-1] == hashes[-2]
        different = [one for each in hashes[:-1] for one in each]
        assert len(different) == len(set(different)) == 5


async def test_a_long_prompt_goes_to_the_executor_over_several_devices() -> None:
    long = " ".join(f"word{n}" for n in range(60))
    async with serving(devices="cuda:0,cuda:1+cuda:2", multi_prompt_len=50) as (system, _):
        await tokens(system.submit(request("short")))
        await tokens(system.submit(request(long)))
        chosen = [(each.executor, each.reason) for each in events(system, ev.RouteDecided)]
        assert chosen == [("cuda:0", "least_loaded"), ("cuda:1+cuda:2", "large_prompt")]
        await system.caught_up()
        assert system.projection.stats()["gpu_routing"]["by_kind"]["multi_gpu"] == {"count": 1, "share": 0.5}
        await same(system)


# ---------------------------------------------------------------- losses


async def test_a_dead_engine_is_replaced_while_the_other_goes_on_and_streams_are_the_same(
    capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    async with serving() as (system, made):
        generations = [system.submit(request(seed=n, max_tokens=60)) for n in range(6)]
        await until(system, lambda: len(events(system, ev.StepCommitted)) > 10)
        made[0].kill()
        answers = await asyncio.gather(*map(tokens, generations))
        assert answers == [expected(n, 60) for n in range(6)]
        assert len(events(system, ev.AttemptRetried)) == 3
        await until(system, lambda: [each["state"] for each in health(system)] == ["ready", "ready"])
        assert [each["engine_exits"] for each in health(system)] == [1, 0]
        await same(system)
    lines = [record for record in caplog.records if record.name == "gptoss.actors.kernel"]
    assert [line.getMessage() for line in lines] == [
        "actor executor/cpu:0 ends with its engine: the engine of cpu:0 ended with -9: killed"
    ]
    assert "Traceback" not in capfd.readouterr().err


async def test_an_engine_that_fails_everything_is_replaced_and_the_other_serves() -> None:
    async with serving() as (system, made):
        executor = system.directory.get("executor/cpu:0")
        assert executor is not None
        for number in range(5):
            executor.tell(port.Failed(request_id=f"x{number}", attempt=1, code="engine_error", message="NaN"))
        await until(system, lambda: events(system, ev.EngineSickened))
        await until(system, lambda: len(made) == 3 and all(each["state"] == "ready" for each in health(system)))
        assert await tokens(system.submit(request())) == expected(3, 5)
        await system.caught_up()
        assert system.projection.stats()["faults"]["engines_sick"] == 1


async def test_a_silent_engine_is_avoided_before_it_is_given_up() -> None:
    class Silent(FakeDriver):
        def send(self, command: port.EngineCommand) -> None:
            if not isinstance(command, port.Submit):
                super().send(command)

    drivers = iter([Silent(FakeOptions())])
    make = lambda: next(drivers, None) or FakeDriver(FakeOptions(step_s=STEP_S))  # noqa: E731
    async with serving(make, step_timeout_s=4.0) as (system, _):
        stuck = system.submit(request())
        await until(system, lambda: any(each["suspect"] for each in health(system)))
        assert await tokens(system.submit(request(seed=1))) == expected(1, 5)
        assert await tokens(stuck) == expected(3, 5)
        stalled = events(system, ev.EngineStalled)
        assert [each.executor for each in stalled] == ["cpu:0"]
        await same(system)


# ---------------------------------------------------------------- restarts


@pytest.mark.parametrize("devices", ["cpu", "cpu:2"])
async def test_a_restart_refuses_nobody(devices: str) -> None:
    async with serving(devices=devices) as (system, made):
        before = [system.submit(request(seed=n, max_tokens=100)) for n in range(4)]
        await until(system, lambda: events(system, ev.ExecutorAccepted))
        assert system.restart_executor("cpu:0", origin="test")
        await until(system, lambda: health(system)[0]["state"] == "draining")
        meanwhile = [system.submit(request(seed=n)) for n in range(10, 20)]
        answers = await asyncio.gather(*map(tokens, before + meanwhile))
        assert answers == [*(expected(n, 100) for n in range(4)), *(expected(n, 5) for n in range(10, 20))]
        await until(system, lambda: health(system)[0]["restarts"] == 1 and health(system)[0]["state"] == "ready")
        assert events(system, ev.AttemptRetried, ev.RequestRejected, ev.RequestFailed, ev.ActorFailed) == []
        assert [each.planned for each in events(system, ev.EngineExited)] == [True]
        assert len(made) == len(health(system)) + 1
        assert system.projection.stats()["faults"] == {"engine_restarts": 1}
        await same(system)


async def test_who_outlives_the_drain_goes_on_elsewhere_with_the_same_tokens() -> None:
    async with serving(drain_timeout_s=0.1) as (system, _):
        generation = system.submit(request(max_tokens=600))
        await until(system, lambda: events(system, ev.ExecutorAccepted))
        system.restart_executor("cpu:0")
        assert await tokens(generation) == expected(3, 600)
        assert [each.attempt for each in events(system, ev.ExecutorAccepted)] == [1, 2]
        assert [each.planned for each in events(system, ev.EngineExited)] == [True]
        await same(system)


async def test_restarting_is_idempotent_and_needs_a_name_that_there_is() -> None:
    async with serving(devices="cpu") as (system, made):
        assert not system.restart_executor("cpu:7")
        assert system.restart_executor("cpu:0")
        assert system.restart_executor("cpu:0")
        await until(system, lambda: len(made) == 2 and health(system)[0]["state"] == "ready")
        assert len(events(system, ev.RestartRequested)) == 1


async def test_a_new_engine_that_cannot_load_is_an_ordinary_loss() -> None:
    class Broken(FakeDriver):
        def start(self, load: port.Load, sink: Callable[[port.EngineEvent], None]) -> None:
            del load
            sink(port.LoadFailed(code="model_load_failed", message="the device has a fault"))
            sink(port.EngineExited(exit_code=1, reason="the model could not be loaded"))

    drivers = iter([FakeDriver(FakeOptions(step_s=STEP_S)), FakeDriver(FakeOptions(step_s=STEP_S)), Broken()])
    make = lambda: next(drivers, None) or FakeDriver(FakeOptions(step_s=STEP_S))  # noqa: E731
    async with serving(make) as (system, made):
        system.restart_executor("cpu:1")
        await until(system, lambda: len(made) == 4 and [each["state"] for each in health(system)] == ["ready"] * 2)
        assert [each.planned for each in events(system, ev.EngineExited)] == [True, False]
        assert await tokens(system.submit(request())) == expected(3, 5)


# ---------------------------------------------------------------- the end


class Ending(FakeDriver):
    """Knows how it ended."""

    def __init__(self) -> None:
        super().__init__(FakeOptions(step_s=STEP_S))
        self.ends: list[port.EngineExited] = []
        self.kills = 0

    def start(self, load: port.Load, sink: Callable[[port.EngineEvent], None]) -> None:
        def hear(event: port.EngineEvent) -> None:
            if isinstance(event, port.EngineExited):
                self.ends.append(event)
            sink(event)

        super().start(load, hear)

    def kill(self) -> None:
        self.kills += not self.ends
        super().kill()


async def test_a_system_that_stops_lets_its_engines_end_in_peace() -> None:
    made: list[Ending] = []

    def make() -> Ending:
        made.append(Ending())
        return made[-1]

    async with serving(make) as (system, _):
        assert await tokens(system.submit(request())) == expected(3, 5)
    assert [[end.reason for end in driver.ends] for driver in made] == [["shut down"]] * 2
    assert [driver.kills for driver in made] == [0, 0]
    assert events(system, ev.EngineExited) == []


async def test_an_engine_that_does_not_end_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    class Deaf(Ending):
        def send(self, command: port.EngineCommand) -> None:
            if not isinstance(command, port.Shutdown):
                super().send(command)

    monkeypatch.setattr("gptoss.actors.executor.STOP_TIMEOUT_S", 0.05)
    made: list[Deaf] = []

    def make() -> Deaf:
        made.append(Deaf())
        return made[-1]

    async with serving(make, devices="cpu") as (system, _):
        assert await tokens(system.submit(request())) == expected(3, 5)
    assert [end.reason for end in made[0].ends] == ["killed"]


# ---------------------------------------------------------------- settings


async def test_changed_settings_are_events_that_deciders_take_and_replay_follows() -> None:
    slow = lambda: FakeDriver(FakeOptions(step_s=0.02, max_batch_size=1))  # noqa: E731
    async with serving(slow, devices="cpu", max_queue=1) as (system, _):
        running = system.submit(request(max_tokens=200))
        await until(system, lambda: events(system, ev.ExecutorAccepted))
        queued = [system.submit(request()) for _ in range(2)]
        with pytest.raises(GptossError, match="waiting already"):
            await tokens(queued[1])
        changes = {"max_queue": 3, "request_timeout_s": 5.0}
        assert set(system.change_settings(changes, origin="test")) == {"max_queue", "request_timeout_s"}
        assert system.change_settings(changes) == ()
        more = [system.submit(request()) for _ in range(3)]
        with pytest.raises(GptossError, match="3 requests are waiting already"):
            await tokens(more[2])
        running.cancel()
        assert await asyncio.gather(*map(tokens, (queued[0], *more[:2]))) == [expected(3, 5)] * 3
        for stream in ("system", *DECIDER_NAMES):
            found = [r.event for r in system.journal.read(stream=stream) if isinstance(r.event, ev.ConfigChanged)]
            assert [(each.origin, set(each.changed)) for each in found] == [("test", set(changes))]
        received = events(system, ev.RequestReceived)
        assert [each.queue_timeout_s for each in received] == [0.0] * 3 + [60.0] * 3
        await same(system)


async def test_a_decider_that_crashes_comes_back_with_the_settings_it_had() -> None:
    class Poison:
        pass

    async with serving(FakeDriver, devices="cpu", max_queue=1) as (system, _):
        system.change_settings({"max_queue": 7})
        for name in DECIDER_NAMES:
            system.directory.tell(name, Poison())
        await until(system, lambda: len(events(system, ev.ActorRestarted)) == 3)
        assert await tokens(system.submit(request())) == expected(3, 5)
        policies = {each.policy for each in events(system, ev.AdmissionDecided)}
        fresh = gptoss.ServingSystem(Settings(max_queue=7)).deciders.admission.policy.fingerprint
        assert policies == {fresh}
        await same(system)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"port": 80}, "port needs a restart"),
        ({"max_queue": 5, "devices": "cpu"}, "devices needs a restart"),
        ({"nonsense": 1}, "unknown setting 'nonsense'"),
        ({"max_queue": 0}, "max_queue is 0"),
        ({"queue_timeout_s": "soon"}, "queue_timeout_s is 'soon'"),
    ],
)
async def test_what_cannot_change_is_refused_by_name_and_nothing_changes(changes: dict[str, Any], named: str) -> None:
    async with serving(devices="cpu") as (system, _):
        before = system.settings
        with pytest.raises(ConfigError, match=named):
            system.change_settings(changes)
        assert system.settings == before
        assert events(system, ev.ConfigChanged) == []


async def test_settings_read_anew_change_what_can_and_name_the_rest() -> None:
    async with serving(devices="cpu", step_timeout_s=9.0) as (system, _):
        wanted = Settings(journal="memory", devices="cpu", port=81, max_queue=9, step_timeout_s=7.0)
        assert system.reload_settings(wanted, origin="SIGHUP") == (("max_queue", "step_timeout_s"), ("port",))
        (changed,) = [r.event for r in system.journal.read(stream="system") if isinstance(r.event, ev.ConfigChanged)]
        assert (changed.refused, changed.settings["max_queue"]) == (("port",), 9)
        assert (system.settings.max_queue, system.settings.port) == (9, 8000)


# ---------------------------------------------------------------- over HTTP


async def test_who_has_had_an_answer_finds_it_in_every_view() -> None:
    body = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 2}
    async with serving(devices="cpu") as (system, _), TestClient(TestServer(gptoss.make_app(system))) as client:
        for number in range(1, 6):
            answer = await client.post("/v1/chat/completions", json=body, headers={"X-Request-ID": f"r{number}"})
            assert answer.status == 200
            listed = await (await client.get("/admin/requests?limit=1")).json()
            assert [(row["request_id"], row["state"]) for row in listed["data"]] == [(f"r{number}", "completed")]
            assert (await (await client.get("/stats")).json())["requests"]["completed"] == number
            live = await (await client.get("/admin/live")).json()
            assert live["stats"]["requests"]["completed"] == number


async def test_operators_restart_and_tune_over_http() -> None:
    async with serving() as (system, _), TestClient(TestServer(gptoss.make_app(system))) as client:
        answer = await client.post("/admin/executors/cpu:1/restart")
        assert (answer.status, (await answer.json())["status"]) == (200, "restarting")
        answer = await client.post("/admin/executors/cpu:9/restart")
        assert (answer.status, (await answer.json())["error"]["code"]) == (404, "executor_not_found")
        answer = await client.post("/admin/settings", json={"max_queue": 11})
        assert (await answer.json())["changed"] == ["max_queue"]
        shown = await (await client.get("/admin/settings")).json()
        assert shown["settings"]["max_queue"] == 11
        for body, param in (({"max_queue": -1}, "max_queue"), ({"port": 1}, "port"), ({"x": [1]}, "x")):
            answer = await client.post("/admin/settings", json=body)
            error = (await answer.json())["error"]
            assert (answer.status, error["param"]) == (400, param)
        await until(system, lambda: health(system)[1]["restarts"] == 1)


# ---------------------------------------------------------------- what a reader sees


async def test_routes_by_conversation_replay_under_pseudonyms() -> None:
    async with serving() as (system, _):
        for number in range(12):
            session = f"secret-conversation-{number % 3}"
            await tokens(system.submit(request(seed=number, session_id=session, request_id=f"r{number}")))
        await run_until_idle(system.system)
        assert "session" in {each.reason for each in events(system, ev.RouteDecided)}
        for keep in (frozenset[str](), frozenset({"r1", "r4"})):
            redacted = Redacted(LiveRecording(system.journal), content="none", keep=keep, key=b"key")
            assert verify(redacted).same
            recorded = b"".join(map(encode_record, redacted.records()))
            named = set(re.findall(rb"secret-conversation-\d", recorded))
            assert named == ({b"secret-conversation-1"} if keep else set())  # that of both


async def test_sighup_reads_the_file_again_and_a_broken_one_changes_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "gptoss.toml"
    file.write_text('max_queue = 5\njournal = "memory"\ndevices = "cpu:2"\n')
    async with serving(max_queue=5) as (system, _):
        layered = load_settings({}, environ={}, file=file)
        file.write_text('max_queue = 6\nport = 9000\njournal = "memory"\ndevices = "cpu:2"\n')
        reload_settings(system, layered)
        assert (system.settings.max_queue, system.settings.port) == (6, 8000)
        (changed,) = [r.event for r in system.journal.read(stream="system") if isinstance(r.event, ev.ConfigChanged)]
        assert (changed.changed, changed.refused, changed.origin) == (("max_queue",), ("port",), "SIGHUP")
        file.write_text("max_queue = 7\nnonsense = 1\n")
        reload_settings(system, layered)
        assert system.settings.max_queue == 6
        assert "unknown setting 'nonsense'" in caplog.text


async def test_a_server_that_lost_an_engine_is_degraded_until_it_is_back() -> None:
    async with serving() as (system, made):
        assert system.projection.health(system.system.now_ns())["status"] == "healthy"
        made[0].kill()
        await until(system, lambda: health(system)[0]["engine_exits"] == 1)
        assert system.projection.health(system.system.now_ns())["status"] == "degraded"
        await until(system, lambda: health(system)[0]["state"] == "ready")
        assert system.projection.health(system.system.now_ns())["status"] == "healthy"
        rebuilt = Projection()
        for record in system.journal.read():
            rebuilt.fold(record)
        assert rebuilt.health(0)["executors"] == health(system)
