"""Admission as clients meet it: headers, error bodies, sessions, and what a load far above a small budget does."""

import asyncio
from typing import Any

import pytest

import gptoss
from gptoss.app import ServingSystem
from gptoss.config import Settings
from gptoss.errors import QueueFull
from gptoss.messages import events as ev
from gptoss.simulation.watched import ReservationsWithinBudget
from gptoss.testing import FakeOptions, run_until_idle

MESSAGES = [{"role": "user", "content": "one two three"}]
CHAT = "/v1/chat/completions"


async def post(client: Any, *, session: str = "", **fields: Any) -> tuple[int, Any, dict[str, str]]:
    headers = {"X-Session-ID": session} if session else {}
    async with client.post(CHAT, json={"messages": MESSAGES, **fields}, headers=headers) as response:
        body = await response.json() if response.content_type == "application/json" else await response.text()
        return response.status, body, dict(response.headers)


def parts(header: str) -> tuple[str, dict[str, float]]:
    """The decision and the numbers of ``X-Admission``."""
    action, *rest = header.split("; ")
    return action, {name: float(value) for name, _, value in (each.partition("=") for each in rest)}


async def memory(client: Any) -> Any:
    async with client.get("/memory_stats") as response:
        return await response.json()


@pytest.mark.parametrize("stream", [False, True])
async def test_an_answer_says_how_it_was_let_in(client: Any, stream: bool) -> None:
    status, _, headers = await post(client, max_tokens=7, stream=stream)
    assert status == 200
    action, numbers = parts(headers["X-Admission"])
    assert action == "accept"
    assert numbers["max_tokens"] == 7
    assert numbers["slots"] == 8
    assert numbers["kv_bytes"] > 0
    assert set(numbers) == {"max_tokens", "kv_bytes", "pressure", "running", "slots", "queued", "waited_ms"}


@pytest.mark.parametrize("options", [FakeOptions(kv_budget_bytes=100)])
async def test_a_shrunk_answer_says_to_what(client: Any) -> None:
    status, body, headers = await post(client, max_tokens=200)
    assert status == 200
    action, numbers = parts(headers["X-Admission"])
    assert action == "shrink"
    assert body["usage"]["completion_tokens"] == numbers["max_tokens"] < 60
    assert body["choices"][0]["finish_reason"] == "length"


@pytest.mark.parametrize("options", [FakeOptions(kv_budget_bytes=20)])
async def test_a_refusal_has_its_reason_and_numbers_in_header_and_body(client: Any) -> None:
    status, body, headers = await post(client, max_tokens=200)
    assert status == 503
    error = body["error"]
    assert error["code"] == "memory_exhausted"
    assert (error["admission"]["action"], error["admission"]["slots"]) == ("reject", 8)
    assert error["admission"]["reason"] == error["message"]
    assert parts(headers["X-Admission"])[0] == "reject"
    assert int(headers["Retry-After"]) >= 1


@pytest.mark.parametrize("settings", [Settings(journal="memory", devices="cpu", max_queue=2)])
@pytest.mark.parametrize("options", [FakeOptions(step_s=0.02, max_batch_size=1)])
async def test_a_full_queue_answers_429_with_the_numbers(client: Any, system: ServingSystem) -> None:
    calls = [asyncio.create_task(post(client, max_tokens=20)) for _ in range(3)]
    while sum(isinstance(r.event, ev.Enqueued) for r in system.journal.read()) < 2:
        await asyncio.sleep(0.005)
    status, body, headers = await post(client, max_tokens=20)
    assert (status, body["error"]["code"]) == (429, "queue_full")
    assert body["error"]["admission"]["queued"] == 2
    assert int(headers["Retry-After"]) >= 1
    assert [status for status, _, _ in await asyncio.gather(*calls)] == [200] * 3


