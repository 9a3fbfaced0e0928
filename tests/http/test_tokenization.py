"""``/tokenize`` and ``/detokenize`` in vLLM's shapes."""

import time
from typing import Any

import pytest

from gptoss.testing import FakeRenderer


async def test_a_prompt_and_messages_are_counted(house: Any) -> None:
    status, answer = await house.ask("/tokenize", prompt="one three", model="demo")
    assert (status, answer) == (200, {"count": 2, "max_model_len": 4096, "tokens": [3, 5], "token_strs": None})
    messages = [{"role": "user", "content": [{"type": "text", "text": "a bb"}]}]
    _, answer = await house.ask("/tokenize", messages=messages, return_token_strs=True)
    assert (answer["tokens"], answer["token_strs"]) == ([1, 2], ["t1 ", "t2 "])


async def test_tokens_become_text_again(house: Any) -> None:
    assert await house.ask("/detokenize", tokens=[3, 5]) == (200, {"prompt": "t3 t5 "})


@pytest.mark.parametrize(
    ("path", "fields", "status", "param"),
    [
        ("/tokenize", {}, 400, "prompt"),
        ("/tokenize", {"prompt": "x", "messages": []}, 400, "messages"),
        ("/tokenize", {"prompt": "x", "model": "other"}, 404, "model"),
        ("/tokenize", {"messages": [{"role": "user"}]}, 400, "messages[0].content"),
        (
            "/tokenize",
            {"messages": [{"role": "user", "content": "x"}], "add_special_tokens": True},
            400,
            "add_special_tokens",
        ),
        ("/tokenize", {"prompt": "x", "chat_template": "{{ x }}"}, 400, "chat_template"),
        ("/detokenize", {}, 400, "tokens"),
        ("/detokenize", {"tokens": [1000]}, 400, "tokens"),
        ("/detokenize", {"tokens": [-1]}, 400, "tokens[0]"),
        ("/detokenize", {"tokens": [1], "model": "other"}, 404, "model"),
    ],
)
async def test_what_cannot_be_done_is_refused_by_name(
    house: Any, path: str, fields: dict[str, Any], status: int, param: str
) -> None:
    found, answer = await house.ask(path, **fields)
    assert (found, answer["error"]["param"]) == (status, param)
    await house.canary()


async def test_a_rendering_that_takes_too_long_is_given_up(house: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(house.gateway.rendering, "_timeout_s", 0.05)

    def slow(*_: Any, **__: Any) -> tuple[int, ...]:
        time.sleep(0.3)
        return (1,)

    monkeypatch.setattr(FakeRenderer, "encode", slow)
    status, answer = await house.ask("/tokenize", prompt="x")
    assert (status, answer["error"]["param"]) == (400, "prompt")
    assert "longer than 0.05 s" in answer["error"]["message"]
