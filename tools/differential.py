"""The same requests to this server and to another with the same model, and where the answers differ in shape.

    python tools/differential.py --url http://127.0.0.1:8000 --peer http://127.0.0.1:9000 [--markdown FILE]

Compared are statuses, finish reasons, token counts, the fields that answers and chunks have, the order of a stream, and
for errors their type and whether they name a parameter; never the text, which depends on number formats. Both are asked
greedily and with ``ignore_eos`` where lengths count. Differences that are meant stand in ``INTENDED`` with their reasons;
any other makes the exit status 1. Fields that only the peer has are counted as a difference when they hold something.
"""

import argparse
import asyncio
import fnmatch
import json
import sys
from http import HTTPStatus
from pathlib import Path
from typing import Any, cast

import aiohttp

CHAT, TEXT, RESPONSES = "/v1/chat/completions", "/v1/completions", "/v1/responses"
HI = [{"role": "user", "content": "Say hello."}]
TURNS = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "One"},
    {"role": "assistant", "content": "Two"},
    {"role": "user", "content": [{"type": "text", "text": "Three"}]},
]
SHORT: dict[str, Any] = {"max_tokens": 5, "temperature": 0, "ignore_eos": True}

CORPUS: dict[str, tuple[str, dict[str, Any] | bytes]] = {
    "chat": (CHAT, {"messages": HI, **SHORT}),
    "chat turns": (CHAT, {"messages": TURNS, **SHORT}),
    "chat n": (CHAT, {"messages": HI, "n": 2, "max_tokens": 5, "ignore_eos": True, "seed": 1}),
    "chat logprobs": (CHAT, {"messages": HI, "logprobs": True, "top_logprobs": 2, **SHORT}),
    "chat max_completion_tokens": (CHAT, {"messages": HI, **SHORT, "max_tokens": None, "max_completion_tokens": 3}),
    "chat stream": (CHAT, {"messages": HI, "stream": True, **SHORT}),
    "chat stream usage": (CHAT, {"messages": HI, "stream": True, "stream_options": {"include_usage": True}, **SHORT}),
    "chat stream continuous usage": (
        CHAT,
        {
            "messages": HI,
            "stream": True,
            "stream_options": {"include_usage": True, "continuous_usage_stats": True},
            **SHORT,
        },
    ),
    "chat stream n": (CHAT, {"messages": HI, "stream": True, "n": 2, **SHORT, "temperature": 1, "seed": 2}),
    "chat stop string": (CHAT, {"messages": HI, "max_tokens": 50, "temperature": 0, "stop": ["e", "o"]}),
    "chat json schema": (
        CHAT,
        {
            "messages": HI,
            "max_tokens": 60,
            "temperature": 0,
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "n", "schema": {"enum": ["a"]}},
            },
        },
    ),
    "chat developer role": (CHAT, {"messages": [{"role": "developer", "content": "Be brief."}, *HI], **SHORT}),
    "chat unknown field": (CHAT, {"messages": HI, "no_such_field": 1, **SHORT}),
    "chat logit bias": (CHAT, {"messages": HI, "logit_bias": {"5": -100}, **SHORT}),
    "text": (TEXT, {"prompt": "Once upon", **SHORT}),
    "text ids": (TEXT, {"prompt": [1, 2, 3], **SHORT}),
    "text several": (TEXT, {"prompt": ["Once upon", "There was"], "n": 2, **SHORT, "temperature": 1, "seed": 3}),
    "text echo": (TEXT, {"prompt": "Once upon", "echo": True, **SHORT}),
    "text logprobs": (TEXT, {"prompt": "Once upon", "logprobs": 2, **SHORT}),
    "text default length": (TEXT, {"prompt": "Once upon", "temperature": 0, "ignore_eos": True}),
    "text stream": (TEXT, {"prompt": "Once upon", "stream": True, "stream_options": {"include_usage": True}, **SHORT}),
    "responses": (RESPONSES, {"input": "Say hello.", "max_output_tokens": 5, "temperature": 0}),
    "responses stream": (RESPONSES, {"input": "Say hello.", "max_output_tokens": 5, "temperature": 0, "stream": True}),
    "tokenize": ("/tokenize", {"prompt": "Once upon"}),
    "tokenize chat": ("/tokenize", {"messages": HI}),
    "detokenize": ("/detokenize", {"tokens": [1, 2, 3]}),
    "error json": (CHAT, b"{"),
    "error no messages": (CHAT, {"max_tokens": 5}),
    "error empty messages": (CHAT, {"messages": []}),
    "error role": (CHAT, {"messages": [{"role": "robot", "content": "x"}]}),
    "error temperature": (CHAT, {"messages": HI, "temperature": -1}),
    "error temperature type": (CHAT, {"messages": HI, "temperature": "hot"}),
    "error top_p": (CHAT, {"messages": HI, "top_p": 2}),
    "error max_tokens": (CHAT, {"messages": HI, "max_tokens": 0}),
    "error top_logprobs": (CHAT, {"messages": HI, "top_logprobs": 2}),
    "error too many top_logprobs": (CHAT, {"messages": HI, "logprobs": True, "top_logprobs": 1000}),
    "error n": (CHAT, {"messages": HI, "n": 0}),
    "error length": (CHAT, {"messages": HI, "max_tokens": 10_000_000}),
    "error long prompt": (CHAT, {"messages": [{"role": "user", "content": "word " * 20_000}]}),
    "error model": (CHAT, {"model": "no-such-model", "messages": HI}),
    "error stream_options": (CHAT, {"messages": HI, "stream_options": {"include_usage": True}}),
    "error tool choice": (CHAT, {"messages": HI, "tool_choice": "required"}),
    "error image": (
        CHAT,
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x/"}}]}]},
    ),
    "error schema": (
        CHAT,
        {"messages": HI, "response_format": {"type": "json_schema", "json_schema": {"name": "n"}}, "max_tokens": 5},
    ),
    "error text prompt": (TEXT, {"max_tokens": 5}),
    "error text empty": (TEXT, {"prompt": []}),
    "error token id": (TEXT, {"prompt": [10_000_000], "max_tokens": 2}),
    "error response unknown": (RESPONSES, {"input": "x", "previous_response_id": "resp_none"}),
    "error path": ("/v1/no-such-path", {}),
}