@pytest.mark.parametrize("options", [FakeOptions(step_s=0.001, prefix_cache_bytes=500_000)])
async def test_a_session_is_kept_between_turns_and_told_of(client: Any, system: ServingSystem) -> None:
    for _ in range(2):
        await post(client, session="chat-7", max_tokens=5, user="ann")
    await post(client, session="chat-7", max_tokens=9, user="bob")
    await run_until_idle(system.system)
    await system.caught_up()
    sessions = (await memory(client))["sessions"]
    assert sessions["active"] == 2, "one of each tenant"
    assert [each["tokens"] for each in sessions["newest"]] == [3 + 9, 3 + 5]
    assert sessions["kv_bytes"] == sum(each["kv_bytes"] for each in sessions["newest"]) == 2 * (12 + 8)
    async with client.get("/stats") as response:
        counts = (await response.json())["sessions"]
    assert (counts["active"], counts["in_use"], counts["kept_turns"]) == (2, 0, 3)
    routed = [r.event for r in system.journal.read() if isinstance(r.event, ev.SessionKept)]
    assert len({event.session_id for event in routed}) == 2
    assert all(event.session_id.startswith("chat-7@") for event in routed)


@pytest.mark.parametrize(
    "settings",
    [Settings(journal="memory", devices="cpu", session_idle_s=0.2)],
)
@pytest.mark.parametrize("options", [FakeOptions(step_s=0.001, prefix_cache_bytes=500_000)])
async def test_an_idle_session_is_given_up(client: Any, system: ServingSystem) -> None:
    await post(client, session="s", max_tokens=5)
    async with asyncio.timeout(10):
        while not any(isinstance(r.event, ev.SessionEvicted) for r in system.journal.read()):
            await asyncio.sleep(0.05)
    await system.caught_up()
    found = await memory(client)
    assert found["sessions"] == {"active": 0, "kv_bytes": 0, "newest": []}
    assert found["memory_pressure"] == 0.0


@pytest.mark.parametrize("settings", [Settings(journal="memory", devices="cpu", max_queue=512, queue_timeout_s=60.0)])
@pytest.mark.parametrize(
    "options", [FakeOptions(step_s=0.0005, kv_budget_bytes=400, max_batch_size=64, prefix_cache_bytes=200)]
)
@pytest.mark.timeout(120)
async def test_under_a_load_far_above_its_budget_nothing_runs_out_and_nobody_who_fits_is_refused(
    client: Any, system: ServingSystem
) -> None:
    books = ReservationsWithinBudget()
    for record in system.journal.read():  # the pool was set before
        books.see(record)
    system.journal.subscribe(books.see)
    calls = [
        post(client, max_tokens=10 + 5 * (n % 7), seed=n, user="abc"[n % 3], session=f"s{n % 5}" if n % 2 else "")
        for n in range(200)
    ]
    answers = await asyncio.gather(*calls)
    assert {status for status, _, _ in answers} == {200}
    actions = {parts(headers["X-Admission"])[0] for _, _, headers in answers}
    assert actions == {"accept", "shrink"}
    await run_until_idle(system.system)
    await system.caught_up()
    found = await memory(client)
    assert (found["reservations"], found["kv_reserved_bytes"]) == (0, 0)
    assert found["kv_in_use_bytes"] == 0
    assert books.grants == {}
    assert system.journal.health.reason == "", "no watcher has raised"
    pressures = [r.event.pressure for r in system.journal.read() if isinstance(r.event, ev.ReservationGranted)]
    assert 0.85 < max(pressures) <= 1.0
    evicted = {r.event.reason for r in system.journal.read() if isinstance(r.event, ev.SessionEvicted)}
    assert evicted & {"pressure", "memory"}


@pytest.mark.parametrize("settings", [Settings(journal="memory", devices="cpu", max_queue=512)])
@pytest.mark.parametrize("options", [FakeOptions(step_s=0.05, max_batch_size=256, kv_budget_bytes=10**9)])
@pytest.mark.timeout(120)
async def test_number_769_is_refused_at_once(system: ServingSystem) -> None:
    request = gptoss.GenerateRequest(prompt="one two", sampling=gptoss.SamplingParams(max_tokens=400, ignore_eos=True))
    running = [system.submit(request) for _ in range(768)]
    while sum(isinstance(r.event, ev.Enqueued) for r in system.journal.read(stream="admission")) < 512:
        await asyncio.sleep(0.05)
    begin = asyncio.get_running_loop().time()
    refused = system.submit(request)
    with pytest.raises(QueueFull):
        await refused.admitted()
    assert asyncio.get_running_loop().time() - begin < 1.0, "50 ms on a machine of its own"
    system.gateway.cancel_all("client")
    for generation in running:
        while generation.outcome is None:
            await asyncio.sleep(0.01)
