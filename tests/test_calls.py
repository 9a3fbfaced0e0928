"""Calls through HTTP into the whole actor system, over a fake engine: what the journal says of them."""

import asyncio
from typing import Any

import msgspec
import pytest
from aiohttp.test_utils import TestClient, TestServer

import gptoss
from gptoss.actors.generation import GenerateRequest
from gptoss.app import ServingSystem
from gptoss.config import Settings
from gptoss.engine.model_source import PreparedModel
from gptoss.engine.port import EngineEvent, Finished, Submit
from gptoss.messages import events as ev
from gptoss.messages.codec import encode_record
from gptoss.testing import FAKE_MODEL, FakeDriver, FakeOptions, FakeRenderer, fake_token

MODEL = PreparedModel(folder="", model_name=FAKE_MODEL, source="test", max_model_len=4096)
MESSAGES = [{"role": "user", "content": "one two three"}]


async def post(client: TestClient[Any, Any], path: str, **fields: Any) -> tuple[int, Any]:
    async with client.post(path, json=fields, headers={"X-Request-ID": "mine"}) as response:
        return response.status, await response.json()


def text(seed: int, tokens: int) -> str:
    return "".join(f"t{fake_token(seed, position)} " for position in range(tokens))


def received(system: ServingSystem) -> dict[str, ev.RequestReceived]:
    events = (record.event for record in system.journal.read())
    return {event.request_id: event for event in events if isinstance(event, ev.RequestReceived)}


def ends(system: ServingSystem) -> dict[str, Any]:
    records = (record for record in system.journal.read())
    return {r.meta.correlation: r.event for r in records if isinstance(r.event, ev.TERMINAL_EVENTS)}


async def test_each_choice_is_a_request_that_names_its_parent(client: Any, system: ServingSystem) -> None:
    status, answer = await post(client, "/v1/chat/completions", messages=MESSAGES, n=3, seed=4, max_tokens=3)
    assert status == 200
    assert [choice["message"]["content"] for choice in answer["choices"]] == [text(4 + i, 3) for i in range(3)]
    assert answer["usage"]["completion_tokens"] == 9
    parents = {name: event.parent_id for name, event in received(system).items()}
    assert parents == {"mine": "", "mine-1": "mine", "mine-2": "mine"}
    assert all(isinstance(end, ev.RequestCompleted) for end in ends(system).values())
    async with client.get("/admin/requests/mine-2/events") as response:
        assert (await response.json())["events"]


async def test_a_choice_can_be_had_again_alone(client: Any) -> None:
    _, several = await post(client, "/v1/chat/completions", messages=MESSAGES, n=2, seed=4, max_tokens=3)
    _, alone = await post(client, "/v1/chat/completions", messages=MESSAGES, seed=5, max_tokens=3)
    assert alone["choices"][0]["message"] == several["choices"][1]["message"]


@pytest.mark.parametrize("options", [FakeOptions(step_s=0.02)])
async def test_cancelling_a_call_cancels_all_its_choices(client: Any, system: ServingSystem) -> None:
    call = asyncio.create_task(post(client, "/v1/chat/completions", messages=MESSAGES, n=3, max_tokens=2000))
    while system.gateway.running < 3 or not any(isinstance(r.event, ev.StepCommitted) for r in system.journal.read()):
        await asyncio.sleep(0.005)
    async with client.post("/cancel/chatcmpl-mine") as response:
        assert response.status == 200
    status, answer = await call
    assert status == 200
    assert [choice["finish_reason"] for choice in answer["choices"]] == ["abort"] * 3
    assert all(isinstance(end, ev.RequestCancelled) and end.reason == "client" for end in ends(system).values())
    assert len(ends(system)) == 3


async def test_a_call_of_which_one_prompt_is_too_long_is_refused_whole(client: Any, system: ServingSystem) -> None:
    long = "word " * 5000
    status, answer = await post(client, "/v1/completions", prompt=["short", long], max_tokens=2000)
    assert (status, answer["error"]["code"]) == (400, "context_length_exceeded")
    assert answer["error"]["param"] in {"prompt", "max_tokens"}
    while system.gateway.running:
        await asyncio.sleep(0.005)
    assert {name: type(end).__name__ for name, end in ends(system).items()} == {
        "mine": "RequestCancelled",
        "mine-1": "RequestRejected",
    }
    assert (await post(client, "/v1/completions", prompt="short"))[0] == 200


async def test_a_request_that_is_cancelled_before_it_runs_ends_under_its_own_name(system: ServingSystem) -> None:
    generation = system.submit(GenerateRequest(prompt="x", request_id="early"))
    generation.cancel()
    while system.gateway.running:
        await asyncio.sleep(0.005)
    assert [type(end).__name__ for end in ends(system).values()] == ["RequestCancelled"]
    assert list(ends(system)) == ["early"]


