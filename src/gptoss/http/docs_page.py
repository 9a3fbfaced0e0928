"""``GET /docs``: the OpenAPI document as a page for people.

It has no script and loads nothing but the style that all pages share.
"""

import functools
from html import escape
from typing import Any

from aiohttp import web

from gptoss.http.openapi import document
from gptoss.http.page import page_response

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>gptoss: API</title>
<link rel="icon" href="assets/icon.svg" type="image/svg+xml">
<link rel="stylesheet" href="assets/base.css">
</head>
<body>
<main class="sheet">
<h1>API</h1>
<p>Made from <a href="openapi.json">openapi.json</a>. <a href="./#api">Back to the front page</a>.</p>
{sections}
</main>
</body>
</html>
"""


async def docs(_: web.Request) -> web.StreamResponse:
    """The page."""
    return page_response(_html())


@functools.cache
def _html() -> str:
    whole = document()
    sections: list[str] = []
    for tag in whole["tags"]:
        sections.append(f"<h2>{escape(tag['name'])}</h2>")
        for path, operations in whole["paths"].items():
            sections += [
                _operation(path, method, operation)
                for method, operation in operations.items()
                if tag["name"] in operation["tags"]
            ]
    sections.append("<h2>Types</h2>")
    sections += [_type(name, schema) for name, schema in sorted(whole["components"]["schemas"].items())]
    return _PAGE.format(sections="\n".join(sections))


def _operation(path: str, method: str, operation: dict[str, Any]) -> str:
    rows = [
        (parameter["name"], f"{_kind(parameter['schema'])}, in {parameter['in']}")
        for parameter in operation["parameters"]
    ]
    if "requestBody" in operation:
        rows.append(("body", _kind(next(iter(operation["requestBody"]["content"].values()))["schema"])))
    for status, response in operation["responses"].items():
        kinds = " or ".join(f"{_kind(media['schema'])}" for media in response["content"].values())
        rows.append((status, f"{escape(response['description'])}: {kinds}"))
    head = f'<code><span class="method">{method.upper()}</span>{escape(path)}</code> {escape(operation["summary"])}'
    return f"<details><summary>{head}</summary>{_table(rows)}</details>"


def _type(name: str, schema: dict[str, Any]) -> str:
    required = set(schema.get("required", ()))
    rows = [
        (field if field in required else f"{field}?", _kind(inner))
        for field, inner in schema.get("properties", {}).items()
    ]
    about = escape(schema.get("description", "").partition("\n")[0])
    return (
        f'<details id="{escape(name)}"><summary><code>{escape(name)}</code> {about}</summary>{_table(rows)}</details>'
    )


def _table(rows: list[tuple[str, str]]) -> str:
    cells = "".join(f"<tr><th scope=row><code>{escape(name)}</code></th><td>{kind}</td></tr>" for name, kind in rows)
    return f"<table>{cells}</table>"


def _kind(schema: dict[str, Any]) -> str:
    """A schema in a few words of HTML."""
    if "$ref" in schema:
        name = escape(schema["$ref"].rpartition("/")[2])
        return f'<a href="#{name}">{name}</a>'
    for union in ("anyOf", "oneOf"):
        if union in schema:
            return " or ".join(map(_kind, schema[union]))
    if "enum" in schema:
        return " or ".join(f"<code>{escape(repr(value))}</code>" for value in schema["enum"])
    kind = schema.get("type", "anything")
    if kind == "array":
        return f"list of {_kind(schema.get('items', {}))}"
    bounds = [
        f"{words} {schema[key]}"
        for key, words in (("minimum", "at least"), ("maximum", "at most"), ("maxLength", "length at most"))
        if key in schema
    ]
    return escape(", ".join([kind, *bounds]))
