"""A system of actors: it starts them, owns what they own, and stops them in order.

Rules:
- A system is bound to the event loop that ``start`` runs on. ``spawn``, ``watch`` and ``supervisor`` belong to that
  loop; references, timers and ``run_task`` work from the threads of its actors too.
- ``stop`` takes the actors down in reverse order of spawning, answers every waiting ask, cancels owned tasks and timers
  and shuts the thread pool. It touches nothing that another system or an embedder started with Pykka.
- No new actor, task or timer starts once stopping has begun.
"""

import asyncio
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Self, TypeVar

import msgspec

from gptoss.actors.cell import Cell, Incarnation
from gptoss.actors.dispatcher import Dispatcher, LiveDispatcher
from gptoss.actors.inbox import MailboxSpec
from gptoss.actors.journal import Journal
from gptoss.actors.kernel import Kernel
from gptoss.actors.ref import Ref
from gptoss.actors.supervisor import Supervision, Supervisor
from gptoss.clock import Clock, IdSource, Rng
from gptoss.errors import ActorError

T = TypeVar("T")
POOL_THREADS = 4
CLEAN_UP_S = 0.5
"""How long cancelled tasks may take to clean up, even when the time for stopping is over."""
DEFAULT_MAILBOX = MailboxSpec()


class Context(msgspec.Struct, frozen=True, eq=False):
    """What an actor knows of its place: its system, its name, which incarnation it is, its own address."""

    system: "System"
    name: str
    incarnation: int
    ref: Ref[Any]


class Timer:
    """A message that will be sent later, once or again and again; ``cancel`` it from any thread."""

    def __init__(self, kernel: Kernel, ref: Ref[Any], factory: Callable[[], Any], period_s: float | None) -> None:
        self.cancelled = False
        self.handle: asyncio.TimerHandle | None = None
        self._kernel = kernel
        self._ref = ref
        self._factory = factory
        self._period_s = period_s

    def cancel(self) -> None:
        """Send nothing more; fine when it has fired or was cancelled."""
        self.cancelled = True
        self._kernel.run_on_loop(self._disarm)

    def arm(self, delay_s: float) -> None:
        """Start counting, on the loop."""
        if not (self.cancelled or self._kernel.stopping):
            self._kernel.timers[self] = None
            self._arm_at(self._kernel.loop.time() + delay_s)

    def _arm_at(self, when_s: float) -> None:
        self.handle = self._kernel.loop.call_at(when_s, self._fire, when_s, context=self._kernel.context)

    def _disarm(self) -> None:
        self._kernel.timers.pop(self, None)
        if self.handle is not None:
            self.handle.cancel()

    def _fire(self, when_s: float) -> None:
        if self.cancelled:
            return
        try:
            message = self._factory()
        except Exception as error:  # noqa: BLE001 - the edge of a timer: its failure is an event
            self._kernel.fail(self._ref.name, "timer", error, incarnation=self._ref.incarnation)
            self._kernel.timers.pop(self, None)
            return
        self._ref.tell(message)
        if self._period_s is None or not self._ref.is_alive:
            self._kernel.timers.pop(self, None)
        else:  # a loop that fell behind skips beats instead of sending a burst
            self._arm_at(max(when_s + self._period_s, self._kernel.loop.time()))


