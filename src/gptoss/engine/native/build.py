"""Compiles ``kernels.cpp`` for this machine once, keeps the result in the cache folder, and opens it.

Rules:
- The file's name is a hash of the source, the flags, the compiler and the CPU's features: whatever changes, it is
  compiled anew, and a folder shared by different machines holds one file for each.
- It is written aside and renamed, so that two engines that start together do not meet a half-written file.
- No compiler is no error: the caller goes on with torch's kernels and says so.
"""

import ctypes
import hashlib
import platform
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

COMPILERS = ("c++", "g++", "clang++")
COMPILE_TIMEOUT_S = 180.0
FLAGS = (
    "-std=c++20",
    "-O3",
    "-ffp-contract=fast",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fPIC",
    "-shared",
    "-pthread",
)
QUIET = ("-Wno-psabi", "-Wno-ignored-attributes", "-Wno-unknown-warning-option")
SOURCE = Path(__file__).with_name("kernels.cpp")


class NativeUnavailableError(Exception):
    """The kernels cannot be had on this machine; the message says why and what to do."""


def is_built(cache_folder: Path) -> bool:
    """Whether ``open_kernels`` would find the file; False also where it cannot be built."""
    try:
        return _target(cache_folder, find_compiler()).exists()
    except NativeUnavailableError:
        return False


def open_kernels(cache_folder: Path) -> ctypes.CDLL:
    """The kernels' library, compiled first if need be (some seconds).

    Raises:
        NativeUnavailableError: no compiler, it failed, or the machine does not let the process run the result.
    """
    compiler = find_compiler()
    target = _target(cache_folder, compiler)
    if not target.exists():
        _compile(compiler, target)
    try:
        library = ctypes.CDLL(str(target))
    except OSError as error:
        raise NativeUnavailableError(f"the compiled kernels cannot be loaded: {error}") from None
    if not library.gptoss_can_run():
        raise NativeUnavailableError("the system does not let this process use AMX")
    return library


def find_compiler() -> str:
    """Path of a C++ compiler.

    Raises:
        NativeUnavailableError: there is none.
    """
    found = next((path for name in COMPILERS if (path := shutil.which(name))), None)
    if found is None:
        raise NativeUnavailableError("no C++ compiler; with one (Debian: apt install g++) the CPU engine is faster")
    return found


def _target(cache_folder: Path, compiler: str) -> Path:
    parts = [SOURCE.read_text(encoding="utf-8"), *_flags(), compiler, _version(compiler), _cpu_features()]
    digest = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:24]
    return cache_folder / "kernels" / f"{digest}.so"


def _compile(compiler: str, target: Path) -> None:
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            made = Path(folder) / target.name
            command = [compiler, *_flags(), str(SOURCE), "-o", str(made)]
            done = subprocess.run(  # noqa: S603 - a fixed command
                command, capture_output=True, text=True, timeout=COMPILE_TIMEOUT_S, check=False
            )
            if done.returncode:
                first = next((line for line in done.stderr.splitlines() if "error" in line), done.stderr[:200])
                raise NativeUnavailableError(f"{compiler} cannot compile the CPU kernels: {first.strip()}")
            made.replace(target)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NativeUnavailableError(f"the CPU kernels cannot be compiled: {error}") from None


def _flags() -> tuple[str, ...]:
    is_x86 = platform.machine().lower() in {"x86_64", "amd64"}
    return (*FLAGS, *QUIET, "-march=native" if is_x86 else "-mcpu=native")


@cache
def _version(compiler: str) -> str:
    try:
        done = subprocess.run([compiler, "--version"], capture_output=True, text=True, timeout=10, check=False)  # noqa: S603
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NativeUnavailableError(f"{compiler} does not run: {error}") from None
    return done.stdout


@cache
def _cpu_features() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.machine())
