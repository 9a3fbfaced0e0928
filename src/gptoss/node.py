"""What a server is known by: its version and surroundings in the log, and the key of its hashes."""

import functools
import hashlib
import importlib.metadata
import os
import platform

import msgspec

from gptoss.clock import Clock, IdSource
from gptoss.config import Settings
from gptoss.messages.events import NodeStarted
from gptoss.telemetry.system_snapshot import without_secrets

VERSION = importlib.metadata.version("gptoss")
PACKAGES = ("aiohttp", "jinja2", "msgspec", "pykka", "tokenizers", "torch", "transformers")


def node_started(settings: Settings, clock: Clock) -> NodeStarted:
    """What a server says of itself first; without its secrets."""
    return NodeStarted(
        version=VERSION,
        settings=msgspec.json.encode(without_secrets(msgspec.to_builtins(settings))).decode(),
        python=platform.python_version(),
        packages=_package_versions(),
        os=platform.platform(),
        cpu_count=os.cpu_count() or 1,
        wall_ns=clock.wall_ns(),
    )


def node_key(settings: Settings, ids: IdSource) -> bytes:
    """The key of this node's prompt hashes; kept beside the journal, so that hashes compare across restarts."""
    fresh = hashlib.sha256(f"{ids.new_id('key')} {ids.new_id('key')}".encode()).digest()
    if settings.journal == "memory":
        return fresh
    path = settings.data_path / "node.key"
    if not path.exists():
        path.touch(mode=0o600)
        path.write_bytes(fresh)
    return path.read_bytes()


@functools.cache
def _package_versions() -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in PACKAGES}
