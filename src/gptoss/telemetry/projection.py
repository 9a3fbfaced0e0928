"""The live picture of the server, folded from the journal; ``/health``, ``/stats`` and ``/memory_stats`` are its queries.

Nothing is measured here: the same records give the same answers, so a picture rebuilt from the log equals the live one.
Time enters a query as ``now_ns`` (monotonic). Memory is bounded: ``FINISHED_MAX`` finished requests, fixed windows of
latencies and recent errors.
"""

from collections import Counter
from collections.abc import Iterable
from typing import Any

import msgspec

from gptoss.actors.journal import JournalHealth
from gptoss.clock import NS_PER_S
from gptoss.messages import events as ev
from gptoss.messages.codec import by_name
from gptoss.messages.envelope import Event, Record
from gptoss.telemetry.books import Books
from gptoss.telemetry.executor_view import ExecutorView
from gptoss.telemetry.folding import Handler, View
from gptoss.telemetry.history import SECONDS_KEPT, History, Levels, as_columns
from gptoss.telemetry.percentile import nearest_rank
from gptoss.telemetry.request_view import TERMINAL_STATES, RequestBook, RequestView, request_row
from gptoss.telemetry.server_view import RATE_WINDOW_S, ServerView

FINISHED_MAX = 1000
PERCENTILES = (50, 95, 99)
COMMIT_TIMEOUT_NS = 10 * NS_PER_S
"""A batch that the disk takes longer for means that nothing new is acknowledged: no progress."""


class Readiness(msgspec.Struct, frozen=True, kw_only=True):
    """Whether the server makes progress, and if not, why."""

    ready: bool
    reason: str