async def test_prompts_as_text_and_as_ids_are_the_same_request(client: Any, system: ServingSystem) -> None:
    _, as_text = await post(client, "/v1/completions", prompt="one three", seed=1)
    _, as_ids = await post(client, "/v1/completions", prompt=[3, 5], seed=1)
    assert as_text["choices"] == as_ids["choices"]
    assert as_text["choices"][0]["text"] == text(1, 16)
    hashes = {
        record.event.prompt_hmac for record in system.journal.read() if isinstance(record.event, ev.PromptRendered)
    }
    assert len(hashes) == 1


@pytest.mark.parametrize("prompt", ["", [1001]])
async def test_a_prompt_without_tokens_or_with_unknown_ones_is_refused(client: Any, prompt: Any) -> None:
    status, answer = await post(client, "/v1/completions", prompt=prompt)
    assert (status, answer["error"]["param"]) == (400, "prompt")


async def test_who_asks_is_recorded_by_hash_and_notes_by_number(client: Any, system: ServingSystem) -> None:
    notes = {"canary-key": "canary-value", "b": "c"}
    for _ in range(2):
        await post(client, "/v1/chat/completions", messages=MESSAGES, user="canary-user", metadata=notes, max_tokens=1)
    found = received(system)["mine"]
    assert len(found.user_hmac) == 64
    assert found.num_metadata == 2
    assert "canary" not in str([record.event for record in system.journal.read()])


async def test_the_salt_of_a_tenant_reaches_the_engine_and_tells_it_nothing(options: FakeOptions) -> None:
    driver = FakeDriver(options)
    settings = Settings(journal="memory", devices="cpu")
    asked = [
        {"cache_salt": "s"},
        {"cache_salt": "s"},
        {"cache_salt": "s", "user": "u"},
        {"user": "u"},
        {"user": "us"},
        {},
    ]
    async with ServingSystem(settings, drivers=lambda _: driver, renderer=FakeRenderer(), model=MODEL) as serving:
        await serving.ready(10.0)
        async with TestClient(TestServer(gptoss.make_app(serving))) as client:
            for fields in asked:
                await post(client, "/v1/completions", prompt="x", max_tokens=1, **fields)
    salts = [command.cache_salt for command in driver.seen if isinstance(command, Submit)]
    assert salts[0] == salts[1]
    assert salts[-1] == ""
    assert len(set(salts)) == len(asked) - 1
    assert {len(salt) for salt in salts} == {0, 64}


async def test_the_context_length_is_told_where_vllm_tells_it(client: Any) -> None:
    async with client.get("/v1/models") as response:
        model = (await response.json())["data"][0]
    assert (model["max_model_len"], model["root"], model["parent"]) == (4096, model["id"], None)
    _, counted = await post(client, "/tokenize", messages=MESSAGES)
    assert counted == {"count": 3, "max_model_len": 4096, "tokens": [3, 3, 5], "token_strs": None}


class StoppedDriver(FakeDriver):
    """An engine whose answers all end at the stop string."""

    def _tell(self, events: list[EngineEvent]) -> None:
        ended: list[EngineEvent] = [
            msgspec.structs.replace(event, reason="stop", stop_reason="canary")
            if isinstance(event, Finished)
            else event
            for event in events
        ]
        super()._tell(ended)


async def test_the_stop_string_that_ended_an_answer_is_told_and_stands_in_no_control_event() -> None:
    async with ServingSystem(
        Settings(journal="memory", devices="cpu"),
        drivers=lambda _: StoppedDriver(),
        renderer=FakeRenderer(),
        model=MODEL,
    ) as system:
        await system.ready(10.0)
        async with TestClient(TestServer(gptoss.make_app(system))) as client:
            _, answer = await post(client, "/v1/completions", prompt="x", max_tokens=2, stop=["canary"])
        assert (answer["choices"][0]["finish_reason"], answer["choices"][0]["stop_reason"]) == ("stop", "canary")
        assert not any(b"canary" in encode_record(record) for record in system.journal.read())


@pytest.mark.parametrize(
    ("path", "fields", "param"),
    [
        ("/v1/chat/completions", {"messages": MESSAGES, "max_tokens": 5000}, "max_tokens"),
        ("/v1/chat/completions", {"messages": MESSAGES, "max_completion_tokens": 5000}, "max_completion_tokens"),
        ("/v1/completions", {"prompt": "x", "max_tokens": 5000}, "max_tokens"),
        ("/v1/responses", {"input": "x", "max_output_tokens": 5000}, "max_output_tokens"),
        ("/v1/responses", {"input": "word " * 5000}, "input"),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "word " * 5000}]}, "messages"),
    ],
)
async def test_a_context_that_is_too_short_is_told_of_the_field_that_the_client_wrote(
    client: Any, path: str, fields: dict[str, Any], param: str
) -> None:
    status, answer = await post(client, path, **fields)
    assert (status, answer["error"]["code"], answer["error"]["param"]) == (400, "context_length_exceeded", param)
    if "max" in param:
        assert param in answer["error"]["message"]
