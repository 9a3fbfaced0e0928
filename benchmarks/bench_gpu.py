"""gpt-oss-20b-shaped random weights on a CUDA device: prefill and decode, beside transformers' own ways.

    python benchmarks/bench_gpu.py [--layers 24] [--streams 1,8,64] [--prompt 1024] [--output 64] [--write FILE]
    python benchmarks/bench_gpu.py --device cpu --layers 2 --tiny        a rehearsal without a GPU; its figures mean nothing

One model serves all three in turn: this engine, ``generate`` on a static batch, and ``generate_batch`` (continuous
batching). All prompts are random and of one length, which suits the static batch best. Prefill is the time until every
stream has its first token, decode the rest. A way that fails is in the table with its error.
"""

import argparse
import dataclasses
import gc
import logging
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import transformers
from engine_run import Streams, table
from tokenizers import Tokenizer, models

from gptoss.engine.load import LoadedModel
from gptoss.engine.memory_model import kv_bytes, kv_layout_from_config
from gptoss.engine.runner_choice import KvOptions, choose_runner
from gptoss.messages.model import EngineCapabilities, ModelFingerprint

LAYERS_20B = 24
EXPERTS_20B = 32
TINY = {
    "vocab_size": 1024,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
}
ERROR_CHARS = 60


@dataclasses.dataclass(frozen=True)
class Workload:
    """``streams`` prompts of ``prompt`` tokens at once, each answered with ``output`` tokens."""

    streams: int
    prompt: int
    output: int

    def prompts(self, vocab_size: int) -> list[list[int]]:
        """Random token ids; no two streams share a beginning."""
        generator = torch.Generator().manual_seed(self.streams)
        return torch.randint(100, vocab_size - 1, (self.streams, self.prompt), generator=generator).tolist()


@dataclasses.dataclass(frozen=True)
class Figures:
    """What a workload took, in seconds, and the most that the device held meanwhile, in bytes."""

    prefill_s: float
    decode_s: float
    memory_bytes: int = 0


Way = Callable[[Workload], Figures]


def make_model(arguments: argparse.Namespace, device: torch.device) -> Any:
    """A gpt-oss with random weights, in bfloat16."""
    shape = {
        "num_hidden_layers": arguments.layers,
        "num_local_experts": EXPERTS_20B,
        **(TINY if arguments.tiny else {}),
    }
    config = transformers.GptOssConfig(**shape, eos_token_id=None, pad_token_id=0)
    torch.manual_seed(0)
    with torch.device(device):
        model: Any = transformers.AutoModelForCausalLM.from_config(
            config, dtype=torch.bfloat16, attn_implementation="eager"
        )
    return model.eval().requires_grad_(False)


def engine_way(
    model: Any, device: torch.device, workloads: Sequence[Workload], *, is_paged: bool
) -> tuple[Way, tuple[str, ...]]:
    """This engine on the model, and its notes. On a CPU it takes the model's weights over, so it comes last."""
    layout = kv_layout_from_config(model.config.to_dict(), dtype_bytes=2)
    longest = max(load.prompt + load.output for load in workloads)
    most = max(load.streams for load in workloads)
    kv = KvOptions(is_paged, lambda layout: most * kv_bytes(layout, longest))
    choice = choose_runner(lambda: model, layout, device, None, kv)
    capabilities = EngineCapabilities(
        model_name="gpt-oss-random",
        architecture=choice.architecture,
        vocab_size=choice.vocab_size,
        max_model_len=longest,
        max_batch_size=most,
        kv_budget_bytes=choice.kv_budget_bytes,
        kv_layout=choice.runner.layout,
        weights_bytes=choice.weights_bytes,
        device=str(device),
        dtype="bfloat16",
        num_threads=torch.get_num_threads(),
        eos_token_ids=(),
        kv_pages=choice.kv_pages,
    )
    loaded = LoadedModel(
        runner=choice.runner,
        tokenizer=Tokenizer(models.WordLevel({f"t{index}": index for index in range(choice.vocab_size)}, "t0")),
        capabilities=capabilities,
        fingerprint=ModelFingerprint(weights="", tokenizer="", chat_template="", config=""),
        notes=choice.notes,
    )

    def run(load: Workload) -> Figures:
        streams = Streams(loaded)
        prefill_s = streams.start(load.streams, load.prompt, load.output)
        began = time.perf_counter()
        while streams.core.has_work():
            streams.step()
        return Figures(prefill_s, time.perf_counter() - began)

    memory = f"KV in {choice.kv_pages} pages" if choice.kv_pages else "KV in slots"
    return run, (type(choice.runner).__name__, memory, *choice.notes)


def generate_way(model: Any, device: torch.device) -> Way:
    """transformers' ``generate``: all streams as one static batch."""

    def run(load: Workload) -> Figures:
        prompts = torch.tensor(load.prompts(model.config.vocab_size), device=device)
        mask = torch.ones_like(prompts)

        def seconds(tokens: int) -> float:
            began = time.perf_counter()
            found = model.generate(
                prompts, attention_mask=mask, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False
            )
            assert found.shape[1] == load.prompt + tokens
            _wait(device)
            return time.perf_counter() - began

        prefill_s = seconds(1)
        return Figures(prefill_s, max(0.0, seconds(load.output) - prefill_s))

    return run


