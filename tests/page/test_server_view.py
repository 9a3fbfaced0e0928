"""The operator's view, and the page while the server is not there."""

import asyncio
import re
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest
from playwright.async_api import expect

from gptoss.engine import port
from gptoss.http.server import serve
from gptoss.serving_context import make_app
from gptoss.testing import FakeDriver, FakeOptions

if TYPE_CHECKING:
    from page.conftest import Chromium, Open, Stage

pytestmark = pytest.mark.asyncio(loop_scope="session")


async def test_the_view_follows_the_server(stage: "Stage", chromium: "Chromium") -> None:
    page = await chromium.page(stage, "/#server")
    await expect(page.locator("#requests-empty")).to_have_text("No request yet. The first one will stand here.")
    await expect(page.locator("#executors tr")).to_have_count(1)
    await expect(page.locator("#executors .state")).to_have_text("ready")
    stage.talk.says = "word " * 60
    await asyncio.gather(*(stage.ask(f"night-{n}", max_tokens=50) for n in range(3)))
    await expect(page.locator("#requests tr")).to_have_count(3)
    row = page.locator("#requests tr", has_text="night-1")
    await expect(row).to_contain_text("completed: length")
    await expect(row).to_contain_text("accept")
    cards = page.locator(".card")
    await expect(cards).to_have_count(6)
    await expect(page.locator(".card", has_text="Admission")).to_contain_text("3 decisions")
    await expect(page.locator(".card", has_text="First token").locator(".now")).to_have_text(re.compile("ms|s"))
    await expect(page.locator(".card", has_text="Throughput").locator("path.level")).to_have_attribute(
        "d", re.compile("^M.*L")
    )


async def test_a_click_on_a_request_opens_its_waterfall_and_gives_its_bundle(
    stage: "Stage", chromium: "Chromium"
) -> None:
    stage.talk.says = "word " * 20
    await asyncio.gather(*(stage.ask(f"night-{n}") for n in range(3)))
    page = await chromium.page(stage, "/#server")
    await page.locator("#requests tr", has_text="night-2").click()
    dialog = page.get_by_role("dialog")
    await expect(dialog.locator(".headline")).to_contain_text("beside up to 2 others")
    assert await dialog.locator("svg.strip g").count() > 10
    async with page.expect_download() as download:
        await dialog.get_by_role("link", name="Download the bundle").click()
    assert (await download.value).suggested_filename == "gptoss-night-2.zip"
    await dialog.get_by_role("button", name="Close").click()
    await expect(dialog).to_be_hidden()
    await expect(page).to_have_url(re.compile(r"#server$"))  # the address follows once the window has closed


async def test_a_story_of_a_request_that_runs_goes_on(stage: "Stage", chromium: "Chromium") -> None:
    stage.talk.says = None
    running = asyncio.create_task(stage.ask("endless", max_tokens=3000))
    page = await chromium.page(stage, "/#server")
    await page.locator("#requests tr", has_text="endless").click()
    headline = page.locator("#story .headline")
    await expect(headline).to_contain_text("running")
    stage.serving.cancel("endless")
    await expect(headline).to_contain_text("cancelled")
    await running


async def test_requests_can_be_filtered(stage: "Stage", chromium: "Chromium") -> None:
    await stage.ask("fine")
    await stage.ask("wrong", model="nobody")
    page = await chromium.page(stage, "/#server")
    await expect(page.locator("#requests tr")).to_have_count(2)
    await page.get_by_text("Went wrong").click()
    await expect(page.locator("#requests tr")).to_have_count(1)
    await expect(page.locator("#requests tr")).to_contain_text("rejected: model_not_found")
    await page.locator("#filter").get_by_text("Running").click()
    await expect(page.locator("#requests-empty")).to_have_text("None of the newest requests.")


async def test_a_request_that_nobody_knows_is_told_so(stage: "Stage", chromium: "Chromium") -> None:
    stage.allowed = ["status of 404"]
    page = await chromium.page(stage, "/#server/nobody")
    await expect(page.locator("#story .trouble")).to_have_text("no request has the id 'nobody'")


