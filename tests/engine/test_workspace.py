"""The estimate of a step's workspace, held against what torch really allocates at the peak of a step."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from core_run import Run, submit

from gptoss.engine.load import LoadedModel
from gptoss.engine.memory_model import kv_bytes, workspace_bytes

# torch types its profiler only in part.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

SLACK = 4.0
"""An estimate above the peak by more than this would waste memory rather than guard it."""


def peak_bytes(work: Callable[[], Any]) -> int:
    """The most memory that torch held at once of what was allocated during ``work``."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        work()
    results: Any = profile.profiler
    events = [event for event in results.kineto_results.events() if event.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda each: each.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


@pytest.mark.parametrize("kind", ["llama", "qwen3", "mistral", "gpt_oss"])
@pytest.mark.parametrize("length", [128, 480])
def test_the_estimate_is_above_the_measured_peak_and_near_it(
    kind: str, length: int, tiny_model: Callable[..., LoadedModel], tiny_folder: Callable[[str], str]
) -> None:
    model = tiny_model(kind)
    config = json.loads((Path(tiny_folder(kind)) / "config.json").read_text())
    run = Run(model)
    prompt = tuple(40 + index % 50 for index in range(length))
    request = submit("a", max_tokens=1)
    run.handle(msgspec.structs.replace(request, prompt_token_ids=prompt))
    measured = peak_bytes(run.finish)
    held = kv_bytes(model.runner.layout, length + 1)
    estimated = workspace_bytes(config, tokens=length, rows=1, dtype_bytes=4)
    assert measured > held, "the profiler saw the step"
    assert measured - held <= estimated, "a step may take more than was set aside for it"
    assert estimated <= SLACK * (measured - held)


def test_it_grows_with_tokens_and_logits_and_not_with_layers() -> None:
    config = {
        "hidden_size": 8,
        "num_attention_heads": 2,
        "num_hidden_layers": 3,
        "intermediate_size": 16,
        "vocab_size": 100,
    }
    one = workspace_bytes(config, tokens=1, rows=0, dtype_bytes=2)
    assert one == 2 * (4 * 8 + 2 * (2 + 4) * 4 + 3 * 16)
    assert workspace_bytes(config, tokens=10, rows=0, dtype_bytes=2) == 10 * one
    assert workspace_bytes(config, tokens=0, rows=5, dtype_bytes=2) == 5 * 100 * 10
    deeper = {**config, "num_hidden_layers": 30}
    assert workspace_bytes(deeper, tokens=1, rows=0, dtype_bytes=2) == one
