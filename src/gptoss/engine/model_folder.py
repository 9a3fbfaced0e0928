"""Model folders on disk: what makes one complete, and how a prepared one is published.

Rules:
- A complete folder holds ``config.json``, safetensors weights (all shards of the index) and ``tokenizer.json``.
  Pickled weights are refused: unpickling runs whatever the file says.
- A prepared folder is written beside its final place and renamed, with a ``gptoss.json`` that says what it was made
  from. Readers need no lock: a folder under its final name is whole. Writers hold a file lock, which dies with them, so
  of two servers that prepare the same model one works and the other finds the result.
"""

import contextlib
import fcntl
import hashlib
import os
import re
import shutil
import time
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any, TypeAlias

import msgspec

from gptoss.errors import ModelLoadError

Progress: TypeAlias = Callable[[str, int, int, str], None]
"""Called with stage, done, total (0: unknown) and unit."""

MANIFEST_NAME = "gptoss.json"
FORMAT = 1
"""Raised when preparation changes what it writes; folders of another format are made anew."""

LOCK_POLL_S = 0.25
LOCK_POLLS_MAX = 14_400
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


def no_progress(stage: str, done: int, total: int, unit: str) -> None:
    """``Progress`` for those who need not know."""
    del stage, done, total, unit


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """What a prepared folder was made from.

    Attributes:
        source: path of the file or folder; ``source_bytes`` and ``source_mtime_ns`` let an unchanged one be
            recognised without reading it, ``sha256`` recognises the same content elsewhere.
        files: size of each file that preparation wrote.
        versions: of the libraries that wrote it; for the record.
    """

    format: int = FORMAT
    source: str
    source_bytes: int
    source_mtime_ns: int
    sha256: str
    dtype: str
    files: dict[str, int] = {}
    versions: dict[str, str] = {}


