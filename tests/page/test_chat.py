"""The chat as a person meets it."""

import asyncio
import re
from typing import TYPE_CHECKING, Any

import pytest
from playwright.async_api import Page, expect

from gptoss.testing import FakeOptions

if TYPE_CHECKING:
    from page.conftest import Chromium, Open, Stage

pytestmark = pytest.mark.asyncio(loop_scope="session")

ANSWER = "Here is **bold** text.\n\n```python\nprint('hi')\n```\n\n| a | b |\n|---|--:|\n| 1 | 2 |\n\nDone."


async def send(page: Page, text: str) -> None:
    await page.get_by_label("Message").fill(text)
    await page.keyboard.press("Enter")


async def ended(page: Page, count: int = 1) -> None:
    """So many answers are whole."""
    await expect(page.locator(".turn.assistant:not([aria-busy]) .facts .row")).to_have_count(count)


async def request_id(page: Page) -> str:
    """The id below the answer."""
    return await page.locator(".facts .id").inner_text()


async def test_an_answer_streams_as_markdown_with_what_it_took(stage: "Stage", chromium: "Chromium") -> None:
    stage.talk.says = ANSWER
    page = await chromium.page(stage)
    await send(page, "Show me")
    await expect(page.locator(".turn.assistant[aria-busy]")).to_be_visible()
    await ended(page)
    answer = page.locator(".turn.assistant .markdown")
    await expect(answer.locator("strong")).to_have_text("bold")
    await expect(answer.locator(".code figcaption span")).to_have_text("python")
    await expect(answer.locator("pre code")).to_have_text("print('hi')\n")
    await expect(answer.locator("td.right")).to_have_text("2")
    facts = page.locator(".facts")
    await expect(facts).to_contain_text(re.compile(r"\d+ tokens"))
    await expect(facts).to_contain_text("tokens/s")
    await expect(facts).to_contain_text("first after")
    await expect(facts).to_contain_text("0 of 2 prompt tokens cached")
    row = stage.serving.projection.request(await request_id(page))
    assert row is not None
    assert row["state"] == "completed"
    await expect(page.locator("#spoken")).to_contain_text("End of the answer.")


async def test_text_is_there_before_the_answer_is_whole(stage: "Stage", chromium: "Chromium") -> None:
    stage.talk.says = None
    page = await chromium.page(stage)
    await send(page, "Go on")
    await expect(page.locator(".turn.assistant[aria-busy] .markdown")).to_contain_text("on and on")
    await page.get_by_role("button", name="Stop").click()
    await ended(page)


@pytest.mark.parametrize("by_key", [False, True], ids=["button", "escape"])
async def test_stop_cancels_the_request_and_keeps_its_text(stage: "Stage", chromium: "Chromium", by_key: bool) -> None:
    stage.talk.says = None
    page = await chromium.page(stage)
    await send(page, "Go on")
    await expect(page.locator(".markdown")).to_contain_text("on and on")
    if by_key:
        await page.get_by_label("Message").press("Escape")
    else:
        await page.get_by_role("button", name="Stop").click()
    await ended(page)
    await expect(page.locator(".facts")).to_contain_text("stopped")
    await expect(page.locator(".markdown")).to_contain_text("on and on")
    (row,) = stage.serving.projection.recent_requests(10)
    assert (row["state"], row["outcome"]) == ("cancelled", "client")
    await expect(page.get_by_label("Message")).to_be_focused()


async def test_thoughts_stand_apart_and_fold(stage: "Stage", chromium: "Chromium") -> None:
    stage.talk.says = "<think> The user greets me. </think> Good morning."
    page = await chromium.page(stage)
    await send(page, "Hello")
    await ended(page)
    thought = page.locator("details.thought")
    await expect(page.locator(".markdown")).to_have_text("Good morning.")
    await expect(thought.locator(".thought-text")).to_be_hidden()
    await thought.locator("summary").click()
    await expect(thought.locator(".thought-text")).to_have_text("The user greets me.")
    await expect(thought.locator("summary")).to_have_text(re.compile("^Thought for"))
    await expect(page.locator(".facts")).to_contain_text("of them thoughts")


