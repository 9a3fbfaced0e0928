"""Profiles and prompt versions: of the server, and of one request."""

from typing import Any

import pytest
from aiohttp.test_utils import TestClient, TestServer

import gptoss
from gptoss.actors.generation import GenerateRequest
from gptoss.actors.rendering import SYSTEM_V2, with_version
from gptoss.app import ServingSystem
from gptoss.config import Settings
from gptoss.engine.model_source import PreparedModel
from gptoss.engine.port import ChatMessage
from gptoss.messages import events as ev
from gptoss.testing import FAKE_MODEL, FakeDriver, FakeOptions, FakeRenderer

MODEL = PreparedModel(folder="", model_name=FAKE_MODEL, source="test", max_model_len=4096)
MESSAGES = [{"role": "user", "content": "one two three"}]


async def records(
    settings: dict[str, Any], body: dict[str, Any], path: str = "/v1/chat/completions"
) -> dict[type, Any]:
    """The events of one call, by type."""
    serving = ServingSystem(
        Settings(journal="memory", devices="cpu", **settings),
        drivers=lambda _: FakeDriver(FakeOptions()),
        renderer=FakeRenderer(),
        model=MODEL,
    )
    async with serving:
        await serving.ready(10.0)
        async with TestClient(TestServer(gptoss.make_app(serving))) as client, client.post(path, json=body) as response:
            assert response.status == 200, await response.text()
        return {type(record.event): record.event for record in serving.journal.read()}


@pytest.mark.parametrize(
    ("server", "asked", "expected"),
    [
        ("latency_first", {}, (512, 0.7)),
        ("quality_first", {}, (2048, 0.8)),
        ("latency_first", {"profile": "quality_first"}, (2048, 0.8)),
        ("quality_first", {"profile": "latency_first", "temperature": 0.1}, (512, 0.1)),
        ("latency_first", {"profile": "quality_first", "max_tokens": 3}, (3, 0.8)),
    ],
)
async def test_a_profile_sets_what_the_request_leaves_open(
    server: str, asked: dict[str, Any], expected: tuple[int, float]
) -> None:
    found = await records({"profile": server}, {"messages": MESSAGES, **asked})
    assert (found[ev.PromptRendered].max_tokens, found[ev.RequestValidated].sampling.temperature) == expected


@pytest.mark.parametrize(
    ("server", "asked", "version", "prompt_tokens"),
    [
        ("SYS/v1", {}, "SYS/v1", 3),
        ("SYS/v2", {}, "SYS/v2", 3 + len(SYSTEM_V2.split())),
        ("SYS/v1", {"prompt_version": "SYS/v2"}, "SYS/v2", 3 + len(SYSTEM_V2.split())),
        ("SYS/v2", {"prompt_version": "SYS/v1"}, "SYS/v1", 3),
    ],
)
async def test_a_prompt_version_says_what_is_added_to_a_conversation(
    server: str, asked: dict[str, Any], version: str, prompt_tokens: int
) -> None:
    found = await records({"prompt_version": server}, {"messages": MESSAGES, "max_tokens": 1, **asked})
    rendered = found[ev.PromptRendered]
    assert (rendered.prompt_version, rendered.prompt_tokens) == (version, prompt_tokens)


async def test_a_raw_prompt_has_no_version() -> None:
    body = {"prompt": "one two", "max_tokens": 1}
    found = await records({"prompt_version": "SYS/v2"}, body, "/v1/completions")
    assert (found[ev.PromptRendered].prompt_version, found[ev.PromptRendered].prompt_tokens) == ("", 2)


def test_a_conversation_with_a_system_message_stays_as_it_is() -> None:
    messages = (ChatMessage(role="user", content="a"), ChatMessage(role="system", content="b"))
    request = GenerateRequest(messages=messages)
    assert with_version(request, "SYS/v2") == request
    assert with_version(GenerateRequest(messages=messages[:1]), "SYS/v1").messages == messages[:1]
    assert with_version(GenerateRequest(messages=messages[:1]), "SYS/v2").messages[0].content == SYSTEM_V2
