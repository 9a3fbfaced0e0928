"""One rank of two, without an engine around it: loads each folder and writes the logits of a prompt and of one more token.

python rank_logits.py RANK SHARED_FOLDER MODEL_FOLDER...
"""

import sys
from pathlib import Path

import torch
from torch import distributed

from gptoss.engine.attention import Chunk
from gptoss.engine.load import LoadedModel, load_model
from gptoss.engine.model_folder import no_progress
from gptoss.engine.port import Load
from gptoss.engine.ranks import join_group
from gptoss.engine.wire import Join

PROMPT = [(37 * index + 11) % 250 for index in range(40)]
"""Longer than the sliding windows of the tiny models."""


def logits_of(model: LoadedModel) -> torch.Tensor:
    """``[3, vocab]``: after the first 30 tokens, after all of the prompt, after one more."""
    slot = model.runner.new_slot(64)
    found: list[torch.Tensor] = []
    for start, end in ((0, 30), (30, 40), (40, 41)):
        chunk = Chunk(slot=slot, token_ids=[*PROMPT, 7][start:end], start=start, num_logits=1)
        (logits,) = model.runner.forward([chunk])
        assert logits is not None
        found.append(logits)
    return torch.cat(found)


def main() -> None:
    rank, shared, folders = int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:]
    torch.set_num_threads(1)
    load = Load(folder="", model_name="tiny", device="cpu+cpu", mode="tensor", dtype="float32", max_batch_size=4)
    join_group(Join(load=load, rank=rank, size=2, folder=str(shared)))
    for number, folder in enumerate(folders):
        place = Load(
            folder=folder,
            model_name="tiny",
            device="cpu+cpu",
            mode="tensor",
            dtype="float32",
            max_batch_size=4,
            kv_layout="paged" if number % 2 else "slots",
        )
        model = load_model(place, no_progress, rank)
        torch.save(
            {
                "logits": logits_of(model),
                "capabilities": (model.capabilities.kv_budget_bytes, model.capabilities.weights_bytes),
                "shares": [(each.weights_bytes, each.kv_budget_bytes) for each in model.capabilities.shares],
                "kv_heads": model.capabilities.kv_layout.kv_heads,
                "notes": list(model.notes),
            },
            shared / f"{number}-{rank}.pt",
        )
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
