"""From what the user calls a model to a prepared local folder.

Rules:
- ``demo``, ``20b`` and ``120b`` are names; what exists on disk is a folder or a ``.gguf`` file; ``org/name`` is a hub
  id. Anything else is refused before anything starts.
- The quick path (a complete folder, or a copy prepared earlier) needs neither torch nor transformers and runs in the
  caller's process. Everything else runs in a child process, which can be killed and cannot take the server with it.
- A prepared folder is complete: config, safetensors weights, ``tokenizer.json`` and chat template in one place.
"""

import hashlib
import os
import re
import selectors
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Literal, TypeAlias

import msgspec

from gptoss.engine import demo
from gptoss.engine.memory_model import max_model_len_from_config
from gptoss.engine.model_folder import (
    Manifest,
    Progress,
    check_folder,
    file_sha256,
    find_prepared,
    folder_name,
    publish,
    read_json,
    read_manifest,
)
from gptoss.errors import ConfigError, GptossError, ModelLoadError

HUB_NAMES = {"20b": "openai/gpt-oss-20b", "120b": "openai/gpt-oss-120b"}
POLL_S = 0.5
SILENCE_MAX_S = 1800
_ERRORS: dict[str, type[GptossError]] = {cls.code: cls for cls in (ConfigError, ModelLoadError)}
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)


class ModelSpec(msgspec.Struct, frozen=True, kw_only=True):
    """What the user's model argument means.

    Attributes:
        location: the hub id, or the absolute path of the folder or file; for the demo its package.
        model_name: the name it is served under unless the settings say otherwise.
    """

    kind: Literal["demo", "hub", "folder", "gguf"]
    location: str
    model_name: str


class PreparedModel(msgspec.Struct, frozen=True, kw_only=True):
    """A folder that an engine can load.

    Attributes:
        folder: holds ``config.json``, ``*.safetensors``, ``tokenizer.json``, ``tokenizer_config.json`` and, if the
            model has one, the chat template.
        source: what it came from: hub id, path or package.
        max_model_len: the model's context in tokens.
    """

    folder: str
    model_name: str
    source: str
    max_model_len: int


class PrepareRequest(msgspec.Struct, frozen=True, kw_only=True):
    """The child's first line of input: the arguments of ``prepare_model``."""

    model: str
    cache_dir: str
    dtype: str


class Progressed(msgspec.Struct, frozen=True, tag=True):
    """A line of the child's output: one call of ``progress``."""

    stage: str
    done: int
    total: int
    unit: str


class Prepared(msgspec.Struct, frozen=True, tag=True):
    """The child's last line when it succeeded."""

    model: PreparedModel


class Refused(msgspec.Struct, frozen=True, tag=True):
    """The child's last line when it failed; ``code`` is one of ``gptoss.errors``."""

    code: str
    message: str


ChildLine: TypeAlias = Progressed | Prepared | Refused
_line_decoder: msgspec.json.Decoder[ChildLine] = msgspec.json.Decoder(Progressed | Prepared | Refused)


def resolve_model(model: str) -> ModelSpec:
    """Say what ``model`` is, without touching the network.

    Raises:
        ConfigError: it is neither a known name, nor an existing folder or GGUF file, nor a hub id.
    """
    if model == "demo":
        return ModelSpec(kind="demo", location=demo.REQUIREMENT, model_name=demo.MODEL_NAME)
    if model in HUB_NAMES:
        return ModelSpec(kind="hub", location=HUB_NAMES[model], model_name=HUB_NAMES[model].rpartition("/")[2])
    if not model or "\0" in model:
        raise ConfigError(f"model is {model!r}; give demo, 20b, 120b, a hub id, a folder or a .gguf file")
    path = Path(model).expanduser().absolute()
    if path.is_dir():
        return ModelSpec(kind="folder", location=str(path), model_name=path.resolve().name)
    if path.is_file():
        if path.suffix != ".gguf":
            raise ConfigError(f"model is {model!r}, a file that is not .gguf; give a model folder or a .gguf file")
        return ModelSpec(kind="gguf", location=str(path), model_name=path.stem)
    if model.startswith(("/", "./", "../", "~")) or model.endswith(".gguf"):
        raise ConfigError(f"model is {model!r}, but there is no such file or folder")
    if _HUB_ID.fullmatch(model):
        return ModelSpec(kind="hub", location=model, model_name=model.rpartition("/")[2])
    raise ConfigError(
        f"model is {model!r}, which is neither demo, 20b or 120b, nor an existing folder or .gguf file, "
        "nor a hub id of the form org/name"
    )


