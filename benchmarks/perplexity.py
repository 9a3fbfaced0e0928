"""What a way of storing and computing weights costs in quality: perplexity on a text, and distance from a reference.

    python benchmarks/perplexity.py                                     the demo: float32, bfloat16, int8, int4
    python benchmarks/perplexity.py --model DIR --ways bfloat16,int8 --text FILE

The text is cut into windows that are read on their own, each through the runner that the server would use. Every token
but the first of a window counts. The first of the ways is the reference: ``KL`` is the mean divergence of the others'
distributions from its own, in nats, and ``same best`` how often the likeliest token is the same.
"""

import argparse
import copy
import math
import sys
from collections.abc import Iterator
from pathlib import Path

import msgspec
import torch
from engine_run import add_model_options, load, load_options, table

from gptoss.engine.attention import Chunk
from gptoss.engine.load import LoadedModel
from gptoss.errors import GptossError

TEXT = Path(__file__).with_name("data") / "text.txt"
CHUNK = 128
WAYS: dict[str, dict[str, str]] = {
    "float32": {"dtype": "float32", "kernels": "torch"},
    "bfloat16-torch": {"dtype": "bfloat16", "kernels": "torch"},
    "bfloat16": {"dtype": "bfloat16"},
    "int8": {"dtype": "bfloat16", "quantization": "int8"},
    "int4": {"dtype": "bfloat16", "quantization": "int4"},
}


class Score(msgspec.Struct):
    """Sums over the tokens of a text."""

    tokens: int = 0
    loss: float = 0.0
    divergence: float = 0.0
    same_best: int = 0


def windows(token_ids: list[int], size: int) -> Iterator[list[int]]:
    """The text in pieces; what remains at the end counts if it is half a window or more."""
    for start in range(0, len(token_ids), size):
        piece = token_ids[start : start + size]
        if len(piece) * 2 >= size or not start:
            yield piece


def logprobs(model: LoadedModel, token_ids: list[int]) -> Iterator[torch.Tensor]:
    """Log-probabilities ``[CHUNK, vocab]`` of every next token, float32, chunk by chunk."""
    slot = model.runner.new_slot(len(token_ids))
    for start in range(0, len(token_ids), CHUNK):
        piece = token_ids[start : start + CHUNK]
        (logits,) = model.runner.forward([Chunk(slot=slot, token_ids=piece, start=start, num_logits=len(piece))])
        assert logits is not None
        yield torch.log_softmax(logits.float(), dim=1)


def read(models: dict[str, LoadedModel], token_ids: list[int], scores: dict[str, Score]) -> None:
    """Read one window with each of the models side by side; the first is the reference."""
    start = 0
    for found in zip(*(logprobs(model, token_ids) for model in models.values()), strict=True):
        following = torch.tensor(token_ids[start + 1 : start + CHUNK + 1], device=found[0].device)
        rows = torch.arange(len(following), device=found[0].device)
        reference = found[0][: len(following)]
        for score, mine in zip(scores.values(), found, strict=True):
            mine = mine[: len(following)]  # noqa: PLW2901 - the last row has nothing to follow
            score.tokens += len(following)
            score.loss -= float(mine[rows, following].sum())
            score.divergence += float((reference.exp() * (reference - mine)).sum())
            score.same_best += int((mine.argmax(dim=1) == reference.argmax(dim=1)).sum())
        start += CHUNK


def report(models: dict[str, LoadedModel], scores: dict[str, Score]) -> str:
    """The table."""
    least = next(iter(scores.values()))
    rows = [
        [
            name,
            type(models[name].runner).__name__,
            f"{models[name].capabilities.weights_bytes / 1e6:.0f}",
            f"{math.exp(score.loss / score.tokens):.4f}",
            f"{math.exp((score.loss - least.loss) / score.tokens) - 1:+.2%}",
            f"{score.divergence / score.tokens:.5f}",
            f"{score.same_best / score.tokens:.1%}",
        ]
        for name, score in scores.items()
    ]
    return table(["weights", "runner", "MB", "perplexity", "against the first", "KL", "same best"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_options(parser)
    parser.add_argument("--text", type=Path, default=TEXT)
    parser.add_argument("--window", type=int, default=1024, help="tokens")
    parser.add_argument("--ways", default="float32,bfloat16-torch,bfloat16,int8,int4", help=f"of {', '.join(WAYS)}")
    arguments = parser.parse_args()
    models: dict[str, LoadedModel] = {}
    with torch.inference_mode():
        for name in arguments.ways.split(","):
            chosen = copy.copy(arguments)
            vars(chosen).update(WAYS[name])
            try:
                models[name] = load(load_options(chosen, max_batch_size=1, max_model_len=arguments.window))
            except GptossError as error:
                print(f"{name} is left out: {error.message}", file=sys.stderr)
        if not models:
            sys.exit(1)
        tokenizer = next(iter(models.values())).tokenizer
        token_ids = tokenizer.encode(arguments.text.read_text(encoding="utf-8")).ids
        scores = {name: Score() for name in models}
        for window in windows(token_ids, arguments.window):
            read(models, window, scores)
    count = next(iter(scores.values())).tokens
    print(f"{arguments.text.name}, {count} tokens in windows of {arguments.window}:\n\n{report(models, scores)}")


if __name__ == "__main__":
    main()
