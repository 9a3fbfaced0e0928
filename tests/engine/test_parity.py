"""A runner that computes something else than the model is found out, in bfloat16 and with experts too; a right one passes."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from gptoss.engine import attention, parity, runner_choice
from gptoss.engine.kv_cache import KvGeometry
from gptoss.engine.kv_pages import PagePool
from gptoss.engine.load import LoadedModel, load_model
from gptoss.engine.model_folder import no_progress
from gptoss.engine.packed_experts import PackedExperts
from gptoss.engine.port import Load
from gptoss.engine.runner import GenericRunner, PackedRunner

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# torch and transformers are only partly typed.

Folders = Callable[[str], str]
Patch = Callable[[pytest.MonkeyPatch], None]
DEEP: dict[str, Any] = {
    "vocab_size": 300,
    "num_hidden_layers": 12,
    "hidden_size": 128,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "eos_token_id": 256,
}
SCALES = {"deep llama": 6, "deep experts, small weights": 1, "deep experts": 3, "deep experts, large weights": 6}
"""By which random weights are multiplied: the larger, the further rounding moves the logits."""


def load(folder: str, **options: Any) -> LoadedModel:
    settings: dict[str, Any] = {"dtype": "bfloat16", "kv_budget_bytes": 1 << 24, "kernels": "torch"} | options
    return load_model(Load(folder=folder, model_name="tiny", **settings), no_progress)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Folders) -> Folders:
    """Makes models in which roundings add up, and the tiny ones."""
    made: dict[str, str] = {}

    def make(kind: str) -> str:
        if kind not in SCALES:
            return tiny_folder(kind)
        if kind not in made:
            experts = {"num_local_experts": 16, "num_experts_per_tok": 4}
            made_of: Any = transformers.LlamaConfig if kind == "deep llama" else transformers.GptOssConfig
            config = made_of(**DEEP, **({} if kind == "deep llama" else experts))
            torch.manual_seed(1)
            model: Any = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    if name.endswith("sinks"):
                        parameter.normal_()
                    elif parameter.ndim > 1:
                        parameter.mul_(SCALES[kind])
            folder = tmp_path_factory.mktemp("deep")
            model.save_pretrained(folder)
            shutil.copy(Path(tiny_folder("llama")) / "tokenizer.json", folder)
            made[kind] = str(folder)
        return made[kind]

    return make


@pytest.mark.parametrize("kv_layout", ["slots", "paged"])
@pytest.mark.parametrize("kind", [*SCALES, "gpt_oss", "gpt_oss_yarn", "qwen3", "mistral"])
def test_a_right_runner_passes_however_far_rounding_moves_the_logits(
    kind: str, kv_layout: str, folders: Folders
) -> None:
    model = load(folders(kind), max_model_len=512, kv_layout=kv_layout)
    assert isinstance(model.runner, PackedRunner), model.notes


def _attends_with(**changed: Any) -> Patch:
    right: Any = attention.attend

    def wrong(query: torch.Tensor, kv: Any, scale: float, **given: Any) -> torch.Tensor:
        options = {**given, **changed}
        return right(query, kv, scale * options.pop("factor", 1.0), **options)

    return lambda monkeypatch: monkeypatch.setattr(attention, "attend", wrong)


class _Swapped(PackedRunner):
    """Runs two layers in the wrong order."""

    def __init__(self, model: Any, geometry: KvGeometry, pool: PagePool | None = None) -> None:
        super().__init__(model, geometry, pool)
        layers = model.model.layers
        layers[0], layers[1] = layers[1], layers[0]


class _Late(PackedRunner):
    """Gives decoding rows a position too far on."""

    def __init__(self, model: Any, geometry: KvGeometry, pool: PagePool | None = None) -> None:
        def run(*, position_ids: torch.Tensor, **options: Any) -> Any:
            late = position_ids + (position_ids >= parity.PROMPT_TOKENS)
            return model(position_ids=late, **options)

        super().__init__(run, geometry, pool)


def _runs_as(wrong: type[PackedRunner]) -> Patch:
    return lambda monkeypatch: monkeypatch.setattr(runner_choice, "PackedRunner", wrong)


def _wrong_experts(monkeypatch: pytest.MonkeyPatch) -> None:
    right = PackedExperts.forward

    def wrong(self: Any, rows: torch.Tensor, expert_ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        return right(self, rows, expert_ids.roll(1, dims=1), weights)

    monkeypatch.setattr(PackedExperts, "forward", wrong)


WRONG: dict[str, Patch] = {
    "no sinks": _attends_with(sinks=None),
    "a scale that is a fifth too large": _attends_with(factor=1.2),
    "two layers swapped": _runs_as(_Swapped),
    "a position off by one": _runs_as(_Late),
    "weights of other experts": _wrong_experts,
}
EXPERTS_ONLY = {"no sinks", "weights of other experts"}
UNSEEN = {
    ("deep experts, small weights", fault) for fault in ("a scale that is a fifth too large", "a position off by one")
}
"""With weights this small attention is an average over all positions, whatever their scores."""
CASES = [
    (kind, fault)
    for kind in ("llama", "gpt_oss", *SCALES)
    for fault in WRONG
    if (kind, fault) not in UNSEEN and not ("llama" in kind and fault in EXPERTS_ONLY)
]


@pytest.mark.parametrize(("kind", "fault"), CASES)
def test_a_wrong_runner_is_found_out_in_bfloat16(
    kind: str, fault: str, folders: Folders, monkeypatch: pytest.MonkeyPatch
) -> None:
    WRONG[fault](monkeypatch)
    model = load(folders(kind), max_model_len=512)
    assert isinstance(model.runner, GenericRunner)
    assert "differ" in model.notes[0]
