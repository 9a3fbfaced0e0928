"""Tools, thoughts and forms of answers, through the whole system and OpenAI's own client.

A scripted engine says given tokens of the real gpt-oss vocabulary; all else is as in production: rendering, admission,
delivery, parsing, framing.
"""

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, Literal

import openai
import pytest
from openai.types.chat import ChatCompletionToolParam
from pydantic import BaseModel

from gptoss.app import ServingSystem
from gptoss.config import Settings
from gptoss.engine.model_source import PreparedModel
from gptoss.engine.port import Submit
from gptoss.engine.prompt import TokenizerRenderer, load_renderer
from gptoss.http.server import serve
from gptoss.messages import events as ev
from gptoss.messages.envelope import Record
from gptoss.serving_context import make_app
from gptoss.testing import FakeOptions, ScriptedDriver

pytestmark = [pytest.mark.slow]

MODEL = PreparedModel(folder="", model_name="gpt-oss", source="test", max_model_len=4096)
EOS = (199999, 200002, 200012)
MESSAGES: Any = [{"role": "user", "content": "What is the weather?"}]
WEATHER: ChatCompletionToolParam = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
THOUGHT = "<|channel|>analysis<|message|>The user wants the weather.<|end|><|start|>assistant"
CALL = '<|channel|>commentary to=functions.get_weather <|constrain|>json<|message|>{"city": "Zürich"}'
FINAL = "<|channel|>final<|message|>Mild, 18 °C 🗼.<|return|>"


@pytest.fixture(scope="module")
def renderer(tmp_path_factory: pytest.TempPathFactory, demo_cache: Path) -> TokenizerRenderer:
    from o200k import write_tokenizer

    home = tmp_path_factory.mktemp("o200k-http")
    try:
        write_tokenizer(home / "tokenizer.json", demo_cache)
    except OSError as error:
        pytest.skip(str(error))
    (home / "config.json").write_text(json.dumps({"eos_token_id": EOS}))
    return load_renderer(str(home))


class Stage:
    """The server, its client, and what the engine is to say."""

    def __init__(self, serving: ServingSystem, client: openai.AsyncOpenAI) -> None:
        self.serving = serving
        self.client = client
        self.script = ""
        self.submits: list[Submit] = []

    def records(self) -> list[Record]:
        journal = self.serving.journal
        return [*journal.read(), *journal.read(family="content")]

    def events(self, kind: type) -> list[Any]:
        return [record.event for record in self.records() if isinstance(record.event, kind)]


@pytest.fixture
async def stage(renderer: TokenizerRenderer) -> AsyncIterator[Stage]:
    def script(submit: Submit) -> list[int]:
        if not made.submits or made.submits[-1] is not submit:
            made.submits.append(submit)
        return renderer.tokenizer.encode(made.script, add_special_tokens=False).ids

    options = FakeOptions(vocab_size=201_088, eos_token_ids=EOS, max_model_len=4096)

    def drivers(_: str) -> ScriptedDriver:
        return ScriptedDriver(renderer.tokenizer, script, options)

    settings = Settings(journal="memory", devices="cpu", content="tokens")
    async with ServingSystem(settings, drivers=drivers, renderer=renderer, model=MODEL) as serving:
        await serving.ready(20.0)
        server = await serve(make_app(serving), "127.0.0.1", 0)
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
            made = Stage(serving, client)
            yield made
        await server.close()


async def test_a_thought_and_an_answer(stage: Stage) -> None:
    stage.script = THOUGHT + FINAL
    answer = await stage.client.chat.completions.create(model="gpt-oss", messages=MESSAGES, reasoning_effort="low")
    message: Any = answer.choices[0].message
    assert message.content == "Mild, 18 °C 🗼."
    assert message.reasoning == message.reasoning_content == "The user wants the weather."
    assert message.tool_calls is None
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None
    assert answer.usage.completion_tokens_details is not None
    assert answer.usage.completion_tokens_details.reasoning_tokens == 6
    completed = stage.events(ev.RequestCompleted)[-1]
    assert (completed.reasoning_tokens, completed.num_calls) == (6, 0)


