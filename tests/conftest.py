"""The demo model, prepared once for all tests that need a real one."""

import os
from pathlib import Path

import pytest

from gptoss.engine.model_folder import no_progress
from gptoss.engine.model_source import prepare_in_child

REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def demo_cache() -> Path:
    """A cache folder that outlives the test run: dequantising the demo takes about twenty seconds the first time."""
    return Path(os.environ.get("DEMO_TEST_CACHE") or REPOSITORY / ".cache")


@pytest.fixture(scope="session")
def demo_folder(demo_cache: Path) -> str:
    """The prepared folder of the demo model in bfloat16."""
    return prepare_in_child("demo", cache_dir=demo_cache, dtype="auto", progress=no_progress).folder
