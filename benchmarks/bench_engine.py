"""The engine alone, without HTTP: steps, prefill, memory, and where the time of one decode step goes.

    python benchmarks/bench_engine.py [--streams 1,8,64] [--contexts 128,2048] [--kernels torch] [--quantization int8]

All streams are greedy. Times are medians of the steps within a second or so; other work on the machine shows in them.
"""

import argparse
import asyncio
import contextlib
import itertools
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Generator, Sequence
from typing import Any
from unittest.mock import patch

import psutil
import torch
from engine_run import Streams, add_model_options, describe, load, load_options, request, table

from gptoss.engine import step as step_module
from gptoss.engine.attention import Chunk, PackedRows
from gptoss.engine.load import LoadedModel
from gptoss.engine.packed_experts import PackedExperts
from gptoss.engine.packed_linear import PackedLinear
from gptoss.engine.port import EngineEvent, EngineExited, Finished, Load, Loaded, LoadFailed, StepDone
from gptoss.engine.process import ProcessDriver
from gptoss.engine.runner import PackedRunner

PROMPT_TOKENS = 136
STEPS_MAX = 40
MB = 1e6
WAIT_S = 120.0
RUNNER_ROUNDS = 15


def _memory_mb() -> float:
    return psutil.Process().memory_info().rss / MB


def _answer_tokens(count: int) -> int:
    """So long that the first streams still answer when the last prompt, read between their steps, has been read."""
    return 2 * STEPS_MAX + 8 * count


def measure_streams(model: LoadedModel, counts: Sequence[int], budget_s: float) -> str:
    """Decode steps with more and more streams."""
    rows: list[list[str]] = []
    for count in counts:
        streams = Streams(model)
        streams.start(count, PROMPT_TOKENS, _answer_tokens(count))
        took = streams.decode_s(budget_s, STEPS_MAX)
        kv = streams.step().kv_bytes_in_use
        read = model.capabilities.weights_bytes / took / 1e9
        rows.append(
            [
                str(count),
                f"{1e3 * took:.1f}",
                f"{count / took:.0f}",
                f"{read:.1f}",
                f"{kv / MB:.0f}",
                f"{_memory_mb():.0f}",
            ]
        )
    return table(["streams", "step ms", "tokens/s", "weights read, GB/s", "KV reserved MB", "process MB"], rows)


