"""The drivers' contract, written once and run against both: a thread of this process and a process of its own."""

import os
import queue
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from engine_loop import on_loop

from gptoss.engine.inprocess import InProcessDriver
from gptoss.engine.port import (
    Cancel,
    Drain,
    Drained,
    EngineDriver,
    EngineEvent,
    EngineExited,
    EngineStatus,
    Finished,
    Load,
    Loaded,
    LoadFailed,
    LoadProgressed,
    Shutdown,
    Snapshot,
    StepDone,
    Submit,
)
from gptoss.engine.process import ProcessDriver
from gptoss.engine.wire import FrameReader, write_frames
from gptoss.messages.sampling import SamplingParams

WAIT_S = 50.0
DRIVERS: dict[str, Callable[[], EngineDriver]] = {"thread": InProcessDriver, "process": ProcessDriver}


class Engine:
    """A driver and the events that it delivers."""

    def __init__(self, driver: EngineDriver, folder: str) -> None:
        self.driver = driver
        self.events: queue.Queue[EngineEvent] = queue.Queue()
        self.is_over = False
        load = Load(folder=folder, model_name="tiny", num_threads=1, kv_budget_bytes=1 << 24)
        on_loop(driver.start, load, self.events.put)

    def until(self, kind: type[EngineEvent]) -> list[EngineEvent]:
        """Events up to the first of ``kind``."""
        seen: list[EngineEvent] = []
        while not seen or not isinstance(seen[-1], kind):
            seen.append(self.events.get(timeout=WAIT_S))
            self.is_over = isinstance(seen[-1], EngineExited)
            assert kind is EngineExited or not self.is_over, seen[-1]
        return seen

    def exit(self) -> EngineExited:
        """The last event, after which there is nothing."""
        last = self.until(EngineExited)[-1]
        assert isinstance(last, EngineExited)
        assert self.events.empty()
        return last


def request(request_id: str, max_tokens: int) -> Submit:
    sampling = SamplingParams(max_tokens=max_tokens, temperature=1.0, seed=1, ignore_eos=True)
    return Submit(request_id=request_id, attempt=1, prompt_token_ids=tuple(range(65, 90)), sampling=sampling)


@pytest.fixture(params=list(DRIVERS))
def engine(request: pytest.FixtureRequest, tiny_folder: Callable[[str], str]) -> Iterator[Engine]:
    running = Engine(DRIVERS[request.param](), tiny_folder("llama"))
    yield running
    running.driver.kill()
    if not running.is_over:
        running.until(EngineExited)


@pytest.mark.slow
def test_an_engine_serves_from_load_to_shutdown(engine: Engine) -> None:
    loading = engine.until(Loaded)
    assert isinstance(loading[0], LoadProgressed)
    assert {event.stage for event in loading if isinstance(event, LoadProgressed)} >= {"import", "weights", "checking"}
    loaded = loading[-1]
    assert isinstance(loaded, Loaded)
    assert loaded.capabilities.model_name == "tiny"
    assert loaded.capabilities.eos_token_ids == (256,)
    assert all(len(value) == 64 for value in (loaded.fingerprint.weights, loaded.fingerprint.tokenizer))
    assert psutil.pid_exists(loaded.pid)

    engine.driver.send(request("a", 5))
    *steps, end = engine.until(Finished)
    assert isinstance(end, Finished)
    assert (end.request_id, end.reason, end.completion_tokens) == ("a", "length", 5)
    tokens = [token for step in steps if isinstance(step, StepDone) for row in step.rows for token in row.token_ids]
    assert len(tokens) == 5

    engine.driver.send(request("b", 500))
    engine.driver.send(Snapshot(nonce=7))
    status = engine.until(EngineStatus)[-1]
    assert isinstance(status, EngineStatus)
    assert (status.nonce, status.running + status.waiting) == (7, 1)
    engine.driver.send(Cancel(request_id="b"))
    engine.driver.send(Drain())
    cancelled, drained = engine.until(Drained)[-2:]
    assert isinstance(cancelled, Finished)
    assert cancelled.reason == "cancelled"
    assert drained == Drained()

    engine.driver.send(Shutdown())
    assert engine.exit() == EngineExited(exit_code=0, reason="shut down")
    engine.driver.send(request("late", 1))
    engine.driver.kill()
    assert engine.events.empty()


