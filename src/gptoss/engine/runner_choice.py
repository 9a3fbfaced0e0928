"""Picks the way to run a given model: the CPU kernels, packed rows through its own code, or one request at a time.

Rules:
- Neither the model nor this code is trusted: a way is taken only if it computes what the model itself does (``parity``).
- What is not the fastest way is said in the notes, with the reason.
- The kernels free the model's weights as they pack them, so a model that fails there is loaded a second time.
"""

import ctypes
from collections.abc import Callable
from typing import Any, TypeAlias, cast

import msgspec
import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from gptoss.engine.attention import ATTENTION_NAME, GeometryProbe, packed_attention
from gptoss.engine.kv_cache import KvGeometry
from gptoss.engine.kv_pages import PagePool, paged_layout
from gptoss.engine.memory_model import kv_bytes
from gptoss.engine.native.runner import NativeRunner, UnsupportedModelError
from gptoss.engine.native.weights import WeightFormat
from gptoss.engine.packed_linear import pack_linears
from gptoss.engine.parity import REQUESTS, TOLERANCE, TOLERANCE_MAX, TOLERANCE_PACKED, ParityError, Reference
from gptoss.engine.placement import Placement
from gptoss.engine.runner import MIN_ROWS, GenericRunner, PackedRunner, Runner
from gptoss.errors import ModelLoadError
from gptoss.messages.model import DeviceShare, KvLayout, Summation

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# torch and transformers are only partly typed.

LoadWeights: TypeAlias = Callable[[], Any]
"""Loads the model anew, with eager attention, in evaluation mode."""


class Native(msgspec.Struct, frozen=True):
    """How the CPU kernels are to be used."""

    library: ctypes.CDLL
    form: WeightFormat
    max_model_len: int
    summation: Summation = "auto"


class KvOptions(msgspec.Struct, frozen=True):
    """How KV memory is to be laid out. ``budget`` gives the bytes to take, once the weights are in."""

    is_paged: bool
    budget: Callable[[KvLayout], int]


class RunnerChoice(msgspec.Struct, frozen=True):
    """What runs the model, and what the model was before its weights were packed. ``kv_pages`` 0 are slots."""

    runner: Runner
    notes: tuple[str, ...]
    architecture: str
    vocab_size: int
    weights_bytes: int
    kv_budget_bytes: int
    kv_pages: int = 0
    shares: tuple[DeviceShare, ...] = ()


def choose_runner(
    load_weights: LoadWeights,
    layout: KvLayout,
    device: torch.device,
    native: Native | None,
    kv: KvOptions,
    placement: Placement | None = None,
) -> RunnerChoice:
    """The fastest runner that gives this model's logits.

    Args:
        load_weights: called once; a second time if the kernels turn out not to fit the model.
        layout: KV geometry that the model's config states, for the generic runner.
        device: where the model is loaded.
        native: None leaves the kernels out.
        kv: layout of KV memory; neither the CPU kernels nor the generic runner have pages.
        placement: of the model; None is whole on ``device``.

    Raises:
        ModelLoadError: packed weights are wanted and the kernels cannot run this model.
    """
    placement = placement or Placement(device)
    model = load_weights()
    vocab_size = int(model.get_input_embeddings().num_embeddings)
    weights = placement.weights(model)
    weights_bytes = sum(weights)
    reference = Reference(model, device)
    architecture = type(model).__name__

    def choice(runner: Runner, *notes: str, size: int = weights_bytes) -> RunnerChoice:
        pool = runner.pool if isinstance(runner, PackedRunner) else None
        budget, pages = (pool.num_bytes, pool.num_pages) if pool else (kv.budget(runner.layout), 0)
        shares = placement.shares(weights, budget)
        return RunnerChoice(runner, notes, architecture, vocab_size, size, budget, pages, shares)

    notes: list[str] = []
    if native is not None:
        try:
            _check_windows(layout, native.max_model_len)
            runner = _native_runner(model, native, reference)
            return choice(runner, size=runner.weights_bytes)
        except (UnsupportedModelError, ParityError) as error:
            if native.form != "bfloat16":
                raise ModelLoadError(f"quantization {native.form} needs the CPU kernels: {error}") from None
            notes.append(f"torch's kernels: {error}")
            is_spent = isinstance(error, ParityError)
        if is_spent:
            model = load_weights()
            reference = Reference(model, device)
    try:
        geometry = _packed_geometry(model, reference, placement, is_paged=kv.is_paged)
    except Exception as error:  # noqa: BLE001 - whatever the model cannot do in slots, it can do in the generic runner
        model.set_attn_implementation("eager")
        cause = " ".join(str(error).split())[:200]
        generic = GenericRunner(model, layout, device)
        return choice(generic, *notes, f"generic runner, one request at a time: {cause}")
    pool = PagePool(geometry, kv.budget(paged_layout(geometry))) if kv.is_paged else None
    return choice(PackedRunner(model, geometry, pool), *notes)


def _check_windows(layout: KvLayout, max_model_len: int) -> None:
    # The comparison of logits is shorter than real windows and would not notice.
    if layout.sliding_layers and layout.sliding_window < max_model_len:
        raise UnsupportedModelError(f"the CPU kernels have no windows of {layout.sliding_window} tokens")


def _native_runner(model: Any, native: Native, reference: Reference) -> NativeRunner:
    runner = NativeRunner(
        native.library,
        model,
        form=native.form,
        max_model_len=native.max_model_len,
        num_threads=torch.get_num_threads(),
        summation=native.summation,
    )
    reference.check_logits(runner, TOLERANCE_PACKED.get(native.form, TOLERANCE[runner.dtype]))
    return runner


def _packed_geometry(model: Any, reference: Reference, placement: Placement, *, is_paged: bool) -> KvGeometry:
    """Make the model attend over this engine's KV memory; its geometry, if its numbers are right then."""
    if placement.device.type == "cpu" and placement.shards == 1:
        pack_linears(model)
    ALL_ATTENTION_FUNCTIONS.register(ATTENTION_NAME, cast("Any", packed_attention))
    model.set_attn_implementation(ATTENTION_NAME)
    geometry = _probe_geometry(model, placement)
    num_bytes = REQUESTS * kv_bytes(paged_layout(geometry), reference.length)
    runner = PackedRunner(model, geometry, PagePool(geometry, num_bytes) if is_paged else None)
    tolerance = TOLERANCE.get(runner.dtype, max(TOLERANCE.values()))
    if reference.check_logits(runner, TOLERANCE_MAX) > tolerance:
        reference.check_parts(runner, tolerance)
    return geometry


@torch.inference_mode()
def _probe_geometry(model: Any, placement: Placement) -> KvGeometry:
    probe = GeometryProbe()
    rows = torch.zeros((1, MIN_ROWS), dtype=torch.long, device=placement.device)
    model(input_ids=rows, position_ids=rows, use_cache=False, logits_to_keep=1, packed=probe)
    return placement.geometry(probe.layers(), probe.dtype)
