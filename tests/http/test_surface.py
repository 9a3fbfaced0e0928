"""The reading endpoints, the page, and who may call."""

import hashlib
import re
from collections.abc import Callable
from typing import Any

import pytest
from aiohttp import ClientSession, web
from yarl import URL

from gptoss.config import Settings
from gptoss.http.assets import assets
from gptoss.http.guard import default_hosts
from gptoss.http.routes import make_app
from gptoss.http.server import serve
from gptoss.telemetry.bundle_slice import Selection


async def get(house: Any, path: str, **headers: str) -> tuple[int, Any]:
    async with house.session.get(path, headers=headers) as response:
        assert response.headers["X-Request-ID"]
        assert response.headers["X-Content-Type-Options"] == "nosniff"
        return response.status, await response.json()


async def test_reading_endpoints_answer_with_the_contexts_values(house: Any) -> None:
    assert await get(house, "/health") == (200, {"status": "healthy"})
    assert await get(house, "/health/live") == (200, {"status": "alive"})
    assert await get(house, "/health/ready") == (200, {"ready": True, "reason": "ready"})
    assert await get(house, "/stats") == (200, {"gpu_routing": {}})
    assert await get(house, "/memory_stats") == (200, {"memory_pressure": 0.0})
    assert await get(house, "/admin/debug/bundle?format=json") == (200, {"stats": {}, "raw": "AP8="})
    assert await get(house, "/admin/requests") == (200, {"object": "list", "data": [{"request_id": "known"}]})


async def test_not_ready_is_503_with_the_reason(open_house: Callable[..., Any]) -> None:
    house = await open_house(readiness=lambda: (False, "no executor is ready"))
    assert await get(house, "/health/ready") == (503, {"ready": False, "reason": "no executor is ready"})
    assert (await get(house, "/health/live"))[0] == 200


async def test_metrics_pass_accept_in_and_the_content_type_out(house: Any) -> None:
    async with house.session.get("/metrics", headers={"Accept": "application/openmetrics-text"}) as response:
        assert response.headers["Content-Type"] == "text/plain; version=0.0.4; charset=utf-8"
        assert await response.text() == "# accept application/openmetrics-text\n"


async def test_models_are_known_by_their_served_name_only(house: Any) -> None:
    _, listed = await get(house, "/v1/models")
    _, shown = await get(house, "/v1/models/demo")
    assert listed == {"object": "list", "data": [shown]}
    assert (shown["id"], shown["object"], shown["owned_by"]) == ("demo", "model", "gptoss")
    status, answer = await get(house, "/v1/models/other")
    assert (status, answer["error"]["code"]) == (404, "model_not_found")


async def test_a_served_name_may_hold_a_slash(house: Any) -> None:
    house.gateway.served_model = "openai/gpt-oss-20b"
    assert (await get(house, "/v1/models/openai/gpt-oss-20b"))[1]["id"] == "openai/gpt-oss-20b"


async def test_events_of_a_request_or_404(house: Any) -> None:
    status, answer = await get(house, "/admin/requests/known/events")
    assert (status, answer["events"][0]["type"]) == (200, "RequestReceived")
    assert (await get(house, "/admin/requests/chatcmpl-known/events"))[1]["request_id"] == "known"
    status, answer = await get(house, "/admin/requests/unknown/events")
    assert (status, answer["error"]["code"]) == (404, "request_not_found")


async def test_the_timeline_of_a_request_or_404(house: Any) -> None:
    assert await get(house, "/admin/requests/known/timeline") == (200, {"timeline": {"request_id": "known"}})
    status, answer = await get(house, "/admin/requests/unknown/timeline")
    assert (status, answer["error"]["code"]) == (404, "request_not_found")


async def test_events_are_asked_for_by_position_type_and_stream(house: Any) -> None:
    nothing: dict[str, Any] = {"after": None, "limit": 100, "wait_s": 0, "types": [], "stream": ""}
    assert await get(house, "/admin/events") == (200, {"ask": nothing})
    path = "/admin/events?after=-1&limit=7&wait=2&type=Preempted&type=Enqueued&stream=admission"
    _, answer = await get(house, path)
    asked = {**answer["ask"], "types": sorted(answer["ask"]["types"])}
    assert asked == {"after": -1, "limit": 7, "wait_s": 2, "types": ["Enqueued", "Preempted"], "stream": "admission"}