async def test_earlier_turns_and_settings_go_along(stage: "Stage", chromium: "Chromium") -> None:
    page = await chromium.page(stage)
    bodies: list[Any] = []
    page.on("request", lambda sent: bodies.append(sent.post_data_json) if sent.method == "POST" else None)
    await page.get_by_role("button", name="Settings").click()
    await page.get_by_label("System prompt").fill("Be brief.")
    await page.get_by_label("Temperature").fill("0")
    await page.get_by_label("Max tokens").fill("64")
    await page.get_by_label("Seed").fill("7")
    await page.get_by_role("button", name="Done").click()
    await expect(page.locator("#settings-said")).to_have_text(
        "system prompt · temperature 0 · at most 64 tokens · seed 7"
    )
    await send(page, "One")
    await ended(page)
    await send(page, "Two")
    await ended(page, 2)
    assert [message["content"] for message in bodies[1]["messages"]] == [
        "Be brief.",
        "One",
        "Hello from the engine.",
        "Two",
    ]
    assert {name: bodies[1][name] for name in ("temperature", "max_tokens", "seed")} == {
        "temperature": 0,
        "max_tokens": 64,
        "seed": 7,
    }
    await page.reload()
    await expect(page.locator(".turn")).to_have_count(4)
    await expect(page.locator("#settings-said")).to_contain_text("seed 7")
    await page.get_by_role("button", name="New chat").click()
    await expect(page.locator(".turn")).to_have_count(0)


async def test_the_last_answer_can_be_asked_for_again(stage: "Stage", chromium: "Chromium") -> None:
    page = await chromium.page(stage)
    await send(page, "One")
    await ended(page)
    stage.talk.says = "Another answer."
    await page.get_by_role("button", name="Try again").click()
    await expect(page.locator(".markdown")).to_have_text("Another answer.")
    await expect(page.locator(".turn.user")).to_have_count(1)


async def test_a_refusal_is_told_in_the_servers_words(stage: "Stage", chromium: "Chromium") -> None:
    stage.allowed = ["status of 400"]
    page = await chromium.page(stage)
    await page.get_by_role("button", name="Settings").click()
    await page.get_by_label("Max tokens").fill("100000")
    await page.get_by_role("button", name="Done").click()
    await send(page, "Hi")
    said = (await stage.ask(max_tokens=100_000))["error"]
    trouble = page.locator(".trouble")
    await expect(trouble).to_contain_text(said["message"])
    await expect(trouble).to_contain_text(f"400 · {said['code']}")


async def test_too_many_requests_tell_when_to_come_back_and_a_click_comes_back(
    open_stage: "Open", chromium: "Chromium"
) -> None:
    stage = await open_stage(options=FakeOptions(step_s=0.004, max_batch_size=1), max_queue=1)
    stage.allowed = ["status of 429"]
    stage.talk.says = None
    page = await chromium.page(stage)
    others = [asyncio.create_task(stage.ask(f"other-{n}", max_tokens=3000)) for n in range(2)]
    while stage.serving.projection.stats()["queued"] < 1:
        await asyncio.sleep(0.01)
    await send(page, "Me too")
    trouble = page.locator(".trouble")
    await expect(trouble).to_contain_text("429")
    await expect(trouble).to_contain_text(re.compile(r"The server asks to wait \d+ second"))
    for name in ("other-0", "other-1"):
        stage.serving.cancel(name)
    await asyncio.gather(*others)
    stage.talk.says = "Now you."
    await trouble.get_by_role("button", name="Try again").click()
    await expect(page.locator(".turn.assistant .markdown")).to_have_text("Now you.")
    await expect(page.locator(".turn.assistant")).to_have_count(1)


ATTACK = (
    "<img src=x onerror='window.pwned=1'> <script>window.pwned=1</script> <svg onload=window.pwned=1>"
    " [link](javascript:window.pwned=1) [data](data:text/html,<script>window.pwned=1</script>)"
    " ![picture](http://127.0.0.1:9/x.png) [page](/cancel/x) https://example.org/a\n\n"
    "```<b>\n</code></pre><img src=x onerror='window.pwned=1'>\n```\n"
)


async def test_markup_in_an_answer_and_a_question_stays_text(stage: "Stage", chromium: "Chromium") -> None:
    stage.talk.says = f"<think> {ATTACK} </think> {ATTACK}"
    page = await chromium.page(stage)
    asked: list[str] = []
    page.on("request", lambda sent: asked.append(sent.url))
    await send(page, ATTACK)
    await ended(page)
    answer = page.locator(".turn.assistant .markdown")
    await expect(answer).to_contain_text("<img src=x onerror='window.pwned=1'>")
    await expect(answer).to_contain_text("<script>window.pwned=1</script>")
    await expect(answer.locator("pre code")).to_have_text("</code></pre><img src=x onerror='window.pwned=1'>\n")
    await expect(page.locator(".bubble")).to_contain_text("<svg onload=window.pwned=1>")
    assert await page.locator("#turns img, #turns script, #turns svg, #turns iframe").count() == 0
    links = await answer.locator("a").evaluate_all("links => links.map((link) => link.href)")
    assert links == ["http://127.0.0.1:9/x.png", "https://example.org/a"]
    assert await page.evaluate("window.pwned") is None
    assert all(url.startswith(stage.server.url) for url in asked)