def check_folder(folder: Path) -> dict[str, Any]:
    """The config of a model folder whose weights are all there; the tokenizer is not looked at.

    Raises:
        ModelLoadError: says what is missing, refused or unreadable.
    """
    names = _names(folder)
    if "config.json" not in names:
        ggufs = sorted(name for name in names if name.endswith(".gguf"))
        hint = f"; pass the file itself: {folder / ggufs[0]}" if ggufs else ""
        raise ModelLoadError(f"{folder} is not a model folder: it has no config.json{hint}")
    config = read_json(folder / "config.json")
    if "model.safetensors.index.json" in names:
        _check_shards(folder, names)
    elif not any(name.endswith(".safetensors") for name in names):
        pickles = sorted(path.name for pattern in _PICKLES for path in folder.glob(pattern))
        if pickles:
            raise ModelLoadError(
                f"{folder} has only pickled weights ({pickles[0]}), which can run code when loaded; "
                "convert them to safetensors or take a GGUF file"
            )
        raise ModelLoadError(f"{folder} has no weights: neither model.safetensors nor its index is there")
    return config


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in ``path``.

    Raises:
        ModelLoadError: it cannot be read or is no JSON object.
    """
    try:
        return msgspec.json.decode(path.read_bytes(), type=dict[str, Any])
    except OSError as error:
        raise ModelLoadError(f"cannot read {path}: {error.strerror}") from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ModelLoadError(f"{path} is not a JSON object: {error}") from None


def file_sha256(path: Path, stage: str, progress: Progress) -> str:
    """Hex sha256 of a file, read in pieces of 8 MiB."""
    digest = hashlib.sha256()
    total = path.stat().st_size
    done = 0
    with path.open("rb") as file:
        while piece := file.read(8 << 20):
            digest.update(piece)
            done += len(piece)
            progress(stage, done, total, "bytes")
    return digest.hexdigest()


def read_manifest(folder: Path) -> Manifest | None:
    """The manifest of a prepared folder that is whole and of this format, else None."""
    try:
        manifest = msgspec.json.decode((folder / MANIFEST_NAME).read_bytes(), type=Manifest)
        whole = all((folder / name).stat().st_size == size for name, size in manifest.files.items())
    except (OSError, msgspec.DecodeError, UnicodeDecodeError):
        return None
    return manifest if whole and manifest.format == FORMAT else None


def find_prepared(models: Path, source: Path, dtype: str) -> Path | None:
    """The folder under ``models`` that was made from ``source`` as it now is, found without reading ``source``."""
    try:
        stat = source.stat()
        folders = sorted(path.parent for path in models.glob(f"*/{MANIFEST_NAME}"))
    except OSError:
        return None
    wanted = (str(source), stat.st_size, stat.st_mtime_ns, dtype)
    for folder in folders:
        made = read_manifest(folder)
        if made and wanted == (made.source, made.source_bytes, made.source_mtime_ns, made.dtype):
            return folder
    return None


def folder_name(*parts: str) -> str:
    """A plain file name made of ``parts``."""
    return "-".join(re.sub(r"[^\w.]+", "-", part).strip("-.") for part in parts)


def publish(target: Path, manifest: Manifest, write: Callable[[Path], dict[str, str]], progress: Progress) -> None:
    """Make the prepared folder ``target`` unless it is there already.

    Args:
        target: its final place; its parent is made when missing.
        manifest: what it is made from; sizes and versions are added here.
        write: fills the empty folder it is given and returns the versions of the libraries it used.
        progress: told while another process holds the lock.

    Raises:
        ModelLoadError: the disk refuses, or another process held the lock for an hour.
    """
    partial = target.with_name(f"{target.name}.partial")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _locked(target.with_name(f"{target.name}.lock"), progress):
            present = read_manifest(target)
            if present and present.sha256 == manifest.sha256 and present.dtype == manifest.dtype:
                return
            shutil.rmtree(partial, ignore_errors=True)  # what a killed preparation left
            partial.mkdir()
            try:
                versions = write(partial)
                _seal(partial, manifest, versions)
                shutil.rmtree(target, ignore_errors=True)
                partial.rename(target)
                _sync(target.parent)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
    except OSError as error:
        raise ModelLoadError(
            f"cannot write the prepared model to {target}: {error.strerror}; free some space or set another cache_dir"
        ) from None


def _seal(folder: Path, manifest: Manifest, versions: dict[str, str]) -> None:
    written = [path for path in folder.iterdir() if not path.is_symlink()]
    for path in written:
        path.chmod(0o644)  # safetensors writes 0600, and a cache made by root is served by another user in a container
        _sync(path)
    files = {path.name: path.stat().st_size for path in written}
    sealed = msgspec.structs.replace(manifest, files=files, versions=versions)
    (folder / MANIFEST_NAME).write_bytes(msgspec.json.format(msgspec.json.encode(sealed)))
    _sync(folder / MANIFEST_NAME)
    _sync(folder)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _locked(path: Path, progress: Progress) -> Generator[None, None, None]:
    with path.open("a") as file:
        for poll in range(LOCK_POLLS_MAX):
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                progress("waiting for another process that prepares the same model", int(poll * LOCK_POLL_S), 0, "s")
                time.sleep(LOCK_POLL_S)
        else:
            raise ModelLoadError(f"another process has held {path} for an hour; end it or set another cache_dir")
        yield


def _names(folder: Path) -> set[str]:
    try:
        return {path.name for path in folder.iterdir()}
    except OSError as error:
        raise ModelLoadError(f"cannot read {folder}: {error.strerror}") from None


def _check_shards(folder: Path, names: set[str]) -> None:
    index = read_json(folder / "model.safetensors.index.json")
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelLoadError(f"{folder / 'model.safetensors.index.json'} has no weight_map")
    shards = {str(shard) for shard in msgspec.convert(weight_map, dict[str, Any]).values()}
    missing = sorted(shards - names)
    if missing:
        raise ModelLoadError(
            f"{folder} is incomplete: {len(missing)} of {len(shards)} weight files are missing, first {missing[0]}"
        )
