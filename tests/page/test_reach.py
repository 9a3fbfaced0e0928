"""The page for everybody: by keyboard alone, in the dark, on a narrow screen, without JavaScript, under a prefix."""

import asyncio
from typing import TYPE_CHECKING, Any

import pytest
from aiohttp import web
from playwright.async_api import Page, expect

from gptoss.http.server import serve
from gptoss.serving_context import make_app

if TYPE_CHECKING:
    from page.conftest import Chromium, Stage

pytestmark = pytest.mark.asyncio(loop_scope="session")

CONTRAST_MIN = 4.5
_LOW_CONTRAST = """(least) => {
  const canvas = new OffscreenCanvas(1, 1).getContext("2d", { willReadFrequently: true });
  const rgba = (color) => {
    canvas.clearRect(0, 0, 1, 1);
    canvas.fillStyle = color;
    canvas.fillRect(0, 0, 1, 1);
    const [r, g, b, a] = canvas.getImageData(0, 0, 1, 1).data;
    return [r, g, b, a / 255];
  };
  const over = ([r, g, b, a], [R, G, B]) => [r * a + R * (1 - a), g * a + G * (1 - a), b * a + B * (1 - a), 1];
  const light = (color) => {
    const [r, g, b] = color.map((part) => (part / 255 <= 0.03928 ? part / 255 / 12.92 : ((part / 255 + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const ground = (node) => {
    const below = node.parentElement ? ground(node.parentElement) : [255, 255, 255, 1];
    return over(rgba(getComputedStyle(node).backgroundColor), below);
  };
  const found = [];
  const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walk.nextNode()) {
    const node = walk.currentNode.parentElement;
    const isShown = node.checkVisibility({ opacityProperty: true, visibilityProperty: true });
    if (!walk.currentNode.data.trim() || !isShown || node.closest("[disabled], .sr, .skip, option")) continue;
    const behind = ground(node);
    const [one, two] = [light(over(rgba(getComputedStyle(node).color), behind)), light(behind)].sort((a, b) => b - a);
    const contrast = (one + 0.05) / (two + 0.05);
    if (contrast < least) found.push(`${contrast.toFixed(2)} ${node.className} ${walk.currentNode.data.trim().slice(0, 40)}`);
  }
  return found;
}"""


async def picture(page: Page, pictures: Any, name: str) -> None:
    if pictures is not None:
        await page.screenshot(path=pictures / f"{name}.png")


async def busy(stage: "Stage") -> None:
    """A server that has something to show."""
    stage.talk.says = (
        "<think> Words, as they come. </think> Here are **some** words.\n\n```sh\nls -l\n```\n\n" + "word " * 30
    )
    await asyncio.gather(*(stage.ask(f"night-{n}", max_tokens=40) for n in range(8)))
    await stage.ask("wrong", model="nobody")


async def answered(page: Page) -> None:
    await page.get_by_label("Message").fill("Tell me")
    await page.keyboard.press("Enter")
    await expect(page.locator(".turn.assistant:not([aria-busy]) .facts .row")).to_be_visible()


async def focus_of(page: Page) -> dict[str, Any]:
    """What has the focus, and whether that can be seen."""
    return await page.evaluate(
        """() => {
          const node = document.activeElement;
          const shown = node.matches(".choice input") ? node.nextElementSibling : node.closest(".composer:focus-within") ?? node;
          const { outlineStyle, boxShadow } = getComputedStyle(node.matches("textarea") ? shown : node.matches(".choice input") ? shown : node);
          const box = node.getBoundingClientRect();
          return { name: (node.getAttribute("aria-label") ?? node.textContent ?? "").trim().slice(0, 40), id: node.id,
            tag: node.tagName, isVisible: outlineStyle !== "none" || boxShadow !== "none", top: box.top, left: box.left };
        }"""
    )


async def test_everything_can_be_done_by_keyboard_and_the_focus_is_seen(stage: "Stage", chromium: "Chromium") -> None:
    page = await chromium.page(stage)
    order: list[str] = []
    for _ in range(10):
        await page.keyboard.press("Tab")
        focus = await focus_of(page)
        assert focus["isVisible"], focus
        order.append(focus["id"] or focus["name"])
    assert order[:8] == ["To the content", "Chat", "Server", "API", "log", *order[5:8]]
    assert all(name.startswith(("Explain", "Write", "A table")) for name in order[5:8])
    assert order[8:10] == ["prompt", "open-settings"]
    await page.get_by_label("Message").focus()
    await page.keyboard.type("Hello")
    await page.keyboard.press("Shift+Enter")
    await page.keyboard.type("again")
    await page.keyboard.press("Enter")
    await expect(page.locator(".bubble")).to_have_text("Hello\nagain")
    await expect(page.locator(".turn.assistant:not([aria-busy]) .facts .row")).to_be_visible()
    await page.keyboard.press("Shift+Tab")  # to the request's buttons, from the box
    while (await focus_of(page))["name"] != "What happened":
        await page.keyboard.press("Shift+Tab")
    await page.keyboard.press("Enter")
    dialog = page.get_by_role("dialog")
    await expect(dialog.locator("h2")).to_be_focused()
    await page.keyboard.press("Tab")
    await page.keyboard.press("Escape")
    await expect(dialog).to_be_hidden()
    assert (await focus_of(page))["name"] == "What happened"


