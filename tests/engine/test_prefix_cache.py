"""Cached prefixes: what they give back, what they keep, and that nobody can tell a hit from computing."""

from collections.abc import Callable, Sequence
from typing import Any

import msgspec
import pytest
import torch
from core_run import Invariant, Run, submit
from hypothesis import given, settings
from hypothesis import strategies as st

from gptoss.engine.attention import Chunk
from gptoss.engine.core import CoreOptions
from gptoss.engine.kv_cache import KvGeometry, KvSlot, LayerGeometry, RequestKv
from gptoss.engine.kv_pages import PagedKv, PagePool
from gptoss.engine.load import LoadedModel
from gptoss.engine.memory_model import kv_bytes
from gptoss.engine.port import Failed, Finished, Submit
from gptoss.engine.prefix_cache import Chain, PrefixCache
from gptoss.messages.plan import plan_of

Models = Callable[..., LoadedModel]
MB = 1 << 20
BLOCK = 4
POOL_BYTES = 8 << 10


# ---------------------------------------------------------------- the cache alone


def value(token_ids: Sequence[int], position: int) -> float:
    """What a model would compute at a position: a function of everything up to it."""
    return float(hash(tuple(token_ids[: position + 1])) % 100_003)


class Shelf:
    """A cache over layers of given windows, in KV slots or in pages."""

    def __init__(self, *windows: int, provenance: str = "m", page_tokens: int = 0) -> None:
        layers = [LayerGeometry(kv_heads=1, head_dim=1, window=window) for window in windows]
        self.geometry = KvGeometry(layers, torch.float32, torch.device("cpu"))
        self.cache = PrefixCache(self.geometry, BLOCK, provenance)
        self.pool = PagePool(self.geometry, POOL_BYTES, page_tokens) if page_tokens else None

    def memory(self, tokens: int) -> RequestKv:
        return PagedKv(self.pool, tokens) if self.pool else KvSlot(self.geometry, tokens)

    def begin(self, token_ids: Sequence[int], salt: str = "") -> "Reader":
        return Reader(self, token_ids, salt)

    def hit(self, token_ids: Sequence[int], salt: str = "") -> int:
        return self.cache.find(Chain(self.cache.root(salt)), token_ids, len(token_ids) - 1).num_tokens


class Reader:
    """A request: found in the cache, computed in pieces, stored after each."""

    def __init__(self, shelf: Shelf, token_ids: Sequence[int], salt: str) -> None:
        self.cache = shelf.cache
        self.token_ids = token_ids
        self.chain = Chain(self.cache.root(salt))
        self.slot = shelf.memory(len(token_ids) + 1)
        hit = self.cache.find(self.chain, token_ids, len(token_ids) - 1)
        self.cache.load(hit, self.slot)
        self.cache.touch(self.chain, len(hit.blocks))
        self.chain.num_stored = len(hit.blocks)
        self.computed = hit.num_tokens

    def run(self, *ends: int, bytes_max: int = MB) -> "Reader":
        """Compute up to each of ``ends`` (to the last token without any) and store what is new."""
        for end in ends or (len(self.token_ids),):
            for store, count in enumerate(self.slot.geometry.counts):
                for position in range(self.computed, end):
                    found = torch.full((count, 2, 1, 1, 1), value(self.token_ids, position))
                    self.slot.write(store, None, position, found)
            self.computed = max(end, self.computed)
            self.cache.store(self.chain, self.token_ids, self.slot, self.computed, bytes_max)
        return self

    def is_right(self) -> bool:
        """Whether the slot has all that the next token attends to."""
        for store, window in enumerate(self.slot.geometry.windows):
            visible = min(self.computed, window - 1) if window else self.computed
            for position in range(self.computed - visible, self.computed):
                found = self.slot.read(store, None, position, position + 1)
                if (found != value(self.token_ids, position)).any():
                    return False
        return True


