"""How a model lies on its devices: whole on one, some layers on each (pipeline), or a part of every layer on each (tensor).

Rules:
- Bytes are those of all devices together, so that a reservation means the same everywhere; ``shares`` says what of them is
  on which. A budget is what the fullest device allows.
- Pipeline: one process holds all devices. accelerate's device map says which block is where and its hooks carry what passes
  from one to the next; the KV memory of a layer stands on the layer's device.
- Tensor: one process for each device (``ranks``), all of them in lockstep. transformers' tensor-parallel plans cut the
  matrices and join the results over ``torch.distributed``: NCCL on GPUs, gloo on CPUs. Each has the KV heads of its part.
- On a CPU the devices are parts of the one memory. That is of no use but to run and test the same code without GPUs.
"""

import logging
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import accelerate
import msgspec
import psutil
import torch
from accelerate.utils import compute_module_sizes
from torch import distributed, nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.modeling_layers import GradientCheckpointingLayer

from gptoss.engine.kv_cache import KvGeometry, LayerGeometry
from gptoss.engine.memory_model import kv_bytes
from gptoss.errors import ModelLoadError
from gptoss.messages.model import DeviceShare, KvLayout

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# accelerate and transformers are only partly typed.

KV_SHARE = {"cpu": 0.25, "cuda": 0.85}
"""Part of the memory that is free once the weights are in, taken for KV when no budget is set."""
GPT_OSS_PLAN = {
    "self_attn.q_proj": "colwise",
    "self_attn.k_proj": "colwise",
    "self_attn.v_proj": "colwise",
    "self_attn.o_proj": "rowwise",
    "self_attn.sinks": "colwise",
    "self_attn": "local_params",
    # [expert, in, out], gate and up in turn: a run of columns has both halves of whole neurons.
    "mlp.experts.gate_up_proj": "rowwise",
    "mlp.experts.gate_up_proj_bias": "rowwise",
    "mlp.experts.down_proj": "colwise",
    "mlp.experts": "moe_tp_experts",
}
"""transformers has a plan for gpt-oss over experts only; this is one by heads and neurons, as for other models."""


class Placement:
    """A whole model on one device.

    Args:
        device: which.

    Attributes:
        devices: all of them, the first being where logits come out.
        shards: processes that each hold a part of every layer.
        notes: for people.
    """

    shards = 1
    notes: tuple[str, ...] = ()

    def __init__(self, *devices: torch.device) -> None:
        self.devices = devices

    @property
    def device(self) -> torch.device:
        """Where tokens go in and logits come out."""
        return self.devices[0]

    def options(self) -> dict[str, Any]:
        """Arguments of ``from_pretrained``."""
        return {"device_map": {"": self.device} if self.device.type == "cuda" else None}

    def settle(self, model: Any) -> None:
        """Do what is left to do once the weights are in."""

    def geometry(self, layers: Sequence[LayerGeometry], dtype: torch.dtype) -> KvGeometry:
        """Where the keys and values of each layer stand."""
        return KvGeometry(list(layers), dtype, self.device)

    def kv_budget(self, layout: KvLayout, max_batch_size: int, max_model_len: int, *, workspace: int) -> int:
        """KV memory to take when no budget is set: as much as can be of use, as far as there is room.

        Args:
            layout: of KV memory.
            max_batch_size: requests that run at once.
            max_model_len: tokens of each.
            workspace: bytes that a step may take besides, on each device.
        """
        return min(self._kv_room(workspace), max_batch_size * kv_bytes(layout, max_model_len))

    def weights(self, model: Any) -> tuple[int, ...]:
        """Bytes on each device, before anything is packed."""
        return (sum(parameter.numel() * parameter.element_size() for parameter in model.parameters()),)

    def shares(self, weights: tuple[int, ...], kv_budget_bytes: int) -> tuple[DeviceShare, ...]:
        """What is on which device, where there are several."""
        if len(self.devices) == 1:
            return ()
        return tuple(
            DeviceShare(device=str(device), weights_bytes=held, kv_budget_bytes=int(kv_budget_bytes * part))
            for device, held, part in zip(self.devices, weights, self._kv_parts(), strict=True)
        )

    def _kv_parts(self) -> list[float]:
        """Of a request's KV memory, what each device has."""
        return [1 / len(self.devices)] * len(self.devices)

    def _kv_room(self, workspace: int) -> int:
        return _room(self.device, workspace)