async def test_names_that_a_server_or_a_client_chose_stay_text(open_stage: "Open", chromium: "Chromium") -> None:
    name = "<img src=x onerror=window.pwned=1>"
    stage = await open_stage(served_model_name=name)
    await stage.ask("bad-model", model="<script>window.pwned=1</script>")
    page = await chromium.page(stage, "/#server/bad-model")
    await expect(page.locator("#story")).to_contain_text("<script>window.pwned=1</script>")
    await page.get_by_text("All its records").click()
    await expect(page.locator(".records")).to_contain_text("RequestRejected")
    await page.keyboard.press("Escape")
    await page.get_by_role("link", name="Chat").click()
    await expect(page.get_by_role("heading", level=1)).to_have_text(f"Ask {name}")
    assert await page.locator("img").count() == 0
    assert await page.evaluate("window.pwned") is None


async def test_an_answer_opens_what_happened_and_gives_its_bundle(stage: "Stage", chromium: "Chromium") -> None:
    page = await chromium.page(stage)
    await send(page, "One")
    await ended(page)
    name = await request_id(page)
    await page.get_by_role("button", name="What happened").click()
    dialog = page.get_by_role("dialog")
    await expect(dialog.locator("h2")).to_have_text(name)
    for phase in ("rendered", "prefill", "decode", "completed"):
        await expect(dialog.locator(".waterfall th", has_text=re.compile(f"^{phase}$"))).to_be_visible()
    await expect(dialog).to_contain_text("The steps it shared")
    async with page.expect_download() as download:
        await dialog.get_by_role("link", name="Download the bundle").click()
    found = await download.value
    assert found.suggested_filename == f"gptoss-{name}.zip"
    assert (await found.path()).read_bytes().startswith(b"PK")
    await page.go_back()
    await expect(dialog).to_be_hidden()


async def test_a_request_that_waits_in_the_queue_can_be_stopped(open_stage: "Open", chromium: "Chromium") -> None:
    stage = await open_stage(options=FakeOptions(step_s=0.004, max_batch_size=1))
    stage.talk.says = None
    page = await chromium.page(stage)
    other = asyncio.create_task(stage.ask("other", max_tokens=3000))
    while not stage.serving.projection.stats()["running"]:
        await asyncio.sleep(0.01)
    await send(page, "Me too")
    await expect(page.locator(".turn .wait")).to_have_text("Waiting for its turn")
    while not stage.serving.projection.stats()["queued"]:
        await asyncio.sleep(0.01)
    await page.get_by_role("button", name="Stop").click()
    await ended(page)
    await expect(page.locator(".facts")).to_contain_text("stopped")
    await expect(page.locator(".trouble")).to_be_hidden()
    stage.serving.cancel("other")
    await other
    (mine,) = [row for row in stage.serving.projection.recent_requests() if row["request_id"] != "other"]
    assert (mine["state"], mine["outcome"]) == ("cancelled", "client")


async def test_an_engine_that_fails_half_way_is_told_with_what_it_said(
    open_stage: "Open", chromium: "Chromium"
) -> None:
    stage = await open_stage(options=FakeOptions(step_s=0.01), request_timeout_s=1.0)
    stage.talk.says = None
    page = await chromium.page(stage)
    await send(page, "Go on")
    await ended(page)
    await expect(page.locator(".markdown")).to_contain_text("on and on")
    await expect(page.locator(".trouble")).not_to_be_empty()
    await expect(page.locator("#spoken")).to_contain_text("Not answered")


async def test_a_connection_that_breaks_is_told_and_the_answer_can_be_asked_for_again(
    open_stage: "Open", chromium: "Chromium"
) -> None:
    stage = await open_stage()
    stage.allowed = ["ERR_"]
    stage.talk.says = None
    page = await chromium.page(stage)
    await send(page, "Go on")
    await expect(page.locator(".markdown")).to_contain_text("on and on")
    await page.context.set_offline(True)
    await page.evaluate("dispatchEvent(new Event('online'))")
    await expect(page.get_by_role("alert")).to_contain_text("cannot be reached")
    await page.get_by_role("button", name="Stop").click()
    await ended(page)
    await page.context.set_offline(False)
    stage.talk.says = "Back again."
    await expect(page.locator("#status")).to_have_text("ready")
    await page.locator(".facts").get_by_role("button", name="Try again").click()
    await expect(page.locator(".markdown")).to_have_text("Back again.")
