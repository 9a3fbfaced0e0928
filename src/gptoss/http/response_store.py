"""Responses that clients may come back to: by id, and as the beginning of a longer conversation.

They live in this process's memory, bounded in number and size, the longest unused forgotten first; a restart forgets
all. A journal is no place for them: its control family holds no text, and clients may delete a response at any time.
"""

from collections import OrderedDict

import msgspec

from gptoss.engine.port import ChatMessage
from gptoss.errors import ResponseNotFound
from gptoss.http.response_schema import ResponseBody, StoredItem

MAX_RESPONSES = 1000
MAX_BYTES = 64 << 20


class StoredResponse(msgspec.Struct, frozen=True):
    """A response and what it came from.

    Attributes:
        body: as it was answered.
        items: its own input.
        messages: the conversation up to and including its output, without its instructions.
    """

    body: ResponseBody
    items: list[StoredItem]
    messages: tuple[ChatMessage, ...]


class ResponseStore:
    """Stored responses. Use it from the event loop.

    Args:
        max_responses: how many are kept.
        max_bytes: how large they may be together, as JSON; conversations count for each response that ends one.
    """

    def __init__(self, max_responses: int = MAX_RESPONSES, max_bytes: int = MAX_BYTES) -> None:
        self._max_responses = max_responses
        self._max_bytes = max_bytes
        self._num_bytes = 0
        self._kept: OrderedDict[str, tuple[StoredResponse, int]] = OrderedDict()

    def __contains__(self, response_id: str) -> bool:
        return response_id in self._kept

    def keep(self, stored: StoredResponse) -> None:
        """Keep a response, and forget others for it; one that is larger than all may be is not kept."""
        size = len(msgspec.json.encode(stored))
        if size > self._max_bytes:
            return
        _, freed = self._kept.pop(stored.body.id, (None, 0))
        self._num_bytes -= freed
        self._kept[stored.body.id] = (stored, size)
        self._num_bytes += size
        while len(self._kept) > self._max_responses or self._num_bytes > self._max_bytes:
            _, (_, freed) = self._kept.popitem(last=False)
            self._num_bytes -= freed

    def get(self, response_id: str, *, param: str) -> StoredResponse:
        """A response; ``param`` names the field that asks for it.

        Raises:
            ResponseNotFound: there is none, or none any more.
        """
        found = self._kept.get(response_id)
        if found is None:
            raise ResponseNotFound(
                f"no response is kept under the id {response_id[:128]!a}; it may have been deleted or forgotten, "
                "was created with store false, or another run of the server had it",
                param=param,
            )
        self._kept.move_to_end(response_id)
        return found[0]

    def delete(self, response_id: str) -> None:
        """Forget a response. Raises as ``get``."""
        self.get(response_id, param="response_id")
        _, freed = self._kept.pop(response_id)
        self._num_bytes -= freed
