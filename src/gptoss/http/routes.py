"""The whole HTTP surface on one screen: every route, and what wraps all of them.

The application knows no absolute path, so an embedder can mount it: ``parent.add_subapp("/llm", make_app(context))``.
"""

import asyncio

from aiohttp import web

from gptoss.http import (
    admin,
    assets,
    batches,
    docs_page,
    embeddings,
    files,
    health,
    models,
    openapi,
    page,
    responses,
    tokenization,
)
from gptoss.http.batch_runner import BatchRunner
from gptoss.http.body import MIB
from gptoss.http.chat import CHAT
from gptoss.http.completions import COMPLETIONS
from gptoss.http.context import ADMISSION, BATCHES, CLOSING, CONTEXT, TRACE, HttpContext
from gptoss.http.errors import answer_errors
from gptoss.http.file_store import FILES, FileStore
from gptoss.http.guard import admit_callers
from gptoss.http.headers import ADMISSION_HEADER, admission_value, response_request_id
from gptoss.http.intake import NAMED_FIELDS
from gptoss.http.response_store import ResponseStore


def make_app(context: HttpContext) -> web.Application:
    """The application that serves ``context``."""
    app = web.Application(middlewares=[answer_errors, admit_callers])
    app[CONTEXT] = context
    app[CLOSING] = asyncio.Event()
    app[NAMED_FIELDS] = set()
    folder = context.data_folder
    keeps_text = folder is not None and context.settings.content != "none"
    app[responses.STORE] = ResponseStore(folder / "responses.sqlite" if folder and keeps_text else None)
    app[models.STARTED_S] = models.started_s(app)
    app.on_response_prepare.append(_add_headers)
    app[FILES] = FileStore(
        folder / "files" if folder else None,
        file_bytes_max=context.settings.file_limit_mb * MIB,
        total_bytes_max=context.settings.files_limit_mb * MIB,
    )
    app.on_startup.append(_open_stores)
    app.on_shutdown.append(_note_closing)
    app.on_cleanup.append(_close_stores)
    app.add_routes(
        [
            web.get("/", page.home),
            web.get("/assets/{name:.+}", assets.asset),
            web.post("/v1/chat/completions", CHAT.handle),
            web.post("/v1/completions", COMPLETIONS.handle),
            web.post("/v1/responses", responses.RESPONSES.handle),
            web.get("/v1/responses/{response_id}", responses.retrieve),
            web.delete("/v1/responses/{response_id}", responses.delete),
            web.get("/v1/responses/{response_id}/input_items", responses.input_items),
            web.post("/v1/files", files.upload),
            web.get("/v1/files", files.list_files),
            web.get("/v1/files/{file_id}", files.retrieve),
            web.delete("/v1/files/{file_id}", files.delete),
            web.get("/v1/files/{file_id}/content", files.content),
            web.post("/v1/batches", batches.create),
            web.get("/v1/batches", batches.list_batches),
            web.get("/v1/batches/{batch_id}", batches.retrieve),
            web.post("/v1/batches/{batch_id}/cancel", batches.cancel),
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
            web.get("/admin/live", admin.live),
            web.get("/admin/requests", admin.recent_requests),
            web.get("/admin/requests/{request_id}/events", admin.request_events),
            web.get("/admin/requests/{request_id}/timeline", admin.request_timeline),
            web.get("/admin/events", admin.events),
            web.get("/admin/debug/bundle", admin.debug_bundle),
            web.get("/admin/debug/bundle/{request_id}", admin.request_bundle),
            web.get("/openapi.json", openapi.document_json),
            web.get("/docs", docs_page.docs),
        ]
    )
    return app


async def _add_headers(request: web.Request, response: web.StreamResponse) -> None:
    response.headers["X-Request-ID"] = response_request_id(request)
    trace = request.get(TRACE)
    if trace is not None and trace.trace_id:
        response.headers["traceparent"] = trace.traceparent
    note = request.get(ADMISSION)
    if note is not None:
        response.headers[ADMISSION_HEADER] = admission_value(note)
    response.headers["X-Content-Type-Options"] = "nosniff"
    response.headers["Server"] = "gptoss"
    if request.app[CONTEXT].draining():
        response.force_close()
        response.headers["Connection"] = "close"


async def _note_closing(app: web.Application) -> None:
    app[CLOSING].set()


async def _open_stores(app: web.Application) -> None:
    await asyncio.to_thread(app[FILES].load)
    app[BATCHES] = await app[CONTEXT].open_batches(BatchRunner(app, app[FILES]))


async def _close_stores(app: web.Application) -> None:
    await asyncio.to_thread(app[FILES].close)
    app[responses.STORE].close()
