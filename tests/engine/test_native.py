"""The CPU kernels: logits near transformers', and the same bits however a text is cut, packed, threaded or accompanied."""

import ctypes
import functools
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from transformers import AutoModelForCausalLM

from gptoss.engine.attention import Chunk
from gptoss.engine.load import LoadedModel, load_model
from gptoss.engine.memory_model import kv_bytes, kv_layout_from_config
from gptoss.engine.model_folder import check_folder, no_progress
from gptoss.engine.native import build
from gptoss.engine.native.build import NativeUnavailableError, open_kernels
from gptoss.engine.native.runner import NativeRunner
from gptoss.engine.native.weights import WeightFormat, quantise
from gptoss.engine.port import Load
from gptoss.engine.runner import PackedRunner
from gptoss.engine.runner_choice import KvOptions, Native, RunnerChoice, choose_runner
from gptoss.errors import ModelLoadError
from gptoss.messages.model import Summation

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# torch and transformers are only partly typed.

KINDS = ["llama", "smollm", "qwen2", "qwen3"]
SHAPE: dict[str, Any] = {
    "vocab_size": 300,  # not a multiple of 16
    "hidden_size": 96,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 640,
    "pad_token_id": None,
}
LENGTH = 90
CUTS = [[1] * LENGTH, [3, 47, 1, 1, 38], [17, 16, 57], [33, *[1] * 57]]

