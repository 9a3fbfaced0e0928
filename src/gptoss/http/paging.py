"""Lists that are told in pages, as OpenAI's are: ``limit``, ``order`` and ``after``."""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Generic, NamedTuple, TypeVar

from gptoss.errors import RequestError

_COUNT = re.compile(r"[0-9]{1,5}", re.ASCII)
_T = TypeVar("_T")


class Page(NamedTuple, Generic[_T]):
    """A page of a list, with the ids of its first and last entry, and whether there is more behind it."""

    entries: list[_T]
    first_id: str | None
    last_id: str | None
    has_more: bool


def page_of(
    query: Mapping[str, str], found: Sequence[_T], id_of: Callable[[_T], str], *, limit_max: int, limit_default: int
) -> Page[_T]:
    """What a list's query asks for, newest first unless it says otherwise.

    Args:
        query: of the URL.
        found: everything, oldest first.
        id_of: names an entry, for ``after``.
        limit_max: most entries of a page.
        limit_default: entries of a page where the query names no limit.

    Raises:
        RequestError: naming the parameter that cannot be honoured.
    """
    order = query.get("order", "desc")
    if order not in {"asc", "desc"}:
        raise RequestError(f"order is {order[:32]!a}; it must be asc or desc", param="order")
    written = query.get("limit", str(limit_default))
    if not _COUNT.fullmatch(written) or not 1 <= int(written) <= limit_max:
        raise RequestError(f"limit is {written[:32]!a}; it must be between 1 and {limit_max}", param="limit")
    ordered = list(found if order == "asc" else reversed(found))
    after = query.get("after")
    if after is not None:
        start = next((index for index, each in enumerate(ordered, start=1) if id_of(each) == after), None)
        if start is None:
            raise RequestError(f"after is {after[:128]!a}, which is not in this list", param="after")
        ordered = ordered[start:]
    entries = ordered[: int(written)]
    first, last = (id_of(entries[0]), id_of(entries[-1])) if entries else (None, None)
    return Page(entries, first, last, len(ordered) > int(written))
