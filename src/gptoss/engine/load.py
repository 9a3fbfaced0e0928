"""Loads a prepared model folder: weights, tokenizer, limits and fingerprint.

Rules:
- Safetensors only, no remote code, no network. Whatever goes wrong becomes a ``ModelLoadError`` of one line.
- ``auto`` is bfloat16, except where torch's kernels run on a CPU without bfloat16 instructions: there float32, if that
  fits well into free memory. Measured there on the 135M model with packed linear layers, bfloat16 against float32: prefill of 136 tokens 595 and
  242 ms, a decoding step 75 and 60 ms at one stream, 103 and 80 ms at eight.
- The weights are hashed in a thread beside the loading. A file of the hub's cache is named by its hash already.
"""

import hashlib
import re
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import msgspec
import psutil
import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, core_model_loading
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from gptoss.config import Settings
from gptoss.engine.memory_model import kv_bytes, kv_layout_from_config, max_model_len_from_config, workspace_bytes
from gptoss.engine.model_folder import Progress, check_folder, file_sha256, no_progress, read_json
from gptoss.engine.mxfp4 import count_parameters, weight_forms
from gptoss.engine.native.build import NativeUnavailableError, open_kernels
from gptoss.engine.native.runner import ARCHITECTURES, NativeRunner
from gptoss.engine.port import Load
from gptoss.engine.prompt import eos_token_ids, load_tokenizer
from gptoss.engine.runner import Runner
from gptoss.engine.runner_choice import KvOptions, Native, choose_runner
from gptoss.errors import ModelLoadError
from gptoss.messages.model import EngineCapabilities, KvLayout, ModelFingerprint

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# transformers is only partly typed.

CHUNK_TOKENS = {"cpu": 256, "cuda": 2048}
"""In how large pieces prompts are computed; a step takes two at most."""
KV_SHARE = {"cpu": 0.25, "cuda": 0.85}
"""Part of the memory that is free once the weights are in, taken for KV when no budget is set."""
FLOAT32_SHARE_MAX = 0.25
"""``auto`` takes float32 only if the weights then fill at most this part of the free memory."""
PROGRESS_STEPS = 50
_SHA256_NAME = re.compile(r"[0-9a-f]{64}")


class LoadedModel(msgspec.Struct, frozen=True, kw_only=True):
    """A model that can run. ``notes`` are for people: what is not as they may expect."""

    runner: Runner
    tokenizer: Tokenizer
    capabilities: EngineCapabilities
    fingerprint: ModelFingerprint
    notes: tuple[str, ...]


def load_model(load: Load, progress: Progress) -> LoadedModel:
    """Load what ``load`` names. Blocks for seconds to minutes.

    Raises:
        ModelLoadError: the folder cannot be read, the architecture is not supported, memory or the device is missing.
    """
    folder = Path(load.folder)
    config = check_folder(folder)
    device = _device(load.device)
    _check_architecture(folder, config)
    max_model_len = _max_model_len(load, config)
    tokenizer = load_tokenizer(load.folder)
    native, notes = _choose_kernels(load, config, device, max_model_len, progress)
    is_paged = load.kv_layout == "paged" or (load.kv_layout == "auto" and device.type == "cuda")
    dtype = torch.bfloat16 if native else _choose_dtype(load, folder, device)
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="fingerprint") as hasher:
        fingerprint = hasher.submit(_fingerprint, folder)
        try:
            layout = kv_layout_from_config(config, dtype_bytes=dtype.itemsize)
            weights = _Weights(folder, config, dtype, device)
            workspace = _workspace(config, load.max_batch_size, dtype, device)
            kv = KvOptions(
                is_paged,
                lambda layout: (
                    load.kv_budget_bytes or _kv_budget(layout, load.max_batch_size, max_model_len, device, workspace)
                ),
            )
            choice = choose_runner(lambda: weights.load(progress), layout, device, native, kv)
        except (MemoryError, torch.OutOfMemoryError) as error:
            raise ModelLoadError(f"not enough memory for {folder} on {device}: {_one_line(error)}") from None
        except ModelLoadError:
            raise
        except Exception as error:  # noqa: BLE001 - the edge to transformers, which raises anything on a bad folder
            raise ModelLoadError(f"cannot load {folder}: {_one_line(error)}") from None
        hashes = fingerprint.result()
    runner = choice.runner
    capabilities = EngineCapabilities(
        model_name=load.model_name,
        architecture=choice.architecture,
        vocab_size=choice.vocab_size,
        max_model_len=max_model_len,
        max_batch_size=load.max_batch_size,
        kv_budget_bytes=choice.kv_budget_bytes,
        kv_layout=runner.layout,
        weights_bytes=choice.weights_bytes,
        device=str(device),
        dtype=str(dtype).removeprefix("torch."),
        num_threads=torch.get_num_threads(),
        eos_token_ids=eos_token_ids(load.folder, tokenizer),
        kv_pages=choice.kv_pages,
        summation=runner.summation if isinstance(runner, NativeRunner) else "auto",
        workspace_bytes=workspace,
    )
    return LoadedModel(
        runner=runner,
        tokenizer=tokenizer,
        capabilities=capabilities,
        fingerprint=hashes,
        notes=(*notes, *weights.notes, *choice.notes, *_page_notes(capabilities)),
    )


