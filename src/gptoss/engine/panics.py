"""Panics of libraries that are written in Rust, as errors.

PyO3 raises them as a ``BaseException``, so that ``except Exception`` does not see them: one in a request would stop
whatever thread or actor it came up in.
"""

import contextlib
from collections.abc import Generator

PANIC_MODULE = "pyo3_runtime"


@contextlib.contextmanager
def panics_become(error: Exception) -> Generator[None]:
    """Raise ``error`` in the place of a panic inside; everything else passes."""
    try:
        yield
    except BaseException as raised:
        if type(raised).__module__ != PANIC_MODULE:
            raise
        raise error from None