async def test_a_call_streams_as_openais_does(stage: Stage) -> None:
    stage.script = THOUGHT + CALL + "<|call|>"
    stream = await stage.client.chat.completions.create(
        model="gpt-oss", messages=MESSAGES, tools=[WEATHER], stream=True, stream_options={"include_usage": True}
    )
    chunks = [chunk async for chunk in stream]
    deltas = [chunk.choices[0].delta for chunk in chunks if chunk.choices]
    assert (deltas[0].role, deltas[0].content) == ("assistant", "")
    reasoning = "".join((delta.model_extra or {}).get("reasoning", "") for delta in deltas)
    assert reasoning == "The user wants the weather."
    calls = [call for delta in deltas for call in delta.tool_calls or []]
    first, *rest = calls
    assert first.function is not None
    assert (first.index, first.type, first.function.name, first.function.arguments) == (
        0,
        "function",
        "get_weather",
        "",
    )
    assert (first.id or "").startswith("call_")
    assert all(call.id is None and call.type is None and call.function and call.function.name is None for call in rest)
    assert rest
    assert "".join(call.function.arguments or "" for call in rest if call.function) == '{"city": "Zürich"}'
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == "tool_calls"
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.prompt_tokens == len(stage.submits[-1].prompt_token_ids)


async def test_a_call_whole_and_the_turn_after_it(stage: Stage, renderer: TokenizerRenderer) -> None:
    stage.script = THOUGHT + CALL + "<|call|>"
    answer = await stage.client.chat.completions.create(model="gpt-oss", messages=MESSAGES, tools=[WEATHER])
    message = answer.choices[0].message
    assert answer.choices[0].finish_reason == "tool_calls"
    assert message.content is None
    assert message.tool_calls is not None
    (call,) = message.tool_calls
    assert call.type == "function"
    assert (call.function.name, json.loads(call.function.arguments)) == ("get_weather", {"city": "Zürich"})

    stage.script = FINAL
    turns: Any = [
        *MESSAGES,
        message.model_dump(exclude_none=True),
        {"role": "tool", "tool_call_id": call.id, "content": "18"},
    ]
    answer = await stage.client.chat.completions.create(model="gpt-oss", messages=turns, tools=[WEATHER])
    assert answer.choices[0].message.content == "Mild, 18 °C 🗼."
    prompt = renderer.tokenizer.decode(stage.submits[-1].prompt_token_ids, skip_special_tokens=False)
    assert prompt.endswith(
        f"<|start|>assistant{THOUGHT}{CALL}<|call|>"
        "<|start|>functions.get_weather<|channel|>commentary to=assistant<|message|>18<|end|><|start|>assistant"
    )


async def test_the_stream_helper_puts_calls_together(stage: Stage) -> None:
    stage.script = "<|channel|>commentary<|message|>I look.<|end|><|start|>assistant" + CALL + "<|call|>"
    strict: Any = {**WEATHER, "function": {**WEATHER["function"], "strict": True}}
    strict["function"]["parameters"] = {**strict["function"]["parameters"], "additionalProperties": False}
    async with stage.client.chat.completions.stream(model="gpt-oss", messages=MESSAGES, tools=[strict]) as stream:
        done = [event async for event in stream if event.type == "tool_calls.function.arguments.done"]
        final = await stream.get_final_completion()
    assert [(event.name, event.parsed_arguments) for event in done] == [("get_weather", {"city": "Zürich"})]
    assert final.choices[0].message.content == "I look."
    assert stage.submits[-1].grammar


async def test_a_call_cut_by_max_tokens_says_length(stage: Stage) -> None:
    stage.script = CALL + "<|call|>"
    answer = await stage.client.chat.completions.create(
        model="gpt-oss", messages=MESSAGES, tools=[WEATHER], max_tokens=12
    )
    assert answer.choices[0].finish_reason == "length"
    assert answer.choices[0].message.tool_calls is not None


@pytest.mark.parametrize(
    ("script", "content"),
    [
        ("<|start|><|start|>assistant" + FINAL, "Mild, 18 °C 🗼."),
        ("<|channel|>final<|message|>Hi<|end|><|return|>", "Hi"),
        ("<|channel|>final Hello<|endoftext|>", "Hello"),
        ("<|channel|>commentary to=functions.nope<|message|>{}<|call|>", "{}"),
        ("plain", "plain"),
        ("", ""),
    ],
)
@pytest.mark.parametrize("streams", [True, False])
async def test_no_output_is_an_error(stage: Stage, script: str, content: str, streams: bool) -> None:
    stage.script = script
    if streams:
        stream = await stage.client.chat.completions.create(model="gpt-oss", messages=MESSAGES, stream=True)
        assert "".join([chunk.choices[0].delta.content or "" async for chunk in stream]) == content
    else:
        answer = await stage.client.chat.completions.create(model="gpt-oss", messages=MESSAGES)
        assert answer.choices[0].message.content == content