def _page_notes(capabilities: EngineCapabilities) -> tuple[str, ...]:
    if not capabilities.kv_pages:
        return ()
    longest = kv_bytes(capabilities.kv_layout, capabilities.max_model_len)
    return (
        f"KV memory in {capabilities.kv_pages} pages of {capabilities.kv_layout.block_tokens} tokens, "
        f"{capabilities.kv_budget_bytes / 1e9:.1f} GB: {capabilities.kv_budget_bytes / longest:.1f} requests "
        f"of {capabilities.max_model_len} tokens",
    )


def _device(name: str) -> torch.device:
    """The torch device called ``name``; several CPU engines, ``cpu:0`` and so on, are all the one CPU."""
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ModelLoadError(f"device is {name!r}; it must be cpu or one such as cuda:0") from None
    if device.type == "cpu":
        return torch.device("cpu")
    if device.type != "cuda":
        raise ModelLoadError(f"device is {name!r}; only cpu and cuda devices are supported")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    index = device.index or 0
    if index >= count:
        raise ModelLoadError(f"device is {name!r}, but torch sees {count} CUDA devices; use cpu or install CUDA torch")
    return torch.device("cuda", index)


def _check_architecture(folder: Path, config: dict[str, Any]) -> None:
    model_type = config.get("model_type")
    if model_type not in cast("Any", MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
        raise ModelLoadError(f"{folder}: model_type is {model_type!r}, which transformers has no causal LM for")


def _max_model_len(load: Load, config: dict[str, Any]) -> int:
    context = max_model_len_from_config(config)
    if load.max_model_len > context:
        raise ModelLoadError(f"max_model_len is {load.max_model_len}; the model's context is {context} tokens")
    return load.max_model_len or context


def _choose_kernels(
    load: Load, config: dict[str, Any], device: torch.device, max_model_len: int, progress: Progress
) -> tuple[Native | None, tuple[str, ...]]:
    """The CPU kernels, if they are wanted and may be had for this model, and a note if they are missed."""
    form = "bfloat16" if load.quantization == "none" else load.quantization
    fits = load.dtype in {"auto", "bfloat16"} and load.kv_layout != "paged"
    is_wanted = device.type == "cpu" and load.kernels != "torch" and fits
    is_known = not ARCHITECTURES.isdisjoint(config.get("architectures") or ())
    must = "kernels native needs" if load.kernels == "native" else ""
    if load.quantization != "none":
        must = f"quantization {load.quantization} needs"
    if not is_wanted or not is_known:
        if must:
            raise ModelLoadError(f"{must} a CPU, bfloat16, KV slots and one of {', '.join(sorted(ARCHITECTURES))}")
        return None, ()
    try:
        folder = Settings(cache_dir=load.cache_folder).cache_path
        progress("kernels", 0, 0, "files")
        return Native(open_kernels(folder), form, max_model_len, load.summation), ()
    except NativeUnavailableError as error:
        if must:
            raise ModelLoadError(f"{must} the CPU kernels: {error}") from None
        return None, (f"torch's kernels: {error}",)


def _choose_dtype(load: Load, folder: Path, device: torch.device) -> torch.dtype:
    if load.dtype != "auto":
        return cast("torch.dtype", getattr(torch, load.dtype))
    if device.type != "cpu" or _has_bfloat16_instructions():
        return torch.bfloat16
    float32_bytes = torch.float32.itemsize * count_parameters(folder)
    fits = float32_bytes <= FLOAT32_SHARE_MAX * psutil.virtual_memory().available
    return torch.float32 if fits else torch.bfloat16


def _has_bfloat16_instructions() -> bool:
    cpu = cast("Any", torch.cpu)
    return bool(cpu._is_avx512_bf16_supported() or cpu._is_amx_tile_supported())  # noqa: SLF001 - torch has no public name


class _Weights:
    """The weights of a folder, in the first form that can be loaded.

    Attributes:
        notes: which form that is, and why not an earlier one.
    """

    def __init__(self, folder: Path, config: dict[str, Any], dtype: torch.dtype, device: torch.device) -> None:
        self._folder = folder
        self._dtype = dtype
        self._device = device
        self._forms = list(weight_forms(folder, config, dtype, device))
        self._failed: list[str] = []

    @property
    def notes(self) -> tuple[str, ...]:
        return tuple(note for note in (*self._failed, self._forms[0].note) if note)

    def load(self, progress: Progress) -> Any:
        """Load the model anew."""
        while len(self._forms) > 1:
            try:
                return self._load(progress)
            except Exception as error:  # noqa: BLE001 - the edge to transformers; the next form is tried then
                self._failed.append(f"not {self._forms[0].note}: {_one_line(error)}")
            del self._forms[0]
        return self._load(progress)

    def _load(self, progress: Progress) -> Any:
        with _report_weights(progress):
            model, info = cast("Any", AutoModelForCausalLM).from_pretrained(
                self._folder,
                dtype=self._dtype,
                device_map={"": self._device} if self._device.type == "cuda" else None,
                attn_implementation="eager",
                use_safetensors=True,
                trust_remote_code=False,
                local_files_only=True,
                output_loading_info=True,
                **self._forms[0].options,
            )
        missing = sorted(info["missing_keys"])
        if missing:  # transformers would go on with random numbers in their place
            raise ModelLoadError(f"{self._folder} lacks {len(missing)} weights of the model, first {missing[0]}")
        progress("checking", 0, 0, "steps")  # what comes next: does a runner give its logits?
        return model.eval().requires_grad_(False)


@contextmanager
def _report_weights(progress: Progress) -> Generator[None]:
    """Turn transformers' progress bar into calls of ``progress`` while the block runs."""
    module = cast("Any", core_model_loading)
    original = module.tqdm

    def report(weights: Iterable[Any], **_: Any) -> Iterator[Any]:
        items = list(weights)
        every = max(1, len(items) // PROGRESS_STEPS)
        for done, item in enumerate(items):
            if done % every == 0:
                progress("weights", done, len(items), "tensors")
            yield item
        progress("weights", len(items), len(items), "tensors")

    module.tqdm = report
    try:
        yield
    finally:
        module.tqdm = original


def _workspace(config: dict[str, Any], max_batch_size: int, dtype: torch.dtype, device: torch.device) -> int:
    """Of the largest step, as estimated; 0 where a config leaves too much out, which is no reason not to serve it."""
    tokens = 2 * CHUNK_TOKENS[device.type] + max_batch_size
    try:
        return workspace_bytes(config, tokens=tokens, rows=max_batch_size, dtype_bytes=dtype.itemsize)
    except (ModelLoadError, TypeError, ValueError):
        return 0


def _kv_budget(layout: KvLayout, max_batch_size: int, max_model_len: int, device: torch.device, workspace: int) -> int:
    if device.type == "cuda":
        torch.cuda.empty_cache()  # what loading left over
        free, _ = torch.cuda.mem_get_info(device)
    else:
        free = psutil.virtual_memory().available
    room = min(int(KV_SHARE[device.type] * free), max(0, free - workspace))
    return min(room, max_batch_size * kv_bytes(layout, max_model_len))


def _fingerprint(folder: Path) -> ModelFingerprint:
    template = folder / "chat_template.jinja"
    if template.exists():
        template_hash = _sha256(template)
    else:
        settings = read_json(folder / "tokenizer_config.json") if (folder / "tokenizer_config.json").exists() else {}
        given = settings.get("chat_template")
        template_hash = hashlib.sha256(given.encode()).hexdigest() if isinstance(given, str) else ""
    weights = "".join(f"{path.name} {_sha256(path)}\n" for path in sorted(folder.glob("*.safetensors")))
    return ModelFingerprint(
        weights=hashlib.sha256(weights.encode()).hexdigest(),
        tokenizer=_sha256(folder / "tokenizer.json"),
        chat_template=template_hash,
        config=_sha256(folder / "config.json"),
    )


def _sha256(path: Path) -> str:
    blob = path.resolve()
    if blob.parent.name == "blobs" and _SHA256_NAME.fullmatch(blob.name):
        return blob.name
    return file_sha256(blob, "fingerprint", no_progress)


def _one_line(error: BaseException) -> str:
    return " ".join(f"{error}".split())[:300] or type(error).__name__
