"""Sessions in the engine: what a turn leaves is there for the next one, whatever else was cached meanwhile."""

from collections.abc import Callable
from typing import Any

import msgspec
import pytest
from core_run import Invariant, Run, submit

from gptoss.engine.core import CoreOptions
from gptoss.engine.load import LoadedModel
from gptoss.engine.memory_model import kv_bytes
from gptoss.engine.port import Cancel, DropSession, Finished, Submit

Models = Callable[..., LoadedModel]
MB = 1 << 20
BLOCK = 32


def text(length: int, start: int = 0) -> list[int]:
    return [32 + (start + index * 7) % 95 for index in range(length)]


def ask(request_id: str, token_ids: list[int], *, session: str = "", **params: Any) -> Submit:
    base = submit(request_id, **params)
    return msgspec.structs.replace(base, prompt_token_ids=tuple(token_ids), session_id=session)


def started(model: LoadedModel, *, cache_bytes: int, session_bytes_max: int = MB) -> Run:
    options = CoreOptions(prefix_cache_bytes=cache_bytes, session_bytes_max=session_bytes_max, provenance="m")
    return Run(model, Invariant(model), options)


def answer(run: Run, request: Submit) -> Finished:
    run.handle(request)
    run.finish()
    end = run.end(request.request_id)
    assert isinstance(end, Finished)
    return end


def others(run: Run, number: int) -> None:
    """Requests that have nothing to do with the session, enough to fill the cache."""
    for index in range(number):
        answer(run, ask(f"other-{index}", text(200, start=1 + index), max_tokens=2))


def test_a_second_turn_pays_only_for_what_is_new(laid_out: Models) -> None:
    model = laid_out()
    cache_bytes = kv_bytes(model.runner.layout, 600)
    run = started(model, cache_bytes=cache_bytes)
    first = answer(run, ask("one", text(200), session="s", max_tokens=40))
    assert first.session_tokens == (200 + 39) // BLOCK * BLOCK
    assert first.session_bytes == kv_bytes(model.runner.layout, first.session_tokens)
    others(run, 6)
    turn = [*text(200), *run.tokens("one"), *text(30, start=3)]
    second = answer(run, ask("two", turn, session="s", max_tokens=4))
    assert second.cached_tokens == first.session_tokens
    assert sum(row.prefilled for row in run.rows("two")) == len(turn) - first.session_tokens
    alone = started(model, cache_bytes=0)
    answer(alone, ask("two", turn, max_tokens=4))
    assert run.tokens("two") == alone.tokens("two")


def test_without_a_session_the_same_turn_finds_nothing_any_more(laid_out: Models) -> None:
    model = laid_out()
    run = started(model, cache_bytes=kv_bytes(model.runner.layout, 600))
    answer(run, ask("one", text(200), max_tokens=40))
    others(run, 6)
    assert answer(run, ask("two", [*text(200), *run.tokens("one")], max_tokens=2)).cached_tokens == 0


def test_a_dropped_session_is_cached_as_anything_else(laid_out: Models) -> None:
    model = laid_out()
    run = started(model, cache_bytes=kv_bytes(model.runner.layout, 600))
    answer(run, ask("one", text(200), session="s", max_tokens=2))
    run.handle(DropSession(session_id="s"), DropSession(session_id="s"), DropSession(session_id="unknown"))
    assert answer(run, ask("two", text(210), max_tokens=2)).cached_tokens == 192
    others(run, 6)
    assert answer(run, ask("three", text(210), max_tokens=2)).cached_tokens == 0


def test_a_session_keeps_no_more_than_it_may(laid_out: Models) -> None:
    model = laid_out()
    limit = kv_bytes(model.runner.layout, 3 * BLOCK) + 1
    run = started(model, cache_bytes=kv_bytes(model.runner.layout, 600), session_bytes_max=limit)
    end = answer(run, ask("one", text(200), session="s", max_tokens=2))
    assert (end.session_tokens, end.session_bytes) == (3 * BLOCK, kv_bytes(model.runner.layout, 3 * BLOCK))


def test_requests_that_run_come_before_every_session(laid_out: Models) -> None:
    model = laid_out()
    budget = model.capabilities.kv_budget_bytes
    run = started(model, cache_bytes=budget)
    for number in range(4):
        answer(run, ask(f"turn-{number}", text(200, start=number), session=f"s{number}", max_tokens=2))
    layout, longest = model.runner.layout, model.capabilities.max_model_len
    places = min(budget // kv_bytes(layout, longest), model.capabilities.max_batch_size)
    large = [ask(f"large-{n}", text(longest - 4, start=50 + n), max_tokens=4) for n in range(places)]
    run.handle(*large)
    run.finish()
    assert all(isinstance(run.end(request.request_id), Finished) for request in large)
    assert max(step.kv_bytes_in_use + step.prefix_cache_bytes for step in run.steps()) <= budget


def test_of_a_turn_that_is_cancelled_nothing_new_is_kept(laid_out: Models) -> None:
    model = laid_out()
    run = started(model, cache_bytes=kv_bytes(model.runner.layout, 900))
    first = answer(run, ask("one", text(100), session="s", max_tokens=2))
    run.handle(ask("two", text(300), session="s", max_tokens=50))
    run.step(3)
    run.handle(Cancel(request_id="two"))
    end = run.end("two")
    assert isinstance(end, Finished)
    assert (end.reason, end.session_tokens, end.session_bytes) == ("cancelled", 0, 0)
    assert first.session_tokens == 96


@pytest.mark.parametrize("session", ["", "s"])
def test_an_engine_without_a_cache_keeps_nothing_and_says_so(laid_out: Models, session: str) -> None:
    run = started(laid_out("gemma2"), cache_bytes=MB)
    end = answer(run, ask("one", text(100), session=session, max_tokens=2))
    assert (end.session_tokens, end.session_bytes) == (0, 0)
