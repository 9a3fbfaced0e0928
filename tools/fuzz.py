"""Coverage-guided fuzzing of what reads bytes from outside: ``python tools/fuzz.py TARGET [libFuzzer's options]``.

    python tools/fuzz.py chat -max_total_time=60
    python tools/fuzz.py all 60                     each target for so many seconds, one after the other
    python tools/fuzz.py chat crash-0123...         the input that broke one, again

A target holds as long as nothing but the errors come out that it may raise. Atheris is not among the dependencies, since
it is of use by hand only: ``pip install atheris``. Without it this says so and exits with 2.
"""
# pyright: basic, reportMissingImports=false

import contextlib
import importlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

EXIT_SKIPPED = 2
try:
    atheris: Any = importlib.import_module("atheris")
except ImportError:
    print("fuzzing SKIPPED: atheris is not installed; pip install atheris", file=sys.stderr)
    raise SystemExit(EXIT_SKIPPED) from None

with atheris.instrument_imports(include=["gptoss"]):
    from gptoss.cli.chat_screen import end_of_blocks
    from gptoss.engine.call_ids import CallIds
    from gptoss.engine.harmony_output import HarmonyParser
    from gptoss.engine.tagged_output import CallTags, TagFormat, TaggedParser
    from gptoss.errors import BundleError, GptossError, JournalError, RequestError, UnsupportedSchema
    from gptoss.http import chat_request, completions, response_request
    from gptoss.http.answer_shape import wanted_tools
    from gptoss.http.batch_file import Lines
    from gptoss.http.batches import DECODER as BATCH
    from gptoss.http.chat import CHAT
    from gptoss.http.responses import RESPONSES
    from gptoss.http.unsupported import unknown_fields
    from gptoss.messages.answer import content_of
    from gptoss.messages.codec import decode_command, decode_record
    from gptoss.telemetry.bundle_reader import BundleReader

WORK = Path(tempfile.mkdtemp(prefix="gptoss-fuzz-"))
SEED_BYTES_MAX = 1 << 20
HARMONY_SPECIAL = range(199_998, 200_020)
TAGS = TagFormat(think=("<think>", "</think>"), calls=CallTags(opening="<tool_call>", closing="</tool_call>"))


def chat(data: bytes) -> None:
    wire, others = CHAT.decoder.decode(data)
    unknown_fields(others)
    wanted_tools(wire)
    chat_request.generate_request(wire, default_temperature=1.0)


def text(data: bytes) -> None:
    wire, others = completions.COMPLETIONS.decoder.decode(data)
    unknown_fields(others)
    completions.prompts_of(wire)


def responses(data: bytes) -> None:
    wire, others = RESPONSES.decoder.decode(data)
    unknown_fields(others)
    items = response_request.items_of(wire)
    response_request.stored_items(items, "resp_1")
    messages = response_request.conversation(items)
    response_request.check_outputs(messages)
    response_request.generate_request(wire, messages, default_temperature=1.0)


def batch(data: bytes) -> None:
    BATCH.decode(data)


def batch_file(data: bytes) -> None:
    path = WORK / "in.jsonl"
    path.write_bytes(data)
    lines = Lines(path, 200)
    if not lines.index("/v1/completions", "demo"):
        assert len({lines.item(index).custom_id for index in range(len(lines))}) == len(lines)
        again = Lines(path, 200)
        again.locate()
        assert [again.item(i) for i in range(len(again))] == [lines.item(i) for i in range(len(lines))]


def harmony(data: bytes) -> None:
    given = atheris.FuzzedDataProvider(data)
    parser = HarmonyParser(frozenset(("look",)), CallIds("r"))
    while given.remaining_bytes():
        if given.ConsumeBool():
            parser.push(given.PickValueInList(list(HARMONY_SPECIAL)), "")
        else:
            parser.push(1, given.ConsumeUnicodeNoSurrogates(8))
    parser.finish()


def tagged(data: bytes) -> None:
    """However the text is cut, the parts are the same."""
    given = atheris.FuzzedDataProvider(data)
    cut = given.ConsumeIntInRange(1, 7)
    said = given.ConsumeUnicodeNoSurrogates(200)
    found = []
    for pieces in ([said], [said[i : i + cut] for i in range(0, len(said), cut)]):
        parser = TaggedParser(TAGS, frozenset(("look",)), {}, CallIds("r"), is_reasoning=False)
        parts = [part for piece in pieces for part in parser.push(1, piece)] + parser.finish()
        found.append((content_of(tuple(parts)), parser.num_calls))
    assert found[0] == found[1], found


def record(data: bytes) -> None:
    decode_record(data)