class Pipeline(Placement):
    """Some layers on each device.

    Args:
        folder: of the model, for the sizes of its blocks.
        dtype: of the weights.
        devices: in the order of the layers.

    Raises:
        ModelLoadError: the model has fewer blocks than there are devices.
    """

    def __init__(self, folder: Path, dtype: torch.dtype, *devices: torch.device) -> None:
        super().__init__(*devices)
        self._stages = _stages(folder, dtype, len(devices))
        self._stage_of_layer: dict[int, int] = {}

    def options(self) -> dict[str, Any]:
        """See ``Placement``."""
        if self.device.type == "cpu":
            return {"device_map": None}
        return {"device_map": {name: self.devices[stage] for name, stage in self._stages.items()}}

    def settle(self, model: Any) -> None:
        """See ``Placement``; accelerate takes several stages on a CPU only when it is asked to."""
        for name, module in model.named_modules():
            if isinstance(getattr(module, "layer_idx", None), int):
                self._stage_of_layer[module.layer_idx] = self._stage_of(name)
        if self.device.type == "cpu":
            with _quiet("accelerate.big_modeling"):
                accelerate.dispatch_model(model, dict.fromkeys(self._stages, "cpu"), force_hooks=True)
        layers = [sum(found == stage for found in self._stage_of_layer.values()) for stage in range(len(self.devices))]
        self.notes = (f"pipeline over {', '.join(map(str, self.devices))}: {', '.join(map(str, layers))} layers",)

    def geometry(self, layers: Sequence[LayerGeometry], dtype: torch.dtype) -> KvGeometry:
        """See ``Placement``."""
        placed = [
            msgspec.structs.replace(layer, stage=self._stage_of_layer.get(index, 0))
            for index, layer in enumerate(layers)
        ]
        return KvGeometry(placed, dtype, self.device, stages=self.devices)

    def weights(self, model: Any) -> tuple[int, ...]:
        """See ``Placement``."""
        held = [0] * len(self.devices)
        for name, parameter in model.named_parameters():
            held[self._stage_of(name)] += parameter.numel() * parameter.element_size()
        return tuple(held)

    def _kv_room(self, workspace: int) -> int:
        if self.device.type == "cpu":
            return super()._kv_room(workspace)
        rooms = [_room(device, workspace) for device in self.devices]
        return int(min(room / part for room, part in zip(rooms, self._kv_parts(), strict=True) if part))

    def _kv_parts(self) -> list[float]:
        # Layers count alike.
        stages = list(self._stage_of_layer.values())
        return [stages.count(stage) / max(1, len(stages)) for stage in range(len(self.devices))]

    def _stage_of(self, name: str) -> int:
        holders = [block for block in self._stages if not block or name == block or name.startswith(f"{block}.")]
        return self._stages[max(holders, key=len)] if holders else 0