_OWN_ERRORS = "OpenAI's three error types; the peer names Python classes"
INTENDED: dict[str, str] = {
    "*/field usage.completion_tokens_details.reasoning_tokens": "told always, 0 included, as OpenAI does",
    "*/field usage.prompt_tokens_details.cached_tokens": "told always; the peer wants --enable-prompt-tokens-details",
    "*/field system_fingerprint": "deprecated by OpenAI; /v1/models and the log say what runs",
    "chat json schema/usage": "an answer that its grammar has completed ends without drawing an end token",
    "responses*/field *store": "whether a response is kept is part of OpenAI's object",
    "responses*/field *text.format.type": "part of OpenAI's object, here when it is the default too",
    "responses*/field *top_logprobs": "a number in OpenAI's object, 0 where none are wanted",
    "responses*/field *_penalty": "not in OpenAI's object",
    "responses*/field *service_tier": "all tiers are one; a field without effect is not told",
    "responses*/field *cache_write_tokens": "not in OpenAI's object",
    "responses*/field *tool_output_tokens": "not in OpenAI's object",
    "responses stream/order": "a cut response ends with response.incomplete, as OpenAI's; the peer's does not",
    "error role/*": "an unknown role is refused; the peer gives it to the template",
    "error long prompt/error param": "the field that the client wrote",
    "error too many top_logprobs/error param": "the field that the client wrote",
    "error response unknown/error param": "the field that the client wrote",
    "error path/error type": "every error has OpenAI's body",
    "error */error type": _OWN_ERRORS,
    "error */error param": "every refusal names the field at fault, as the client wrote it",
}
"""``case/what`` (a pattern) -> why this server differs."""


async def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", required=True, help="this server")
    parser.add_argument("--peer", required=True, help="the other")
    parser.add_argument("--markdown", type=Path, help="write the findings as a table")
    parser.add_argument("--case", action="append", help="only this one; may be repeated")
    options = parser.parse_args()
    cases = {name: CORPUS[name] for name in options.case or CORPUS}
    found: list[tuple[str, str, str, str]] = []
    async with Server(options.url) as ours, Server(options.peer) as theirs:
        for name, (path, body) in cases.items():
            here, there = await ours.ask(path, body), await theirs.ask(path, body)
            found += [(name, what, a, b) for what, a, b in differences(here, there)]
    unexplained = report(found, len(cases), options.markdown)
    return 1 if unexplained else 0


