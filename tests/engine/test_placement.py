"""Models over several devices: the same logits as on one, and bytes that add up."""

import queue
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import psutil
import pytest
import torch
from core_run import run, submit
from engine_loop import on_loop
from rank_logits import logits_of

from gptoss.engine import port
from gptoss.engine.inprocess import InProcessDriver
from gptoss.engine.load import LoadedModel, load_model
from gptoss.engine.memory_model import kv_bytes
from gptoss.engine.model_folder import no_progress
from gptoss.engine.port import Load
from gptoss.engine.process import ProcessDriver
from gptoss.errors import ModelLoadError
from gptoss.messages.sampling import SamplingParams

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# torch is only partly typed.

KINDS = ("llama", "gpt_oss")
SPLIT_TOLERANCE = 2e-5
"""Largest difference of a logit, relative to the largest, in float32: sums over halves are joined in another order."""


def largest_gap(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


# ---------------------------------------------------------------- pipeline


@pytest.mark.parametrize("kind", [*KINDS, "qwen3", "smollm"])
def test_two_stages_give_the_bits_of_one_device(tiny_model: Callable[..., LoadedModel], kind: str) -> None:
    one, two = tiny_model(kind, kernels="torch"), tiny_model(kind, device="cpu+cpu")
    assert two.notes[0] == "pipeline over cpu, cpu: 1, 1 layers"
    assert type(two.runner).__name__ == "PackedRunner"
    assert torch.equal(logits_of(two), logits_of(one))


def test_each_stage_has_the_keys_and_values_of_its_layers(tiny_model: Callable[..., LoadedModel]) -> None:
    model = tiny_model("gpt_oss", device="cpu+cpu")  # one layer slides, the other does not, so both differ anyway
    geometry = model.runner.geometry
    assert geometry is not None
    assert [geometry.places[layer][0] for layer in range(2)] == [0, 1]
    slot: Any = model.runner.new_slot(48)
    assert [store.shape[3] for store in slot.stores] == [8, 48]
    assert slot.num_bytes == kv_bytes(model.runner.layout, 48)


def test_the_shares_of_a_pipeline_add_up(tiny_model: Callable[..., LoadedModel]) -> None:
    capabilities = tiny_model("llama", device="cpu+cpu").capabilities
    assert capabilities.multi_device
    assert sum(share.weights_bytes for share in capabilities.shares) == capabilities.weights_bytes
    assert sum(share.kv_budget_bytes for share in capabilities.shares) == capabilities.kv_budget_bytes
    assert all(share.weights_bytes for share in capabilities.shares)
    assert tiny_model("llama").capabilities.shares == ()


def test_a_pipeline_serves_requests_as_one_device_does(
    tiny_model: Callable[..., LoadedModel],
) -> None:
    requests = [submit(name, length=60, temperature=0.8) for name in "abcd"]
    one, two = (run(tiny_model("llama", kernels="torch", device=device), *requests) for device in ("cpu", "cpu+cpu"))
    assert [two.tokens(name) for name in "abcd"] == [one.tokens(name) for name in "abcd"]


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"device": "+".join(["cpu"] * 9)}, "cannot be cut into 9 stages"),
        ({"device": "cpu+cpu", "kv_layout": "paged"}, "kv_layout is 'paged'"),
        ({"device": "cpu+cuda:0"}, "torch sees 0 CUDA devices"),
        ({"device": "cpu+cpu", "kernels": "native"}, "one CPU"),
        ({"device": "cpu+cpu+cpu", "mode": "tensor"}, "num_attention_heads is 4"),
    ],
)
def test_what_cannot_be_spread_is_refused_in_one_line(
    tiny_folder: Callable[[str], str], options: dict[str, Any], named: str
) -> None:
    with pytest.raises(ModelLoadError, match=named):
        load_model(Load(folder=tiny_folder("llama"), model_name="tiny", **options), no_progress)


