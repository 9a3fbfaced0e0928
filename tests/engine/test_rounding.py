"""How much of a difference rounding explains: enough for a deep mixture of experts, too little for a wrong model."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from gptoss.engine import attention
from gptoss.engine.load import LoadedModel, load_model
from gptoss.engine.model_folder import no_progress
from gptoss.engine.port import Load
from gptoss.engine.rounding import rounding_noise
from gptoss.engine.runner import GenericRunner, PackedRunner

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# torch and transformers are only partly typed.

Folders = Callable[[str], str]


def load(folder: str, **options: Any) -> LoadedModel:
    settings: dict[str, Any] = {"dtype": "bfloat16", "kv_budget_bytes": 1 << 24, "kernels": "torch"} | options
    return load_model(Load(folder=folder, model_name="tiny", **settings), no_progress)


@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 2e-5), (torch.bfloat16, 0.1)])
@pytest.mark.parametrize("kind", ["llama", "gpt_oss"])
def test_the_noise_is_of_the_size_of_the_dtypes_rounding_and_the_model_stays_as_it_was(
    kind: str, dtype: torch.dtype, most: float, tiny_folder: Folders
) -> None:
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(tiny_folder(kind), dtype=dtype).eval()

    def logits() -> torch.Tensor:
        with torch.inference_mode():
            return model(input_ids=torch.arange(20)[None], use_cache=False).logits[0].float()

    expected = logits()
    noise = rounding_noise(model, logits, expected)
    assert torch.finfo(dtype).eps / 100 < noise < most
    assert rounding_noise(model, logits, expected) == noise
    assert torch.equal(logits(), expected)


def test_a_deep_mixture_of_experts_in_bfloat16_is_run_packed(tmp_path: Path, tiny_folder: Folders) -> None:
    config = transformers.GptOssConfig(
        vocab_size=300,
        num_hidden_layers=12,
        hidden_size=128,
        intermediate_size=128,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        num_local_experts=16,
        num_experts_per_tok=4,
        eos_token_id=256,
    )
    torch.manual_seed(1)
    model: Any = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(6)
    model.save_pretrained(tmp_path)
    shutil.copy(Path(tiny_folder("llama")) / "tokenizer.json", tmp_path)
    loaded = load(str(tmp_path), max_model_len=512)
    assert isinstance(loaded.runner, PackedRunner), loaded.notes


@pytest.mark.parametrize(("kind", "options"), [("gpt_oss", {"sinks": None}), ("llama", {"scale": 0.2})])
def test_a_wrong_attention_is_still_found_out(
    kind: str, options: dict[str, Any], tiny_folder: Folders, monkeypatch: pytest.MonkeyPatch
) -> None:
    right: Any = attention.attend

    def wrong(query: torch.Tensor, kv: Any, scale: float, **given: Any) -> torch.Tensor:
        changed = {**given, **options}
        return right(query, kv, changed.pop("scale", scale), **changed)

    assert isinstance(load(tiny_folder(kind)).runner, PackedRunner)
    monkeypatch.setattr(attention, "attend", wrong)
    loaded = load(tiny_folder(kind))
    assert isinstance(loaded.runner, GenericRunner)
    assert "differ from eager attention" in loaded.notes[0]