class Server:
    """One of the two; requests without a model ask for the one it has."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        self.model = ""

    async def __aenter__(self) -> "Server":
        self._session = aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=300))
        async with self._session.get(f"{self.url}/v1/models") as response:
            self.model = (await response.json())["data"][0]["id"]
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._session.close()

    async def ask(self, path: str, body: dict[str, Any] | bytes) -> dict[str, Any]:
        """What of an answer is compared, by name."""
        sent = body if isinstance(body, bytes) else json.dumps({"model": self.model, **body}).encode()
        headers = {"Content-Type": "application/json"}
        async with self._session.post(f"{self.url}{path}", data=sent, headers=headers) as response:
            data = await response.read()
            told: dict[str, Any] = {"status": response.status}
            if response.status != HTTPStatus.OK:
                return told | error_facts(data)
            if response.content_type == "text/event-stream":
                return told | stream_facts(data)
            return told | answer_facts(json.loads(data))


def error_facts(data: bytes) -> dict[str, Any]:
    try:
        error = json.loads(data)["error"]
        return {"error type": error.get("type"), "error param": error.get("param")}
    except (ValueError, KeyError, TypeError):
        return {"error type": f"no error body: {data[:60]!r}"}


def answer_facts(body: dict[str, Any]) -> dict[str, Any]:
    facts: dict[str, Any] = {"fields": paths(body)}
    if "choices" in body:
        facts["finish"] = [choice["finish_reason"] for choice in body["choices"]]
        facts["stop reason"] = [choice.get("stop_reason") for choice in body["choices"]]
        facts["object"] = body["object"]
    for name in ("usage", "status", "incomplete_details", "count", "tokens", "max_model_len"):
        if name in body:
            facts[name] = counts(body[name]) if name == "usage" else body[name]
    return facts


def stream_facts(data: bytes) -> dict[str, Any]:
    frames = [frame for frame in data.decode().split("\n\n") if frame.strip() and not frame.startswith(":")]
    payloads = [line[5:].strip() for frame in frames for line in frame.splitlines() if line.startswith("data:")]
    chunks = [json.loads(payload) for payload in payloads if payload != "[DONE]"]
    facts: dict[str, Any] = {
        "done": payloads[-1:] == ["[DONE]"],
        "fields": sorted({p for c in chunks for p in paths(c)}),
    }
    if chunks and "type" in chunks[0]:
        order = [chunk["type"] for chunk in chunks]
        facts["order"] = [kind for index, kind in enumerate(order) if index == 0 or order[index - 1] != kind]
        return facts
    finishes = [(c["index"], c["finish_reason"]) for chunk in chunks for c in chunk["choices"] if c["finish_reason"]]
    facts["finish"] = sorted(finishes)
    first: Any = chunks[0]["choices"][0].get("delta") if chunks[0]["choices"] else None
    facts["first delta"] = sorted(first) if first is not None else None
    facts["last chunk"] = "usage" if chunks[-1].get("usage") and not chunks[-1]["choices"] else "choice"
    facts["usage"] = counts(chunks[-1].get("usage"))
    facts["usage in every chunk"] = all(chunk.get("usage") for chunk in chunks)
    return facts


def counts(usage: Any) -> Any:
    names = ("prompt_tokens", "completion_tokens", "total_tokens", "input_tokens", "output_tokens")
    return {name: usage[name] for name in names if name in usage} if usage else None


def paths(value: Any, where: str = "") -> list[str]:
    """The fields that hold something, by path; entries of lists are alike."""
    if isinstance(value, dict):
        value = cast("dict[str, Any]", value)
        return sorted({p for key, item in value.items() for p in paths(item, f"{where}.{key}" if where else str(key))})
    if isinstance(value, list):
        value = cast("list[Any]", value)
        return sorted({p for item in value for p in paths(item, f"{where}[]")})
    return [] if value is None else [where]


def differences(here: dict[str, Any], there: dict[str, Any]) -> list[tuple[str, str, str]]:
    found: list[tuple[str, str, str]] = []
    for what in dict.fromkeys([*here, *there]):
        a, b = here.get(what), there.get(what)
        if what == "fields":
            found += [(f"field {name}", "yes", "no") for name in sorted(set(a or ()) - set(b or ()))]
            found += [(f"field {name}", "no", "yes") for name in sorted(set(b or ()) - set(a or ()))]
        elif a != b:
            found.append((what, json.dumps(a), json.dumps(b)))
    return found


def report(found: list[tuple[str, str, str, str]], num_cases: int, markdown: Path | None) -> int:
    """Say what differs; returns how many differences have no reason."""
    unexplained = 0
    grouped: dict[tuple[str, str, str, str], list[str]] = {}
    for name, what, a, b in found:
        reason = next((why for pattern, why in INTENDED.items() if fnmatch.fnmatch(f"{name}/{what}", pattern)), "")
        unexplained += not reason
        grouped.setdefault((what, a, b, reason), []).append(name)
    rows = [
        f"| {what} | {a[:60]} | {b[:60]} | {', '.join(names)} | {reason or '**unexplained**'} |"
        for (what, a, b, reason), names in grouped.items()
    ]
    head = ["| what | here | peer | where | why |", "|---|---|---|---|---|"]
    summary = f"{num_cases} requests; {len(found)} differences, {unexplained} of them without a reason"
    text = "\n".join([*head, *rows, "", summary])
    print(text)
    if markdown is not None:
        markdown.write_text(text + "\n", encoding="utf-8")
    return unexplained


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
