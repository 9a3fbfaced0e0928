"""Tiny models with random weights, and the demo model loaded."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from gptoss.engine.model_folder import no_progress
from gptoss.engine.port import Load

if TYPE_CHECKING:
    from gptoss.engine.load import LoadedModel

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# torch and transformers are only partly typed.


TINY: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 640,
    "eos_token_id": 256,
    "bos_token_id": None,
    "pad_token_id": None,
    "tie_word_embeddings": False,
}
"""Of the tiny models: token ids below 256 are single bytes, 256 is the end of a text."""
LLAMA32: dict[str, Any] = {**TINY, "head_dim": 32}
"""Of a shape that the CPU kernels take."""
TIED: dict[str, Any] = {**TINY, "tie_word_embeddings": True}


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    """Makes a prepared folder of a two-layer model with random weights, by the name of its kind."""
    import torch
    import transformers

    kinds: dict[str, Callable[[], Any]] = {
        "llama": lambda: transformers.LlamaConfig(**TINY),
        "llama32": lambda: transformers.LlamaConfig(**LLAMA32),
        "smollm": lambda: transformers.LlamaConfig(**TIED),
        "mistral": lambda: transformers.MistralConfig(**TINY, sliding_window=8),
        "qwen2": lambda: transformers.Qwen2Config(**TINY),
        "qwen3": lambda: transformers.Qwen3Config(
            **TINY, use_sliding_window=True, sliding_window=8, max_window_layers=1
        ),
        "gpt_oss": lambda: transformers.GptOssConfig(
            **TINY,
            num_local_experts=4,
            num_experts_per_tok=2,
            sliding_window=8,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        ),
        "gpt_oss_yarn": lambda: transformers.GptOssConfig(
            **TINY,
            num_local_experts=4,
            num_experts_per_tok=2,
            sliding_window=8,
            rope_parameters={  # as the published models have it, over a shorter context
                "rope_type": "yarn",
                "rope_theta": 150000.0,
                "factor": 16.0,
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "truncate": False,
                "original_max_position_embeddings": 40,
            },
        ),
        "gemma2": lambda: transformers.Gemma2Config(**TINY, sliding_window=8),
    }

    @functools.cache
    def make(kind: str) -> str:
        folder = tmp_path_factory.mktemp(kind)
        torch.manual_seed(1)
        model: Any = transformers.AutoModelForCausalLM.from_config(kinds[kind](), dtype=torch.float32)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("sinks"):
                    parameter.normal_()
                elif name.endswith("bias"):
                    parameter.normal_(std=0.1)  # transformers starts them at zero, which hides whether they are used
                elif parameter.ndim > 1:
                    parameter.mul_(5)  # far from uniform, so that a wrong step shows
        model.save_pretrained(folder)
        write_byte_tokenizer(folder / "tokenizer.json")
        return str(folder)

    return make


def write_byte_tokenizer(path: Path) -> None:
    """A byte-level tokenizer without merges: token ``b`` is the byte ``b``, token 256 the special ``<|end|>``."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    from gptoss.engine.token_text import byte_alphabet

    tokenizer = Tokenizer(models.BPE(vocab=byte_alphabet(), merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<|end|>", special=True)])
    tokenizer.save(str(path))


@pytest.fixture(scope="session")
def tiny_model(tiny_folder: Callable[[str], str]) -> Callable[..., "LoadedModel"]:
    """Loads a tiny model, once for each kind and set of options; in float32 unless they say otherwise."""
    import torch

    from gptoss.engine.load import load_model

    @functools.cache
    def load(kind: str = "llama", **options: Any) -> "LoadedModel":
        torch.set_num_threads(1)  # several would only wait for each other on models this small
        options = {"dtype": "float32", "max_batch_size": 8, "kv_budget_bytes": 1 << 30} | options
        return load_model(Load(folder=tiny_folder(kind), model_name=kind, **options), no_progress)

    return load


@pytest.fixture(scope="session", params=["slots", "paged"])
def laid_out(tiny_model: Callable[..., "LoadedModel"], request: pytest.FixtureRequest) -> Callable[..., "LoadedModel"]:
    """``tiny_model`` with KV memory in slots, and again in pages."""
    return functools.partial(tiny_model, kv_layout=request.param)
