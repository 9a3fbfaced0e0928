"""What a bound answer costs: ``python benchmarks/bench_grammar.py --tokenizer PATH --vocab N --end ID``.

- prepare: what all grammars of a model share, once for each engine;
- compile: one grammar, once for each that is new;
- mask: which tokens may come next, and the state moved on by one: once for each token of a bound answer;
- apply: the logits of one row with the mask put in.

Answers are walked by drawing, with a fixed seed, among the tokens that the mask allows. Milliseconds and microseconds.
"""

import argparse
import functools
import json
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch

from gptoss.engine.dialect import TaggedDialect
from gptoss.engine.grammar_mask import GrammarMasks
from gptoss.engine.prompt import load_tokenizer
from gptoss.engine.tagged_output import TagFormat
from gptoss.messages.answer import AnswerFormat, AnswerShape

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"type": "string"}},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}
FORMS = {
    "any object": AnswerFormat(kind="json", text='{"type": "object"}'),
    "small schema": AnswerFormat(kind="json", text=json.dumps(PERSON)),
    "schema of 60 fields": AnswerFormat(
        kind="json",
        text=json.dumps({"type": "object", "properties": {f"field_{index}": PERSON for index in range(60)}}),
    ),
    "regex": AnswerFormat(kind="regex", text="[A-Z][a-z]{2,12}( [a-z]{1,9}){5,40}\\."),
}
T = TypeVar("T")


def timed(call: Callable[[], T]) -> tuple[T, float]:
    """What ``call`` returns and the seconds that it took."""
    started = time.perf_counter()
    value = call()
    return value, time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", required=True, help="folder with tokenizer.json")
    parser.add_argument("--vocab", type=int, required=True, help="width of the logits")
    parser.add_argument("--end", type=int, nargs="+", required=True, help="tokens that end an answer")
    parser.add_argument("--tokens", type=int, default=300, help="tokens of each answer at most")
    options = parser.parse_args()

    device = torch.device("cpu")
    masks = GrammarMasks(load_tokenizer(str(Path(options.tokenizer))), options.vocab, tuple(options.end))
    _, prepare_s = timed(masks.prepare)
    logits = torch.zeros(options.vocab)
    print(f"vocabulary {options.vocab}: prepared in {prepare_s * 1e3:.0f} ms\n")
    print("| form | tokens | check ms | compile ms | mask us p50 | mask us p99 | apply us |")
    print("|---|---|---|---|---|---|---|")
    dialect = TaggedDialect(TagFormat(), {})
    for name, form in FORMS.items():
        shape = AnswerShape(format=form)
        grammar, check_s = timed(lambda shape=shape: dialect.grammar((), shape, opens_reasoning=False))
        mask, compile_s = timed(lambda grammar=grammar: masks.mask(grammar, device))
        choose = random.Random(1)
        mask_s: list[float] = []
        apply_s: list[float] = []
        for _ in range(options.tokens):
            allowed, seconds = timed(mask.allowed)
            apply_s.append(timed(lambda allowed=allowed: logits.clone().masked_fill_(~allowed, float("-inf")))[1])
            token_id = choose.choice(allowed.nonzero().flatten().tolist())
            mask_s.append(seconds + timed(functools.partial(mask.push, token_id))[1])
            if mask.is_over or token_id in options.end:
                break
        p99 = sorted(mask_s)[int(len(mask_s) * 0.99)]
        print(
            f"| {name} | {len(mask_s)} | {check_s * 1e3:.1f} | {compile_s * 1e3:.1f} | "
            f"{statistics.median(mask_s) * 1e6:.0f} | {p99 * 1e6:.0f} | {statistics.median(apply_s) * 1e6:.0f} |"
        )


if __name__ == "__main__":
    main()
