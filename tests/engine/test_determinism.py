"""The same request with the same seed gives the same tokens: alone, in company, after a preemption, a crash or a restart.

What is compared is the whole stream: token ids, text, and the log-probabilities to the last bit, so that a difference in
rounding shows even where it does not change a token.
"""

import functools
import queue
import signal
from collections.abc import Callable, Sequence

import msgspec
import pytest
from core_run import Run, submit
from engine_loop import on_loop
from streams import SETTINGS, TOKENS, Stream, has_each, joined, rest_of, strangers, streams, targets

from gptoss.engine.core import CoreOptions
from gptoss.engine.load import LoadedModel
from gptoss.engine.model_folder import no_progress
from gptoss.engine.native.build import NativeUnavailableError, find_compiler
from gptoss.engine.port import (
    Cancel,
    EngineEvent,
    EngineExited,
    Finished,
    Load,
    Loaded,
    LoadFailed,
    StepDone,
    Submit,
)
from gptoss.engine.process import ProcessDriver

Models = Callable[..., LoadedModel]
Folders = Callable[[str], str]

WAIT_S = 100.0
STRANGERS = 16
ARCHITECTURES = ["llama", "qwen3", "mistral", "gpt_oss"]
WAYS: dict[str, tuple[str, dict[str, str]]] = {
    **{kind: (kind, {"dtype": "float32"}) for kind in ARCHITECTURES},
    "gpt_oss in bfloat16": ("gpt_oss", {"dtype": "bfloat16"}),
    **{f"{kind} in pages": (kind, {"dtype": "float32", "kv_layout": "paged"}) for kind in ARCHITECTURES},
    "gpt_oss in pages and bfloat16": ("gpt_oss", {"dtype": "bfloat16", "kv_layout": "paged"}),
    "torch's kernels in bfloat16": ("llama32", {"dtype": "bfloat16", "kernels": "torch"}),
    "own kernels": ("llama32", {"dtype": "bfloat16", "kernels": "native"}),
    "own kernels with int8": ("llama32", {"quantization": "int8", "dtype": "bfloat16"}),
    "own kernels with int4": ("llama32", {"quantization": "int4", "dtype": "bfloat16"}),
    "generic runner": ("gemma2", {"dtype": "float32"}),
}
"""Of running a model: its kind and how it is loaded."""
CACHING = CoreOptions(prefix_cache_bytes=1 << 28, provenance="tests")

Alone = Callable[[str], dict[str, Stream]]


@pytest.fixture(scope="module")
def load(tiny_model: Models) -> Callable[..., LoadedModel]:
    """Loads a tiny model in one of the ways."""

    def load(way: str, max_batch_size: int = 2 * STRANGERS) -> LoadedModel:
        kind, options = WAYS[way]
        if way.startswith("own"):
            try:
                find_compiler()
            except NativeUnavailableError as error:
                pytest.skip(str(error))
        return tiny_model(kind, max_batch_size=max_batch_size, **options)

    return load


@pytest.fixture(scope="module")
def alone(load: Callable[..., LoadedModel]) -> Alone:
    """The streams of the targets, each in a core of its own."""

    @functools.cache
    def run(way: str) -> dict[str, Stream]:
        found: dict[str, Stream] = {}
        for request in targets():
            running = Run(load(way))
            running.handle(request)
            found |= streams(running.finish().events)
        assert all(len(stream.token_ids) == TOKENS == len(stream.logprobs) for stream in found.values())
        assert len({stream.token_ids for stream in found.values()}) == len(SETTINGS)
        return found

    return run


@pytest.mark.parametrize("is_last", [False, True], ids=["first", "last"])
@pytest.mark.parametrize("way", WAYS)
def test_a_stream_is_the_same_alone_and_among_strangers_who_come_and_go(
    way: str, is_last: bool, load: Callable[..., LoadedModel], alone: Alone
) -> None:
    running = Run(load(way), options=CACHING)
    others = strangers(STRANGERS)
    before, after = (others, []) if is_last else (others[:2], others[2:])
    running.handle(*before)
    running.step(3)
    running.handle(*(reversed(targets()) if is_last else targets()))
    running.step(2)
    running.handle(*after)
    running.step(4)
    running.handle(Cancel(request_id="s1"), Cancel(request_id="s9"))
    running.finish()
    assert max(step.running for step in running.steps()) > STRANGERS
    found = streams(running.events)
    for name, expected in alone(way).items():
        assert found[name] == expected, name