async def test_a_hidden_tab_asks_nothing(stage: "Stage", chromium: "Chromium") -> None:
    page = await chromium.page(stage, "/#server")
    asked: list[str] = []
    page.on("request", lambda sent: asked.append(sent.url))
    await page.wait_for_timeout(1_500)
    assert any("/admin/live" in url for url in asked)
    await page.evaluate(
        """Object.defineProperty(document, "hidden", { get: () => window.isHidden });
        window.isHidden = true;
        document.dispatchEvent(new Event("visibilitychange", { bubbles: true }));"""
    )
    await page.wait_for_timeout(300)  # an answer may be on its way
    asked.clear()
    await page.wait_for_timeout(2_500)
    assert not asked
    await page.evaluate("isHidden = false; document.dispatchEvent(new Event('visibilitychange', { bubbles: true }))")
    await page.wait_for_timeout(500)
    assert asked


class SlowDriver(FakeDriver):
    """An engine that loads until ``done`` is set."""

    def __init__(self) -> None:
        super().__init__(FakeOptions())
        self.done = threading.Event()

    def start(self, load: port.Load, sink: Callable[[port.EngineEvent], None]) -> None:
        def wait() -> None:
            sink(port.LoadProgressed(stage="weights", done=45, total=100))
            self.done.wait(30)
            super(SlowDriver, self).start(load, sink)

        threading.Thread(target=wait, daemon=True).start()


async def test_while_the_model_loads_the_page_says_how_far_it_is(open_stage: "Open", chromium: "Chromium") -> None:
    driver = SlowDriver()
    stage = await open_stage(driver=driver)
    page = await chromium.page(stage)
    await expect(page.locator("#status")).to_have_text("loading 45%")
    await expect(page.locator("#loading")).to_contain_text("loading: weights")
    await page.get_by_label("Message").fill("Already written")
    await expect(page.get_by_role("button", name="Not ready")).to_be_disabled()
    driver.done.set()
    await expect(page.locator("#status")).to_have_text("ready")
    await expect(page.get_by_role("button", name="Send")).to_be_enabled()
    await expect(page.get_by_label("Message")).to_have_value("Already written")


async def test_a_server_that_is_gone_is_told_of_and_so_is_its_return(stage: "Stage", chromium: "Chromium") -> None:
    stage.allowed = ["ERR_CONNECTION_REFUSED", "ERR_EMPTY_RESPONSE", "ERR_CONNECTION_RESET"]
    page = await chromium.page(stage, "/#server")
    await expect(page.locator("#executors tr")).to_have_count(1)
    await stage.server.close()
    await expect(page.get_by_role("alert")).to_contain_text("The server cannot be reached.")
    await page.get_by_role("link", name="Chat").click()
    await expect(page.get_by_role("button", name="Not ready")).to_be_disabled()
    stage.server = await serve(make_app(stage.serving), "127.0.0.1", stage.server.port)
    await expect(page.locator("#status")).to_have_text("ready")
    await expect(page.locator("#banner")).to_be_hidden()


async def test_who_delayed_a_request_can_be_looked_at_next(open_stage: "Open", chromium: "Chromium") -> None:
    stage = await open_stage(options=FakeOptions(step_s=0.004, max_batch_size=1))
    stage.talk.says = "word " * 60
    first = asyncio.create_task(stage.ask("first"))
    while not stage.serving.projection.stats()["running"]:
        await asyncio.sleep(0.01)
    await stage.ask("second")
    await first
    page = await chromium.page(stage, "/#server/second")
    dialog = page.get_by_role("dialog")
    await expect(dialog).to_contain_text("waited in the queue for first")
    await dialog.get_by_role("link", name="first").click()
    await expect(dialog.locator("h2")).to_have_text("first")
    await expect(dialog).to_contain_text("Nothing that cost half a percent of its time.")
    await page.go_back()
    await expect(dialog.locator("h2")).to_have_text("second")