def test_a_beginning_is_found_in_whole_blocks_and_never_whole() -> None:
    shelf = Shelf(0)
    shelf.begin(range(10)).run()
    assert shelf.hit(range(10)) == 8
    assert shelf.hit([*range(9), 99]) == 8
    assert shelf.hit([*range(7), 99, 99]) == 4
    assert shelf.hit(range(8)) == 4, "the last token must be computed, its logits are wanted"
    assert shelf.hit(range(1, 10)) == 0
    again = shelf.begin(range(10))
    assert again.computed == 8
    assert again.is_right()


def test_another_salt_or_model_shares_nothing() -> None:
    shelf = Shelf(0)
    shelf.begin(range(10), salt="a").run()
    assert (shelf.hit(range(10), "a"), shelf.hit(range(10), "b"), shelf.hit(range(10))) == (8, 0, 0)
    assert shelf.cache.root("") != Shelf(0, provenance="other").cache.root("")


def test_equal_keys_of_other_tokens_are_no_hit() -> None:
    shelf = Shelf(0)
    reader = shelf.begin(range(10)).run()
    forged = Chain(reader.chain.root)
    forged.keys = list(reader.chain.keys)  # as a collision would have them
    assert shelf.cache.find(forged, [5] * 10, 9).num_tokens == 0


def test_a_ring_is_found_only_where_it_was_kept() -> None:
    shelf = Shelf(0, 8)
    shelf.begin(range(30)).run(16, 30)
    assert shelf.hit(range(30)) == 16, "behind 16 the ring had moved on before it was copied"
    shelf.begin(range(30)).run(*range(17, 31))
    assert shelf.hit(range(30)) == 28, "token by token nothing is missed"
    assert shelf.hit([*range(27), 99, 99]) == 24
    again = shelf.begin(range(30))
    assert again.is_right()


def test_the_least_recently_used_goes_first_and_from_the_end() -> None:
    shelf = Shelf(0)
    shelf.begin([1] * 12).run()
    shelf.begin([2] * 12).run()
    size = shelf.cache.num_bytes // 6
    shelf.begin([1] * 13)
    shelf.begin([3] * 12).run(bytes_max=6 * size)
    assert [shelf.hit([token] * 13) for token in (1, 2, 3)] == [12, 0, 12]
    shelf.cache.shrink(4 * size)
    assert [shelf.hit([token] * 13) for token in (1, 2, 3)] == [4, 0, 12]
    shelf.cache.shrink(0)
    assert shelf.cache.num_bytes == 0


def test_a_chain_longer_than_the_cache_keeps_its_beginning() -> None:
    shelf = Shelf(0)
    shelf.begin(range(40)).run(12, 24, 40, bytes_max=100)
    assert shelf.hit(range(40)) == 100 // 32 * BLOCK
    assert shelf.cache.num_bytes <= 100


def test_what_is_forgotten_is_not_found() -> None:
    shelf = Shelf(0)
    reader = shelf.begin(range(12)).run()
    shelf.cache.forget(reader.chain)
    assert (shelf.hit(range(13)), shelf.cache.num_bytes) == (0, 0)


TEXTS = st.lists(st.integers(0, 1), min_size=1, max_size=40)


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from([(0,), (6,), (0, 6), (0, 3), (0, 4), (0, 12), (100,), (0, 6, 0, 0)]),
    st.sampled_from([0, 1, 2, 4]),
    st.lists(st.tuples(TEXTS, st.integers(1, 9), st.integers(0, 400)), min_size=1, max_size=12),
)
def test_whatever_was_stored_a_hit_is_what_computing_gives(
    windows: tuple[int, ...], page_tokens: int, requests: list[tuple[list[int], int, int]]
) -> None:
    shelf = Shelf(*windows, page_tokens=page_tokens)
    for token_ids, stride, bytes_max in requests:
        shelf.cache.shrink(bytes_max)
        reader = shelf.begin(token_ids)
        assert reader.is_right()
        reader.run(*range(reader.computed + stride, len(token_ids), stride), len(token_ids), bytes_max=bytes_max)
        assert shelf.cache.num_bytes <= bytes_max
        held = list(shelf.cache._blocks.values())
        assert shelf.cache.num_bytes == sum(block.num_bytes for block in held)
        if shelf.pool:
            others = shelf.pool.num_bytes - shelf.pool.num_free * shelf.pool.page_bytes - reader.slot.num_bytes
            assert others <= shelf.cache.num_bytes, "pages are counted by whoever refers to them"
    longest = max((token_ids for token_ids, _, _ in requests), key=len)
    assert shelf.hit(longest) <= len(longest) - 1


