"""What differs between two bundles: the servers, the models, the settings, and how each request fared."""

from collections import Counter
from typing import Any

import msgspec

from gptoss.telemetry.bundle_format import BootFacts, Manifest
from gptoss.telemetry.bundle_reader import BundleReader
from gptoss.telemetry.bundle_summary import RequestLine, Summary, percentile, summarize


class Difference(msgspec.Struct, frozen=True, kw_only=True):
    """One thing that differs; None where one side lacks it."""

    name: str
    a: Any
    b: Any


class RequestDifference(msgspec.Struct, frozen=True, kw_only=True):
    """One request that is in either bundle.

    Attributes:
        a, b: None where it is in the other only.
        tokens_differ_at: position of the first output token that differs; None when all are the same or unknown.
    """

    request_id: str
    a: RequestLine | None
    b: RequestLine | None
    tokens_differ_at: int | None = None

    @property
    def is_same(self) -> bool:
        """It ended the same way with as many tokens, and the same ones as far as they are known. Times may differ."""
        if self.a is None or self.b is None or self.tokens_differ_at is not None:
            return False
        return (self.a.state, self.a.outcome, self.a.completion_tokens) == (
            self.b.state,
            self.b.outcome,
            self.b.completion_tokens,
        )


class BundleDiff(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that differs. ``figures`` are of all requests together and shown whether they differ or not."""

    servers: tuple[Difference, ...]
    settings: tuple[Difference, ...]
    models: tuple[Difference, ...]
    decisions: tuple[Difference, ...]
    figures: tuple[Difference, ...]
    requests: tuple[RequestDifference, ...]

    @property
    def is_same(self) -> bool:
        """Nothing differs but times."""
        apart = (self.servers, self.settings, self.models, self.decisions)
        return not any(apart) and all(request.is_same for request in self.requests)


def diff(a: BundleReader, b: BundleReader) -> BundleDiff:
    """Compare two bundles by what their newest boots say of themselves, and by their requests' ids.

    Raises:
        BundleError: either is bad.
    """
    boot_a, boot_b = _newest(a.manifest), _newest(b.manifest)
    of_a, of_b = summarize(a), summarize(b)
    return BundleDiff(
        servers=_differences(_server(boot_a), _server(boot_b)),
        settings=_differences(boot_a.settings, boot_b.settings),
        models=_differences(_models(boot_a), _models(boot_b)),
        decisions=_differences(_decisions(of_a), _decisions(of_b)),
        figures=tuple(Difference(name=name, a=_figures(of_a)[name], b=_figures(of_b)[name]) for name in _figures(of_a)),
        requests=_requests(of_a, of_b),
    )


def _newest(manifest: Manifest) -> BootFacts:
    return manifest.boots[-1] if manifest.boots else BootFacts(boot="", node="")


def _server(boot: BootFacts) -> dict[str, Any]:
    return {
        "gptoss": boot.version,
        "python": boot.python,
        "os": boot.os,
        "cpu_count": boot.cpu_count,
        **boot.packages,
    }


def _models(boot: BootFacts) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for engine in boot.engines:
        parts: list[dict[str, Any]] = [msgspec.to_builtins(part) for part in (engine.fingerprint, engine.capabilities)]
        for part in parts:
            found |= {f"{engine.executor} {name}": value for name, value in part.items()}
    return found


def _decisions(summary: Summary) -> dict[str, Any]:
    return {f"{what}, {why}": count for what, reasons in summary.decisions.items() for why, count in reasons.items()}


def _figures(summary: Summary) -> dict[str, Any]:
    states = Counter(line.state for line in summary.requests)
    ttft = [line.ttft_ms for line in summary.requests if line.ttft_ms is not None]
    e2e = [line.e2e_ms for line in summary.requests if line.e2e_ms is not None]
    return {
        "requests": len(summary.requests),
        **{state: states[state] for state in ("completed", "failed", "cancelled", "rejected")},
        "output tokens": sum(line.completion_tokens for line in summary.requests),
        "queue p50 ms": percentile([line.queue_ms for line in summary.requests], 50),
        "ttft p50 ms": percentile(ttft, 50),
        "ttft p99 ms": percentile(ttft, 99),
        "e2e p50 ms": percentile(e2e, 50),
        "e2e p99 ms": percentile(e2e, 99),
    }


def _requests(of_a: Summary, of_b: Summary) -> tuple[RequestDifference, ...]:
    lines_a = {line.request_id: line for line in of_a.requests}
    lines_b = {line.request_id: line for line in of_b.requests}
    return tuple(
        RequestDifference(
            request_id=name,
            a=lines_a.get(name),
            b=lines_b.get(name),
            tokens_differ_at=_first_difference(of_a.output.get(name), of_b.output.get(name)),
        )
        for name in dict.fromkeys([*lines_a, *lines_b])
    )


def _first_difference(a: list[int] | None, b: list[int] | None) -> int | None:
    if a is None or b is None or a == b:
        return None
    same = (index for index, (x, y) in enumerate(zip(a, b, strict=False)) if x != y)
    return next(same, min(len(a), len(b)))


def _differences(a: dict[str, Any], b: dict[str, Any]) -> tuple[Difference, ...]:
    return tuple(
        Difference(name=name, a=a.get(name), b=b.get(name))
        for name in dict.fromkeys([*a, *b])
        if a.get(name) != b.get(name)
    )