class Tensor(Placement):
    """A part of every layer on each device; this process has one of them, as ``rank``.

    Args:
        config: of the model.
        rank: of this process, whose device ``devices[rank]`` is.
        devices: of all ranks.

    Raises:
        ModelLoadError: the heads cannot be shared out evenly.
    """

    def __init__(self, config: dict[str, Any], rank: int, *devices: torch.device) -> None:
        super().__init__(*devices)
        self.shards = len(devices)
        self._rank = rank
        self._is_gpt_oss = config.get("model_type") == "gpt_oss"
        for name in ("num_attention_heads", "num_key_value_heads"):
            count = config.get(name)
            if isinstance(count, int) and count % self.shards:
                raise ModelLoadError(f"gpu_mode is tensor over {self.shards} devices, but {name} is {count}")
        self.notes = (f"tensor parallel over {', '.join(map(str, devices))}",)

    @property
    def device(self) -> torch.device:
        """See ``Placement``."""
        return self.devices[self._rank]

    def options(self) -> dict[str, Any]:
        """See ``Placement``."""
        from transformers.distributed.configuration_utils import DistributedConfig  # noqa: PLC0415 - only here

        plan = {f"model.layers.*.{name}": style for name, style in GPT_OSS_PLAN.items()} if self._is_gpt_oss else None
        return {"distributed_config": DistributedConfig(tp_size=self.shards, tp_plan=plan)}

    def settle(self, model: Any) -> None:
        """See ``Placement``. Every rank adds the bias of the experts before the sums are joined."""
        if self._is_gpt_oss:
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    if name.endswith("experts.down_proj_bias"):
                        parameter.div_(self.shards)

    def geometry(self, layers: Sequence[LayerGeometry], dtype: torch.dtype) -> KvGeometry:
        """See ``Placement``."""
        return KvGeometry(list(layers), dtype, self.device, shards=self.shards)

    def weights(self, model: Any) -> tuple[int, ...]:
        """See ``Placement``; the ranks are alike, and each has all of what is not cut."""
        return (sum(local_part(each).numel() * each.element_size() for each in model.parameters()),) * self.shards

    def _kv_room(self, workspace: int) -> int:
        """The same on every rank. GPUs have a memory each, CPUs share theirs."""
        room = torch.tensor([super()._kv_room(workspace)], dtype=torch.int64, device=self.device)
        distributed.all_reduce(room, distributed.ReduceOp.MIN)
        return int(room) * (self.shards if self.device.type == "cuda" else 1)


def _room(device: torch.device, workspace: int) -> int:
    """For KV memory on one device."""
    free = free_bytes(device)
    return min(int(KV_SHARE[device.type] * free), max(0, free - workspace))


def free_bytes(device: torch.device) -> int:
    """Memory of a device that nobody uses now."""
    if device.type == "cuda":
        torch.cuda.empty_cache()  # what loading left over
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available


def local_part(parameter: torch.Tensor) -> torch.Tensor:
    """What this process holds of a parameter."""
    return cast("Any", parameter).to_local() if hasattr(parameter, "to_local") else parameter


def _stages(folder: Path, dtype: torch.dtype, count: int) -> dict[str, int]:
    """Which stage each block of the model belongs to: in order, where the middle of its bytes falls."""
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    with accelerate.init_empty_weights():
        model: Any = cast("Any", AutoModelForCausalLM).from_config(config, dtype=dtype)
    sizes = compute_module_sizes(model, dtype=cast("Any", dtype))
    blocks = list(_blocks(model, ""))
    total = sum(sizes[name] for name, _ in blocks)
    stages: dict[str, int] = {}
    before = 0
    for name, _ in blocks:
        stages[name] = min(count - 1, int(count * (before + sizes[name] / 2) / total))
        before += sizes[name]
    if {stages[name] for name, is_layer in blocks if is_layer} != set(range(count)):
        raise ModelLoadError(f"{folder} cannot be cut into {count} stages: it has too few layers")
    return stages


def _blocks(module: nn.Module, prefix: str) -> Iterator[tuple[str, bool]]:
    """Names of what goes to one device as a whole, in order, and whether that is a layer."""
    for name, child in module.named_children():
        is_layer = isinstance(child, GradientCheckpointingLayer)
        if is_layer or not any(isinstance(each, GradientCheckpointingLayer) for each in child.modules()):
            yield f"{prefix}{name}", is_layer
        else:
            yield from _blocks(child, f"{prefix}{name}.")


@contextmanager
def _quiet(logger: str) -> Generator[None]:
    """No warnings of a library's logger while the block runs."""
    found = logging.getLogger(logger)
    level = found.level
    found.setLevel(logging.ERROR)
    try:
        yield
    finally:
        found.setLevel(level)
