"""What the deciders are told of an executor: that it can serve, takes nobody new, is suspect, or is gone, and what it keeps."""

from collections.abc import Callable

from gptoss.actors.directory import Directory
from gptoss.messages import commands as cmd
from gptoss.messages.envelope import NO_CAUSE
from gptoss.messages.model import EngineCapabilities


class Standing:
    """The standing of one executor.

    Args:
        executor: its name.
        directory: where the deciders are.
        now_ns: monotonic time.

    Attributes:
        capabilities: of the engine that serves, or is to serve again once a wanted restart is over; else None.
    """

    def __init__(self, executor: str, directory: Directory, now_ns: Callable[[], int]) -> None:
        self.capabilities: EngineCapabilities | None = None
        self._executor = executor
        self._directory = directory
        self._now_ns = now_ns
        self._is_suspect = False

    def join(self, capabilities: EngineCapabilities, cause: int) -> None:
        """The engine serves."""
        self.capabilities = capabilities
        self._is_suspect = False
        now_ns = self._now_ns()
        pool = cmd.SetMemoryPool(now_ns=now_ns, executor=self._executor, capabilities=capabilities)
        self._directory.tell("memory", pool, cause=cause)
        joins = cmd.SetExecutor(
            now_ns=now_ns,
            executor=self._executor,
            slots=capabilities.max_batch_size,
            kv_budget_bytes=capabilities.kv_budget_bytes,
            multi_device=capabilities.multi_device,
        )
        self._directory.tell("router", joins, cause=cause)
        self._offer(capabilities.max_batch_size, cause)

    def drain(self, cause: int) -> None:
        """Nobody new runs here until it joins again; who finds no place elsewhere waits for that."""
        drain = cmd.DrainExecutor(now_ns=self._now_ns(), executor=self._executor)
        self._directory.tell("router", drain, cause=cause)
        self._offer(0, cause)

    def rate(self, *, is_suspect: bool, silent_ms: float) -> None:
        """Tell the router what is thought of the engine, if that has changed."""
        if is_suspect == self._is_suspect:
            return
        self._is_suspect = is_suspect
        rate = cmd.RateExecutor(
            now_ns=self._now_ns(),
            executor=self._executor,
            suspect=is_suspect,
            silent_ms=silent_ms if is_suspect else 0.0,
        )
        self._directory.tell("router", rate)

    def keep(self, session_id: str, tokens: int, kv_bytes: int, cause: int) -> None:
        """The engine keeps a session's turn that has just finished, whatever becomes of the request.

        To be said before the request is told of its end: then the guard hears it before the turn's own memory is released.
        """
        kept = cmd.KeepSession(
            now_ns=self._now_ns(), session_id=session_id, executor=self._executor, tokens=tokens, kv_bytes=kv_bytes
        )
        self._directory.tell("memory", kept, cause=cause)

    def leave(self, reason: str, cause: int = NO_CAUSE, *, fault: bool = False, returns: bool = False) -> None:
        """Nothing can run here; with ``returns``, only until a wanted restart is over."""
        now_ns = self._now_ns()
        drop = cmd.DropExecutor(now_ns=now_ns, executor=self._executor, reason=reason, fault=fault)
        self._directory.tell("router", drop, cause=cause)
        pool = cmd.DropMemoryPool(now_ns=now_ns, executor=self._executor)
        self._directory.tell("memory", pool, cause=cause)
        if not returns:
            self.capabilities = None
        self._offer(0, cause)

    def _offer(self, slots: int, cause: int) -> None:
        """How many may run here. Admission lets requests wait for capacity that has no slots now."""
        capabilities = self.capabilities
        capacity = cmd.SetCapacity(
            now_ns=self._now_ns(),
            executor=self._executor,
            slots=slots,
            kv_budget_bytes=capabilities.kv_budget_bytes if capabilities else 0,
            multi_device=capabilities.multi_device if capabilities else False,
        )
        self._directory.tell("admission", capacity, cause=cause)