def continuous_way(model: Any, device: torch.device) -> Way:
    """transformers' continuous batching."""

    def run(load: Workload) -> Figures:
        settings = transformers.GenerationConfig(
            max_new_tokens=load.output, do_sample=False, eos_token_id=-1, pad_token_id=0
        )
        prompts = load.prompts(model.config.vocab_size)
        # On a GPU it sizes itself; on a CPU it would take nearly all memory.
        blocks = -(-(load.prompt + load.output) // 256) * load.streams * 2 if device.type == "cpu" else None
        batching = transformers.ContinuousBatchingConfig(num_blocks=blocks)
        try:
            found = model.generate_batch(prompts, settings, batching, record_timestamps=True)
        finally:
            model.set_attn_implementation("eager")
        outputs = list(found.values())
        failed = next((output.error for output in outputs if output.error), None)
        if failed or len(outputs) < load.streams:
            raise RuntimeError(failed or f"{len(outputs)} of {load.streams} streams were answered")
        asked = min(output.created_time for output in outputs)  # what precedes is starting its thread and cache
        all_first, last = (max(output.timestamps[at] for output in outputs) for at in (0, -1))
        return Figures(all_first - asked, last - all_first)

    return run


def measure(way: Way, load: Workload, device: torch.device) -> Figures | str:
    """Run once to warm up (kernels, caches, graphs) and once to measure; or why it cannot be."""
    try:
        for is_warm in (False, True):
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats(device)
            found = way(load if is_warm else dataclasses.replace(load, output=min(load.output, 8)))
    except Exception as error:  # noqa: BLE001 - the edge to other people's code; the table says it
        return " ".join(f"{type(error).__name__}: {error}".split())[:ERROR_CHARS]
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
    return dataclasses.replace(found, memory_bytes=peak)


def report(results: dict[tuple[str, Workload], Figures | str]) -> str:
    """The table."""
    rows: list[list[str]] = []
    for (name, load), found in results.items():
        if isinstance(found, str):
            rows.append([str(load.streams), name, found, "", "", ""])
            continue
        decoded = load.streams * (load.output - 1)
        rows.append(
            [
                str(load.streams),
                name,
                f"{1e3 * found.prefill_s:.0f}",
                f"{load.streams * load.prompt / found.prefill_s:.0f}",
                f"{decoded / found.decode_s:.0f}" if found.decode_s else "",
                f"{1e3 * found.decode_s / (load.output - 1):.1f}" if found.decode_s else "",
                f"{found.memory_bytes / 1e9:.1f}",
            ]
        )
    head = ["streams", "", "prefill ms", "prefill tokens/s", "decode tokens/s", "ms a step", "device GB"]
    return table(head, [[*row, *[""] * (len(head) - len(row))] for row in rows])


def describe(arguments: argparse.Namespace, model: Any, device: torch.device, notes: tuple[str, ...]) -> str:
    """What was measured, on what."""
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU (a rehearsal)"
    size = sum(parameter.numel() for parameter in model.parameters()) / 1e9
    return (
        f"{datetime.now(UTC):%Y-%m-%d}, {where}, torch {torch.__version__}, transformers {transformers.__version__}; "
        f"gpt-oss with {arguments.layers} layers, {size:.1f} billion random parameters in bfloat16; "
        f"{arguments.prompt} tokens in, {arguments.output} out; gptoss: {'; '.join(notes)}"
    )


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--layers", type=int, default=LAYERS_20B)
    parser.add_argument("--tiny", action="store_true", help="small matrices and vocabulary")
    parser.add_argument("--streams", default="1,8,64")
    parser.add_argument("--prompt", type=int, default=1024, help="tokens")
    parser.add_argument("--output", type=int, default=64, help="tokens")
    parser.add_argument("--kv-layout", default="paged", choices=("slots", "paged"), help="of gptoss")
    parser.add_argument("--ways", default="gptoss,generate,continuous")
    parser.add_argument("--write", type=Path, metavar="FILE", help="write the table there as well")
    return parser.parse_args()


def main() -> None:
    arguments = _parse()
    device = torch.device(arguments.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print("bench_gpu: no CUDA device here, nothing is measured (rehearse with --device cpu --layers 2 --tiny)")
        return
    logging.getLogger("ContinuousBatchingLogger").setLevel(logging.CRITICAL)  # its errors are in the table
    loads = [Workload(int(count), arguments.prompt, arguments.output) for count in arguments.streams.split(",")]
    wanted = arguments.ways.split(",")
    results: dict[tuple[str, Workload], Figures | str] = {}
    with torch.no_grad():  # inference mode would break transformers' continuous batching, which writes from a thread
        model = make_model(arguments, device)
        heading = describe(arguments, model, device, ())
        peers = {"generate": generate_way(model, device), "continuous": continuous_way(model, device)}
        for name in [name for name in wanted if name in peers]:
            for load in loads:
                results[name, load] = measure(peers[name], load, device)
        notes: tuple[str, ...] = ()
        if "gptoss" in wanted:
            way, notes = engine_way(model, device, loads, is_paged=arguments.kv_layout == "paged")
            for load in loads:
                results["gptoss", load] = measure(way, load, device)
    ordered = dict(sorted(results.items(), key=lambda item: (item[0][1].streams, wanted.index(item[0][0]))))
    text = f"{heading}{'; '.join(notes)}\n\n{report(ordered)}\n"
    print(text)
    if arguments.write:
        arguments.write.write_text(f"# On a GPU\n\n`make bench-gpu`: {text}", encoding="utf-8")


if __name__ == "__main__":
    main()