@pytest.mark.parametrize(
    ("query", "param"),
    [("after=-2", "after"), ("after=x", "after"), ("wait=31", "wait"), ("limit=0", "limit"), ("type=Nothing", "type")],
)
async def test_a_bad_ask_for_events_is_refused(house: Any, query: str, param: str) -> None:
    status, answer = await get(house, f"/admin/events?{query}")
    assert (status, answer["error"]["param"]) == (400, param)


@pytest.mark.parametrize("limit", ["0", "-1", "1001", "x", "\u0661", ""])
async def test_a_bad_limit_is_refused(house: Any, limit: str) -> None:
    status, answer = await get(house, f"/admin/requests?limit={limit}")
    assert (status, answer["error"]["param"]) == (400, "limit")


async def test_a_live_view_asks_for_the_seconds_since_the_last(house: Any) -> None:
    assert await get(house, "/admin/live") == (200, {"after": 0, "limit": 40})
    assert await get(house, "/admin/live?after=17&limit=0") == (200, {"after": 17, "limit": 0})


@pytest.mark.parametrize(("query", "param"), [("after=-1", "after"), ("after=x", "after"), ("limit=1001", "limit")])
async def test_a_bad_ask_for_a_live_view_is_refused(house: Any, query: str, param: str) -> None:
    status, answer = await get(house, f"/admin/live?{query}")
    assert (status, answer["error"]["param"]) == (400, param)


async def test_the_page_names_model_port_and_links_and_permits_only_its_own_files(
    open_house: Callable[..., Any],
) -> None:
    house = await open_house(readiness=lambda: (False, "loading <weights>"))
    house.gateway.served_model = "<demo>"
    async with house.session.get("/") as response:
        policy = dict(part.strip().split(" ", 1) for part in response.headers["Content-Security-Policy"].split(";"))
        html = await response.text()
    assert policy == {
        "default-src": "'none'",
        "script-src": "'self'",
        "style-src": "'self'",
        "img-src": "'self'",
        "connect-src": "'self'",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
        "require-trusted-types-for": "'script'",
        "trusted-types": "'none'",
    }
    assert not re.search(r"<style|<script>|style=|\son\w+=|https?://(?!127)", html)
    assert "&lt;demo&gt;" in html
    assert "<demo>" not in html
    assert "not ready: loading &lt;weights&gt;" in html
    assert f"curl http://127.0.0.1:{house.port}/v1/chat/completions" in html
    assert f"http://127.0.0.1:{house.port}/v1&#34;, api_key" in html
    for link in re.findall(r'(?:href|src)="([^"#]+)"', html):
        async with house.session.get(f"/{link}") as response:
            assert response.status in {200, 503}, link


async def test_files_of_the_page_are_sent_once(house: Any) -> None:
    async with house.session.get("/assets/page.js") as response:
        assert response.headers["Content-Type"] == "text/javascript; charset=utf-8"
        etag = response.headers["ETag"]
        assert etag == f'"{hashlib.sha256(await response.read()).hexdigest()}"'
    for known, status in ((etag, 304), (f'"other", {etag}', 304), ("*", 304), ('"other"', 200)):
        async with house.session.get("/assets/page.js", headers={"If-None-Match": known}) as response:
            assert (response.status, response.headers["ETag"]) == (status, etag)
            assert bool(await response.read()) == (status == 200)


@pytest.mark.parametrize(
    "name", ["nothing.js", "", "../page.py", "..%2fpage.py", "vendor", "vendor/", "%2e%2e/page.py"]
)
async def test_nothing_but_files_of_the_page_is_sent(house: Any, name: str) -> None:
    async with house.session.get(URL(f"{house.url}/assets/{name}", encoded=True)) as response:
        assert response.status == 404
        assert (await response.json())["error"]["code"] == "not_found"


async def test_modules_import_only_files_that_are_there(house: Any) -> None:
    named = {"page.js"}
    for name, asset in assets().items():
        if name.endswith(".js"):
            named |= set(re.findall(r'^import .* from "\./([^"]+)";$', asset.body.decode(), re.MULTILINE))
    scripts = {name for name in assets() if name.endswith(("js", "mjs"))}
    assert named == scripts


