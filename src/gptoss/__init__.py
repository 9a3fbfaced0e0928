"""gptoss: an event-sourced server for gpt-oss and other causal language models.

The embedding API: ``ServingSystem`` runs the actor system without HTTP, ``make_app`` serves it as an aiohttp
application that mounts under a prefix.

Names are imported on first use: an engine process imports ``gptoss.engine`` and must not pay for HTTP and telemetry.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gptoss.actors.generation import Delta, GenerateRequest, Generation
    from gptoss.app import ServingSystem
    from gptoss.config import Settings
    from gptoss.engine.port import ChatMessage
    from gptoss.messages.sampling import SamplingParams
    from gptoss.serving_context import make_app

_HOMES = {
    "ChatMessage": "gptoss.engine.port",
    "Delta": "gptoss.actors.generation",
    "GenerateRequest": "gptoss.actors.generation",
    "Generation": "gptoss.actors.generation",
    "SamplingParams": "gptoss.messages.sampling",
    "ServingSystem": "gptoss.app",
    "Settings": "gptoss.config",
    "make_app": "gptoss.serving_context",
}

__all__ = [
    "ChatMessage",
    "Delta",
    "GenerateRequest",
    "Generation",
    "SamplingParams",
    "ServingSystem",
    "Settings",
    "make_app",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'gptoss' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
