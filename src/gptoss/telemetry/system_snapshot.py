"""The snapshot of a system: one JSON document that says what this server is and how it does.

Everything in it comes from the projection, the metrics and the journal's health; it holds no prompt, no output and no
secret: settings whose name speaks of one are masked, and credentials inside URLs are cut out.
"""

import re
from collections.abc import Mapping
from typing import Any

import msgspec

from gptoss.actors.journal import JournalHealth
from gptoss.config import Settings
from gptoss.telemetry.metrics import Metrics
from gptoss.telemetry.projection import Projection

FORMAT_VERSION = 1
REQUESTS_MAX = 50
MASK = "***"

_SECRET_NAME = re.compile(r"secret|passw|credential|api_?key|(^|_)(key|token)s?$", re.IGNORECASE)
_URL_CREDENTIALS = re.compile(r"(?<=://)[^/@\s]+@")


def system_snapshot(
    *, projection: Projection, metrics: Metrics, settings: Settings, journal: JournalHealth, now_ns: int
) -> dict[str, Any]:
    """The document for ``GET /admin/debug/bundle?format=json``; JSON types only.

    Args:
        projection: folded up to now.
        metrics: folded up to now.
        settings: the effective settings.
        journal: state of the journal.
        now_ns: monotonic time.
    """
    node = projection.node
    health = projection.health(now_ns, journal)
    return {
        "format_version": FORMAT_VERSION,
        "versions": {
            "gptoss": node.version if node else "",
            "python": node.python if node else "",
            "packages": dict(sorted(node.packages.items())) if node else {},
        },
        "system": {
            "os": node.os if node else "",
            "cpu_count": node.cpu_count if node else 0,
            "uptime_s": health["uptime_s"],
        },
        "health": health,
        "gpu": projection.executor_details(),
        "memory": projection.memory_stats(),
        "configuration": without_secrets(msgspec.to_builtins(settings)),
        "journal": msgspec.to_builtins(journal),
        "stats": projection.stats(now_ns),
        "metrics": metrics.render()[0].decode(),
        "recent_requests": projection.recent_requests(REQUESTS_MAX),
        "recent_errors": projection.recent_errors(),
    }


def without_secrets(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings with secrets masked: by the setting's name, and credentials inside URLs by their form."""
    return {name: _masked(name, value) for name, value in settings.items()}


def _masked(name: str, value: Any) -> Any:
    if _SECRET_NAME.search(name) and value:
        return MASK
    if isinstance(value, str):
        return _URL_CREDENTIALS.sub(f"{MASK}@", value)
    if isinstance(value, Mapping):
        return {str(key): _masked(str(key), inner) for key, inner in value.items()}  # pyright: ignore[reportUnknownVariableType, reportUnknownArgumentType]
    if isinstance(value, list):
        return [_masked("", inner) for inner in value]  # pyright: ignore[reportUnknownVariableType]
    return value