async def test_the_app_can_be_mounted_under_a_prefix(house: Any) -> None:
    parent = web.Application()
    parent.add_subapp("/llm", make_app(house.context))
    server = await serve(parent, "127.0.0.1", 0)
    async with ClientSession(server.url) as session:
        async with session.get("/llm/") as response:
            assert f"curl {server.url}/llm/v1/chat/completions" in await response.text()
        async with session.get("/llm/v1/models") as response:
            assert response.status == 200
        async with session.get("/llm/nothing") as response:
            assert (await response.json())["error"]["code"] == "not_found"
        body = {"messages": [{"role": "user", "content": "x"}]}
        async with session.post("/llm/v1/chat/completions", json=body) as response:
            assert (await response.json())["choices"][0]["message"]["content"] == "Hello world"
    await server.close()


@pytest.mark.parametrize(
    "host", ["evil.example", "127.0.0.1.evil.example:80", "localhost@evil.example", "[::2]", "a:b:c"]
)
async def test_a_foreign_host_is_421(house: Any, host: str) -> None:
    status, answer = await get(house, "/v1/models", Host=host)
    assert (status, answer["error"]["code"]) == (421, "host_not_allowed")


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:8000", "127.0.0.1:1", "[::1]:9"])
async def test_names_of_this_machine_are_served(house: Any, host: str) -> None:
    assert (await get(house, "/v1/models", Host=host))[0] == 200


def test_a_public_bind_serves_any_host() -> None:
    assert default_hosts(Settings(host="0.0.0.0")) == frozenset()
    assert default_hosts(Settings(host="127.0.0.2")) >= {"127.0.0.2", "localhost"}


async def test_pages_of_other_sites_may_not_cancel(house: Any) -> None:
    for origin, status in (("http://evil.example", 403), ("null", 403), (house.url, 404)):
        async with house.session.post("/cancel/x", headers={"Origin": origin}) as response:
            assert response.status == status
            assert "Access-Control-Allow-Origin" not in response.headers


async def test_a_caller_names_even_the_reading_of_a_page(house: Any) -> None:
    async with house.session.get("/health", headers={"X-Request-ID": "probe-7"}) as response:
        assert response.headers["X-Request-ID"] == "probe-7"


async def test_a_bundle_is_a_download_with_a_name(house: Any) -> None:
    async with house.session.get("/admin/debug/bundle?window=2m&content=hash&errors=true&limit_mb=9") as response:
        assert response.status == 200
        assert response.headers["Content-Type"] == "application/zip"
        assert response.headers["Content-Disposition"] == 'attachment; filename="all.zip"'
        assert response.headers["Content-Length"] == "700000"
        assert await response.read() == b"bundle!" * 100_000
    (order,) = house.orders
    assert order.selection == Selection(window_s=120.0, errors=True)
    assert (order.content, order.limit_bytes) == ("hash", 9 << 20)


async def test_a_bundle_of_one_request_is_found_by_the_id_of_its_completion(house: Any) -> None:
    async with house.session.get("/admin/debug/bundle/chatcmpl-known") as response:
        assert response.status == 200
        await response.read()
    assert [order.selection.request_ids for order in house.orders] == [("chatcmpl-known",), ("known",)]
    status, answer = await get(house, "/admin/debug/bundle/other")
    assert (status, answer["error"]["code"], answer["error"]["param"]) == (404, "request_not_found", "request_id")


@pytest.mark.parametrize(
    ("query", "param"),
    [
        ("format=xml", "format"),
        ("content=all", "content"),
        ("window=soon", "window"),
        ("window=0s", "window"),
        ("window=2026-13-01..", "window"),
        ("last=0", "last"),
        ("last=many", "last"),
        ("errors=perhaps", "errors"),
        ("slow=-1", "slow"),
        ("limit_mb=99999", "limit_mb"),
        ("limits=1", "limits"),
    ],
)
async def test_a_bad_query_for_a_bundle_is_named(house: Any, query: str, param: str) -> None:
    status, answer = await get(house, f"/admin/debug/bundle?{query}")
    assert (status, answer["error"]["param"]) == (400, param)
    assert house.orders == []
