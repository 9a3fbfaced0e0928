"""The OpenAPI 3.1 document, made from the wire types themselves, at ``/openapi.json``.

``OPERATIONS`` names every route once; a test holds it against the routes that exist. The schemas say what JSON types and
bounds the decoder checks. What values mean beyond that is in ``docs/api.md``.
"""

import functools
import importlib.metadata
import re
from typing import Any, Literal

import msgspec
from aiohttp import web

from gptoss.http.answer_schema import ChatCompletion, TextCompletion
from gptoss.http.batches import BatchBody, BatchList, BatchRequest
from gptoss.http.completions import CompletionRequest
from gptoss.http.errors import json_response
from gptoss.http.files import FileBody, FileDeleted, FileList
from gptoss.http.headers import ADMISSION_HEADER
from gptoss.http.models import ModelBody, ModelList
from gptoss.http.operations import SettingsChange
from gptoss.http.response_schema import ItemList, ResponseBody, ResponseDeleted, ResponsesRequest
from gptoss.http.schema import ChatCompletionRequest
from gptoss.http.tokenization import DetokenizeAnswer, DetokenizeRequest, TokenizeAnswer, TokenizeRequest
from gptoss.messages.commands import AdmissionNote
from gptoss.telemetry.bundle_format import CONTENT_LEVELS
from gptoss.telemetry.bundle_order import LAST_MAX, LIMIT_MB, LIMIT_MB_MAX

TITLE = "gptoss"
_PATH_PARAMETER = re.compile(r"\{(\w+)\}")

SERVER_SENT_EVENT: dict[str, Any] = {
    "type": "object",
    "description": "One event of the stream.",
    "properties": {"event": {"type": "string"}, "data": {"type": "string", "description": "JSON, or [DONE]."}},
    "required": ["data"],
}


class ErrorDetails(msgspec.Struct, frozen=True):
    """What went wrong; ``param`` names the field at fault, ``admission`` the numbers of a refusal by admission."""

    message: str
    type: Literal["invalid_request_error", "rate_limit_error", "server_error"]
    param: str | None
    code: str
    admission: AdmissionNote | msgspec.UnsetType = msgspec.UNSET


class ErrorBody(msgspec.Struct, frozen=True):
    """Every answer with a status from 400 on."""

    error: ErrorDetails


class Operation(msgspec.Struct, frozen=True, kw_only=True):
    """One route.

    Attributes:
        path: with its parameters in braces.
        answer: what 200 holds: a type of ours, a media type, or nothing for any JSON object.
        body: type of the request's body.
        form: schema of the request's body, where that is a form.
        or_json: whether the answer can be a JSON object instead.
        streams: whether the answer can be an event stream.
        query: names of query parameters with their schemas.
        refuses: statuses of error answers, beside those that every route may give.
    """

    method: Literal["get", "post", "delete"]
    path: str
    summary: str
    tag: str
    answer: type[msgspec.Struct] | str = ""
    body: type[msgspec.Struct] | None = None
    form: dict[str, Any] | None = None
    or_json: bool = False
    streams: bool = False
    query: dict[str, dict[str, Any]] = {}
    refuses: tuple[int, ...] = ()


_GENERATING = (400, 404, 408, 413, 415, 429, 500, 503)
_READING_BODY = (400, 404, 408, 413, 415)

_BUNDLE_QUERY: dict[str, dict[str, Any]] = {
    "last": {"type": "integer", "minimum": 1, "maximum": LAST_MAX},
    "errors": {"type": "boolean"},
    "slow": {"type": "string", "examples": ["2s"]},
    "window": {"type": "string", "examples": ["10m", "2026-03-01T02:50..2026-03-01T03:10"]},
    "content": {"enum": list(CONTENT_LEVELS), "default": "none"},
    "limit_mb": {"type": "integer", "minimum": 1, "maximum": LIMIT_MB_MAX, "default": LIMIT_MB},
}

_UPLOAD: dict[str, Any] = {
    "type": "object",
    "required": ["file", "purpose"],
    "properties": {"purpose": {"enum": ["batch"]}, "file": {"type": "string", "format": "binary"}},
}


