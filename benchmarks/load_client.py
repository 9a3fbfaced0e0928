"""Loads an OpenAI-compatible server with one workload and gives figures as the client sees them.

Streams chat completions, greedy, random prompts of common words. Prompts depend on the seed alone, so every server gets
the same ones.
"""

import asyncio
import json
import random
import statistics
import time
from dataclasses import dataclass, field

import aiohttp

WORDS = ("river", "stone", "cloud", "window", "garden", "market", "paper", "engine", "signal", "forest", "bridge", "candle",
         "mirror", "planet", "winter", "copper", "silver", "travel", "ocean", "harvest", "memory", "letter", "circle", "number")  # fmt: skip
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
class Answer:
    """What one request took; times in seconds."""

    ttft_s: float
    tokens: int
    tpot_s: float | None
    text: str


@dataclass(frozen=True)
class Figures:
    """Of one run of a workload; milliseconds are medians over its requests."""

    tokens_per_s: float
    ttft_ms: float
    tpot_ms: float
    tokens: int


def _words(rng: random.Random, count: int) -> str:
    return " ".join(rng.choice(WORDS) for _ in range(count))


async def _ask(session: aiohttp.ClientSession, url: str, body: dict[str, object]) -> Answer:
    started = time.perf_counter()
    first = last = None
    tokens = 0
    pieces: list[str] = []
    async with session.post(f"{url}/chat/completions", json=body) as answer:
        answer.raise_for_status()
        async for line in answer.content:
            data = line.removeprefix(b"data:").strip()
            if not line.startswith(b"data:") or data == b"[DONE]":
                continue
            chunk = json.loads(data)
            if "error" in chunk:
                raise RuntimeError(chunk["error"])
            tokens = (chunk.get("usage") or {}).get("completion_tokens") or tokens
            for choice in chunk.get("choices") or []:
                if choice["delta"].get("content"):
                    last = time.perf_counter()
                    first = first or last
                    pieces.append(choice["delta"]["content"])
    if first is None or last is None:
        raise RuntimeError("an answer without text")
    tokens = tokens or len(pieces)
    tpot = (last - first) / (tokens - 1) if tokens > 1 else None
    return Answer(ttft_s=first - started, tokens=tokens, tpot_s=tpot, text="".join(pieces))


async def _run(url: str, model: str, workload: Workload, seed: int) -> Figures:
    rng = random.Random(seed)
    shared = [{"role": "system", "content": _words(rng, workload.shared_words)}] if workload.shared_words else []
    gate = asyncio.Semaphore(workload.streams)
    # New connections for each request: a proxy or a browser would do the same, and no server gains from keep-alive.
    connector = aiohttp.TCPConnector(limit=0, force_close=True)
    timeout = aiohttp.ClientTimeout(total=TIMEOUT_S)

    def body() -> dict[str, object]:
        question = {"role": "user", "content": "Write a long story about: " + _words(rng, workload.prompt_words)}
        return {
            "model": model,
            "messages": [*shared, question],
            "max_tokens": workload.output_tokens,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
            **workload.extra,
        }

    async with aiohttp.ClientSession(timeout=timeout, connector=connector) as session:

        async def ask(one: dict[str, object]) -> Answer:
            async with gate:
                return await _ask(session, url, one)

        await _ask(session, url, {**body(), "max_tokens": 8})
        bodies = [body() for _ in range(workload.requests)]
        started = time.perf_counter()
        answers = await asyncio.gather(*map(ask, bodies))
        wall_s = time.perf_counter() - started
    tokens = sum(answer.tokens for answer in answers)
    return Figures(
        tokens_per_s=tokens / wall_s,
        ttft_ms=1e3 * statistics.median(answer.ttft_s for answer in answers),
        tpot_ms=1e3 * statistics.median(answer.tpot_s for answer in answers if answer.tpot_s),
        tokens=tokens,
    )


def run(url: str, model: str, workload: Workload, seed: int = 1) -> Figures:
    """Run ``workload`` against ``url`` (its ``/v1``), one warm-up request first."""
    return asyncio.run(_run(url, model, workload, seed))
