"""Loads a model into an engine of this process and runs streams on it, for the benchmarks of the engine."""

import argparse
import statistics
import time
from pathlib import Path

import torch

from gptoss.clock import SystemClock
from gptoss.config import Settings
from gptoss.engine.core import CoreOptions, EngineCore
from gptoss.engine.load import LoadedModel, load_model
from gptoss.engine.model_folder import no_progress
from gptoss.engine.model_source import prepare_in_child
from gptoss.engine.port import EngineEvent, Load, StepDone, Submit
from gptoss.messages.sampling import SamplingParams

KV_BUDGET_BYTES = 8 << 30
"""More than any benchmark fills; memory is touched only as tokens come."""


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Which model to load, and how; see ``gptoss serve --help``."""
    parser.add_argument("--model", default="demo", help="a model folder, or demo")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="auto", choices=("auto", "bfloat16", "float32"))
    parser.add_argument("--kernels", default="auto", choices=("auto", "native", "torch"))
    parser.add_argument("--quantization", default="none", choices=("none", "int8", "int4"))
    parser.add_argument("--threads", type=int, default=0, help="0: one for each core")


def load_options(arguments: argparse.Namespace, *, max_batch_size: int, max_model_len: int = 0) -> Load:
    """What the options ask for; the demo is prepared first."""
    folder, name = arguments.model, Path(arguments.model).name
    if arguments.model == "demo":
        made = prepare_in_child("demo", cache_dir=cache_folder(), dtype="auto", progress=no_progress)
        folder, name = made.folder, made.model_name
    return Load(
        folder=folder,
        model_name=name,
        device=arguments.device,
        dtype=arguments.dtype,
        kernels=arguments.kernels,
        quantization=arguments.quantization,
        max_batch_size=max_batch_size,
        max_model_len=max_model_len,
        kv_budget_bytes=KV_BUDGET_BYTES,
        prefix_cache_bytes=-1,
        num_threads=arguments.threads,
        cache_folder=str(cache_folder()),
    )


def load(options: Load) -> LoadedModel:
    """The model, in this process."""
    if options.num_threads:
        torch.set_num_threads(options.num_threads)
    return load_model(options, no_progress)


def cache_folder() -> Path:
    """Of prepared models and compiled kernels: the one that the server uses."""
    return Settings().cache_path


def describe(model: LoadedModel) -> str:
    """One line on what runs."""
    has = model.capabilities
    parts = [
        f"{has.model_name} ({has.architecture})",
        f"{type(model.runner).__name__}, {has.dtype}, weights {has.weights_bytes / 1e6:.0f} MB",
        f"{has.device}, {has.num_threads} threads, torch {torch.__version__}",
    ]
    return "; ".join([*parts, *model.notes])


def request(name: str, prompt_tokens: int, max_tokens: int, vocab_size: int) -> Submit:
    """A greedy request with a random prompt that depends on its name alone."""
    generator = torch.Generator().manual_seed(sum(map(ord, name)))
    prompt = torch.randint(100, min(vocab_size, 30_000) - 1, (prompt_tokens,), generator=generator).tolist()
    sampling = SamplingParams(max_tokens=max_tokens, temperature=0.0, seed=1, ignore_eos=True)
    return Submit(request_id=name, attempt=1, prompt_token_ids=tuple(prompt), sampling=sampling)


class Streams:
    """A core and its requests."""

    def __init__(self, model: LoadedModel, options: CoreOptions | None = None) -> None:
        self.core = EngineCore(model.runner, model.capabilities, model.tokenizer, SystemClock(), options)
        self.vocab_size = model.capabilities.vocab_size

    def start(self, count: int, prompt_tokens: int, max_tokens: int) -> float:
        """Submit ``count`` requests and step until each has its first token. Returns the seconds it took."""
        waiting = {f"r{number}" for number in range(count)}
        began = time.perf_counter()
        for name in waiting:
            self.core.handle(request(name, prompt_tokens, max_tokens, self.vocab_size))
        while waiting:
            waiting -= {row.request_id for row in self.step().rows if row.token_ids}
        return time.perf_counter() - began

    def step(self) -> StepDone:
        """One step of the batch."""
        done: EngineEvent = self.core.step()[0]
        assert isinstance(done, StepDone)
        return done

    def decode_s(self, budget_s: float, steps_max: int) -> float:
        """Median seconds of a step, over steps for at most about ``budget_s``."""
        times: list[float] = []
        while len(times) < steps_max and (sum(times) < budget_s or len(times) < 4):
            began = time.perf_counter()
            self.step()
            times.append(time.perf_counter() - began)
        return statistics.median(times)


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])
