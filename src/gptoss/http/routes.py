"""The whole HTTP surface on one screen: every route, and what wraps all of them.

The application knows no absolute path, so an embedder can mount it: ``parent.add_subapp("/llm", make_app(context))``.
"""

import asyncio

from aiohttp import web

from gptoss.http import (
    admin,
    chat,
    completions,
    docs_page,
    embeddings,
    health,
    models,
    openapi,
    operations,
    page,
    responses,
    tokenization,
)
from gptoss.http.context import CLOSING, CONTEXT, HttpContext
from gptoss.http.errors import answer_errors
from gptoss.http.guard import admit_callers
from gptoss.http.headers import response_request_id
from gptoss.http.intake import NAMED_FIELDS
from gptoss.http.response_store import ResponseStore


def make_app(context: HttpContext) -> web.Application:
    """The application that serves ``context``."""
    app = web.Application(middlewares=[answer_errors, admit_callers])
    app[CONTEXT] = context
    app[CLOSING] = asyncio.Event()
    app[NAMED_FIELDS] = set()
    app[responses.STORE] = ResponseStore()
    app[models.STARTED_S] = models.started_s(app)
    app.on_response_prepare.append(_add_headers)
    app.on_shutdown.append(_note_closing)
    app.add_routes(
        [
            web.get("/", page.home),
            web.post("/v1/chat/completions", chat.chat_completions),
            web.post("/v1/completions", completions.completions),
            web.post("/v1/responses", responses.create),
            web.get("/v1/responses/{response_id}", responses.retrieve),
            web.delete("/v1/responses/{response_id}", responses.delete),
            web.get("/v1/responses/{response_id}/input_items", responses.input_items),
            web.post("/v1/embeddings", embeddings.embeddings),
            web.post("/tokenize", tokenization.tokenize),
            web.post("/detokenize", tokenization.detokenize),
            web.get("/v1/models", models.list_models),
            web.get("/v1/models/{model:.+}", models.show_model),
            web.post("/cancel/{request_id}", admin.cancel),
            web.get("/health", health.health),
            web.get("/health/live", health.live),
            web.get("/health/ready", health.ready),
            web.get("/stats", health.stats),
            web.get("/memory_stats", health.memory_stats),
            web.get("/metrics", health.metrics),
            web.get("/admin/requests", admin.recent_requests),
            web.get("/admin/requests/{request_id}/events", admin.request_events),
            web.get("/admin/requests/{request_id}/timeline", admin.request_timeline),
            web.get("/admin/events", admin.events),
            web.get("/admin/settings", operations.show_settings),
            web.post("/admin/settings", operations.change_settings),
            web.post("/admin/executors/{name}/restart", operations.restart_executor),
            web.get("/admin/debug/bundle", admin.debug_bundle),
            web.get("/admin/debug/bundle/{request_id}", admin.request_bundle),
            web.get("/openapi.json", openapi.document_json),
            web.get("/docs", docs_page.docs),
        ]
    )
    return app


async def _add_headers(request: web.Request, response: web.StreamResponse) -> None:
    response.headers["X-Request-ID"] = response_request_id(request)
    response.headers["X-Content-Type-Options"] = "nosniff"
    response.headers["Server"] = "gptoss"
    if request.app[CONTEXT].draining():
        response.force_close()
        response.headers["Connection"] = "close"


async def _note_closing(app: web.Application) -> None:
    app[CLOSING].set()