def find_ready(spec: ModelSpec, *, cache_dir: Path, dtype: str) -> PreparedModel | None:
    """The model if it can be loaded as it stands or was prepared earlier; None if there is work to do.

    Raises:
        ModelLoadError: the folder cannot become a model: no config, no weights, or pickled ones.
    """
    models = cache_dir / "models"
    if spec.kind == "hub":
        return None  # only the hub's client knows whether its cache is complete and current
    if spec.kind == "folder":
        return _ready_folder(spec, Path(spec.location), models)
    source = demo.find_demo_gguf(cache_dir) if spec.kind == "demo" else Path(spec.location)
    folder = find_prepared(models, source, weight_dtype(dtype)) if source else None
    return _prepared(spec, folder) if folder else None


def prepare_model(model: str, *, cache_dir: Path, dtype: str, progress: Progress) -> PreparedModel:
    """Make ``model`` loadable, in this process; may import transformers and block for minutes.

    Args:
        model: what the user gave.
        cache_dir: where prepared copies go.
        dtype: ``auto``, ``bfloat16`` or ``float32``: of dequantised weights.
        progress: called with stage, done, total and unit.

    Raises:
        ConfigError: ``model`` is not the name of anything.
        ModelLoadError: it cannot be fetched, read or converted.
    """
    spec = resolve_model(model)
    ready = find_ready(spec, cache_dir=cache_dir, dtype=dtype)
    if ready:
        return ready
    if spec.kind == "hub":
        from gptoss.engine.hub import download_model  # noqa: PLC0415 - the quick path must not pay for this import

        return _complete_folder(spec, download_model(spec.location, progress), cache_dir, progress)
    if spec.kind == "folder":
        return _complete_folder(spec, Path(spec.location), cache_dir, progress)
    if spec.kind == "demo":
        source = demo.find_demo_gguf(cache_dir) or demo.fetch_demo_gguf(cache_dir, progress)
    else:
        source = Path(spec.location)
    return _dequantise(spec, source, cache_dir, weight_dtype(dtype), progress)


def prepare_in_child(
    model: str,
    *,
    cache_dir: Path,
    dtype: str,
    progress: Progress,
    is_cancelled: Callable[[], bool] = lambda: False,
) -> PreparedModel:
    """``prepare_model`` that never imports transformers here: work that needs it is done in a child process.

    Blocks; call it off the event loop. The child ends when this call does, or when this process dies.

    Args:
        model: what the user gave.
        cache_dir: where prepared copies go.
        dtype: ``auto``, ``bfloat16`` or ``float32``: of dequantised weights.
        progress: called in this thread with stage, done, total and unit; what it raises ends the child.
        is_cancelled: asked twice a second.

    Raises:
        ConfigError: ``model`` is not the name of anything.
        ModelLoadError: it cannot be fetched, read or converted, the child died, or the call was cancelled.
    """
    ready = find_ready(resolve_model(model), cache_dir=cache_dir, dtype=dtype)
    if ready:
        return ready
    request = PrepareRequest(model=model, cache_dir=str(cache_dir), dtype=dtype)
    command = [sys.executable, "-m", "gptoss.engine.prepare"]
    with (
        tempfile.TemporaryFile() as errors,
        subprocess.Popen(  # noqa: S603 - a fixed command
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors
        ) as child,
    ):
        try:
            return _follow(child, request, progress, is_cancelled)
        except EOFError:
            raise ModelLoadError(f"preparing {model} broke off ({_cause_of_death(child, errors)})") from None
        finally:
            child.kill()


def weight_dtype(dtype: str) -> str:
    """The dtype that dequantised weights are stored in."""
    return "bfloat16" if dtype == "auto" else dtype


def _dequantise(spec: ModelSpec, source: Path, cache_dir: Path, dtype: str, progress: Progress) -> PreparedModel:
    sha256 = file_sha256(source, "hashing the GGUF file", progress)
    target = cache_dir / "models" / folder_name(spec.model_name, sha256[:12], dtype)

    def write(folder: Path) -> dict[str, str]:
        from gptoss.engine.hf_export import export_gguf  # noqa: PLC0415 - imports transformers

        return export_gguf(source, folder, dtype=dtype, progress=progress)

    publish(target, _manifest(source, sha256, dtype), write, progress)
    return _prepared(spec, target)


