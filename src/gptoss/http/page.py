"""``GET /``: the page. A chat, a live view of the server, and how to call it.

Rules:
- Nothing from outside, and nothing inline: the policy allows the page's own files (``assets``) and no other script,
  style or connection. ``trusted-types 'none'`` forbids every way of turning a string into markup.
- Links are relative, so that the page works under an embedder's prefix too.
- Without JavaScript the page says how to call the server.
"""

import functools
from importlib.resources import files

import jinja2
from aiohttp import web

from gptoss.http.context import CONTEXT

_POLICY = (
    "default-src 'none'; style-src 'self'; img-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_SCRIPTS = "script-src 'self'; connect-src 'self'; require-trusted-types-for 'script'; trusted-types 'none'"

_LINKS = (
    ("docs", "every endpoint and its fields"),
    ("v1/models", "the model that is served"),
    ("health", "health in one answer"),
    ("health/ready", "would a request sent now be served?"),
    ("stats", "requests, tokens, latencies, routing, cache"),
    ("memory_stats", "KV memory by executor"),
    ("metrics", "Prometheus metrics"),
    ("admin/requests", "the newest requests"),
    ("admin/live", "the last seconds, second by second"),
    ("admin/debug/bundle", "everything that decided in the last ten minutes, as one file that replays"),
)

_CURL = """curl {base}/v1/chat/completions \\
  -H 'Content-Type: application/json' \\
  -d '{{"model": "{model}", "stream": true,
       "messages": [{{"role": "user", "content": "Hello!"}}]}}'"""

_PYTHON = """from openai import OpenAI

client = OpenAI(base_url="{base}/v1", api_key="unused")
answer = client.chat.completions.create(
    model="{model}",
    messages=[{{"role": "user", "content": "Hello!"}}],
)
print(answer.choices[0].message.content)"""


async def home(request: web.Request) -> web.StreamResponse:
    """The page, as of now."""
    context = request.app[CONTEXT]
    model = context.gateway.served_model
    is_ready, reason = context.readiness()
    base = f"{request.scheme}://{request.host}{request.path}".rstrip("/")
    html = _template().render(
        model=model,
        is_ready=is_ready,
        status="ready" if is_ready else f"not ready: {reason}",
        base=base,
        curl=_CURL.format(base=base, model=model),
        python=_PYTHON.format(base=base, model=model),
        links=_LINKS,
        temperature=context.default_temperature,
        takes_effort=context.gateway.rendering.takes_reasoning_effort,
    )
    return page_response(html, f"{_POLICY}; {_SCRIPTS}")


@functools.cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    return environment.from_string(files("gptoss.http").joinpath("page.html.j2").read_text(encoding="utf-8"))


def page_response(html: str, policy: str = _POLICY) -> web.Response:
    """A page that may use nothing but this package's own files; without ``policy`` no script at all."""
    headers = {"Content-Security-Policy": policy, "Cache-Control": "no-store", "Referrer-Policy": "no-referrer"}
    return web.Response(body=html.encode(errors="replace"), content_type="text/html", charset="utf-8", headers=headers)
