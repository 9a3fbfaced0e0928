"""The OpenAPI document: valid, complete, and what the server really does."""

import asyncio
import html.parser
import re
from typing import Any

import hypothesis
import msgspec
import pytest
import schemathesis
from hypothesis import HealthCheck
from hypothesis.errors import Unsatisfiable
from hypothesis.strategies import SearchStrategy
from openapi_spec_validator import OpenAPIV31SpecValidator, validate
from schemathesis import GenerationMode
from schemathesis import checks as base_checks
from schemathesis.core.failures import FailureGroup
from schemathesis.specs.openapi import checks as openapi_checks

from gptoss.http.openapi import OPERATIONS, document
from gptoss.http.routes import make_app

_base: Any = base_checks
_openapi: Any = openapi_checks
CHECKS: list[Any] = [
    _base.not_a_server_error,
    _openapi.status_code_conformance,
    _openapi.content_type_conformance,
    _openapi.response_schema_conformance,
]
EXAMPLES = 8
SLOW = [HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large]
NAMES = [f"{op.method} {op.path}" for op in OPERATIONS]


def test_the_document_is_valid_openapi_3_1() -> None:
    validate(document(), cls=OpenAPIV31SpecValidator)


def test_every_route_is_in_the_document_and_nothing_else(context: Any) -> None:
    app = make_app(context)
    served = {
        (route.method.lower(), re.sub(r":[^}]*", "", resource.canonical))
        for resource in app.router.resources()
        for route in resource
        if route.method != "HEAD"
    }
    assert served == {(op.method, op.path) for op in OPERATIONS}


def test_bounds_that_the_decoder_checks_stand_in_the_schema() -> None:
    schemas = document()["components"]["schemas"]
    assert schemas["ChatCompletionRequest"]["properties"]["metadata"]["anyOf"][0]["maxProperties"] == 16
    assert schemas["ChatCompletionRequest"]["required"] == ["messages"]
    assert schemas["ErrorDetails"]["properties"]["type"]["enum"]


def test_every_endpoint_that_generates_takes_a_salt_and_says_what_it_parts() -> None:
    schemas = document()["components"]["schemas"]
    for name in ("ChatCompletionRequest", "CompletionRequest", "ResponsesRequest"):
        salt = schemas[name]["properties"]["cache_salt"]["anyOf"][0]
        assert (salt["type"], salt["minLength"], salt["maxLength"]) == ("string", 1, 256)
        assert "user" in salt["description"]


async def test_the_document_is_served(house: Any) -> None:
    async with house.session.get("/openapi.json") as response:
        assert response.content_type == "application/json"
        assert await response.json() == document()


class _Links(html.parser.HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.ids: set[str] = set()
        self.targets: set[str] = set()
        self.loaded: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.ids.add(values.get("id") or "")
        if tag == "a" and (values.get("href") or "").startswith("#"):
            self.targets.add((values["href"] or "")[1:])
        if tag in {"script", "link", "img", "iframe"}:
            self.loaded.append(values.get("href") or values.get("src") or "")


async def test_the_page_shows_every_operation_and_loads_only_its_style(house: Any) -> None:
    async with house.session.get("/docs") as response:
        assert "default-src 'none'" in response.headers["Content-Security-Policy"]
        page = await response.text()
    assert all(op.path in page and op.summary.replace("'", "&#x27;") in page for op in OPERATIONS)
    links = _Links()
    links.feed(page)
    assert links.loaded == ["assets/icon.svg", "assets/base.css"]
    assert links.targets
    assert links.targets <= links.ids, "every type that is named can be read about"


@pytest.mark.timeout(120)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("mode", list(GenerationMode), ids=str)
async def test_schemathesis_finds_no_answer_that_the_document_does_not_tell(
    house: Any, name: str, mode: GenerationMode
) -> None:
    method, path = name.split(" ")
    try:
        await asyncio.to_thread(_ask, document(), path, method, mode, house.url)
    except Unsatisfiable:
        assert mode is GenerationMode.NEGATIVE, "an operation without inputs has no bad ones"
    await house.canary()


async def test_schemathesis_would_find_one(house: Any) -> None:
    lying = msgspec.json.decode(msgspec.json.encode(document()))
    del lying["paths"]["/v1/chat/completions"]["post"]["responses"]["400"]
    with pytest.raises(FailureGroup):
        await asyncio.to_thread(_ask, lying, "/v1/chat/completions", "post", GenerationMode.NEGATIVE, house.url)


def _ask(openapi: dict[str, Any], path: str, method: str, mode: GenerationMode, url: str) -> None:
    """Call an operation with examples of its schema, and check every answer against it."""
    schema: Any = schemathesis.openapi.from_dict(openapi)
    strategy: SearchStrategy[Any] = schema[path][method.upper()].as_strategy(generation_mode=mode)

    @hypothesis.settings(max_examples=EXAMPLES, deadline=None, database=None, suppress_health_check=SLOW)
    @hypothesis.given(strategy)
    def call(case: Any) -> None:
        case.call_and_validate(base_url=url, checks=CHECKS, timeout=10)

    call()
