"""Other servers that are installed here, to be measured beside this one.

A peer is looked for in its own virtual environment below ``PEERS_HOME`` (by default ``~/.cache/peers``), then among the
commands on PATH. What is not there is said, with what would install it; nothing is ever installed from here.
"""

import dataclasses
import os
import shutil
from collections.abc import Mapping
from pathlib import Path


@dataclasses.dataclass(frozen=True)
class Peer:
    """A server.

    Attributes:
        folder: of its virtual environment, below ``PEERS_HOME``.
        program: in that, or on PATH.
        arguments: with ``{model}``, a folder of weights in bfloat16, and ``{port}``.
        packages: what pip is asked for.
        variables: of its environment, unless they are set already.
    """

    name: str
    folder: str
    program: str
    arguments: str
    packages: str
    variables: Mapping[str, str] = dataclasses.field(default_factory=dict)


TRANSFORMERS = "serve {model} --device cpu --host 127.0.0.1 --port {port}"
PEERS = (
    Peer(
        "vllm",
        "vllm",
        "vllm",
        "serve {model} --host 127.0.0.1 --port {port} --dtype bfloat16 --max-model-len 4096",
        "vllm",
        {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "VLLM_CPU_KVCACHE_SPACE": "2"},
    ),
    Peer("transformers", "hf", "transformers", TRANSFORMERS, "torch accelerate 'transformers[serving]'"),
    Peer(
        "transformers-cb",
        "hf",
        "transformers",
        f"{TRANSFORMERS} --continuous-batching",
        "torch accelerate 'transformers[serving]'",
    ),
)


def home() -> Path:
    """Where the peers' virtual environments are."""
    return Path(os.environ.get("PEERS_HOME") or "~/.cache/peers").expanduser()


def find_peers() -> tuple[dict[str, str], dict[str, str], list[str]]:
    """Look for all peers.

    Returns:
        the command of each one that is here; variables that they want; and a line on each peer, for people.
    """
    commands: dict[str, str] = {}
    variables: dict[str, str] = {}
    lines: list[str] = []
    for peer in PEERS:
        own = home() / peer.folder / "bin" / peer.program
        program = str(own) if os.access(own, os.X_OK) else shutil.which(peer.program)
        if program is None:
            install = f"python3 -m venv {own.parent.parent} && {own.parent}/pip install {peer.packages}"
            lines.append(f"{peer.name}: not found; to install it: {install}")
            continue
        commands[peer.name] = f"{program} {peer.arguments}"
        variables |= peer.variables
        lines.append(f"{peer.name}: {program}")
    return commands, variables, lines
