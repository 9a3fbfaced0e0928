"""Metrics as text: 0.0.4, or OpenMetrics 1.0.0 where ``Accept`` prefers it.

Names are escaped as ``allow-utf-8``: otherwise OpenMetrics would rename ``vllm:x`` to ``vllm_x`` and break the dashboards
made for vLLM.
"""

import re
from typing import Any

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.openmetrics import exposition as openmetrics

CONTENT_TYPE_TEXT = "text/plain; version=0.0.4; charset=utf-8"
CONTENT_TYPE_OPENMETRICS = "application/openmetrics-text; version=1.0.0; charset=utf-8; escaping=allow-utf-8"


def content_type_for(accept: str) -> str:
    """The content type that an ``Accept`` header asks for: OpenMetrics if it ranks at least as high as plain text."""
    quality = {"application/openmetrics-text": 0.0, "text/plain": 0.0}
    for part in accept.split(","):
        media, *parameters = (piece.strip() for piece in part.split(";"))
        given = next((piece[2:] for piece in parameters if piece.startswith("q=")), "1")
        if media in quality and re.fullmatch(r"[01](\.\d{0,3})?", given):
            quality[media] = max(quality[media], float(given))
    wants_openmetrics = 0 < quality["application/openmetrics-text"] >= quality["text/plain"]
    return CONTENT_TYPE_OPENMETRICS if wants_openmetrics else CONTENT_TYPE_TEXT


def exposition(registry: CollectorRegistry, content_type: str) -> bytes:
    """A registry's metrics in one of the two formats."""
    if content_type == CONTENT_TYPE_OPENMETRICS:
        untyped: Any = openmetrics
        return bytes(untyped.generate_latest(registry, escaping=openmetrics.ALLOWUTF8))
    return generate_latest(registry, escaping=openmetrics.ALLOWUTF8)
