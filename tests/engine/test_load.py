"""Loading: limits, fingerprint, and what is refused."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file  # pyright: ignore[reportUnknownVariableType] - safetensors types its path loosely

from gptoss.engine.load import LoadedModel, load_model
from gptoss.engine.memory_model import kv_bytes
from gptoss.engine.model_folder import no_progress
from gptoss.engine.port import Load
from gptoss.errors import ModelLoadError

Folders = Callable[[str], str]


def load(folder: Path | str, **options: Any) -> LoadedModel:
    return load_model(Load(folder=str(folder), model_name="tiny", **options), no_progress)


@pytest.fixture
def copy(tiny_folder: Folders, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_folder("llama"), tmp_path / "copy"))


def change_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_limits_follow_the_model_and_the_load(tiny_folder: Folders) -> None:
    model = load(tiny_folder("llama"), max_batch_size=3, dtype="bfloat16")
    capabilities = model.capabilities
    assert (capabilities.vocab_size, capabilities.max_model_len, capabilities.max_batch_size) == (300, 640, 3)
    assert (capabilities.dtype, capabilities.architecture) == ("bfloat16", "LlamaForCausalLM")
    assert capabilities.kv_layout.dtype_bytes == 2
    assert 0 < capabilities.kv_budget_bytes <= 3 * kv_bytes(capabilities.kv_layout, 640)
    assert load(tiny_folder("llama"), max_model_len=64, kv_budget_bytes=999).capabilities.kv_budget_bytes == 999


def test_the_fingerprint_tells_models_apart(tiny_folder: Folders, copy: Path) -> None:
    original = load(tiny_folder("llama")).fingerprint
    assert load(copy).fingerprint == original
    (copy / "chat_template.jinja").write_text("{{ messages }}")
    weights = load_file(copy / "model.safetensors")
    weights["lm_head.weight"][0, 0] += 1
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    changed = load(copy).fingerprint
    assert (changed.tokenizer, changed.config) == (original.tokenizer, original.config)
    assert changed.weights != original.weights
    assert original.chat_template == ""
    assert len(changed.chat_template) == 64


def test_missing_weights_are_refused_not_made_up(copy: Path) -> None:
    weights = load_file(copy / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelLoadError, match=r"lacks 1 weights.*layers\.1\.mlp\.up_proj"):
        load(copy)


def test_broken_weights_are_one_line(copy: Path) -> None:
    (copy / "model.safetensors").write_bytes(b"not safetensors")
    with pytest.raises(ModelLoadError, match=r"^cannot load [^\n]*$"):
        load(copy)


def test_an_unknown_architecture_is_named(copy: Path) -> None:
    change_config(copy, model_type="perceptron")
    with pytest.raises(ModelLoadError, match="perceptron"):
        load(copy)


def test_a_context_longer_than_the_models_is_refused(copy: Path) -> None:
    with pytest.raises(ModelLoadError, match=r"max_model_len is 1000.*640"):
        load(copy, max_model_len=1000)


@pytest.mark.parametrize("device", ["cuda:7", "tpu", "mps", "nonsense:x"])
def test_a_device_that_is_not_there_is_named(device: str, copy: Path) -> None:
    if torch.cuda.is_available() and device == "cuda:7":
        pytest.skip("this machine has CUDA devices")
    with pytest.raises(ModelLoadError, match=device):
        load(copy, device=device)


def test_several_cpu_engines_are_on_the_one_cpu(copy: Path) -> None:
    assert load(copy, device="cpu:1").capabilities.device == "cpu"