# ---------------------------------------------------------------- in the engine


def started(model: LoadedModel, *, invariant: bool = False, cache: int = 64 * MB) -> Run:
    return Run(model, Invariant(model) if invariant else None, CoreOptions(prefix_cache_bytes=cache))


def ask(request_id: str, prompt: Sequence[int], salt: str = "", **options: Any) -> Submit:
    made = submit(request_id, **{"logprobs": 0} | options)
    return msgspec.structs.replace(made, prompt_token_ids=tuple(prompt), cache_salt=salt)


def text(length: int, seed: int = 0) -> list[int]:
    return [(index * 37 + index * index * seed + 5) % 256 for index in range(length)]


def cached(running: Run, request_id: str) -> int:
    end = running.end(request_id)
    assert isinstance(end, Finished)
    return end.cached_tokens


def bits(running: Run, request_id: str) -> list[tuple[int, float]]:
    return [(each.token_id, each.logprob) for row in running.rows(request_id) for each in row.logprobs]


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen3", "gpt_oss"])
def test_a_hit_gives_the_same_bits_as_computing(kind: str, laid_out: Models) -> None:
    model = laid_out(kind)
    first, second = ask("first", text(600)), ask("second", [*text(560), 1, 2, 3], temperature=1.0)
    running = started(model)
    running.handle(first)
    running.finish()
    running.handle(second)
    running.finish()
    assert (cached(running, "first"), cached(running, "second")) == (0, 512)
    alone = Run(model)
    alone.handle(second)
    alone.finish()
    assert bits(running, "second") == bits(alone, "second")
    assert sum(row.prefilled for row in running.rows("second")) == 563 - 512


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen3", "gpt_oss"])
def test_where_bits_allow_it_answers_are_cached_too_and_hits_are_finer(kind: str, laid_out: Models) -> None:
    model = laid_out(kind)
    running = started(model, invariant=True)
    running.handle(ask("first", text(100), max_tokens=80))
    running.finish()
    answer = running.tokens("first")
    turn = [*text(100), *answer, 7, 8]
    running.handle(ask("second", turn))
    running.finish()
    assert cached(running, "second") == (100 + 79) // 32 * 32
    alone = Run(model, Invariant(model))
    alone.handle(ask("second", turn))
    alone.finish()
    assert running.tokens("second") == alone.tokens("second")


def test_generic_runners_have_no_cache_and_say_so(laid_out: Models) -> None:
    running = started(laid_out("gemma2"))
    assert running.core.capabilities.prefix_cache_bytes == 0
    for request_id in "ab":
        running.handle(ask(request_id, text(520)))
        running.finish()
    assert cached(running, "b") == 0


def test_tenants_do_not_share(laid_out: Models) -> None:
    running = started(laid_out())
    for request_id, salt in (("a", "x"), ("b", "y"), ("c", "x")):
        running.handle(ask(request_id, text(300), salt=salt))
        running.finish()
    assert [cached(running, request_id) for request_id in "abc"] == [0, 0, 256]


def test_a_request_that_is_here_at_the_same_time_shares_what_is_computed_by_then(laid_out: Models) -> None:
    running = started(laid_out())
    running.handle(ask("a", text(300)))
    running.step(2)
    running.handle(ask("b", text(290)))
    running.finish()
    assert cached(running, "b") == 256


def test_of_two_that_come_at_once_one_computes_the_common_part(laid_out: Models) -> None:
    model = laid_out("gpt_oss")
    running = started(model, invariant=True)
    requests = [ask("a", text(600)), ask("b", [*text(580), 3])]
    running.handle(*requests)
    running.finish()
    assert sum(row.prefilled for request_id in "ab" for row in running.rows(request_id)) < 600 + 100
    assert cached(running, "b") >= 480
    for request in requests:
        alone = Run(model, Invariant(model))
        alone.handle(request)
        alone.finish()
        assert running.tokens(request.request_id) == alone.tokens(request.request_id)


