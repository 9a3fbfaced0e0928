"""How far rounding alone moves logits."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers

from gptoss.engine.rounding import rounding_noise

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# torch and transformers are only partly typed.

Folders = Callable[[str], str]


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