def measure_contexts(model: LoadedModel, contexts: Sequence[int], budget_s: float) -> str:
    """One stream after prompts of more and more tokens."""
    rows: list[list[str]] = []
    for context in contexts:
        room = model.capabilities.max_model_len - context
        if room < STEPS_MAX // 2:
            context += room - STEPS_MAX // 2  # noqa: PLW2901 - the longest that leaves room for the steps
        streams = Streams(model)
        prefill_s = streams.start(1, context, STEPS_MAX + 4)
        took = streams.decode_s(budget_s, min(STEPS_MAX, max(room, STEPS_MAX // 2)) // 2)
        kv = streams.step().kv_bytes_in_use
        rows.append(
            [
                str(context),
                f"{1e3 * prefill_s:.0f}",
                f"{context / prefill_s:.0f}",
                f"{1e3 * took:.1f}",
                f"{kv / MB:.0f}",
                f"{_memory_mb():.0f}",
            ]
        )
    return table(["context", "prefill ms", "prefill tokens/s", "decode step ms", "KV reserved MB", "process MB"], rows)


# ---------------------------------------------------------------- where a step's time goes


class Stopwatch:
    """Seconds by part. ``around`` times a function; calls inside others of its kind count for the outer one."""

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self._is_busy = False

    def around(self, part: str, function: Callable[..., Any], *, nests: bool = False) -> Callable[..., Any]:
        def timed(*args: Any, **options: Any) -> Any:
            if self._is_busy and not nests:
                return function(*args, **options)
            self._is_busy = not nests
            began = time.perf_counter()
            try:
                return function(*args, **options)
            finally:
                self.seconds[part] += time.perf_counter() - began
                self._is_busy = False

        return timed


@contextlib.contextmanager
def _timed(model: LoadedModel, watch: Stopwatch) -> Generator[None]:
    """Time the parts of each step while the block runs."""
    with contextlib.ExitStack() as stack:
        runner = model.runner
        stack.enter_context(patch.object(runner, "forward", watch.around("model", runner.forward, nests=True)))
        stack.enter_context(
            patch.object(step_module, "draw_tokens", watch.around("sampling", step_module.draw_tokens, nests=True))
        )
        if isinstance(runner, PackedRunner):
            attend: Any = PackedRows.attend
            stack.enter_context(patch.object(PackedRows, "attend", watch.around("attention", attend)))
            parts = {PackedLinear: "linear layers", PackedExperts: "experts"}
            for name, module in runner._model.named_modules():
                part = "lm_head" if name == "lm_head" else parts.get(type(module))
                if part:
                    stack.enter_context(patch.object(module, "forward", watch.around(part, module.forward)))
        yield


def _runner_seconds(model: LoadedModel, count: int, context: int, num_logits: int) -> float:
    """Median seconds of the runner alone on ``count`` rows at position ``context``."""
    runner = model.runner
    slots = [runner.new_slot(context + 1) for _ in range(count)]
    if context:
        for slot in slots:
            runner.forward([Chunk(slot=slot, token_ids=[7] * context, start=0, num_logits=0)])
    chunks = [Chunk(slot=slot, token_ids=[9], start=context, num_logits=num_logits) for slot in slots]
    times: list[float] = []
    for _ in range(RUNNER_ROUNDS):
        began = time.perf_counter()
        runner.forward(chunks)
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def step_parts(model: LoadedModel, count: int) -> dict[str, float]:
    """Milliseconds of each part of a decode step of ``count`` streams, all of them together at the end."""
    streams = Streams(model)
    streams.start(count, PROMPT_TOKENS, _answer_tokens(count))
    watch = Stopwatch()
    steps = STEPS_MAX // 2
    with _timed(model, watch):
        began = time.perf_counter()
        for _ in range(steps):
            streams.step()
        total = time.perf_counter() - began
    parts = {name: 1e3 * seconds / steps for name, seconds in watch.seconds.items()}
    whole, sampling, everything = parts.pop("model"), parts.pop("sampling"), 1e3 * total / steps
    if isinstance(model.runner, PackedRunner):
        parts["norms, positions, activations, dispatch"] = whole - sum(parts.values())
    else:  # one call: told apart by leaving out the logits, and the context
        layers = 1e3 * _runner_seconds(model, count, 0, 0)
        attention = 1e3 * _runner_seconds(model, count, PROMPT_TOKENS, 0) - layers
        parts = {"layers": layers, f"attention to {PROMPT_TOKENS} tokens": attention}
        parts["lm_head and the rest of the call"] = whole - layers - attention
    parts["sampling"] = sampling
    parts["engine: plan, text, events"] = everything - whole - sampling
    return parts | {"step": everything}


def boundary_ms(options: Load, count: int) -> float:
    """Median milliseconds between two steps of an engine process: packing, the socket, taking commands."""
    steps = asyncio.run(process_steps(options, count))
    full = [step for step in steps if len(step.rows) == count and all(row.num_tokens == 1 for row in step.rows)]
    pairs = [(a, b) for a, b in itertools.pairwise(full) if b.step == a.step + 1]
    return 1e-6 * statistics.median(b.started_ns - a.started_ns - a.duration_ns for a, b in pairs)


async def process_steps(options: Load, count: int) -> list[StepDone]:
    """The steps of an engine process that answers ``count`` requests at once."""
    heard: asyncio.Queue[EngineEvent] = asyncio.Queue()
    driver = ProcessDriver()
    driver.start(options, heard.put_nowait)
    event: EngineEvent | None = None
    try:
        while not isinstance(event := await asyncio.wait_for(heard.get(), WAIT_S), Loaded):
            if isinstance(event, LoadFailed):
                raise RuntimeError(event.message)
        for number in range(count):
            driver.send(request(f"r{number}", PROMPT_TOKENS, _answer_tokens(count), event.capabilities.vocab_size))
        steps: list[StepDone] = []
        left = count
        while left:
            event = await asyncio.wait_for(heard.get(), WAIT_S)
            left -= isinstance(event, Finished)
            if isinstance(event, StepDone):
                steps.append(event)
        return steps
    finally:
        driver.kill()
        while not isinstance(event, EngineExited):
            event = await asyncio.wait_for(heard.get(), WAIT_S)


def measure_parts(model: LoadedModel, options: Load, counts: Sequence[int]) -> str:
    """Where the time of one decode step goes."""
    found = {count: step_parts(model, count) for count in counts}
    for count, parts in found.items():
        total = parts.pop("step")
        parts["process boundary"] = boundary_ms(options, count)
        parts["step and boundary"] = total + parts["process boundary"]
    names = list(next(iter(found.values())))
    rows = [
        [name, *(f"{parts[name]:.2f} ({parts[name] / parts['step and boundary']:.0%})" for parts in found.values())]
        for name in names
    ]
    return table(["part", *(f"{count} streams, ms" for count in counts)], rows)


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",") if part]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_options(parser)
    parser.add_argument("--streams", type=_numbers, default="1,2,4,8,16,32,64")
    parser.add_argument("--contexts", type=_numbers, default="128,512,2048,8192")
    parser.add_argument("--parts", type=_numbers, default="1,8,32", help="streams to take a step of apart")
    parser.add_argument("--budget-s", type=float, default=1.0, help="for each median")
    arguments = parser.parse_args()
    batch = max([*arguments.streams, *arguments.parts, 1])
    options = load_options(arguments, max_batch_size=batch)
    began = time.perf_counter()
    with torch.inference_mode():
        model = load(options)
        loaded_s = time.perf_counter() - began
        print(f"{describe(model)}; loaded in {loaded_s:.1f} s, process {_memory_mb():.0f} MB\n", flush=True)
        if arguments.streams:
            print(f"Decoding after {PROMPT_TOKENS} tokens:\n")
            print(measure_streams(model, arguments.streams, arguments.budget_s), flush=True)
        if arguments.contexts:
            print("\nOne stream by context:\n")
            print(measure_contexts(model, arguments.contexts, arguments.budget_s), flush=True)
        if arguments.parts:
            print("\nOne decode step:\n")
            print(measure_parts(model, options, arguments.parts), flush=True)


if __name__ == "__main__":
    main()