def _complete_folder(spec: ModelSpec, folder: Path, cache_dir: Path, progress: Progress) -> PreparedModel:
    """``folder`` itself, or, where it has no ``tokenizer.json``, a folder of links to it with one added."""
    ready = _ready_folder(spec, folder, cache_dir / "models")
    if ready:
        return ready
    sha256 = _state_of(folder)

    def write(overlay: Path) -> dict[str, str]:
        from gptoss.engine.hf_export import export_tokenizer  # noqa: PLC0415 - imports transformers

        progress("converting the tokenizer", 0, 0, "files")
        versions = export_tokenizer(folder, overlay)
        for path in folder.iterdir():
            if path.is_file() and not (overlay / path.name).exists():
                (overlay / path.name).symlink_to(path)
        return versions

    target = _overlay(spec, sha256, cache_dir / "models")
    publish(target, _manifest(folder, sha256, ""), write, progress)
    return _prepared(spec, target)


def _ready_folder(spec: ModelSpec, folder: Path, models: Path) -> PreparedModel | None:
    check_folder(folder)
    if (folder / "tokenizer.json").is_file():
        return _prepared(spec, folder)
    overlay = _overlay(spec, _state_of(folder), models)
    return _prepared(spec, overlay) if read_manifest(overlay) else None


def _overlay(spec: ModelSpec, sha256: str, models: Path) -> Path:
    return models / folder_name(spec.model_name, "tokenizer", sha256[:12])


def _state_of(folder: Path) -> str:
    """A hash that changes when a file of ``folder`` does, without reading the files."""
    stats = [(path.name, path.stat()) for path in sorted(folder.iterdir()) if path.is_file()]
    state = (str(folder), [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats])
    return hashlib.sha256(msgspec.json.encode(state)).hexdigest()


def _manifest(source: Path, sha256: str, dtype: str) -> Manifest:
    stat = source.stat()
    return Manifest(
        source=str(source), source_bytes=stat.st_size, source_mtime_ns=stat.st_mtime_ns, sha256=sha256, dtype=dtype
    )


def _prepared(spec: ModelSpec, folder: Path) -> PreparedModel:
    return PreparedModel(
        folder=str(folder.absolute()),
        model_name=spec.model_name,
        source=spec.location,
        max_model_len=max_model_len_from_config(read_json(folder / "config.json")),
    )


def _follow(
    child: "subprocess.Popen[bytes]", request: PrepareRequest, progress: Progress, is_cancelled: Callable[[], bool]
) -> PreparedModel:
    """Relay the child's lines until its last one. Raises ``EOFError`` when it ends without one."""
    assert child.stdin
    assert child.stdout
    try:
        child.stdin.write(msgspec.json.encode(request) + b"\n")
        child.stdin.flush()  # and left open: its end tells the child that this process is gone
    except BrokenPipeError:
        raise EOFError from None
    for line in _lines(child.stdout, is_cancelled):
        message: ChildLine = _line_decoder.decode(line)
        match message:
            case Progressed():
                progress(message.stage, message.done, message.total, message.unit)
            case Prepared():
                return message.model
            case Refused():
                raise _ERRORS.get(message.code, ModelLoadError)(message.message)
    raise EOFError


def _lines(output: IO[bytes], is_cancelled: Callable[[], bool]) -> Iterator[bytes]:
    """Lines of ``output`` to its end, watching for cancellation and for a child that hangs."""
    pending = b""
    silent_polls = 0
    with selectors.DefaultSelector() as selector:
        selector.register(output, selectors.EVENT_READ)
        while True:
            if is_cancelled():
                raise ModelLoadError("preparing the model was cancelled")
            if not selector.select(POLL_S):
                silent_polls += 1
                if silent_polls * POLL_S > SILENCE_MAX_S:
                    raise ModelLoadError(f"preparing the model made no progress for {SILENCE_MAX_S} s")
                continue
            silent_polls = 0
            data = os.read(output.fileno(), 1 << 16)
            if not data:
                return
            *complete, pending = (pending + data).split(b"\n")
            yield from complete


def _cause_of_death(child: "subprocess.Popen[bytes]", errors: IO[bytes]) -> str:
    """The last line the child wrote to its standard error, or how it ended."""
    status = child.wait()
    errors.seek(max(0, errors.seek(0, 2) - 4096))
    lines = errors.read().decode(errors="replace").strip().splitlines()
    ending = f"signal {-status}, perhaps out of memory" if status < 0 else f"exit status {status}"
    return f"{ending}: {lines[-1][:300]}" if lines and status > 0 else ending
