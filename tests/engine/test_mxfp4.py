"""MXFP4 checkpoints of gpt-oss: the numbers that they stand for, and what is said when they are dequantised."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from core_run import Run, submit
from safetensors.torch import load_file, save_file

from gptoss.doctor import DEQUANTISED_BYTES
from gptoss.engine import load as load_module
from gptoss.engine import mxfp4
from gptoss.engine.load import LoadedModel, load_model
from gptoss.engine.model_folder import no_progress
from gptoss.engine.mxfp4 import WeightForm, count_parameters, weight_forms
from gptoss.engine.port import Load
from gptoss.engine.runner import PackedRunner
from gptoss.errors import ModelLoadError

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# torch and transformers are only partly typed.

FP4 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0])
"""Values of 4 bits: sign, 2 bits of exponent, 1 of mantissa."""
SCALE_BIAS = 127
GROUP = 32
QUANTIZATION = {
    "quant_method": "mxfp4",
    "modules_to_not_convert": [
        "model.layers.*.self_attn",
        "model.layers.*.mlp.router",
        "model.embed_tokens",
        "lm_head",
    ],
}
CPU = torch.device("cpu")


def dequantised(blocks: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """The matrices ``[experts, in, out]`` of blocks ``[experts, out, groups, 16]``, low half of a byte first."""
    numbers = torch.stack((blocks & 15, blocks >> 4), dim=-1).flatten(-2).long()
    values = FP4[numbers] * torch.exp2(scales.float() - SCALE_BIAS)[..., None]
    return values.flatten(-2).transpose(1, 2).contiguous().bfloat16()


@pytest.fixture(scope="module")
def checkpoints(tiny_folder: Callable[[str], str], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A tiny gpt-oss in MXFP4, as it is published, and the bfloat16 one that it stands for."""
    home = tmp_path_factory.mktemp("mxfp4")
    stored, plain = (Path(shutil.copytree(tiny_folder("gpt_oss"), home / name)) for name in ("stored", "plain"))
    weights = {name: tensor.bfloat16() for name, tensor in load_file(plain / "model.safetensors").items()}
    packed = dict(weights)
    generator = torch.Generator().manual_seed(0)
    for name in [name for name in weights if name.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        experts, inputs, outputs = weights[name].shape
        shape = (experts, outputs, inputs // GROUP)
        blocks = torch.randint(0, 256, (*shape, GROUP // 2), generator=generator, dtype=torch.uint8)
        scales = torch.randint(SCALE_BIAS - 6, SCALE_BIAS - 2, shape, generator=generator, dtype=torch.uint8)
        del packed[name]
        packed |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        weights[name] = dequantised(blocks, scales)
    save_file(weights, plain / "model.safetensors", metadata={"format": "pt"})
    save_file(packed, stored / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((stored / "config.json").read_text())
    (stored / "config.json").write_text(json.dumps(config | {"quantization_config": QUANTIZATION}))
    return stored, plain


def load(folder: Path, **options: Any) -> LoadedModel:
    settings: dict[str, Any] = {"dtype": "bfloat16", "kv_budget_bytes": 1 << 28} | options
    return load_model(Load(folder=str(folder), model_name="tiny", **settings), no_progress)


def _always(value: Any) -> Callable[..., Any]:
    def answer(*_: object) -> Any:
        return value

    return answer


def logprobs(model: LoadedModel) -> list[float]:
    running = Run(model)
    running.handle(submit("r", length=40, temperature=1.0, logprobs=4))
    running.finish()
    return [value for row in running.rows("r") for each in row.logprobs for _, value, _, _ in each.top]


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_an_mxfp4_checkpoint_has_the_logits_of_the_weights_that_it_stands_for(
    dtype: str, checkpoints: tuple[Path, Path]
) -> None:
    stored, plain = (load(folder, dtype=dtype) for folder in checkpoints)
    assert isinstance(stored.runner, PackedRunner)
    assert logprobs(stored) == logprobs(plain)
    assert stored.capabilities.weights_bytes == plain.capabilities.weights_bytes


def test_dequantising_is_said_with_its_reason_and_size(checkpoints: tuple[Path, Path]) -> None:
    stored, plain = (load(folder) for folder in checkpoints)
    (note,) = stored.notes
    assert note.startswith("MXFP4 weights dequantised, since there are no kernels for them on a cpu: they take 0.0 GB")
    assert plain.notes == ()


def test_parameters_are_counted_as_if_dequantised(checkpoints: tuple[Path, Path]) -> None:
    stored, plain = checkpoints
    assert count_parameters(stored) == count_parameters(plain)
    assert 2 * count_parameters(stored) == load(plain).capabilities.weights_bytes


def test_weights_that_do_not_fit_once_dequantised_are_refused_with_both_sizes(
    checkpoints: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mxfp4.psutil, "virtual_memory", lambda: SimpleNamespace(available=1000))
    with pytest.raises(ModelLoadError, match=r"dequantised.* 0\.0 GB in bfloat16, and cpu has 0\.0 GB free"):
        load(checkpoints[0])


def test_where_there_are_kernels_the_weights_stay_as_they_are_and_may_be_dequantised_if_that_fails(
    checkpoints: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    stored, plain = checkpoints
    config = json.loads((stored / "config.json").read_text())
    monkeypatch.setattr(mxfp4, "_missing_for_kernels", _always(""))
    first, second = weight_forms(stored, config, torch.bfloat16, CPU)
    assert first == WeightForm(note="MXFP4 weights as stored, with transformers' Triton kernels")
    assert second.note.startswith("MXFP4 weights dequantised: they take")
    broken = WeightForm({"quantization_config": "kernels that cannot be fetched"}, first.note)
    monkeypatch.setattr(load_module, "weight_forms", _always((broken, second)))
    model = load(stored)
    assert [note.partition(":")[0] for note in model.notes] == [f"not {first.note}", "MXFP4 weights dequantised"]
    assert logprobs(model) == logprobs(load(plain))


def test_other_checkpoints_have_one_form_and_no_note(checkpoints: tuple[Path, Path]) -> None:
    assert weight_forms(checkpoints[1], {"model_type": "gpt_oss"}, torch.bfloat16, CPU) == (WeightForm(),)


@pytest.mark.parametrize("content", [b"", b"\xff" * 40, (9).to_bytes(8, "little") + b"not json."])
def test_a_broken_weight_file_is_named(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(ModelLoadError, match=r"^cannot load .*model\.safetensors: [^\n]*$"):
        count_parameters(tmp_path)


@pytest.mark.parametrize(("name", "layers", "experts"), [("20b", 24, 32), ("120b", 36, 128)])
def test_doctor_knows_what_the_published_models_take_dequantised(name: str, layers: int, experts: int) -> None:
    config = transformers.GptOssConfig(num_hidden_layers=layers, num_local_experts=experts)
    with torch.device("meta"):
        model: Any = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    assert DEQUANTISED_BYTES[f"openai/gpt-oss-{name}"] == 2 * model.num_parameters()