Make = Callable[..., NativeRunner]


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return open_kernels(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    import transformers

    configs: dict[str, Callable[[], Any]] = {
        "llama": lambda: transformers.LlamaConfig(**SHAPE, tie_word_embeddings=False),
        "smollm": lambda: transformers.LlamaConfig(**SHAPE, tie_word_embeddings=True),
        "qwen2": lambda: transformers.Qwen2Config(**SHAPE, tie_word_embeddings=False),
        "qwen3": lambda: transformers.Qwen3Config(**SHAPE, tie_word_embeddings=True),
        "mistral": lambda: transformers.MistralConfig(**SHAPE, sliding_window=8),
    }

    @functools.cache
    def make(kind: str) -> Path:
        torch.manual_seed(3)
        model: Any = AutoModelForCausalLM.from_config(configs[kind](), dtype=torch.bfloat16)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("bias"):
                    parameter.normal_(std=0.1)
                elif parameter.ndim > 1:
                    parameter.mul_(4)
                else:
                    parameter.uniform_(0.5, 1.5)
        path = tmp_path_factory.mktemp(kind)
        model.save_pretrained(path)
        return path

    return make


@pytest.fixture(scope="module")
def make(kernels: ctypes.CDLL, folder: Callable[[str], Path]) -> Make:
    @functools.cache
    def made(
        kind: str, form: WeightFormat = "bfloat16", num_threads: int = 2, summation: Summation = "auto"
    ) -> NativeRunner:
        return runner_of(kernels, folder(kind), form, num_threads, summation)

    return made


def runner_of(
    kernels: ctypes.CDLL, folder: Path, form: WeightFormat, num_threads: int, summation: Summation
) -> NativeRunner:
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    return NativeRunner(kernels, model, form=form, max_model_len=640, num_threads=num_threads, summation=summation)


def text(length: int, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 300, (length,), generator=generator).tolist()


def logits_of(runner: NativeRunner, token_ids: list[int], sizes: list[int], strangers: int = 0) -> torch.Tensor:
    """Logits of every position, ``[T, vocab]``, with strangers of the same length before and after."""
    slots = [runner.new_slot(len(token_ids)) for _ in range(strangers + 1)]
    texts = [
        token_ids if index == strangers // 2 else text(len(token_ids), 7 + index) for index in range(strangers + 1)
    ]
    found: list[torch.Tensor] = []
    start = 0
    for size in sizes:
        chunks = [
            Chunk(slot=slot, token_ids=ids[start : start + size], start=start, num_logits=size)
            for slot, ids in zip(slots, texts, strict=True)
        ]
        rows = runner.forward(chunks)[strangers // 2]
        assert rows is not None
        found.append(rows)
        start += size
    return torch.cat(found)


@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_nearer_to_float32_than_those_of_bfloat16_eager_attention(
    kind: str, make: Make, folder: Callable[[str], Path]
) -> None:
    ids = text(LENGTH)
    with torch.inference_mode():
        exact, rounded = (
            AutoModelForCausalLM.from_pretrained(folder(kind), dtype=dtype, attn_implementation="eager")
            .eval()(torch.tensor([ids]))
            .logits[0]
            .float()
            for dtype in (torch.float32, torch.bfloat16)
        )
    found = logits_of(make(kind), ids, [LENGTH])
    assert (found - exact).norm() < (rounded - exact).norm()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("form", "summation"), [("bfloat16", "blocks"), ("bfloat16", "pairs"), ("int8", "auto"), ("int4", "auto")]
)
def test_bits_do_not_depend_on_the_cut_the_company_or_the_threads(
    kind: str, form: WeightFormat, summation: Summation, make: Make
) -> None:
    def logits(sizes: list[int], strangers: int = 0, num_threads: int = 2) -> torch.Tensor:
        return logits_of(make(kind, form, num_threads, summation), ids, sizes, strangers)

    ids = text(LENGTH)
    whole = logits([LENGTH])
    assert whole.isfinite().all()
    for sizes in CUTS:
        assert torch.equal(logits(sizes), whole)
    assert torch.equal(logits(CUTS[1], strangers=16), whole)
    assert torch.equal(logits(CUTS[1], strangers=1, num_threads=1), whole)
    assert torch.equal(logits([LENGTH], num_threads=3), whole)


@pytest.mark.parametrize("summation", ["blocks", "pairs"])
@pytest.mark.skipif(platform.machine() != "x86_64", reason="the instructions are those of x86")
def test_a_machine_without_its_instructions_gives_the_same_bits(
    summation: Summation, make: Make, folder: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without = [f"-mno-{name}" for name in ("amx-bf16", "amx-tile", "avx512bf16", "avx512vnni", "avx512f")]
    monkeypatch.setattr(build, "_flags", lambda: (*build.FLAGS, *build.QUIET, "-march=native", *without))
    poorer = runner_of(open_kernels(tmp_path), folder("llama"), "bfloat16", 2, summation)
    ids = text(LENGTH)
    own = make("llama", "bfloat16", 2, summation)
    assert own.summation == poorer.summation == summation
    assert torch.equal(logits_of(poorer, ids, CUTS[1]), logits_of(own, ids, CUTS[1]))


def test_the_two_orders_of_summing_differ_in_rounding_alone(make: Make) -> None:
    ids = text(LENGTH)
    blocks, pairs = (logits_of(make("llama", "bfloat16", 2, order), ids, [LENGTH]) for order in ("blocks", "pairs"))
    assert not torch.equal(blocks, pairs)
    assert (blocks - pairs).norm() < 0.01 * blocks.norm()


@pytest.mark.parametrize(("form", "gap_max", "share"), [("int8", 0.03, 0.6), ("int4", 0.5, 0.45)])
def test_packed_weights_cost_little_and_take_less_memory(
    form: WeightFormat, gap_max: float, share: float, make: Make
) -> None:
    ids = text(LENGTH)
    exact, rounded = make("smollm"), make("smollm", form)
    expected = logits_of(exact, ids, [LENGTH])
    gap = (logits_of(rounded, ids, [LENGTH]) - expected).norm() / expected.norm()
    assert 0 < gap < gap_max
    assert rounded.weights_bytes < share * exact.weights_bytes


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", ["int8", "int4"])
def test_packed_weights_are_multiplied_as_exactly_as_bfloat16(
    kind: str, form: WeightFormat, kernels: ctypes.CDLL, make: Make, folder: Callable[[str], Path]
) -> None:
    ids = text(LENGTH)

    def eager(dtype: torch.dtype) -> torch.Tensor:
        model: Any = AutoModelForCausalLM.from_pretrained(folder(kind), dtype=dtype, attn_implementation="eager").eval()
        for name, module in model.named_modules():
            if isinstance(module, torch.nn.Linear):
                stored: WeightFormat = "int8" if name == "lm_head" else form
                module.weight = torch.nn.Parameter(as_stored(kernels, module.weight.detach(), stored).to(dtype))
        if model.config.tie_word_embeddings:
            model.model.embed_tokens.weight = model.lm_head.weight
        with torch.inference_mode():
            return model(torch.tensor([ids])).logits[0].float()

    exact, rounded = eager(torch.float32), eager(torch.bfloat16)
    found = logits_of(make(kind, form), ids, [LENGTH])
    assert (found - exact).norm() < (rounded - exact).norm()


def as_stored(kernels: ctypes.CDLL, weight: torch.Tensor, form: WeightFormat) -> torch.Tensor:
    """What a matrix is once it was packed, in float32."""
    whole, scales = quantise(kernels, weight, form)
    numbers = whole.view(torch.int8).float().view(weight.shape[0], -1, 32)
    return (numbers * scales[..., :1].float() + scales[..., 1:].float().sum(-1, keepdim=True)).view_as(weight)


@pytest.mark.parametrize("form", ["int8", "int4"])
def test_scale_and_minimum_are_those_that_fit_best(form: WeightFormat, kernels: ctypes.CDLL) -> None:
    torch.manual_seed(4)
    weight = (torch.randn(16, 320) * torch.logspace(-5, 2, 16)[:, None]).bfloat16()
    whole, scales = quantise(kernels, weight, form)
    numbers = whole.view(torch.int8).double().view(16, -1, 32)
    blocks = weight.double().view(16, -1, 32)
    columns = [numbers, torch.ones_like(numbers)] if form == "int4" else [numbers]
    best = torch.linalg.lstsq(torch.stack(columns, -1), blocks[..., None]).solution[..., 0]
    error = (as_stored(kernels, weight, form).double().view_as(blocks) - blocks).norm(dim=-1)
    error_best = ((torch.stack(columns, -1) @ best[..., None])[..., 0] - blocks).norm(dim=-1)
    is_coarse = best[..., 0] < 2.0**-14  # below that float16 has fewer bits
    assert (error <= 1.01 * error_best + 2e-3 * blocks.abs().amax(-1))[~is_coarse].all()
    assert is_coarse.float().mean() < 0.5
    assert scales.isfinite().all()


def test_int4_finds_the_numbers_of_a_4_bit_file_again_and_comes_nearer_to_it_than_bfloat16(
    kernels: ctypes.CDLL,
) -> None:
    generator = torch.Generator().manual_seed(5)
    whole = torch.randint(0, 16, (64, 6, 32), generator=generator)
    whole[..., 3], whole[..., 9] = 0, 15  # as in every block that was rounded between its least and its largest weight
    scale = (0.002 + 0.03 * torch.rand((64, 6, 1), generator=generator)).half().float()
    minimum = (scale * (-8 + torch.randn((64, 6, 1), generator=generator))).half().float()
    written = (minimum + scale * whole).view(64, -1)
    stored = written.bfloat16()
    assert torch.equal(quantise(kernels, stored, "int4")[0].view_as(whole), whole.byte())
    assert (as_stored(kernels, stored, "int4") - written).norm() < 0.6 * (stored.float() - written).norm()


@pytest.mark.parametrize("form", ["int8", "int4"])
def test_weights_that_are_all_alike_or_zero_can_be_packed(form: WeightFormat, kernels: ctypes.CDLL) -> None:
    weight = torch.zeros(32, 64)
    weight[:, 32:] = 0.5
    assert torch.allclose(as_stored(kernels, weight, form), weight, rtol=1e-2, atol=0)


@pytest.mark.parametrize("form", ["bfloat16", "int8", "int4"])
def test_not_a_number_stays_in_its_row(form: WeightFormat, make: Make) -> None:
    runner = make("llama", form)
    ids = text(20)
    alone = logits_of(runner, ids, [19, 1])
    slots = [runner.new_slot(20), runner.new_slot(20)]
    runner.forward([Chunk(slot=slot, token_ids=ids[:19], start=0, num_logits=0) for slot in slots])
    slots[0].stores[0][1, 1, :, 0] = float("nan")
    sick, healthy = runner.forward([Chunk(slot=slot, token_ids=ids[19:], start=19, num_logits=1) for slot in slots])
    assert sick is not None
    assert healthy is not None
    assert sick.isnan().all()
    assert torch.equal(healthy[0], alone[-1])


def test_a_slot_has_the_bytes_that_the_memory_model_estimates(make: Make, folder: Callable[[str], Path]) -> None:
    runner = make("llama")
    from_config = kv_layout_from_config(check_folder(folder("llama")), dtype_bytes=2)
    assert runner.layout == msgspec.structs.replace(from_config, block_tokens=32)
    assert runner.new_slot(77).num_bytes == kv_bytes(runner.layout, 77)


def test_they_are_compiled_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not build.is_built(tmp_path)
    open_kernels(tmp_path)
    assert build.is_built(tmp_path)

    def compile_again(*_: object) -> None:
        raise AssertionError("compiled a second time")

    monkeypatch.setattr(build, "_compile", compile_again)
    open_kernels(tmp_path)
    assert [path.suffix for path in (tmp_path / "kernels").iterdir()] == [".so"]


def test_a_compiler_that_fails_is_told_in_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "broken.cpp"
    source.write_text("int main() { return nothing; }")
    monkeypatch.setattr(build, "SOURCE", source)
    with pytest.raises(NativeUnavailableError, match=r"cannot compile the CPU kernels: .*nothing"):
        open_kernels(tmp_path)


def load(folder: str, **options: Any) -> LoadedModel:
    return load_model(Load(folder=folder, model_name="tiny", kv_budget_bytes=1 << 26, **options), no_progress)


@pytest.mark.parametrize(("quantization", "weights_bytes"), [("none", 269e6), ("int8", 143e6), ("int4", 97e6)])
def test_a_model_that_they_know_runs_on_them(quantization: str, weights_bytes: float, demo_folder: str) -> None:
    model = load(demo_folder, quantization=quantization)
    assert isinstance(model.runner, NativeRunner)
    assert model.notes == ()
    assert model.capabilities.dtype == "bfloat16"
    assert model.capabilities.weights_bytes == pytest.approx(weights_bytes, rel=0.01)


def test_without_a_compiler_torch_computes_and_the_note_says_what_to_do(
    demo_folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "COMPILERS", ("no-such-compiler",))
    model = load(demo_folder)
    assert isinstance(model.runner, PackedRunner)
    (note,) = model.notes
    assert "apt install g++" in note
    for form in ("int8", "int4"):
        with pytest.raises(ModelLoadError, match=f"quantization {form} needs the CPU kernels: no C\\+\\+ compiler"):
            load(demo_folder, quantization=form)


def test_a_model_that_they_do_not_know_runs_on_torch_or_is_refused_packed_weights(
    tiny_folder: Callable[[str], str],
) -> None:
    assert isinstance(load(tiny_folder("gpt_oss")).runner, PackedRunner)
    for form in ("int8", "int4"):
        with pytest.raises(ModelLoadError, match=f"quantization {form} needs one CPU, bfloat16, KV slots and one of"):
            load(tiny_folder("gpt_oss"), quantization=form)


def test_the_embedding_counts_where_it_is_not_the_head(make: Make) -> None:
    apart, tied = make("llama"), make("smollm")
    assert apart.weights_bytes == tied.weights_bytes + 2 * SHAPE["vocab_size"] * SHAPE["hidden_size"]


def test_a_window_shorter_than_the_context_is_left_to_torch(folder: Callable[[str], Path]) -> None:
    config = check_folder(folder("mistral"))
    layout = kv_layout_from_config(config, dtype_bytes=2)

    def weights() -> Any:
        return AutoModelForCausalLM.from_pretrained(
            folder("mistral"), dtype=torch.bfloat16, attn_implementation="eager"
        ).eval()

    def choose(max_model_len: int) -> RunnerChoice:
        native = Native(open_kernels(folder("mistral")), "bfloat16", max_model_len)
        kv = KvOptions(is_paged=False, budget=lambda layout: kv_bytes(layout, max_model_len))
        return choose_runner(weights, layout, torch.device("cpu"), native, kv)

    choice = choose(640)
    assert isinstance(choice.runner, PackedRunner)
    assert choice.notes == ("torch's kernels: the CPU kernels have no windows of 8 tokens",)


def test_steps_without_logits_and_with_them_follow_each_other_at_once(make: Make) -> None:
    runner = make("llama", "bfloat16", 3)
    slot = runner.new_slot(32)
    chunk = Chunk(slot=slot, token_ids=text(3), start=0, num_logits=0)
    expected = logits_of(runner, text(4), [4])[-1]
    for _ in range(300):  # a thread that reads the next step while it leaves this one would hang or compute nonsense
        assert runner.forward([chunk]) == [None]
        rows = runner.forward([Chunk(slot=slot, token_ids=text(4)[3:], start=3, num_logits=1)])[0]
        assert rows is not None
        assert torch.equal(rows[0], expected)
