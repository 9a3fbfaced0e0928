"""``GET /``: one page that says what runs here and how to call it.

Self-contained: no script, no outside resource, and a Content-Security-Policy that permits its one style sheet by hash.
Links are relative, so that the page works under an embedder's prefix too.
"""

import base64
import hashlib
from html import escape

from aiohttp import web

from gptoss.http.context import CONTEXT

_STYLE = """
:root{color-scheme:light dark;--ink:#1b1f24;--paper:#fff;--soft:#f3f5f7;--line:#d5dae0;--link:#0a58ca;--ok:#17692f;
--bad:#a3261c}
@media (prefers-color-scheme:dark){:root{--ink:#e6e9ed;--paper:#14171b;--soft:#1f242a;--line:#39414a;--link:#86b7fe;
--ok:#7fd08f;--bad:#ff9d94}}
body{margin:0 auto;max-width:46rem;padding:2rem 1rem;background:var(--paper);color:var(--ink);
font:1rem/1.55 system-ui,sans-serif}
h1{font-size:1.5rem;margin:0}h2{font-size:1.05rem;margin:2rem 0 .5rem}
code,pre{font:.9rem/1.5 ui-monospace,monospace}
pre{overflow-x:auto;margin:0;padding:.8rem 1rem;background:var(--soft);border:1px solid var(--line);border-radius:.4rem}
a{color:var(--link)}a:focus-visible,pre:focus-visible{outline:3px solid var(--link);outline-offset:2px}
ul{padding-left:1.2rem}.ok{color:var(--ok)}.bad{color:var(--bad)}
"""

_LINKS = (
    ("docs", "every endpoint and its fields"),
    ("v1/models", "the model that is served"),
    ("health", "health in one answer"),
    ("health/ready", "would a request sent now be served?"),
    ("stats", "requests, tokens, latencies, routing, cache"),
    ("memory_stats", "KV memory by executor"),
    ("metrics", "Prometheus metrics"),
    ("admin/requests", "the newest requests"),
    ("admin/debug/bundle", "a snapshot of the whole system"),
)

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>gptoss: {model}</title>
<style>{style}</style>
</head>
<body>
<main>
<h1>gptoss</h1>
<p>Serving <strong>{model}</strong>. Status: <strong class="{mark}">{status}</strong></p>
<h2>Ask it from a shell</h2>
<pre tabindex="0" aria-label="curl example"><code>{curl}</code></pre>
<h2>Ask it from Python</h2>
<pre tabindex="0" aria-label="Python example"><code>{python}</code></pre>
<h2>Look around</h2>
<ul>
{links}
</ul>
</main>
</body>
</html>
"""

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
    html = _PAGE.format(
        style=_STYLE,
        model=escape(model),
        mark="ok" if is_ready else "bad",
        status="ready" if is_ready else escape(f"not ready: {reason}"),
        curl=escape(_CURL.format(base=base, model=model)),
        python=escape(_PYTHON.format(base=base, model=model)),
        links="\n".join(f'<li><a href="{path}">/{path}</a>: {escape(text)}</li>' for path, text in _LINKS),
    )
    return page_response(html, _STYLE)


def page_style_sheet(more: str) -> str:
    """The style of all pages, and ``more``."""
    return _STYLE + more.strip() + "\n"


def page_response(html: str, style: str) -> web.Response:
    """A page that may use nothing but its own style sheet."""
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    policy = (
        f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    headers = {"Content-Security-Policy": policy, "Cache-Control": "no-store", "Referrer-Policy": "no-referrer"}
    return web.Response(body=html.encode(errors="replace"), content_type="text/html", charset="utf-8", headers=headers)