def test_reservations_come_before_the_cache(laid_out: Models) -> None:
    layout = laid_out().capabilities.kv_layout
    budget = kv_bytes(layout, 900)
    model = laid_out("llama", kv_budget_bytes=budget)
    running = started(model, cache=budget)
    assert running.core.capabilities.prefix_cache_bytes == budget
    for index in range(4):
        running.handle(ask(f"r{index}", text(300, index)))
        running.finish()
    assert running.steps()[-1].prefix_cache_bytes >= kv_bytes(layout, 512)
    running.handle(ask("x", text(500, 9), max_tokens=100), ask("y", text(290, 8), max_tokens=10))
    running.finish()
    for step in running.steps():
        assert step.kv_bytes_in_use + step.prefix_cache_bytes <= budget
    assert all(isinstance(running.end(request_id), Finished) for request_id in "xy")


def test_a_hit_that_would_not_fit_beside_its_copy_is_not_taken(laid_out: Models) -> None:
    layout = laid_out().capabilities.kv_layout
    model = laid_out("llama", kv_budget_bytes=kv_bytes(layout, 620))
    running = started(model, cache=kv_bytes(layout, 600))
    running.handle(ask("a", text(300)))
    running.finish()
    running.handle(ask("b", text(520), max_tokens=90))
    running.finish()
    assert cached(running, "b") == 0
    for step in running.steps():
        assert step.kv_bytes_in_use + step.prefix_cache_bytes <= kv_bytes(layout, 620)


def test_a_preempted_request_finds_its_own_beginning_again(laid_out: Models) -> None:
    layout = laid_out().capabilities.kv_layout
    model = laid_out("llama", kv_budget_bytes=kv_bytes(layout, 1000), max_batch_size=1)
    victim = ask("victim", text(400), max_tokens=20)
    running = started(model, cache=kv_bytes(layout, 1000))
    running.handle(victim)
    running.step(6)
    running.handle(ask("urgent", text(50, 3), max_tokens=2))
    running.handle(msgspec.structs.replace(ask("soon", text(50, 3), max_tokens=2), priority=-1))
    running.finish()
    resumed = [start for step in running.steps() for start in step.starts if start.request_id == "victim"]
    assert [start.num_cached for start in resumed] == [0, 256]
    assert cached(running, "victim") == 0, "what it computed itself is no saving"
    alone = Run(model)
    alone.handle(victim)
    alone.finish()
    assert bits(running, "victim") == bits(alone, "victim")


def test_a_plan_with_hits_is_followed_without_a_cache(laid_out: Models) -> None:
    model = laid_out("gpt_oss")
    running, again = started(model), Run(model)
    for request_id, prompt in (("a", text(600)), ("b", text(560))):
        running.handle(ask(request_id, prompt))
        running.finish()
    assert cached(running, "b") == 512
    again.handle(ask("a", text(600)), ask("b", text(560)))
    for step in running.steps():
        again.events += again.core.step(plan_of(step))
    assert bits(again, "b") == bits(running, "b")


class Broken(Invariant):
    """Gives NaN for one token id."""

    is_row_invariant = False

    def forward(self, chunks: Sequence[Chunk]) -> list[torch.Tensor | None]:
        spoiled = [255 in chunk.token_ids for chunk in chunks]
        return [
            rows * float("nan") if bad and rows is not None else rows
            for bad, rows in zip(spoiled, super().forward(chunks), strict=True)
        ]


def test_a_prompt_whose_logits_made_no_sense_is_not_kept(laid_out: Models) -> None:
    model = laid_out()
    running = Run(model, Broken(model), CoreOptions(prefix_cache_bytes=MB))
    prompt = [token_id % 255 for token_id in text(300)]
    running.handle(ask("bad", [*prompt, 255]))
    running.finish()
    assert isinstance(running.end("bad"), Failed)
    assert running.steps()[0].prefix_cache_bytes > 0
    assert running.steps()[-1].prefix_cache_bytes == 0
