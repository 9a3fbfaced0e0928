"""Loads an OpenAI-compatible server with one workload and gives figures as the client sees them.

Streams chat completions, greedy, random prompts of common words. Prompts depend on the seed alone, so every server gets
the same ones. The client is that of ``gptoss bench http``.
"""

import asyncio
import statistics
import time
from dataclasses import dataclass, field

import aiohttp

from gptoss.bench.client import ChatClient, Timed, chat_body, words
from gptoss.clock import SeededRng, SystemClock

TIMEOUT_S = 600


@dataclass(frozen=True)
class Workload:
    """``streams`` requests at once, ``requests`` in all; lengths in words in, tokens out."""

    name: str
    streams: int
    requests: int
    prompt_words: int = 100
    shared_words: int = 0
    output_tokens: int = 64
    extra: dict[str, object] = field(default_factory=dict)


@dataclass(frozen=True)
class Figures:
    """Of one run of a workload; milliseconds are medians over its requests."""

    tokens_per_s: float
    ttft_ms: float
    tpot_ms: float
    tokens: int


async def _run(url: str, model: str, workload: Workload, seed: int) -> Figures:
    rng = SeededRng(str(seed))
    shared = [{"role": "system", "content": words(rng, workload.shared_words)}] if workload.shared_words else []
    gate = asyncio.Semaphore(workload.streams)
    # New connections for each request: a proxy or a browser would do the same, and no server gains from keep-alive.
    connector = aiohttp.TCPConnector(limit=0, force_close=True)
    timeout = aiohttp.ClientTimeout(total=TIMEOUT_S)

    def body(tokens: int) -> dict[str, object]:
        question = {"role": "user", "content": "Write a long story about: " + words(rng, workload.prompt_words)}
        return chat_body([*shared, question], tokens, {"model": model, **workload.extra})

    async with aiohttp.ClientSession(timeout=timeout, connector=connector) as session:
        client = ChatClient(session, url, SystemClock())

        async def ask(one: dict[str, object]) -> Timed:
            async with gate:
                timed = await client.ask(one)
            if timed.error or timed.ttft_s is None:
                raise RuntimeError(f"no answer: {timed.error or 'an answer without text'}")
            return timed

        await ask(body(8))
        bodies = [body(workload.output_tokens) for _ in range(workload.requests)]
        started = time.perf_counter()
        answers = await asyncio.gather(*map(ask, bodies))
        wall_s = time.perf_counter() - started
    tokens = sum(answer.tokens for answer in answers)
    return Figures(
        tokens_per_s=tokens / wall_s,
        ttft_ms=1e3 * statistics.median(answer.ttft_s for answer in answers if answer.ttft_s is not None),
        tpot_ms=1e3 * statistics.median(answer.tpot_s for answer in answers if answer.tpot_s),
        tokens=tokens,
    )


def run(url: str, model: str, workload: Workload, seed: int = 1) -> Figures:
    """Run ``workload`` against ``url`` (its ``/v1``), one warm-up request first."""
    return asyncio.run(_run(url, model, workload, seed))