def _page(limit_max: int, limit_default: int) -> dict[str, dict[str, Any]]:
    return {
        "limit": {"type": "integer", "minimum": 1, "maximum": limit_max, "default": limit_default},
        "order": {"type": "string", "enum": ["asc", "desc"], "default": "desc"},
        "after": {"type": "string"},
    }


OPERATIONS: tuple[Operation, ...] = (
    Operation(
        method="post", path="/v1/chat/completions", tag="Generate", summary="Answer a conversation",
        body=ChatCompletionRequest, answer=ChatCompletion, streams=True, refuses=_GENERATING,
    ),
    Operation(
        method="post", path="/v1/completions", tag="Generate", summary="Go on from text or token ids",
        body=CompletionRequest, answer=TextCompletion, streams=True, refuses=_GENERATING,
    ),
    Operation(
        method="post", path="/v1/responses", tag="Generate", summary="Answer an input, as part of a kept conversation",
        body=ResponsesRequest, answer=ResponseBody, streams=True, refuses=_GENERATING,
    ),
    Operation(
        method="get", path="/v1/responses/{response_id}", tag="Generate", summary="A response that was kept",
        answer=ResponseBody, query={"stream": {"type": "string", "enum": ["false"]}}, refuses=(400, 404),
    ),
    Operation(
        method="delete", path="/v1/responses/{response_id}", tag="Generate", summary="Forget a response",
        answer=ResponseDeleted, refuses=(404,),
    ),
    Operation(
        method="get", path="/v1/responses/{response_id}/input_items", tag="Generate",
        summary="What a response was made from", answer=ItemList, refuses=(400, 404),
        query=_page(100, 20),
    ),
    Operation(
        method="post", path="/cancel/{request_id}", tag="Generate", summary="Stop a running request, with all its choices",
        refuses=(404,),
    ),
    Operation(
        method="post", path="/v1/files", tag="Batches", summary="Upload a file of requests, one a line",
        form=_UPLOAD, answer=FileBody, refuses=(400, 408, 413, 415, 503),
    ),
    Operation(
        method="get", path="/v1/files", tag="Batches", summary="The files that are kept, newest first",
        answer=FileList, query={"purpose": {"type": "string"}, **_page(10_000, 10_000)}, refuses=(400,),
    ),
    Operation(
        method="get", path="/v1/files/{file_id}", tag="Batches", summary="A file's name, size and purpose",
        answer=FileBody, refuses=(404,),
    ),
    Operation(
        method="delete", path="/v1/files/{file_id}", tag="Batches", summary="Delete a file that no open batch reads",
        answer=FileDeleted, refuses=(400, 404),
    ),
    Operation(
        method="get", path="/v1/files/{file_id}/content", tag="Batches", summary="A file's bytes",
        answer="application/octet-stream", refuses=(404,),
    ),
    Operation(
        method="post", path="/v1/batches", tag="Batches", summary="Run a file's requests within 24 hours, behind others",
        body=BatchRequest, answer=BatchBody, refuses=(400, 404, 408, 413, 415, 503),
    ),
    Operation(
        method="get", path="/v1/batches", tag="Batches", summary="The batches that are known, newest first",
        answer=BatchList, query=_page(100, 20), refuses=(400,),
    ),
    Operation(
        method="get", path="/v1/batches/{batch_id}", tag="Batches", summary="How a batch stands",
        answer=BatchBody, refuses=(404,),
    ),
    Operation(
        method="post", path="/v1/batches/{batch_id}/cancel", tag="Batches", summary="Begin no more of a batch",
        answer=BatchBody, refuses=(400, 404),
    ),
    Operation(
        method="get", path="/v1/models", tag="Models", summary="The model that is served", answer=ModelList,
    ),
    Operation(
        method="get", path="/v1/models/{model}", tag="Models", summary="A model by its served name", answer=ModelBody,
        refuses=(404,),
    ),
    Operation(
        method="post", path="/v1/embeddings", tag="Models", summary="Refused: the models served here do not embed",
        answer="refused", refuses=(400, 503),
    ),
    Operation(
        method="post", path="/tokenize", tag="Tokens", summary="Token ids of a prompt or a conversation",
        body=TokenizeRequest, answer=TokenizeAnswer, refuses=_READING_BODY,
    ),
    Operation(
        method="post", path="/detokenize", tag="Tokens", summary="The text of token ids",
        body=DetokenizeRequest, answer=DetokenizeAnswer, refuses=_READING_BODY,
    ),
    Operation(method="get", path="/health", tag="Operate", summary="Health in one answer"),
    Operation(method="get", path="/health/live", tag="Operate", summary="The process turns"),
    Operation(
        method="get", path="/health/ready", tag="Operate", summary="Would a request sent now be served? 503 if not"
    ),
    Operation(method="get", path="/stats", tag="Operate", summary="Requests, tokens, latencies, routing, cache"),
    Operation(method="get", path="/memory_stats", tag="Operate", summary="KV memory by executor"),
    Operation(
        method="get", path="/metrics", tag="Operate", summary="Metrics as Prometheus or OpenMetrics text",
        answer="text/plain",
    ),
    Operation(
        method="get", path="/admin/requests", tag="Operate", summary="The newest requests",
        query={"limit": {"type": "integer", "minimum": 1, "maximum": 1000, "default": 100}}, refuses=(400,),
    ),
    Operation(
        method="get", path="/admin/live", tag="Operate", summary="The last seconds, health, memory and newest requests",
        query={
            "after": {"type": "integer", "minimum": 0, "default": 0},
            "limit": {"type": "integer", "minimum": 0, "maximum": 1000, "default": 40},
        },
        refuses=(400,),
    ),
    Operation(
        method="get", path="/admin/requests/{request_id}/events", tag="Operate", summary="Everything about one request",
        refuses=(404,),
    ),
    Operation(
        method="get", path="/admin/requests/{request_id}/timeline", tag="Operate",
        summary="One request's phases, and what delayed it", refuses=(404,),
    ),
    Operation(
        method="get", path="/admin/events", tag="Operate", summary="The newest events, or those to come",
        query={
            "after": {"type": "integer", "minimum": -1},
            "limit": {"type": "integer", "minimum": 1, "maximum": 1000, "default": 100},
            "wait": {"type": "integer", "minimum": 0, "maximum": 30, "default": 0},
            "type": {"type": "string"},
            "stream": {"type": "string"},
        },
        refuses=(400, 429),
    ),
    Operation(
        method="get", path="/admin/settings", tag="Operate", summary="Settings that can change while the server runs"
    ),
    Operation(
        method="post", path="/admin/settings", tag="Operate", summary="Change some of them, all or none",
        body=SettingsChange, refuses=(400, 408, 413, 415),
    ),
    Operation(
        method="post", path="/admin/executors/{name}/restart", tag="Operate", refuses=(404,),
        summary="Replace an executor's engine without refusing anybody",
    ),
    Operation(
        method="get", path="/admin/debug/bundle", tag="Operate", summary="A debug bundle, or a snapshot of the system",
        answer="application/zip", or_json=True, refuses=(400, 404, 413),
        query={"format": {"enum": ["zip", "json"], "default": "zip"}, "request": {"type": "string"}, **_BUNDLE_QUERY},
    ),
    Operation(
        method="get", path="/admin/debug/bundle/{request_id}", tag="Operate", summary="The debug bundle of one request",
        answer="application/zip", refuses=(400, 404, 413), query=_BUNDLE_QUERY,
    ),
    Operation(method="get", path="/openapi.json", tag="Read", summary="This document"),
    Operation(method="get", path="/docs", tag="Read", summary="This document for people", answer="text/html"),
    Operation(method="get", path="/", tag="Read", summary="The page: chat, the server live, how to call it", answer="text/html"),
    Operation(
        method="get", path="/assets/{name}", tag="Read", summary="A file of the page", answer="text/javascript",
        refuses=(404,),
    ),
)  # fmt: skip

