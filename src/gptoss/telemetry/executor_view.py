"""What is known of each executor and of its memory, folded from the journal.

An executor's ``silent_since_ns`` moves with its steps only: an engine that still answers but does not step makes no
progress, and readiness means progress.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, TypeAlias

from gptoss.actors.directory import EXECUTOR_PREFIX
from gptoss.messages import events as ev
from gptoss.messages.envelope import Event, Meta
from gptoss.messages.model import DeviceMemory, EngineCapabilities

ExecutorState: TypeAlias = Literal["starting", "loading", "ready", "draining", "restarting", "failed"]


@dataclass(slots=True)
class ExecutorView:
    """One executor so far.

    Attributes:
        running: requests that it has accepted and that are not over.
        silent_since_ns: when it last made progress; meaningful while something runs.
        exits: engine processes that it has lost; those that it ended itself for a restart do not count.
        restarts: of those that were wanted, how many are over.
        suspect: the router avoids it because it should have made progress by now.
        devices: memory of each, where it has several.
        is_loaded: its engine has joined the router; is_leaving: that engine has exited, and the router is about to say so.
    """

    name: str
    device: str = ""
    state: ExecutorState = "starting"
    stage: str = ""
    progress: float | None = None
    incarnation: int = 0
    pid: int = 0
    capabilities: EngineCapabilities | None = None
    running: set[str] = field(default_factory=set[str])
    silent_since_ns: int = 0
    steps: int = 0
    exits: int = 0
    restarts: int = 0
    suspect: bool = False
    is_loaded: bool = False
    is_leaving: bool = False
    devices: tuple[DeviceMemory, ...] = ()
    reason: str = ""
    kv_budget_bytes: int = 0
    kv_bytes_in_use: int = 0
    prefix_cache_bytes: int = 0
    lacking_bytes: int = 0
    memory_used_bytes: int = 0
    memory_total_bytes: int = 0


def model_of(view: ExecutorView | None) -> str:
    """Name of the model that an executor has loaded; empty before that."""
    return view.capabilities.model_name if view is not None and view.capabilities is not None else ""


@dataclass(slots=True)
class ExecutorBook:
    """All executors of this boot by name, and the memory reservations by request."""

    views: dict[str, ExecutorView] = field(default_factory=dict[str, ExecutorView])
    reservations: dict[str, tuple[str, int]] = field(default_factory=dict[str, tuple[str, int]])
    """request id -> (executor or empty while unbound, KV bytes)"""
    boot: str = ""

    def begin_boot(self, boot: str) -> None:
        """Begin anew, with the first record of another boot."""
        self.boot = boot
        self.views.clear()
        self.reservations.clear()

    def fold_of(self, kind: type[Event]) -> Callable[[Meta, Any], None] | None:
        """What becomes of an event of this type, None for nothing."""
        handler = _HANDLERS.get(kind)
        return None if handler is None else partial(handler, self)

    def reserved_bytes(self, executor: str) -> int:
        """KV bytes that are reserved on ``executor``; the empty name is for grants that no executor has yet."""
        return sum(kv_bytes for name, kv_bytes in self.reservations.values() if name == executor)

    def of(self, name: str) -> ExecutorView:
        """The view of ``name``, new when it is seen for the first time."""
        view = self.views.get(name)
        if view is None:
            view = self.views[name] = ExecutorView(name)
        return view


# ---------------------------------------------------------------- engine


def _started(book: ExecutorBook, meta: Meta, event: ev.EngineStarted) -> None:
    book.views.pop(ev.PREPARATION, None)  # it is over, and was no executor
    view = book.of(event.executor)
    view.state = "restarting" if view.exits or view.restarts or meta.incarnation else "starting"
    view.device, view.incarnation = event.device, meta.incarnation
    view.stage, view.progress, view.reason = "", None, ""


def _load_progressed(book: ExecutorBook, _meta: Meta, event: ev.EngineLoadProgressed) -> None:
    view = book.of(event.executor)
    view.state, view.stage = "loading", event.stage
    view.progress = min(1.0, event.done / event.total) if event.total else None


def _loaded(book: ExecutorBook, meta: Meta, event: ev.EngineLoaded) -> None:
    view = book.of(event.executor)
    view.state, view.stage, view.progress, view.reason = "ready", "", 1.0, ""
    view.capabilities, view.kv_budget_bytes = event.capabilities, event.capabilities.kv_budget_bytes
    view.device = view.device or event.capabilities.device
    view.incarnation, view.silent_since_ns = meta.incarnation, meta.mono_ns
    view.pid = event.pid
    view.is_loaded = True


def _load_failed(book: ExecutorBook, _meta: Meta, event: ev.EngineLoadFailed) -> None:
    view = book.of(event.executor)
    view.state, view.reason = "failed", event.message


def _exited(book: ExecutorBook, _meta: Meta, event: ev.EngineExited) -> None:
    view = book.of(event.executor)
    if view.state != "failed":
        view.state, view.reason = "restarting", event.reason
    if event.planned:
        view.restarts += 1
    else:
        view.exits += 1
    view.suspect = False
    view.is_loaded, view.is_leaving = False, view.is_loaded
    view.running.clear()
    view.kv_bytes_in_use = view.prefix_cache_bytes = 0
    view.progress = None


def _left(book: ExecutorBook, _meta: Meta, event: ev.ExecutorLeft) -> None:
    view = book.of(event.executor)
    if view.is_leaving:  # of the engine before; the next may have loaded by now
        view.is_leaving = False
    elif view.state in {"ready", "draining"}:
        view.state, view.reason = "restarting", event.reason


def _stalled(book: ExecutorBook, _meta: Meta, event: ev.EngineStalled) -> None:
    view = book.of(event.executor)
    view.state, view.reason = "restarting", f"no step for {event.silent_ms:.0f} ms"


def _sickened(book: ExecutorBook, _meta: Meta, event: ev.EngineSickened) -> None:
    view = book.of(event.executor)
    view.state, view.reason = "restarting", f"failed {event.failures} requests in a row"


def _restart_requested(book: ExecutorBook, _meta: Meta, event: ev.RestartRequested) -> None:
    view = book.of(event.executor)
    view.state, view.reason = "draining", f"restart wanted by {event.origin}"


def _rated(book: ExecutorBook, _meta: Meta, event: ev.ExecutorRated) -> None:
    book.of(event.executor).suspect = event.suspect


def _escalated(book: ExecutorBook, _meta: Meta, event: ev.SupervisorEscalated) -> None:
    view = book.views.get(event.child.removeprefix(EXECUTOR_PREFIX))
    if view is not None:
        view.state, view.reason = "failed", f"restarted {event.restarts} times within {event.within_s:g} s"


# ---------------------------------------------------------------- requests on it


def _accepted(book: ExecutorBook, meta: Meta, event: ev.ExecutorAccepted) -> None:
    view = book.of(event.executor)
    if not view.running:
        view.silent_since_ns = meta.mono_ns
    view.running.add(event.request_id)


def _stepped(book: ExecutorBook, meta: Meta, event: ev.StepCommitted) -> None:
    view = book.of(event.executor)
    view.steps += 1
    view.silent_since_ns = meta.mono_ns
    view.kv_bytes_in_use = event.kv_bytes_in_use
    view.prefix_cache_bytes = event.prefix_cache_bytes


def _let_go(book: ExecutorBook, _meta: Meta, event: ev.CancelApplied | ev.ExecutorFaulted | ev.RouteForgotten) -> None:
    if (view := book.views.get(event.executor)) is not None:
        view.running.discard(event.request_id)


def _ended(book: ExecutorBook, meta: Meta, _event: Event) -> None:
    for view in book.views.values():
        view.running.discard(meta.correlation)


# ---------------------------------------------------------------- memory


def _pool_set(book: ExecutorBook, _meta: Meta, event: ev.MemoryPoolSet) -> None:
    view = book.of(event.executor)
    view.kv_budget_bytes, view.lacking_bytes = event.capabilities.kv_budget_bytes, 0


def _pool_dropped(book: ExecutorBook, _meta: Meta, event: ev.MemoryPoolDropped) -> None:
    view = book.of(event.executor)
    view.kv_budget_bytes = view.lacking_bytes = 0
    for request_id, (name, kv_bytes) in book.reservations.items():
        if name == event.executor:
            book.reservations[request_id] = ("", kv_bytes)


def _granted(book: ExecutorBook, _meta: Meta, event: ev.ReservationGranted) -> None:
    book.reservations[event.request_id] = ("", event.kv_bytes)


def _bound(book: ExecutorBook, _meta: Meta, event: ev.ReservationBound) -> None:
    if (held := book.reservations.get(event.request_id)) is not None:
        book.reservations[event.request_id] = (event.executor, held[1])


def _released(book: ExecutorBook, _meta: Meta, event: ev.ReservationReleased) -> None:
    book.reservations.pop(event.request_id, None)


def _observed(book: ExecutorBook, _meta: Meta, event: ev.MemoryObserved) -> None:
    view = book.of(event.executor)
    view.memory_used_bytes, view.memory_total_bytes = event.used_bytes, event.total_bytes
    view.kv_bytes_in_use, view.devices = event.kv_bytes_in_use, event.devices
    view.lacking_bytes = event.lacking_bytes


_HANDLERS: dict[type[Event], Callable[[ExecutorBook, Meta, Any], None]] = {
    ev.EngineStarted: _started,
    ev.EngineLoadProgressed: _load_progressed,
    ev.EngineLoaded: _loaded,
    ev.EngineLoadFailed: _load_failed,
    ev.EngineExited: _exited,
    ev.EngineStalled: _stalled,
    ev.EngineSickened: _sickened,
    ev.RestartRequested: _restart_requested,
    ev.ExecutorRated: _rated,
    ev.ExecutorLeft: _left,
    ev.SupervisorEscalated: _escalated,
    ev.ExecutorAccepted: _accepted,
    ev.StepCommitted: _stepped,
    ev.CancelApplied: _let_go,
    ev.ExecutorFaulted: _let_go,
    ev.RouteForgotten: _let_go,
    ev.RequestCompleted: _ended,
    ev.RequestFailed: _ended,
    ev.RequestCancelled: _ended,
    ev.MemoryPoolSet: _pool_set,
    ev.MemoryPoolDropped: _pool_dropped,
    ev.ReservationGranted: _granted,
    ev.ReservationBound: _bound,
    ev.ReservationReleased: _released,
    ev.MemoryObserved: _observed,
}
