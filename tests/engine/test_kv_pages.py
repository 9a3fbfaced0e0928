"""Pages: exact bytes, references, and attention over them in as many kernel calls for many requests as for few."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from core_run import Run, submit
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from gptoss.engine.attention import Chunk, attend, attend_portably
from gptoss.engine.kv_cache import KvGeometry, LayerGeometry
from gptoss.engine.kv_pages import PAGE_TOKENS, PagedKv, PagePool
from gptoss.engine.load import LoadedModel
from gptoss.engine.memory_model import kv_bytes
from gptoss.engine.port import Failed, Finished
from gptoss.errors import ModelLoadError

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# torch is only partly typed.

Models = Callable[..., LoadedModel]
WINDOWS = [(0,), (8,), (0, 8), (0, 128, 0, 128), (0, 0, 100), (0, 40, 0, 40, 40, 40)]


def pool_of(windows: Sequence[int], num_bytes: int = 1 << 20, page_tokens: int = PAGE_TOKENS) -> PagePool:
    layers = [LayerGeometry(kv_heads=2, head_dim=4, window=window) for window in windows]
    return PagePool(KvGeometry(layers, torch.float32, torch.device("cpu")), num_bytes, page_tokens)


@given(st.sampled_from(WINDOWS), st.integers(1, 700), st.sampled_from([1, 4, 16]))
@settings(deadline=None)
def test_a_request_takes_the_bytes_that_the_memory_model_says_to_the_last_one(
    windows: tuple[int, ...], tokens: int, page_tokens: int
) -> None:
    pool = pool_of(windows, page_tokens=page_tokens)
    needed = kv_bytes(pool.layout, tokens)
    memory = PagedKv(pool, tokens)
    assert memory.num_bytes == needed == pool.num_bytes - pool.num_free * pool.page_bytes
    del memory
    assert pool.num_free == pool.num_pages


@given(st.sampled_from(WINDOWS), st.lists(st.integers(1, 300), min_size=1, max_size=30), st.integers(0, 60_000))
@settings(deadline=None)
def test_whoever_keeps_to_the_budget_in_bytes_finds_pages_whatever_the_mix_of_lengths(
    windows: tuple[int, ...], lengths: list[int], budget: int
) -> None:
    pool = pool_of(windows, budget)
    assert pool.num_bytes <= budget < pool.num_bytes + pool.page_bytes
    held: list[PagedKv] = []
    for tokens in lengths:
        if sum(memory.num_bytes for memory in held) + kv_bytes(pool.layout, tokens) <= pool.num_bytes:
            held.append(PagedKv(pool, tokens))
        else:
            with pytest.raises(MemoryError, match=r"KV pages are needed, \d+ of \d+ are free"):
                PagedKv(pool, tokens)
    pages = [page for memory in held for table in memory.tables for page in table.pages.flatten().tolist()]
    assert len(pages) == len(set(pages)) == pool.num_pages - pool.num_free


def test_a_page_is_free_when_the_last_who_refers_to_it_is_gone_and_clean_when_it_is_taken_again() -> None:
    pool = pool_of((0,))
    first = PagedKv(pool, 64)
    first.write(0, None, 0, torch.full((1, 2, 2, 64, 4), float("nan")))
    part = first.copy_out(0, 32, 64)
    second = PagedKv(pool, 48)
    second.copy_in(32, part)
    assert torch.equal(second.tables[0].pages[:, :2], first.tables[0].pages[:, :2])
    assert pool.num_pages - pool.num_free == 4 + 1, "two of the three that the second took went back"
    del first
    assert pool.num_pages - pool.num_free == 2 + 1
    del part, second
    assert pool.num_free == pool.num_pages
    assert PagedKv(pool, 16 * pool.num_pages).read(0, 0, 0, 64).count_nonzero() == 0


def test_rings_are_copied_since_they_are_overwritten() -> None:
    pool = pool_of((32,))
    first = PagedKv(pool, 100)
    rows = torch.arange(40.0).view(1, 1, 1, 40, 1).expand(1, 2, 2, 40, 4)
    first.write(0, None, 0, rows[:, :, :, :32])
    part = first.copy_out(16, 32, 32)
    first.write(0, None, 32, rows[:, :, :, 32:])
    assert first.copy_out(0, 16, 40) == [None], "its first half is no longer there"
    second = PagedKv(pool, 100)
    second.copy_in(32, part)
    assert torch.equal(second.read(0, None, 16, 32), rows[:, :, :, 16:32])


# ---------------------------------------------------------------- attention


class Calls(TorchDispatchMode):
    """Counts the operations that are run."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", ["llama", "mistral", "gpt_oss"])