@pytest.mark.parametrize("way", WAYS)
def test_a_stream_is_the_same_when_it_is_asked_for_again_and_its_beginning_is_in_the_cache(
    way: str, load: Callable[..., LoadedModel], alone: Alone
) -> None:
    running = Run(load(way), options=CACHING)
    for attempt in (1, 2):
        running.events.clear()
        running.handle(*(msgspec.structs.replace(request, attempt=attempt) for request in targets()))
        running.finish()
        assert streams(running.events) == alone(way)
    cached = {event.request_id: event.cached_tokens for event in running.events if isinstance(event, Finished)}
    if way != "generic runner":  # which keeps nothing
        longest = max(targets(), key=lambda request: len(request.prompt_token_ids))
        assert cached[longest.request_id] >= 256


@pytest.mark.parametrize("way", WAYS)
def test_a_stream_is_the_same_after_preemptions(way: str, load: Callable[..., LoadedModel], alone: Alone) -> None:
    running = Run(load(way, max_batch_size=len(SETTINGS)), options=CACHING)
    running.handle(*targets(priority=1))
    preempted: set[str] = set()
    for round_number in range(3):  # first while most still prefill, then while they decode
        running.step(2 + 4 * round_number)
        urgent = strangers(len(SETTINGS))
        running.handle(*(msgspec.structs.replace(each, attempt=round_number + 1) for each in urgent))
        running.step(2)
        preempted |= {each.request_id for step in running.steps() for each in step.preemptions}
        running.handle(*(Cancel(request_id=each.request_id) for each in urgent))
    running.finish()
    assert preempted >= set(SETTINGS)
    found = streams(running.events)
    for name, expected in alone(way).items():
        assert found[name] == expected, name


@pytest.mark.parametrize("way", ["own kernels", "own kernels with int4"])
def test_a_stream_is_the_same_when_its_tokens_are_guessed(
    way: str, load: Callable[..., LoadedModel], alone: Alone
) -> None:
    found: dict[str, Stream] = {}
    guessed = 0
    for request in targets():
        running = Run(load(way), options=msgspec.structs.replace(CACHING, speculates=True))
        running.handle(request, *strangers(2))
        running.finish()
        found[request.request_id] = streams(running.events)[request.request_id]
        guessed += sum(row.num_draft for row in running.rows(request.request_id))
    assert guessed
    assert found == alone(way)


@pytest.mark.parametrize("cut", [1, 11, TOKENS - 1])
@pytest.mark.parametrize("way", WAYS)
def test_a_stream_goes_on_as_it_would_have_in_another_engine(
    way: str, cut: int, load: Callable[..., LoadedModel], alone: Alone
) -> None:
    lost = Run(load(way), options=CACHING)
    lost.handle(*targets())
    while not has_each(lost.events, SETTINGS, cut):
        lost.step()
    running = Run(load(way), options=CACHING)
    running.handle(*strangers(5))
    running.step(2)
    running.handle(*rest_of(targets(), lost.events))
    running.finish()
    for name, expected in alone(way).items():
        assert joined(lost.events, running.events, name) == expected, name


class Engine:
    """An engine process and what it said."""

    def __init__(self, load: Load) -> None:
        self.events: list[EngineEvent] = []
        self.driver = ProcessDriver()
        self._queue: queue.Queue[EngineEvent] = queue.Queue()
        on_loop(self.driver.start, load, self._queue.put)
        self.until(lambda event: isinstance(event, Loaded))

    def until(self, is_enough: Callable[[EngineEvent], bool]) -> None:
        while True:
            event = self._queue.get(timeout=WAIT_S)
            self.events.append(event)
            assert not isinstance(event, LoadFailed), event
            if is_enough(event):
                return
            assert not isinstance(event, EngineExited), event

    def run(self, requests: Sequence[Submit]) -> None:
        """Submit, and wait until all have ended."""
        for request in requests:
            self.driver.send(request)
        left = {request.request_id for request in requests}

        def is_over(event: EngineEvent) -> bool:
            if isinstance(event, Finished):
                left.discard(event.request_id)
            return not left

        if left:  # an engine that was killed late had ended them all
            self.until(is_over)

    def kill(self) -> None:
        self.driver.kill()
        self.until(lambda event: isinstance(event, EngineExited))


