"""The reply to an ask: a Pykka future with done-callbacks.

Rules:
- It is set once, from any thread; the callbacks run on the setting thread, each exactly once.
- ``await`` never blocks the event loop. Stock Pykka's ``__await__`` yields once and then blocks in ``get``; this one
  parks an asyncio future that is woken directly from the loop's own thread, by ``call_soon_threadsafe`` from others.
- ``get`` blocks its thread and therefore refuses to run on a thread with a running event loop.
- ``set`` and ``set_exception`` are the replier's: a second call raises, as in Pykka. ``resolve`` and ``fail`` are the
  runtime's: first one wins. A reply that comes after the runtime gave up (time-out, dead actor) is dropped.
- A stored exception loses its traceback, cause and context: those pin frames, and frames pin tensors.
"""

import asyncio
import contextlib
import functools
import logging
import sys
import threading
from collections.abc import Callable, Generator
from typing import Any, Self, TypeVar, cast

import pykka

from gptoss.errors import ActorError

T = TypeVar("T")
logger = logging.getLogger(__name__)


class ReplyFuture(pykka.Future[T]):
    """A value that arrives later, for coroutines (``await``) and threads (``get``)."""

    # Class attributes, not set for each instance: there is a future for each ask.
    _done = False
    _set_by_replier = False
    _value: Any = None
    _error: BaseException | None = None

    def __init__(self) -> None:
        super().__init__()
        self._lock = threading.Lock()
        self._callbacks: list[Callable[[Self], object]] = []

    def done(self) -> bool:
        """Whether a value or an error is there."""
        return self._done

    def error(self) -> BaseException | None:
        """The error that was set, None while there is none."""
        return self._error

    # ---- setting

    def set(self, value: T | None = None) -> None:
        """Reply with ``value``.

        Raises:
            ActorError: a reply was set before.
        """
        if not self._finish(value, None, by_replier=True):
            raise ActorError("the reply was already set; a future takes one")

    def set_exception(self, exc_info: BaseException | Any = None) -> None:
        """Reply with an error.

        Args:
            exc_info: the exception, or a ``sys.exc_info()`` tuple; None takes the exception being handled.

        Raises:
            ActorError: a reply was set before, or there is no exception.
        """
        if exc_info is None:
            exc_info = sys.exc_info()
        error: Any = cast("Any", exc_info[1]) if isinstance(exc_info, tuple) else exc_info
        if not isinstance(error, BaseException):
            raise ActorError(f"set_exception needs an exception, not {error!r}")
        if not self._finish(None, error, by_replier=True):
            raise ActorError("the reply was already set; a future takes one")

    def resolve(self, value: T | None = None) -> bool:
        """Set ``value`` unless something is set already; returns whether this call did."""
        return self._finish(value, None, by_replier=False)

    def fail(self, error: BaseException) -> bool:
        """Set ``error`` unless something is set already; returns whether this call did."""
        return self._finish(None, error, by_replier=False)

    def set_get_hook(self, func: Callable[[float | None], T]) -> None:
        """See Pykka: compute the value by ``func`` when it is asked for."""
        with self._lock:
            if self._done:
                raise ActorError("the reply was already set; it cannot take a hook")
            super().set_get_hook(func)

    def _finish(self, value: Any, error: BaseException | None, *, by_replier: bool) -> bool:
        with self._lock:
            if self._done or self._get_hook is not None:
                # A replier that lost against a time-out did nothing wrong; one that replies twice did.
                return by_replier and self._done and not self._set_by_replier
            self._value = value
            self._error = without_frames(error) if error is not None else None
            self._set_by_replier = by_replier
            self._done = True
            callbacks, self._callbacks = self._callbacks, []
        for callback in callbacks:
            self._call(callback)
        return True

    # ---- getting

    def add_done_callback(self, callback: Callable[[Self], object]) -> None:
        """Call ``callback(self)`` on the setting thread, or now when already set. It should be quick."""
        with self._lock:
            if not self._done:
                self._callbacks.append(callback)
                return
        self._call(callback)

    def remove_done_callback(self, callback: Callable[[Self], object]) -> None:
        """Forget ``callback``; fine when it is unknown or has run."""
        with self._lock, contextlib.suppress(ValueError):
            self._callbacks.remove(callback)

    def get(self, *, timeout: float | None = None) -> T:
        """Wait on this thread for the value.

        Args:
            timeout: seconds; None waits as long as it takes.

        Raises:
            pykka.Timeout: nothing came in time.
            ActorError: called on a thread whose event loop is running and would stand still.
        """
        if self._get_hook is not None:
            return super().get(timeout=timeout)
        if not self._done:
            _refuse_on_a_loop()
            bell = threading.Event()
            self.add_done_callback(lambda _: bell.set())
            if not bell.wait(timeout):
                raise pykka.Timeout(f"{timeout} seconds")
        return self._outcome()

    def __await__(self) -> Generator[Any, None, T]:
        if self._get_hook is not None:
            # Pykka's map, join and stop futures compute by blocking: that belongs on another thread.
            hooked = functools.partial(self.get, timeout=None)
            return (yield from asyncio.get_running_loop().run_in_executor(None, hooked).__await__())
        if not self._done:
            yield from self._park()
        return self._outcome()

    def _park(self) -> Generator[Any, None, None]:
        loop = asyncio.get_running_loop()
        loop_thread = threading.get_ident()
        waiter: asyncio.Future[None] = loop.create_future()

        def wake(_: object) -> None:
            if threading.get_ident() == loop_thread:
                _release(waiter)
            else:
                with contextlib.suppress(RuntimeError):  # the loop is closed, nobody waits
                    loop.call_soon_threadsafe(_release, waiter)

        self.add_done_callback(wake)
        try:
            yield from waiter.__await__()
        finally:
            if not self._done:
                self.remove_done_callback(wake)

    def _outcome(self) -> T:
        if self._error is not None:
            raise self._error.with_traceback(None)
        return cast("T", self._value)

    def _call(self, callback: Callable[[Self], object]) -> None:
        try:
            callback(self)
        except Exception:  # the replier must not pay for a watcher's fault
            logger.exception("a done-callback of a reply raised")


def without_frames(error: BaseException) -> BaseException:
    """``error`` itself, no longer holding on to the frames it passed through."""
    error.__cause__ = error.__context__ = None
    return error.with_traceback(None)


def _release(waiter: "asyncio.Future[None]") -> None:
    if not waiter.done():
        waiter.set_result(None)


def _refuse_on_a_loop() -> None:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return
    raise ActorError("get() would block the running event loop; await the reply instead")
