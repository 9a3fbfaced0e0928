"""Whatever JSON a client sends, the answer is 200 or a 400 that names a parameter; never a 500."""

import asyncio
from http.client import HTTPConnection
from typing import Any

import msgspec
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gptoss.http.schema import ChatCompletionRequest

LEAVES = st.none() | st.booleans() | st.integers(-(2**63), 2**63) | st.floats(-1e9, 1e9) | st.text(max_size=6)
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
MESSAGES = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(["user", "system", "assistant", "x"]), "content": VALUES}),
    max_size=3,
)
NAMES = st.sampled_from(ChatCompletionRequest.__struct_fields__) | st.text(max_size=5)


async def test_no_json_makes_the_server_fail(house: Any) -> None:
    connection = HTTPConnection("127.0.0.1", house.port, timeout=10)

    @settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
    @given(st.dictionaries(NAMES, VALUES, max_size=5), MESSAGES)
    def fuzz(fields: dict[str, Any], messages: list[Any]) -> None:
        body = msgspec.json.encode({"messages": messages, **fields})
        connection.request("POST", "/v1/chat/completions", body, {"Content-Type": "application/json"})
        response = connection.getresponse()
        answer = response.read()
        assert response.status in {200, 400}, (body, answer)
        if response.status == 400:
            assert msgspec.json.decode(answer)["error"]["param"], answer

    await asyncio.to_thread(fuzz)
    connection.close()
    await house.canary()