def command(data: bytes) -> None:
    decode_command(data)  # pyright: ignore[reportArgumentType] - msgspec.Raw is bytes to its decoder


def bundle(data: bytes) -> None:
    path = WORK / "bundle.zip"
    path.write_bytes(data)
    with BundleReader(path) as reader:
        for _ in reader.records():
            pass


def markdown(data: bytes) -> None:
    """What has been printed for good never changes with what comes after it."""
    said = atheris.FuzzedDataProvider(data).ConsumeUnicodeNoSurrogates(200)
    ends = [end_of_blocks(said[:place]) for place in range(len(said) + 1)]
    assert ends == sorted(ends), said


TARGETS: dict[str, tuple[Callable[[bytes], None], tuple[type[GptossError], ...]]] = {
    "chat": (chat, (RequestError,)),
    "text": (text, (RequestError,)),
    "responses": (responses, (RequestError,)),
    "batch": (batch, (RequestError,)),
    "batch_file": (batch_file, ()),
    "harmony": (harmony, ()),
    "tagged": (tagged, ()),
    "record": (record, (JournalError,)),
    "command": (command, (JournalError,)),
    "bundle": (bundle, (BundleError, UnsupportedSchema)),
    "markdown": (markdown, ()),
}
"""Name -> what reads the bytes, and what it may raise."""

SEEDS: dict[str, list[bytes]] = {
    "chat": [
        b'{"model":"demo","messages":[{"role":"user","content":[{"type":"text","text":"x"}]}],"stream":true,'
        b'"tools":[{"type":"function","function":{"name":"a","parameters":{}}}],"tool_choice":"auto","stop":["a"],'
        b'"response_format":{"type":"json_schema","json_schema":{"name":"n","schema":{}}},"logit_bias":{"5":1.5}}'
    ],
    "text": [b'{"prompt":["a",[1,2]],"n":2,"echo":true,"logprobs":3,"best_of":1,"suffix":""}'],
    "responses": [
        b'{"input":[{"role":"user","content":"x"},{"type":"function_call","call_id":"c","name":"a","arguments":"{}"},'
        b'{"type":"function_call_output","call_id":"c","output":"y"},{"type":"reasoning","content":[]}],'
        b'"tools":[{"type":"function","name":"a"}],"text":{"format":{"type":"json_object"}},"tool_choice":"auto"}'
    ],
    "batch": [
        b'{"input_file_id":"file-1","endpoint":"/v1/completions","completion_window":"24h","metadata":{"a":"b"}}'
    ],
    "batch_file": [b'{"custom_id":"a","method":"POST","url":"/v1/completions","body":{"model":"demo"}}\n\n{}\r\n'],
    "tagged": [b'\x03<think>x</think> <tool_call>{"name":"look","arguments":{"a":1}}</tool_call> y'],
    "markdown": [b"# a\n\n```py\nx\n\n```\n\n1. a\n\n2. b\n\n~~~\n"],
}


def seeds_of(name: str) -> list[bytes]:
    """Inputs to begin with: those above, and what the tests keep of recorded bytes."""
    tests = Path(__file__).parents[1] / "tests"
    if name == "record":
        golden = (json.loads(path.read_text("utf-8")) for path in (tests / "messages" / "golden").glob("*.json"))
        return [bytes.fromhex(kept["record"]) for kept in golden]
    if name == "bundle":
        kept = (tests / "replay" / "bundles").glob("*.zip")
        return [path.read_bytes() for path in kept if path.stat().st_size < SEED_BYTES_MAX]
    return SEEDS.get(name, [])


def main() -> int:
    name, *given = sys.argv[1:] or [""]
    if name == "all":
        return run_all(given[0] if given else "30")
    if name not in TARGETS:
        print(f"{__doc__}\ntargets: {', '.join(TARGETS)}")
        return 1
    read, allowed = TARGETS[name]

    def one(data: bytes) -> None:
        with contextlib.suppress(*allowed):
            read(data)

    corpus = WORK / "corpus"
    corpus.mkdir()
    for number, seed in enumerate(seeds_of(name)):
        (corpus / f"seed-{number}").write_bytes(seed)
    # A file that is named is run alone; the corpus would make it a run of its own.
    has_file = any(not option.startswith("-") for option in given)
    atheris.Setup([sys.argv[0], *given, *([] if has_file else [str(corpus)])], one)
    atheris.Fuzz()
    return 0


def run_all(seconds: str) -> int:
    failed = [
        name
        for name in TARGETS
        if subprocess.run([sys.executable, __file__, name, f"-max_total_time={seconds}"], check=False).returncode
    ]
    print(f"failed: {', '.join(failed)}" if failed else f"{len(TARGETS)} targets held for {seconds} s each")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