def test_a_step_takes_as_many_calls_for_many_decoding_requests_as_for_few(kind: str, tiny_model: Models) -> None:
    runner = tiny_model(kind, kv_layout="paged").runner
    found: dict[int, int] = {}
    for count in (4, 16):
        chunks = [Chunk(slot=runner.new_slot(40), token_ids=[7], start=30, num_logits=1) for _ in range(count)]
        runner.forward(chunks)
        with Calls() as calls:
            runner.forward(chunks)
        found[count] = calls.count
    assert runner.geometry is not None
    stores = len(runner.geometry.windows)
    assert found[16] - found[4] == 12 * (stores + 1), "once a step: its tables, its logits; nothing for each layer"


def long_text(length: int, seed: int) -> list[int]:
    return torch.randint(0, 256, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


@pytest.mark.parametrize("kind", ["llama", "mistral", "gpt_oss"])
def test_rows_have_the_same_bits_beside_requests_of_other_lengths(kind: str, tiny_model: Models) -> None:
    runner = tiny_model(kind, kv_layout="paged").runner
    lengths = [1, 15, 16, 17, 127, 128, 129, 300, 500]
    texts = [long_text(length + 1, seed) for seed, length in enumerate(lengths)]

    def prefilled() -> list[Chunk]:
        slots = [runner.new_slot(length + 1) for length in lengths]
        for slot, text in zip(slots, texts, strict=True):
            runner.forward([Chunk(slot=slot, token_ids=text[:-1], start=0, num_logits=0)])
        return [
            Chunk(slot=slot, token_ids=text[-1:], start=len(text) - 1, num_logits=1)
            for slot, text in zip(slots, texts, strict=True)
        ]

    together = runner.forward(prefilled())
    for chunk, expected in zip(prefilled(), together, strict=True):
        (alone,) = runner.forward([chunk])
        assert alone is not None
        assert expected is not None
        assert torch.equal(alone, expected)


@pytest.mark.parametrize("has_sinks", [False, True])
@pytest.mark.parametrize(("mask_kind", "start"), [("none", 0), ("none", 5), ("causal", 0), ("mask", 0), ("mask", 5)])
def test_attention_for_any_device_is_that_for_cpus(has_sinks: bool, mask_kind: str, start: int) -> None:
    torch.manual_seed(1)
    groups, kv_heads, rows, head_dim = 3, 2, 7, 16
    length = rows + start
    query = torch.randn(groups, kv_heads, rows, head_dim)
    kv = (torch.randn(1, kv_heads, length, head_dim), torch.randn(1, kv_heads, length, head_dim))
    hidden = torch.arange(length)[None] > torch.arange(rows)[:, None] + start
    options: dict[str, Any] = {
        "sinks": 3 * torch.randn(groups, kv_heads, 1) if has_sinks else None,
        "mask": torch.zeros(rows, length).masked_fill(hidden, float("-inf")) if mask_kind == "mask" else None,
        "is_causal": mask_kind == "causal",
    }
    found, expected = (each(query, kv, 0.3, **options) for each in (attend_portably, attend))
    assert found.shape == expected.shape
    assert torch.allclose(found, expected, atol=1e-5)


# ---------------------------------------------------------------- in the engine


def test_capacity_is_whole_pages_and_is_said_at_start(tiny_model: Models) -> None:
    model = tiny_model("gpt_oss", kv_layout="paged", kv_budget_bytes=1_000_000)
    has = model.capabilities
    page_bytes = PAGE_TOKENS * 2 * 2 * 16 * 4
    assert (has.kv_pages, has.kv_budget_bytes) == (1_000_000 // page_bytes, 1_000_000 // page_bytes * page_bytes)
    assert has.kv_layout.block_tokens == PAGE_TOKENS
    (note,) = model.notes
    assert note == f"KV memory in {has.kv_pages} pages of 16 tokens, 0.0 GB: 6.0 requests of 640 tokens"
    assert tiny_model("gpt_oss").capabilities.kv_pages == 0


def test_a_full_pool_runs_and_a_request_beyond_it_is_refused(tiny_model: Models) -> None:
    layout = tiny_model("gpt_oss", kv_layout="paged").capabilities.kv_layout
    model = tiny_model("gpt_oss", kv_layout="paged", kv_budget_bytes=3 * kv_bytes(layout, 48))
    running = Run(model)
    running.handle(*(submit(name, length=30, max_tokens=18) for name in "abcde"), submit("f", length=200))
    running.step()
    assert running.steps()[-1].running == 3
    assert running.steps()[-1].kv_bytes_in_use == model.capabilities.kv_budget_bytes
    running.finish()
    assert all(isinstance(running.end(name), Finished) for name in "abcde")
    refused = running.end("f")
    assert isinstance(refused, Failed)
    assert refused.code == "memory_exhausted"


def test_the_cpu_kernels_have_no_pages(tiny_model: Models) -> None:
    with pytest.raises(ModelLoadError, match="kernels native needs one CPU, bfloat16, KV slots"):
        tiny_model("llama32", dtype="bfloat16", kernels="native", kv_layout="paged")