async def test_the_server_view_can_be_walked_by_keyboard(stage: "Stage", chromium: "Chromium") -> None:
    await busy(stage)
    page = await chromium.page(stage, "/#server")
    await expect(page.locator("#requests tr")).to_have_count(9)
    await page.locator(".plot").first.focus()
    await page.keyboard.press("ArrowLeft")
    await expect(page.locator(".readout").first).to_contain_text("generated")
    names: list[str] = []
    for _ in range(12):
        await page.keyboard.press("Tab")
        focus = await focus_of(page)
        assert focus["isVisible"], focus
        names.append(focus["name"] or focus["tag"])
    assert "wrong" in names
    await page.locator("#requests a", has_text="night-3").focus()
    await page.wait_for_timeout(1_500)  # the list was filled again meanwhile
    await page.keyboard.press("Enter")
    await expect(page.get_by_role("dialog")).to_contain_text("night-3")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", [(1280, 800), (360, 740)], ids=["wide", "phone"])
async def test_all_text_can_be_read(
    stage: "Stage", chromium: "Chromium", pictures: Any, scheme: str, size: Any
) -> None:
    await busy(stage)
    width, height = size
    page = await chromium.page(stage, color_scheme=scheme, viewport={"width": width, "height": height})
    seen: list[str] = []

    async def look(name: str) -> None:
        await picture(page, pictures, f"{name}-{scheme}-{width}")
        seen.extend(f"{name}: {one}" for one in await page.evaluate(_LOW_CONTRAST, CONTRAST_MIN))
        overflow = await page.evaluate("document.documentElement.scrollWidth - innerWidth")
        assert overflow <= 0, f"{name} is wider than the screen"

    await look("empty")
    await answered(page)
    await page.locator("details.thought summary").click()
    await look("chat")
    await page.get_by_role("button", name="Settings").click()
    await look("settings")
    await page.keyboard.press("Escape")
    await page.get_by_role("link", name="Server").click()
    await expect(page.locator("#requests tr")).to_have_count(10)
    await page.wait_for_timeout(1_200)
    await look("server")
    await page.locator("#requests a", has_text="night-3").click()
    await expect(page.locator("#story .headline")).to_be_visible()
    await look("story")
    await page.keyboard.press("Escape")
    await page.get_by_role("link", name="API").click()
    await look("api")
    background = await page.evaluate("getComputedStyle(document.body).backgroundColor")
    is_dark = sum(map(int, background.removeprefix("rgb(").removesuffix(")").split(", "))) < 3 * 64
    assert is_dark == (scheme == "dark")
    assert not seen, "\n".join(seen)


async def test_who_wants_no_motion_gets_none(stage: "Stage", chromium: "Chromium") -> None:
    page = await chromium.page(stage, reduced_motion="reduce")
    await answered(page)
    assert await page.evaluate("document.getAnimations().length") == 0


async def test_without_javascript_the_page_says_how_to_call_the_server(stage: "Stage", chromium: "Chromium") -> None:
    page = await chromium.page(stage, java_script_enabled=False)
    await expect(page.get_by_role("heading", name="Use the API")).to_be_visible()
    await expect(page.locator("pre").first).to_contain_text(f"curl {stage.server.url}/v1/chat/completions")
    await expect(page.get_by_label("Message")).to_be_hidden()
    await expect(page.get_by_role("link", name="Server")).to_be_hidden()
    await expect(page.locator("#status")).to_have_text("ready")


async def test_the_page_works_under_an_embedders_prefix(stage: "Stage", chromium: "Chromium") -> None:
    parent = web.Application()
    parent.add_subapp("/some/llm", make_app(stage.serving))
    inner, stage.server = stage.server, await serve(parent, "127.0.0.1", 0)
    page = await chromium.page(stage, "/some/llm/")
    await answered(page)
    await page.get_by_role("button", name="What happened").click()
    await expect(page.get_by_role("dialog")).to_contain_text("decode")
    async with page.expect_download() as download:
        await page.get_by_role("link", name="Download the bundle").click()
    assert (await download.value).suggested_filename.endswith(".zip")
    await page.keyboard.press("Escape")
    await page.get_by_role("link", name="Server").click()
    await expect(page.locator("#requests tr")).to_have_count(1)
    await inner.close()
