"""The live dispatcher: turns in the order in which they were asked for, many in one callback of the loop."""

import asyncio
import contextvars
from typing import Any

import pytest

from gptoss.actors.dispatcher import TURNS_A_CALL, LiveDispatcher


async def test_turns_come_in_order_and_those_they_ask_for_in_the_same_callback() -> None:
    loop = asyncio.get_running_loop()
    call_turn = LiveDispatcher().bind(loop)
    said: list[str] = []

    def first() -> None:
        said.append("first")
        call_turn(lambda: said.append("third"))

    call_turn(first)
    call_turn(lambda: said.append("second"))
    loop.call_soon(said.append, "another callback")
    await asyncio.sleep(0)
    assert said == ["first", "second", "third", "another callback"]


async def test_actors_that_ask_for_ever_let_the_loop_go_on() -> None:
    loop = asyncio.get_running_loop()
    call_turn = LiveDispatcher().bind(loop)
    turns = 0

    def again() -> None:
        nonlocal turns
        turns += 1
        if turns < 10 * TURNS_A_CALL:
            call_turn(again)

    call_turn(again)
    await asyncio.sleep(0)
    assert turns == TURNS_A_CALL
    async with asyncio.timeout(10.0):
        while turns < 10 * TURNS_A_CALL:
            await asyncio.sleep(0)


async def test_a_turn_that_raises_is_reported_and_costs_the_others_nothing() -> None:
    loop = asyncio.get_running_loop()
    reported: list[dict[str, Any]] = []
    loop.set_exception_handler(lambda _, context: reported.append(context))
    call_turn = LiveDispatcher().bind(loop)
    said: list[str] = []

    def broken() -> None:
        raise ValueError("no")

    call_turn(broken)
    call_turn(lambda: said.append("next"))
    for _ in range(3):
        await asyncio.sleep(0)
    assert said == ["next"]
    assert isinstance(reported[0]["exception"], ValueError)


def test_the_users_interrupt_reaches_the_loop_and_no_turn_is_lost() -> None:
    said: list[str] = []

    async def main() -> None:
        call_turn = LiveDispatcher().bind(asyncio.get_running_loop())

        def interrupted() -> None:
            raise KeyboardInterrupt

        call_turn(interrupted)
        call_turn(lambda: said.append("next"))
        await asyncio.sleep(0)

    loop = asyncio.new_event_loop()
    task = loop.create_task(main())
    with pytest.raises(KeyboardInterrupt):
        loop.run_until_complete(task)
    loop.run_until_complete(asyncio.sleep(0))
    loop.run_until_complete(task)
    loop.close()
    assert said == ["next"]


async def test_a_turn_runs_in_the_context_it_was_asked_with() -> None:
    variable = contextvars.ContextVar("variable", default="outside")
    context = contextvars.copy_context()
    context.run(variable.set, "inside")
    call_turn = LiveDispatcher().bind(asyncio.get_running_loop())
    seen: list[str] = []
    call_turn(lambda: seen.append(variable.get()), context=context)
    call_turn(lambda: seen.append(variable.get()))
    await asyncio.sleep(0)
    assert seen == ["inside", "outside"]