# ---------------------------------------------------------------- tensor


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_two_ranks_give_the_logits_of_one_device(
    tiny_model: Callable[..., LoadedModel], tiny_folder: Callable[[str], str], tmp_path: Path
) -> None:
    folders = [tiny_folder(kind) for kind in KINDS]
    script = Path(__file__).with_name("rank_logits.py")
    ranks = [
        subprocess.Popen([sys.executable, str(script), str(rank), str(tmp_path), *folders], stderr=subprocess.PIPE)
        for rank in range(2)
    ]
    for process in ranks:
        _, said = process.communicate(timeout=200)
        assert process.returncode == 0, said.decode()[-2000:]
    for number, kind in enumerate(KINDS):
        first, second = (torch.load(tmp_path / f"{number}-{rank}.pt", weights_only=True) for rank in range(2))
        assert torch.equal(first["logits"], second["logits"])
        one = tiny_model(kind, kernels="torch")
        assert largest_gap(first["logits"], logits_of(one)) < SPLIT_TOLERANCE
        assert first["capabilities"] == second["capabilities"]
        assert first["kv_heads"] == one.capabilities.kv_layout.kv_heads  # of both ranks together
        assert sum(kv for _, kv in first["shares"]) == first["capabilities"][0]
        assert all(weights < one.capabilities.weights_bytes for weights, _ in first["shares"])
        assert first["notes"][0] == "tensor parallel over cpu, cpu"


def served(
    driver: port.EngineDriver, load: Load, count: int = 5
) -> tuple[dict[str, list[int]], "queue.Queue[port.EngineEvent]"]:
    """The tokens of some requests that run together."""
    news: queue.Queue[port.EngineEvent] = queue.Queue()
    on_loop(driver.start, load, news.put)
    while not isinstance(event := news.get(timeout=150), port.Loaded):
        assert isinstance(event, port.LoadProgressed), event
    for number in range(count):
        sampling = SamplingParams(max_tokens=10, temperature=number % 2 * 0.9, seed=5, ignore_eos=True)
        prompt = tuple(range(40 + number, 80 + 3 * number))
        driver.send(port.Submit(request_id=f"r{number}", attempt=1, prompt_token_ids=prompt, sampling=sampling))
    tokens: dict[str, list[int]] = {}
    ends = 0
    while ends < count:
        event = news.get(timeout=60)
        assert not isinstance(event, port.Failed | port.EngineExited), event
        ends += isinstance(event, port.Finished)
        for row in event.rows if isinstance(event, port.StepDone) else ():
            tokens.setdefault(row.request_id, []).extend(row.token_ids)
    return tokens, news


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_a_tensor_parallel_engine_serves_what_one_device_does_tells_its_memory_and_ends_with_a_rank(
    tiny_folder: Callable[[str], str],
) -> None:
    load = Load(folder=tiny_folder("gpt_oss"), model_name="tiny", dtype="float32", max_batch_size=4, num_threads=1)
    alone = InProcessDriver()
    expected, _ = served(alone, load)
    alone.send(port.Shutdown())
    together = ProcessDriver()
    spread = msgspec.structs.replace(load, device="cpu+cpu", mode="tensor", prefix_cache_bytes=1 << 20)
    found, news = served(together, spread)
    assert found == expected
    readings: tuple[Any, ...] = ()
    for nonce in range(50):
        together.send(port.Snapshot(nonce=nonce))
        status = news.get(timeout=30)
        if isinstance(status, port.EngineStatus) and len(status.devices) == 2:
            readings = status.devices
            assert status.memory_bytes == sum(each.used_bytes for each in readings)
            break
    assert len(readings) == 2
    (rank,) = [each for each in psutil.Process().children(recursive=True) if "gptoss.engine.rank" in each.cmdline()]
    rank.kill()
    event = news.get(timeout=30)
    while not isinstance(event, port.EngineExited):
        event = news.get(timeout=30)
    assert event.reason == "one of its ranks was lost"


def test_tensor_needs_processes_of_its_own(tiny_folder: Callable[[str], str]) -> None:
    news: queue.Queue[port.EngineEvent] = queue.Queue()
    load = Load(folder=tiny_folder("llama"), model_name="tiny", device="cpu+cpu", mode="tensor")
    InProcessDriver().start(load, news.put)
    while not isinstance(event := news.get(timeout=60), port.LoadFailed):
        assert isinstance(event, port.LoadProgressed), event
    assert "processes of its own" in event.message
