"""Replies: set once from anywhere, awaited without blocking, got from threads."""

import asyncio
import logging
import threading

import pykka
import pytest

from gptoss.actors.future import ReplyFuture
from gptoss.errors import ActorError, AskTimeout, EngineError


async def test_a_value_set_before_is_there_at_once() -> None:
    future: ReplyFuture[int] = ReplyFuture()
    future.set(3)
    assert await future == 3
    assert future.get() == 3


async def test_many_coroutines_can_await_one_reply_set_by_a_thread() -> None:
    future: ReplyFuture[int] = ReplyFuture()

    async def wait() -> int:
        return await future

    waits = [asyncio.ensure_future(wait()) for _ in range(5)]
    await asyncio.sleep(0)
    await asyncio.to_thread(future.set, 7)
    assert await asyncio.gather(*waits) == [7] * 5


async def test_an_error_is_raised_at_the_await() -> None:
    future: ReplyFuture[int] = ReplyFuture()
    asyncio.get_running_loop().call_soon(future.set_exception, EngineError("lost"))
    with pytest.raises(EngineError, match="lost"):
        await future


def test_get_waits_for_another_thread() -> None:
    future: ReplyFuture[int] = ReplyFuture()
    threading.Timer(0.01, future.set, [5]).start()
    assert future.get(timeout=5) == 5


def test_get_gives_up_after_its_timeout() -> None:
    with pytest.raises(pykka.Timeout):
        ReplyFuture[int]().get(timeout=0.01)


async def test_get_on_the_loop_is_refused_instead_of_freezing_it() -> None:
    with pytest.raises(ActorError, match="await"):
        ReplyFuture[int]().get(timeout=1)


def test_a_second_reply_raises() -> None:
    future: ReplyFuture[int] = ReplyFuture()
    future.set(1)
    with pytest.raises(ActorError, match="already set"):
        future.set(2)
    with pytest.raises(ActorError, match="already set"):
        future.set_exception(EngineError("late"))
    assert future.get() == 1


def test_a_reply_after_the_time_out_is_dropped() -> None:
    future: ReplyFuture[int] = ReplyFuture()
    assert future.fail(AskTimeout("too late"))
    future.set(1)
    with pytest.raises(AskTimeout):
        future.get()


def test_the_first_of_reply_and_time_out_wins() -> None:
    future: ReplyFuture[int] = ReplyFuture()
    assert future.resolve(1)
    assert not future.fail(AskTimeout("too late"))
    assert future.get() == 1


def test_set_exception_takes_pykkas_tuple_and_the_exception_being_handled() -> None:
    by_tuple: ReplyFuture[int] = ReplyFuture()
    by_tuple.set_exception((KeyError, KeyError("k"), None))
    current: ReplyFuture[int] = ReplyFuture()
    try:
        raise EngineError("now")
    except EngineError:
        current.set_exception()
    assert isinstance(by_tuple.error(), KeyError)
    assert isinstance(current.error(), EngineError)


def test_set_exception_without_an_exception_is_refused() -> None:
    with pytest.raises(ActorError, match="needs an exception"):
        ReplyFuture[int]().set_exception()


def test_callbacks_run_once_also_when_added_late() -> None:
    future: ReplyFuture[int] = ReplyFuture()
    seen: list[str] = []
    future.add_done_callback(lambda _: seen.append("early"))
    future.set(1)
    future.add_done_callback(lambda _: seen.append("late"))
    assert seen == ["early", "late"]


def test_a_removed_callback_does_not_run() -> None:
    future: ReplyFuture[int] = ReplyFuture()
    seen: list[object] = []
    future.add_done_callback(seen.append)
    future.remove_done_callback(seen.append)
    future.set(1)
    assert seen == []


def test_a_callback_that_raises_hurts_nobody(caplog: pytest.LogCaptureFixture) -> None:
    future: ReplyFuture[int] = ReplyFuture()
    seen: list[object] = []

    def broken(_: object) -> None:
        raise ValueError("watcher")

    future.add_done_callback(broken)
    future.add_done_callback(seen.append)
    with caplog.at_level(logging.CRITICAL):
        future.set(1)
    assert seen == [future]


async def test_a_cancelled_waiter_leaves_no_callback_behind() -> None:
    future: ReplyFuture[int] = ReplyFuture()
    for _ in range(3):
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.001):
                await future
    assert future._callbacks == []
    future.set(1)
    assert await future == 1


async def test_pykkas_hooked_futures_do_not_block_the_loop_either() -> None:
    future: ReplyFuture[int] = ReplyFuture()
    doubled = future.map(lambda value: value * 2)
    asyncio.get_running_loop().call_later(0.01, future.set, 21)
    assert await doubled == 42


def test_a_set_future_takes_no_hook() -> None:
    future: ReplyFuture[int] = ReplyFuture()
    future.set(1)
    with pytest.raises(ActorError, match="hook"):
        future.set_get_hook(lambda _: 2)