class Projection(View):
    """The server as the records of its newest boot tell it.

    Args:
        step_timeout_s: an executor with running requests that makes no step for this long makes the server not ready.
        books: see ``View``.
    """

    def __init__(self, *, step_timeout_s: float = 60.0, books: Books | None = None) -> None:
        super().__init__(Books(requests=RequestBook(finished_max=FINISHED_MAX)) if books is None else books)
        self._step_timeout_s = step_timeout_s
        self._requests = self._books.requests
        self._executors = self._books.executors
        self._sessions = self._books.sessions
        self._server = ServerView()
        self._history = History(self._levels)
        # A second that is over keeps the levels of its end.
        self.turn = self._history.turn

    def begin_boot(self, boot: str) -> None:
        """See ``View``: another boot is a new picture."""
        self._server = ServerView(boot=boot)
        self._history.clear()

    def handlers(self, kind: type[Event]) -> tuple[Handler, ...]:
        """See ``View``."""
        if kind is ev.StepCommitted:
            return (self._step,)
        return (*self._server.handlers(kind), *self._history.handlers(kind))

    def _step(self, record: Record, event: ev.StepCommitted, _: RequestView | None) -> None:
        sums = self._books.step
        self._server.step(record.meta.mono_ns, sums)
        self._history.step(event, sums)

    @property
    def _step_timeout_ns(self) -> int:
        return int(float(self._server.live.get("step_timeout_s", self._step_timeout_s)) * NS_PER_S)

    @property
    def newest_pos(self) -> int:
        """Position of the newest record that was folded, -1 before the first."""
        return self._books.newest_pos

    def count_missed(self, records: int) -> None:
        """Say that ``records`` records never came here, for ``/stats``."""
        self._server.missed += records

    def readiness(self, now_ns: int, journal: JournalHealth | None = None) -> Readiness:
        """Whether requests sent now would be served.

        Args:
            now_ns: monotonic time.
            journal: state of the journal; a journal that cannot commit makes the server not ready.
        """
        reason = self._obstacle(now_ns, journal)
        return Readiness(ready=not reason, reason=reason or "ready")

    def _obstacle(self, now_ns: int, journal: JournalHealth | None) -> str:
        if self._server.draining:
            return "draining"
        if self._server.log_degraded or (journal is not None and not journal.ok):
            return f"the journal has stopped: {self._server.log_degraded or (journal.reason if journal else '')}"
        if journal is not None and journal.commit_ns > COMMIT_TIMEOUT_NS:
            return f"the journal's disk has not answered for {journal.commit_ns / NS_PER_S:.0f} s"
        if self._server.escalated:
            return f"{self._server.escalated} failed too often and stays down"
        for view in self._executors.views.values():
            silent_ns = now_ns - view.silent_since_ns
            if view.state in {"ready", "draining"} and view.running and silent_ns > self._step_timeout_ns:
                return f"{view.name} made no step for {silent_ns / NS_PER_S:.0f} s with {len(view.running)} running"
        views = list(self._executors.views.values())
        if any(view.state == "ready" for view in views):
            return ""
        states = ", ".join(f"{view.name} {view.state}" for view in views)
        return f"no executor is ready: {states}" if states else "no executor has started"

    def health(self, now_ns: int, journal: JournalHealth | None = None) -> dict[str, Any]:
        """The body of ``/health``: the older server's fields, readiness, uptime and the executors."""
        readiness = self.readiness(now_ns, journal)
        return {
            "status": self._status(readiness),
            "version": self._server.node.version if self._server.node else "",
            "model": self.model,
            "profile": str(self._server.settings.get("profile", "")),
            "observability_enabled": True,
            "tracing_enabled": bool(self._server.settings.get("otlp_endpoint")),
            "cache_enabled": self._cache_enabled(),
            "gpu_routing_enabled": self._routing_enabled(),
            "ready": readiness.ready,
            "reason": readiness.reason,
            "uptime_s": round(max(0, now_ns - self._server.started_ns) / NS_PER_S, 3) if self._server.node else 0.0,
            "executors": [_executor_health(view) for view in self._executors.views.values()],
        }

    @property
    def model(self) -> str:
        """Name of the loaded model, else the one that the settings ask for."""
        for view in self._executors.views.values():
            if view.capabilities is not None:
                return view.capabilities.model_name
        return str(self._server.settings.get("served_model_name") or self._server.settings.get("model", ""))

    @property
    def wall_offset_ns(self) -> int | None:
        """Wall time minus monotonic time, as last anchored."""
        return self._server.wall_offset_ns

    @property
    def node(self) -> ev.NodeStarted | None:
        """What the server said about itself when it began; None before that."""
        return self._server.node

    def _status(self, readiness: Readiness) -> str:
        if self._server.draining:
            return "draining"
        if readiness.ready:
            failed = any(_is_amiss(view) for view in self._executors.views.values())
            return "degraded" if failed else "healthy"
        views = self._executors.views.values()
        fresh = all(view.state in {"starting", "loading"} and not view.exits for view in views)
        return "starting" if fresh and not self._server.log_degraded and not self._server.escalated else "degraded"

    def _cache_enabled(self) -> bool:
        """Whether some executor keeps prefixes, rather than whether one was found yet."""
        loaded = (view.capabilities for view in self._executors.views.values())
        return any(can is not None and can.prefix_cache_bytes > 0 for can in loaded)

    def _routing_enabled(self) -> bool:
        return len(self._executors.views) > 1

    def stats(self, now_ns: int | None = None) -> dict[str, Any]:
        """The body of ``/stats``.

        Args:
            now_ns: monotonic time, the end of the window of ``tokens_per_s``; None takes the newest record's.
        """
        end_ns = self._books.newest_ns if now_ns is None else now_ns
        states = Counter(view.state for view in self._requests.open.values())
        decisions = sum(self._server.routes.values())
        return {
            "requests": {
                "total": self._server.requests["total"],
                **{state: states[state] for state in ("received", "queued", "admitted", "running")},
                **{state: self._server.requests[state] for state in TERMINAL_STATES},
            },
            "running": sum(len(view.running) for view in self._executors.views.values()),
            "queued": states["queued"],
            "tokens": {name: self._server.tokens[name] for name in ("prompt", "prefilled", "cached", "generated")},
            "tokens_per_s": round(self._server.tokens_per_s(end_ns), 2),
            "window_s": RATE_WINDOW_S,
            "latency": {name: _percentiles(samples) for name, samples in self._server.windows.items()},
            "admission": dict(sorted(self._server.admission.items())),
            "telemetry_missed": self._server.missed,
            "faults": dict(sorted(self._server.faults.items())),
            "gpu_routing": {
                "enabled": self._routing_enabled(),
                "decisions": decisions,
                "by_executor": _shares(self._server.routes, decisions),
                "by_reason": _shares(self._server.route_reasons, decisions),
                "by_kind": _shares(self._server.route_kinds, decisions),
            },
            "cache_stats": self._cache_stats(),
            "traces": dict(sorted(self._server.spans.items())),
            "host": None if self._server.host is None else by_name(self._server.host),
            "sessions": self._sessions.counts(),
        }

    def _cache_stats(self) -> dict[str, Any]:
        prompt = self._server.tokens["prompt"]
        cached = self._server.tokens["cached"]
        hits, looked_up = self._server.requests["cache_hits"], self._server.requests["looked_up"]
        return {
            "enabled": self._cache_enabled(),
            "hits": hits,
            "misses": looked_up - hits,
            "prompt_tokens": prompt,
            "cached_tokens": cached,
            "hit_rate": round(cached / prompt, 4) if prompt else 0.0,
            "bytes": sum(view.prefix_cache_bytes for view in self._executors.views.values()),
        }

    def memory_stats(self) -> dict[str, Any]:
        """The body of ``/memory_stats``: for each executor and in all.

        ``memory_pressure`` is the share of the KV memory that is reserved for requests or kept for sessions, by the memory
        guard's own formula: of the budgets, less what their devices turned out not to have.
        """
        book = self._sessions.book
        reserved = sum(kv_bytes for _, kv_bytes in self._executors.reservations.values())
        budget = sum(view.kv_budget_bytes for view in self._executors.views.values())
        lacking = sum(min(view.kv_budget_bytes, view.lacking_bytes) for view in self._executors.views.values())
        executors = {name: self._executor_memory(view) for name, view in self._executors.views.items()}
        return {
            "memory_pressure": _share(reserved + book.total_bytes, budget - lacking),
            "kv_budget_bytes": budget,
            "kv_lacking_bytes": lacking,
            "kv_reserved_bytes": reserved,
            "kv_in_use_bytes": sum(memory["kv_in_use_bytes"] for memory in executors.values()),
            "unbound_bytes": self._executors.reserved_bytes(""),
            "reservations": len(self._executors.reservations),
            "sessions": self._sessions.memory(),
            "executors": executors,
        }

    def _executor_memory(self, view: ExecutorView) -> dict[str, Any]:
        reserved = self._executors.reserved_bytes(view.name)
        kept = self._sessions.book.kept_on(view.name)
        return {
            "kv_budget_bytes": view.kv_budget_bytes,
            "kv_reserved_bytes": reserved,
            "kv_in_use_bytes": view.kv_bytes_in_use,
            "session_bytes": kept,
            "kv_lacking_bytes": view.lacking_bytes,
            "memory_used_bytes": view.memory_used_bytes,
            "memory_total_bytes": view.memory_total_bytes,
            "memory_pressure": _share(reserved + kept, view.kv_budget_bytes - view.lacking_bytes),
            "devices": [msgspec.to_builtins(device) for device in view.devices],
        }

    def live(
        self, now_ns: int, *, after: int = 0, limit: int = 0, journal: JournalHealth | None = None
    ) -> dict[str, Any]:
        """The body of ``/admin/live``: everything that a live view shows, in one answer.

        Args:
            now_ns: monotonic time.
            after: the ``now`` of the answer before, for the seconds since; 0 for all that are kept.
            limit: requests to list.
            journal: state of the journal.
        """
        wall_offset_ns = self._server.wall_offset_ns
        return {
            "boot": self._server.boot,
            "now": now_ns // NS_PER_S,
            "now_unix_s": None if wall_offset_ns is None else (wall_offset_ns + now_ns) // NS_PER_S,
            "seconds_kept": SECONDS_KEPT,
            "seconds": as_columns(self._history.since(after)),
            "health": self.health(now_ns, journal),
            "stats": self.stats(now_ns),
            "memory": self.memory_stats(),
            "requests": self.recent_requests(limit),
        }

    def _levels(self) -> Levels:
        executors = self._executors
        return Levels(
            running=sum(len(view.running) for view in executors.views.values()),
            queued=sum(view.state == "queued" for view in self._requests.open.values()),
            kv_reserved_bytes=sum(kv_bytes for _, kv_bytes in executors.reservations.values()),
            kv_in_use_bytes=sum(view.kv_bytes_in_use for view in executors.views.values()),
            kv_budget_bytes=sum(view.kv_budget_bytes for view in executors.views.values()),
        )

    def executor_details(self) -> dict[str, dict[str, Any]]:
        """For each executor what it runs on and what it can take, for the debug bundle."""
        return {
            name: {
                **_executor_health(view),
                "steps": view.steps,
                "capabilities": msgspec.to_builtins(view.capabilities),
                "memory": self._executor_memory(view),
            }
            for name, view in self._executors.views.items()
        }

    def recent_requests(self, limit: int = 100) -> list[dict[str, Any]]:
        """The newest requests, open ones first, then the finished by when they ended; at most ``limit``."""
        newest = [*reversed(self._requests.open.values()), *reversed(self._requests.finished.values())]
        return [self._as_dict(view) for view in newest[: max(0, limit)]]

    def request(self, request_id: str) -> dict[str, Any] | None:
        """One request as in ``recent_requests``; None when it is unknown or forgotten."""
        view = self._requests.open.get(request_id) or self._requests.finished.get(request_id)
        return None if view is None else self._as_dict(view)

    def recent_errors(self) -> list[dict[str, Any]]:
        """The last warnings and errors as log lines, oldest first."""
        return list(self._server.errors)

    def _as_dict(self, view: RequestView) -> dict[str, Any]:
        row = request_row(view, boot=self._server.boot, wall_offset_ns=self._server.wall_offset_ns)
        return msgspec.to_builtins(row)