@pytest.mark.slow
def test_a_killed_engine_says_so_once(engine: Engine) -> None:
    engine.until(Loaded)
    engine.driver.send(request("a", 500))
    engine.until(StepDone)
    engine.driver.kill()
    engine.driver.kill()
    assert engine.exit().exit_code == -signal.SIGKILL


@pytest.mark.parametrize("name", list(DRIVERS))
@pytest.mark.slow
def test_a_folder_that_is_no_model_fails_to_load_with_one_line(name: str, tmp_path: Path) -> None:
    engine = Engine(DRIVERS[name](), str(tmp_path))
    failed = engine.until(LoadFailed)[-1]
    assert isinstance(failed, LoadFailed)
    assert failed.code == "model_load_failed"
    assert "config.json" in failed.message
    assert "\n" not in failed.message
    assert engine.exit() == EngineExited(exit_code=1, reason="the model could not be loaded")


@pytest.mark.parametrize("name", list(DRIVERS))
def test_kill_before_the_engine_is_up_ends_it(name: str, tiny_folder: Callable[[str], str]) -> None:
    engine = Engine(DRIVERS[name](), tiny_folder("llama"))
    engine.driver.kill()
    assert engine.exit().exit_code == -signal.SIGKILL


@pytest.mark.slow
def test_signals_to_the_group_leave_the_engine_process_alone(tiny_folder: Callable[[str], str]) -> None:
    engine = Engine(ProcessDriver(), tiny_folder("llama"))
    loaded = engine.until(Loaded)[-1]
    assert isinstance(loaded, Loaded)
    assert loaded.pid != os.getpid()
    os.kill(loaded.pid, signal.SIGINT)
    os.kill(loaded.pid, signal.SIGTERM)
    engine.driver.send(Snapshot(nonce=1))
    engine.until(EngineStatus)
    os.kill(loaded.pid, signal.SIGSEGV)
    assert engine.exit() == EngineExited(exit_code=-signal.SIGSEGV, reason="killed by SIGSEGV")


@pytest.mark.slow
def test_a_sink_that_raises_ends_the_engine(tiny_folder: Callable[[str], str]) -> None:
    driver = ProcessDriver()
    seen: list[EngineEvent] = []
    over = threading.Event()

    def sink(event: EngineEvent) -> None:
        seen.append(event)
        if isinstance(event, EngineExited):
            over.set()
        if not isinstance(event, EngineExited):
            raise ValueError(event)

    on_loop(driver.start, Load(folder=tiny_folder("llama"), model_name="tiny"), sink)
    assert over.wait(WAIT_S)
    assert len(seen) == 2
    assert seen[1] == EngineExited(exit_code=-signal.SIGKILL, reason="the event sink raised ValueError")


def spawn_worker() -> tuple["subprocess.Popen[bytes]", socket.socket]:
    ours, theirs = socket.socketpair()
    with theirs:
        command = [sys.executable, "-m", "gptoss.engine.worker", "--fd", str(theirs.fileno())]
        worker = subprocess.Popen(command, pass_fds=(theirs.fileno(),), stderr=subprocess.DEVNULL)
    return worker, ours


def test_a_worker_exits_when_its_driver_goes(tiny_folder: Callable[[str], str]) -> None:
    worker, channel = spawn_worker()
    with channel:
        write_frames(channel, Load(folder=tiny_folder("llama"), model_name="tiny"))
        reader = FrameReader(channel)
        assert isinstance(reader.event(), LoadProgressed)
        reader.close()
    assert worker.wait(WAIT_S) == 0


def test_a_worker_refuses_what_is_not_of_the_protocol() -> None:
    worker, channel = spawn_worker()
    with channel:
        write_frames(channel, Snapshot(nonce=1))
        assert worker.wait(WAIT_S) == 76
