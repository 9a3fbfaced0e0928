"""What preparation needs transformers for: dequantising a GGUF file, and converting a slow tokenizer.

Rules: imported only inside the preparing child process, which may take seconds to start and is free to swap functions
of third-party modules. No remote code, ever.
"""

import functools
import importlib.metadata
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, cast

import gguf
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, modeling_gguf_pytorch_utils

from gptoss.engine.model_folder import Progress
from gptoss.errors import ModelLoadError

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# transformers and gguf are only partly typed.


def export_gguf(source: Path, folder: Path, *, dtype: str, progress: Progress) -> dict[str, str]:
    """Dequantise ``source`` into ``folder`` as an ordinary model folder.

    Args:
        source: a GGUF file with weights and tokenizer.
        folder: an empty folder.
        dtype: ``bfloat16`` or ``float32``, of the weights to write.
        progress: told about each tensor.

    Returns:
        the versions of the libraries that did it.

    Raises:
        ModelLoadError: the file is broken or of an architecture that transformers cannot read.
    """
    _read_once(progress)
    place: dict[str, Any] = {"gguf_file": source.name, "trust_remote_code": False, "local_files_only": True}
    try:
        progress("reading the tokenizer", 0, 0, "files")
        tokenizer: Any = AutoTokenizer.from_pretrained(source.parent, **place)
        progress("reading the weights", 0, 0, "tensors")
        model: Any = AutoModelForCausalLM.from_pretrained(
            source.parent,
            dtype=getattr(torch, dtype),
            quantization_config=GgufConfig(gguf_file=source.name, dequantize=True),
            **place,
        )
    except Exception as error:  # noqa: BLE001 - the edge to transformers, which raises anything on a bad file
        cause = " ".join(str(error).split())[:300]
        raise ModelLoadError(f"cannot read {source} as a GGUF model: {cause}") from None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config  # the copy is not quantised any more
    model.hf_quantizer = None
    progress("writing the weights", 0, 0, "files")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return _versions() | {"gguf": _gguf_version()}


def export_tokenizer(source: Path, folder: Path) -> dict[str, str]:
    """Write ``tokenizer.json`` and its settings for the slow tokenizer in ``source``.

    Returns:
        the versions of the libraries that did it.

    Raises:
        ModelLoadError: there is no tokenizer, or none that converts.
    """
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(source, trust_remote_code=False, local_files_only=True)
        tokenizer.save_pretrained(folder)
    except Exception as error:  # noqa: BLE001 - the edge to transformers, which raises anything on a bad file
        cause = " ".join(str(error).split())[:300]
        raise ModelLoadError(f"cannot make a tokenizer.json from the tokenizer in {source}: {cause}") from None
    if not (folder / "tokenizer.json").exists():
        raise ModelLoadError(f"the tokenizer in {source} has no fast version, so tokenizer.json cannot be made")
    return _versions()


def _read_once(progress: Progress) -> None:
    """Let transformers parse the file and build its name map once instead of hundreds of times, and report tensors.

    Measured on the demo model: 31 s before, 19 s after, on two slow cores; the files written are identical.
    """
    module = cast("Any", gguf)
    module.GGUFReader = functools.cache(gguf.GGUFReader)
    module.get_tensor_name_map = functools.cache(gguf.get_tensor_name_map)

    def report(tensors: Collection[Any], **_: Any) -> Iterator[Any]:
        for done, tensor in enumerate(tensors):
            progress("dequantising", done, len(tensors), "tensors")
            yield tensor

    cast("Any", modeling_gguf_pytorch_utils).tqdm = report


def _versions() -> dict[str, str]:
    return {"torch": str(torch.__version__), "transformers": transformers.__version__}


def _gguf_version() -> str:
    return importlib.metadata.version("gguf")