async def test_tools_that_may_not_be_called_are_not_told(stage: Stage, renderer: TokenizerRenderer) -> None:
    stage.script = CALL + "<|call|>"
    answer = await stage.client.chat.completions.create(
        model="gpt-oss", messages=MESSAGES, tools=[WEATHER], tool_choice="none"
    )
    assert answer.choices[0].message.tool_calls is None
    assert answer.choices[0].finish_reason == "stop"
    assert "get_weather" not in renderer.tokenizer.decode(stage.submits[-1].prompt_token_ids)


@pytest.mark.parametrize(
    ("choice", "bound"),
    [
        ("auto", False),
        ("required", True),
        ({"type": "function", "function": {"name": "get_weather"}}, True),
    ],
)
async def test_a_call_that_must_come_is_bound(stage: Stage, choice: Any, bound: bool) -> None:
    stage.script = CALL + "<|call|>"
    answer = await stage.client.chat.completions.create(
        model="gpt-oss", messages=MESSAGES, tools=[WEATHER], tool_choice=choice
    )
    assert answer.choices[0].message.tool_calls is not None
    assert bool(stage.submits[-1].grammar) == bound
    rendered, content = stage.events(ev.PromptRendered)[-1], stage.events(ev.PromptTokens)[-1]
    assert content.grammar == stage.submits[-1].grammar
    assert bool(rendered.grammar_hmac) == bound


class Answer(BaseModel):
    city: str
    kind: Literal["mild", "cold"]


async def test_a_pydantic_model_is_the_form_of_the_answer(stage: Stage) -> None:
    stage.script = THOUGHT + '<|channel|>final<|message|>{"city": "Zürich", "kind": "mild"}<|return|>'
    answer = await stage.client.chat.completions.parse(model="gpt-oss", messages=MESSAGES, response_format=Answer)
    assert answer.choices[0].message.parsed == Answer(city="Zürich", kind="mild")
    assert '"kind"' in stage.submits[-1].grammar


async def test_the_text_of_a_grammar_is_content_and_never_control(stage: Stage) -> None:
    stage.script = '<|channel|>final<|message|>{"canary_9f": true}<|return|>'
    schema = {"type": "object", "properties": {"canary_9f": {"type": "boolean"}}, "required": ["canary_9f"]}
    form: Any = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    await stage.client.chat.completions.create(model="gpt-oss", messages=MESSAGES, response_format=form)
    holders = {r.meta.type for r in stage.records() if "canary_9f" in repr(r.event)}
    assert holders == {"PromptTokens"}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"not": {}}}}}, "response_format"),
        ({"extra_body": {"guided_regex": "(a|"}}, "guided_regex"),
        ({"extra_body": {"guided_choice": []}}, "guided_choice"),
        ({"extra_body": {"structured_outputs": {"json": {"type": "nonsense"}}}}, "structured_outputs.json"),
        ({"extra_body": {"guided_choice": ["a"], "guided_regex": "a"}}, "guided_choice"),
        ({"extra_body": {"guided_regex": "a", "min_tokens": 3}}, "min_tokens"),
        ({"extra_body": {"guided_regex": "a", "ignore_eos": True}}, "ignore_eos"),
        ({"tools": [WEATHER], "tool_choice": {"type": "function", "function": {"name": "other"}}}, "tool_choice"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"messages": [{"role": "tool", "content": "x", "tool_call_id": "nobody"}]}, "messages"),
    ],
)  # fmt: skip
async def test_what_cannot_be_enforced_is_refused_by_name(stage: Stage, fields: dict[str, Any], param: str) -> None:
    stage.script = FINAL
    asked: dict[str, Any] = {"model": "gpt-oss", "messages": MESSAGES, **fields}
    with pytest.raises(openai.BadRequestError) as caught:
        await stage.client.chat.completions.create(**asked)
    assert caught.value.param == param
    assert not stage.submits
    canary = await stage.client.chat.completions.create(model="gpt-oss", messages=MESSAGES)
    assert canary.choices[0].message.content == "Mild, 18 °C 🗼."


async def test_the_embedding_api_reads_the_visible_text(stage: Stage, renderer: TokenizerRenderer) -> None:
    from gptoss.actors.generation import GenerateRequest
    from gptoss.engine.port import ChatMessage

    stage.script = THOUGHT + FINAL
    request = GenerateRequest(messages=(ChatMessage(role="user", content="Hi"),))
    assert await stage.serving.submit(request).text() == "Mild, 18 °C 🗼."


async def test_a_stop_string_cuts_the_visible_text(stage: Stage) -> None:
    stage.script = THOUGHT + FINAL
    stream = await stage.client.chat.completions.create(model="gpt-oss", messages=MESSAGES, stop=["18"], stream=True)
    assert "".join([chunk.choices[0].delta.content or "" async for chunk in stream]) == "Mild, "