def _share(part: int, whole: int) -> float:
    return round(part / whole, 4) if whole > 0 else 0.0


def _is_amiss(view: ExecutorView) -> bool:
    """Whether an executor is not what it was: lost and not back yet, being replaced, or suspect."""
    was_up = bool(view.exits or view.restarts or view.incarnation)
    return view.suspect or view.state not in {"ready", "starting", "loading"} or (view.state != "ready" and was_up)


def _executor_health(view: ExecutorView) -> dict[str, Any]:
    return {
        "name": view.name,
        "device": view.device,
        "state": view.state,
        "stage": view.stage,
        "progress": view.progress,
        "running": len(view.running),
        "incarnation": view.incarnation,
        "reason": view.reason,
        "engine_exits": view.exits,
        "restarts": view.restarts,
        "suspect": view.suspect,
    }


def _percentiles(samples: Iterable[float]) -> dict[str, float | int | None]:
    """Nearest-rank percentiles; None where there is no sample."""
    ordered = sorted(samples)
    values: dict[str, float | int | None] = {
        f"p{p}": round(nearest_rank(ordered, p), 3) if ordered else None for p in PERCENTILES
    }
    return {**values, "count": len(ordered)}


def _shares(counts: Counter[str], total: int) -> dict[str, dict[str, float | int]]:
    return {name: {"count": count, "share": round(count / total, 4)} for name, count in sorted(counts.items())}
