"""``POST /v1/embeddings``: refused, with the reason, for every model.

The models served here are causal language models that nobody trained to embed. Pooling their hidden states gives vectors
that look like embeddings and rank worse than word counts, and it would take a path of its own through the engine; so the
server says no instead of giving a bad answer.
"""

from aiohttp import web

from gptoss.errors import RequestError
from gptoss.http.context import CONTEXT
from gptoss.http.intake import take

ENDPOINT = "/v1/embeddings"


async def embeddings(request: web.Request) -> web.StreamResponse:
    """The handler."""
    return await take(request, ENDPOINT, _refuse)


async def _refuse(request: web.Request) -> web.StreamResponse:
    served = request.app[CONTEXT].gateway.served_model
    raise RequestError(
        f"{served} generates text and was not trained to make embeddings; ask an embedding model", param="model"
    )