class System:
    """Actors that live and end together."""

    def __init__(
        self,
        *,
        name: str,
        clock: Clock,
        ids: IdSource,
        rng: Rng,
        journal: Journal,
        dispatcher: Dispatcher | None = None,
    ) -> None:
        self.name = name
        self.clock = clock
        self.ids = ids
        self.rng = rng
        self.journal = journal
        self._dispatcher = dispatcher or LiveDispatcher()
        self._kernel: Kernel | None = None
        self._root: Supervisor | None = None
        self._cells: dict[str, Cell] = {}
        self._pool = ThreadPoolExecutor(POOL_THREADS, thread_name_prefix=name)
        self._in_threads: dict[asyncio.Future[Any], None] = {}
        self._stopping: asyncio.Task[None] | None = None

    # ---- life

    async def start(self) -> None:
        """Bind to the running event loop.

        Raises:
            ActorError: it was started before; a system runs once.
        """
        if self._kernel is not None:
            raise ActorError(f"system {self.name!r} was started before; make a new one")
        self._kernel = Kernel(
            name=self.name, clock=self.clock, rng=self.rng, journal=self.journal, dispatcher=self._dispatcher
        )
        self._root = Supervisor(self._kernel, "root", Supervision())

    async def stop(self, timeout_s: float = 10.0) -> None:
        """Stop every actor, task and timer of this system; idempotent, and concurrent calls wait for the same end.

        Args:
            timeout_s: how long handlers and threads may finish by themselves, in total. What is still busy then is
                cancelled, or given up when it is a thread.
        """
        if self._kernel is None:
            self._pool.shutdown(wait=False)
            return
        if self._stopping is None:
            self._kernel.stopping = True
            self._stopping = self._kernel.loop.create_task(self._stop(self._kernel, timeout_s))
        await asyncio.shield(self._stopping)

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    async def _stop(self, kernel: Kernel, timeout_s: float) -> None:
        deadline_s = kernel.loop.time() + timeout_s
        for timer in tuple(kernel.timers):
            timer.cancel()
        for cell in reversed(tuple(self._cells.values())):
            await cell.stop(max(0.0, deadline_s - kernel.loop.time()))
        for task in tuple(kernel.tasks):
            task.cancel()
        open_work = {*kernel.tasks, *self._in_threads}
        if open_work:
            await asyncio.wait(open_work, timeout=max(CLEAN_UP_S, deadline_s - kernel.loop.time()))
        self._pool.shutdown(wait=False, cancel_futures=True)

    # ---- actors

    def spawn(
        self,
        factory: Callable[[], Incarnation],
        *,
        name: str,
        mailbox: MailboxSpec = DEFAULT_MAILBOX,
        supervisor: Supervisor | None = None,
        quiet: bool = False,
    ) -> Ref[Any]:
        """Start an actor and return its address, which stays the same over restarts.

        Args:
            factory: makes an instance; called again for each restart.
            name: unique among the living actors of this system.
            mailbox: bounds of its mailbox.
            supervisor: who restarts it; without one it stops for good when it fails.
            quiet: neither record its start and its normal end nor list it in Pykka's registry, as for the many actors that
                live for one request.

        Raises:
            ActorError: the name is taken, or the system is not running.
        """
        kernel = self._running()
        if name in self._cells:
            raise ActorError(f"an actor named {name!r} is running; names are unique")
        cell = Cell(kernel, name, factory, mailbox=mailbox, parent=supervisor, quiet=quiet)
        cell.context_of = self._context_of
        cell.on_stopped = self._forget
        self._cells[name] = cell
        if supervisor is not None:
            supervisor.adopt(cell)
        ref = cell.ref
        cell.start()
        return ref

    def supervisor(self, name: str, supervision: Supervision) -> Supervisor:
        """A further supervisor, to be passed to ``spawn``."""
        return Supervisor(self._running(), name, supervision)

    @property
    def root(self) -> Supervisor:
        """The default supervisor, one_for_one."""
        if self._root is None:
            raise ActorError(f"system {self.name!r} is not started")
        return self._root

    def watch(self, ref: Ref[Any], watcher: Ref[Any]) -> None:
        """Send ``watcher`` a ``Terminated`` when the actor behind ``ref`` stops for good, at once if it has."""
        ref.watch(watcher)

    def on_escalated(self, callback: Callable[[str], object]) -> None:
        """Call ``callback`` with the child's name, on the loop, whenever a supervisor gives up on a child."""
        self._bound().on_escalated.append(callback)

    def mailbox_depths(self) -> dict[str, int]:
        """Letters that wait, by actor."""
        return {name: len(cell.inbox) for name, cell in tuple(self._cells.items())}

    def is_idle(self) -> bool:
        """Whether nothing happens before a timer or someone outside says so: no letter waits or is being handled.

        Short-lived (``quiet``) actors count as work of their own, since each lives for as long as its request runs.
        """
        return all(cell.inbox.is_at_rest() and not cell.quiet for cell in tuple(self._cells.values()))

    # ---- work beside actors

    def run_task(self, coro: Coroutine[Any, Any, T], *, name: str) -> "asyncio.Task[T | None]":
        """Run a coroutine that the system owns; an exception becomes an ``ActorFailed`` event and the result None."""
        try:
            return self._running().own(coro, name)
        except ActorError:
            coro.close()
            raise

    async def run_in_thread(self, function: Callable[..., T], *args: Any) -> T:
        """Run a blocking function on one of a few threads and return what it returns."""
        kernel = self._running()
        work = kernel.loop.run_in_executor(self._pool, function, *args)
        self._in_threads[work] = None
        try:
            return await work
        finally:
            self._in_threads.pop(work, None)

    def send_after(self, delay_s: float, ref: Ref[Any], message_factory: Callable[[], Any]) -> Timer:
        """Tell ``ref`` what ``message_factory`` returns at that time, once; from any thread."""
        return self._timer(delay_s, ref, message_factory, None)

    def send_every(self, period_s: float, ref: Ref[Any], message_factory: Callable[[], Any]) -> Timer:
        """Tell ``ref`` what ``message_factory`` returns, every ``period_s`` until cancelled; from any thread."""
        return self._timer(period_s, ref, message_factory, period_s)

    def _timer(
        self, delay_s: float, ref: Ref[Any], message_factory: Callable[[], Any], period_s: float | None
    ) -> Timer:
        kernel = self._bound()
        timer = Timer(kernel, ref, message_factory, period_s)
        kernel.run_on_loop(timer.arm, delay_s)
        return timer

    # ---- what it is made of

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        """The event loop that this system is bound to."""
        return self._bound().loop

    def now_ns(self) -> int:
        """Monotonic nanoseconds of the system's clock."""
        return self.clock.monotonic_ns()

    def _context_of(self, cell: Cell) -> Context:
        return Context(system=self, name=cell.name, incarnation=cell.incarnation, ref=cell.ref)

    def _forget(self, cell: Cell) -> None:
        if self._cells.get(cell.name) is cell:
            del self._cells[cell.name]

    def _bound(self) -> Kernel:
        if self._kernel is None:
            raise ActorError(f"system {self.name!r} is not started")
        return self._kernel

    def _running(self) -> Kernel:
        kernel = self._bound()
        if kernel.stopping:
            raise ActorError(f"system {self.name!r} is stopping; nothing new can start")
        return kernel