def killed_and_resumed(load: Load, requests: list[Submit], others: list[Submit], steps: int) -> dict[str, Stream]:
    """Run in one engine process until ``steps`` steps are done, kill it, and go on in another."""
    first = Engine(load)
    for request in (*others[::2], *requests, *others[1::2]):
        first.driver.send(request)
    for _ in range(steps):
        first.until(lambda event: isinstance(event, StepDone))
    first.kill()
    last = first.events[-1]
    assert isinstance(last, EngineExited)
    assert last.exit_code == -signal.SIGKILL
    second = Engine(load)
    second.run(rest_of(requests, first.events))
    second.kill()
    return {request.request_id: joined(first.events, second.events, request.request_id) for request in requests}


@pytest.mark.slow
@pytest.mark.timeout(180)
@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_a_stream_is_the_same_in_other_processes_one_of_which_is_killed(
    kind: str,
    tiny_folder: Folders,
    alone: Alone,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    expected = alone(kind)
    monkeypatch.setenv("PYTHONHASHSEED", str(1 + ARCHITECTURES.index(kind)))
    load = Load(
        folder=tiny_folder(kind),
        model_name=kind,
        dtype="float32",
        max_batch_size=2 * STRANGERS,
        kv_budget_bytes=1 << 30,
        num_threads=1,
    )
    assert killed_and_resumed(load, targets(), strangers(STRANGERS), steps=9) == expected


DEMO_TOKENS = 12
DEMO_TEXTS = (
    "Count from one to ten.",
    "What is the capital of France? Answer in one sentence, and say what the city is known for.",
    "The quick brown fox " * 60,
)


def questions(model: LoadedModel) -> list[Submit]:
    """Each of the texts with three of the settings."""
    found: list[Submit] = []
    for number, text in enumerate(DEMO_TEXTS):
        prompt = tuple(model.tokenizer.encode(f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n").ids)
        for name in ("greedy", "top_p", "penalties"):
            request = submit(f"{name} {number}", max_tokens=DEMO_TOKENS, seed=number, logprobs=1, **SETTINGS[name])
            found.append(msgspec.structs.replace(request, prompt_token_ids=prompt))
    return found


@pytest.fixture(scope="module")
def demo_load(demo_folder: str, request: pytest.FixtureRequest) -> Load:
    """The demo, on the kernels that the test is parametrised with."""
    return Load(
        folder=demo_folder,
        model_name="demo",
        max_batch_size=2 * STRANGERS,
        kv_budget_bytes=1 << 30,
        num_threads=1,
        kernels=request.param,
    )


@pytest.fixture(scope="module")
def demo(demo_load: Load) -> LoadedModel:
    from gptoss.engine.load import load_model

    return load_model(demo_load, no_progress)


@pytest.fixture(scope="module")
def demo_alone(demo: LoadedModel) -> dict[str, Stream]:
    """The streams of the questions, each in a core of its own."""
    found: dict[str, Stream] = {}
    for request in questions(demo):
        running = Run(demo)
        running.handle(request)
        found |= streams(running.finish().events)
    assert len({stream.token_ids for stream in found.values()}) > len(DEMO_TEXTS)
    return found


@pytest.mark.slow
@pytest.mark.timeout(180)
@pytest.mark.parametrize("demo_load", ["auto", "torch"], indirect=True)
def test_the_demo_model_says_the_same_among_strangers_and_after_preemptions(
    demo: LoadedModel, demo_alone: dict[str, Stream]
) -> None:
    running = Run(demo, options=CACHING)
    running.handle(*strangers(STRANGERS // 2, priority=1))
    running.step(2)
    running.handle(*(msgspec.structs.replace(request, priority=1) for request in questions(demo)))
    running.step(5)
    running.handle(*(strangers(2 * STRANGERS)[STRANGERS // 2 :]))
    running.finish()
    preempted = {each.request_id for step in running.steps() for each in step.preemptions}
    assert len(preempted & set(demo_alone)) > 1
    found = streams(running.events)
    for name, expected in demo_alone.items():
        assert found[name] == expected, name


@pytest.mark.slow
@pytest.mark.timeout(180)
@pytest.mark.parametrize("demo_load", ["auto"], indirect=True)
def test_the_demo_model_says_the_same_in_another_process_after_a_crash(
    demo: LoadedModel, demo_load: Load, demo_alone: dict[str, Stream], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONHASHSEED", "5")
    found = killed_and_resumed(demo_load, questions(demo), strangers(4), steps=6)
    for name, expected in demo_alone.items():
        assert found[name] == expected, name
