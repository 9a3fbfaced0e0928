"""How requests fared, from events in the order of their times: recorded ones, simulated ones, or both in turn."""

from collections.abc import Iterable

from gptoss.clock import NS_PER_MS
from gptoss.messages import events as ev
from gptoss.messages.envelope import Event
from gptoss.replay.result import Figures
from gptoss.telemetry.percentile import nearest_rank


class Fares:
    """Takes events and counts. Copy it to go on in two ways."""

    def __init__(self) -> None:
        self._received: dict[str, int] = {}
        self._enqueued: dict[str, int] = {}
        self._decided: dict[str, tuple[str, str]] = {}
        self._queue_ns: dict[str, int] = {}
        self._ttft_ns: dict[str, int] = {}
        self._e2e_ns: dict[str, int] = {}

    def copy(self) -> "Fares":
        """Another one that has seen the same."""
        other = Fares()
        for name, value in vars(self).items():
            setattr(other, name, dict(value))
        return other

    def observe(self, at_ns: int, request_id: str, event: Event) -> None:
        """Take an event that names a request."""
        match event:
            case ev.RequestReceived():
                self._received[request_id] = at_ns
            case ev.Enqueued():
                self._enqueued.setdefault(request_id, at_ns)
            case ev.AdmissionDecided() if event.action != "queue":
                self._decided[request_id] = (event.action, event.code)
                if request_id in self._enqueued:
                    self._queue_ns[request_id] = at_ns - self._enqueued[request_id]
            case ev.FirstTokenProduced() if request_id in self._received:
                self._ttft_ns[request_id] = at_ns - self._received[request_id]
            case ev.RequestCompleted() if request_id in self._received:
                self._e2e_ns[request_id] = at_ns - self._received[request_id]
            case _:
                pass

    @property
    def num_strangers(self) -> int:
        """Requests that were decided on without ever having been received here: others, in a bundle of some."""
        return len((self._decided.keys() | self._enqueued.keys()) - self._received.keys())

    def figures(self) -> Figures:
        """The counts and times so far."""
        actions = [action for action, _ in self._decided.values()]
        expired = sum(code == "deadline_exceeded" for _, code in self._decided.values())
        queue_p50, queue_p95 = _quantiles_ms(self._queue_ns.values())
        ttft_p50, ttft_p95 = _quantiles_ms(self._ttft_ns.values())
        e2e_p50, e2e_p95 = _quantiles_ms(self._e2e_ns.values())
        return Figures(
            requests=len(self._received),
            accepted=actions.count("accept"),
            shrunk=actions.count("shrink"),
            queued=len(self._enqueued),
            refused=actions.count("reject") - expired,
            expired=expired,
            completed=len(self._e2e_ns),
            queue_ms_p50=queue_p50,
            queue_ms_p95=queue_p95,
            ttft_ms_p50=ttft_p50,
            ttft_ms_p95=ttft_p95,
            e2e_ms_p50=e2e_p50,
            e2e_ms_p95=e2e_p95,
        )


def _quantiles_ms(values: Iterable[int]) -> tuple[float | None, float | None]:
    """The nearest-rank percentiles 50 and 95, in milliseconds."""
    ordered = sorted(values)
    if not ordered:
        return None, None
    half, most = (nearest_rank(ordered, percent) / NS_PER_MS for percent in (50, 95))
    return round(half, 3), round(most, 3)