_EVERYWHERE = {"403": "an Origin that is not this server", "421": "a Host that is not this server"}
_ADMISSION = {"description": "how the request was let in: decision and numbers", "schema": {"type": "string"}}
_GENERATING_HEADERS: list[dict[str, Any]] = [
    {
        "name": "X-Session-ID",
        "in": "header",
        "description": "names the conversation, whose keys and values are kept for its next turn",
        "schema": {"type": "string", "pattern": r"^[\w.-]{1,128}$"},
    }
]
_REFUSALS = {
    400: "a field cannot be honoured; param names it",
    404: "no such model, request, response, file, batch or executor",
    408: "the body did not arrive in time",
    413: "the body is too large",
    415: "the body is not plain JSON",
    429: "too many requests wait; see Retry-After",
    500: "the engine failed",
    503: "the server cannot take the request now; see Retry-After",
}


async def document_json(_: web.Request) -> web.StreamResponse:
    """``GET /openapi.json``."""
    return json_response(document())


@functools.cache
def document() -> dict[str, Any]:
    """The whole document."""
    types = {t for op in OPERATIONS for t in (op.body, op.answer) if isinstance(t, type)} | {ErrorBody}
    ordered = sorted(types, key=lambda t: t.__name__)
    refs, components = msgspec.json.schema_components(ordered, ref_template="#/components/schemas/{name}")
    schema_of = dict(zip(ordered, refs, strict=True))
    paths: dict[str, dict[str, Any]] = {}
    for op in OPERATIONS:
        paths.setdefault(op.path, {})[op.method] = _operation(op, schema_of)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": TITLE,
            "version": importlib.metadata.version("gptoss"),
            "description": "A server for gpt-oss and Hugging Face causal language models, compatible with OpenAI's API.",
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "servers": [{"url": "."}],
        "tags": [{"name": tag} for tag in dict.fromkeys(op.tag for op in OPERATIONS)],
        "paths": paths,
        "components": {"schemas": components},
    }


