"""What the projections answer, live and folded again from the journal's bytes."""

import io
from typing import Any

from gptoss.messages.codec import decode_record, encode_record
from gptoss.simulation.observed import Observed
from gptoss.telemetry.logs import LogWriter
from gptoss.telemetry.metrics import Metrics
from gptoss.telemetry.projection import Projection

EVERYTHING = 10_000


def answers_of(projection: Projection, metrics: Metrics, now_ns: int, log: str) -> dict[str, Any]:
    """Every query of the projections, by name."""
    body, _ = metrics.render("text/plain")
    return {
        "stats": projection.stats(now_ns),
        "memory_stats": projection.memory_stats(),
        "health": projection.health(now_ns),
        "requests": projection.recent_requests(EVERYTHING),
        "executors": projection.executor_details(),
        "errors": projection.recent_errors(),
        "metrics": body.decode(),
        "log": log,
    }


def rebuilt_answers(observed: Observed, now_ns: int) -> dict[str, Any]:
    """The same queries of new projections, from the bytes of the records."""
    projection = Projection(step_timeout_s=observed.settings.step_timeout_s)
    metrics = Metrics()
    lines = io.StringIO()
    log = LogWriter(lines, "json", "debug")
    for record in observed.records:
        again = decode_record(encode_record(record))
        projection.fold(again)
        metrics.fold(again)
        log.fold(again)
    return answers_of(projection, metrics, now_ns, lines.getvalue())