def _operation(op: Operation, schema_of: dict[Any, Any]) -> dict[str, Any]:
    in_path: list[dict[str, Any]] = [
        {"name": name, "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}
        for name in _PATH_PARAMETER.findall(op.path)
    ]
    in_query: list[dict[str, Any]] = [
        {"name": name, "in": "query", "schema": schema} for name, schema in op.query.items()
    ]
    found: dict[str, Any] = {
        "operationId": f"{op.method} {op.path}",
        "summary": op.summary,
        "tags": [op.tag],
        "parameters": in_path + in_query + (_GENERATING_HEADERS if op.streams else []),
        "responses": _responses(op, schema_of),
    }
    if op.body is not None:
        found["requestBody"] = {"required": True, "content": {"application/json": {"schema": schema_of[op.body]}}}
    if op.form is not None:
        found["requestBody"] = {"required": True, "content": {"multipart/form-data": {"schema": op.form}}}
    return found


def _responses(op: Operation, schema_of: dict[Any, Any]) -> dict[str, Any]:
    error = {"application/json": {"schema": schema_of[ErrorBody]}}
    responses: dict[str, Any] = {}
    if op.answer != "refused":
        responses["200"] = {"description": "as asked", "content": _content(op, schema_of)}
    if op.streams:
        responses["200"]["headers"] = {ADMISSION_HEADER: _ADMISSION}
    if op.path == "/health/ready":
        responses["503"] = {"description": "not ready", "content": _content(op, schema_of)}
    responses |= {str(status): {"description": _REFUSALS[status], "content": error} for status in op.refuses}
    return responses | {status: {"description": text, "content": error} for status, text in _EVERYWHERE.items()}


def _content(op: Operation, schema_of: dict[Any, Any]) -> dict[str, Any]:
    if isinstance(op.answer, str) and op.answer:
        content: dict[str, Any] = {op.answer: {"schema": {"type": "string"}}}
        return content | ({"application/json": {"schema": {"type": "object"}}} if op.or_json else {})
    answer: dict[str, Any] = {"type": "object"} if isinstance(op.answer, str) else schema_of[op.answer]
    content = {"application/json": {"schema": answer}}
    if op.streams:
        content["text/event-stream"] = {"schema": SERVER_SENT_EVENT}
    return content
