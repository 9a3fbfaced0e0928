"""A sorted map that never changes: to put and to take give a new one, which shares all but a path with the old.

Deciders keep their lines in these, because their states are values: a replay, a what-if and a snapshot may hold on to
any of them. Each step costs O(log n). It is a treap; its shape follows from the hashes of the keys and means nothing:
two maps are equal if they hold equal values in the same order, whatever keys put them there.
"""

from collections.abc import Iterator
from typing import Any, Generic, TypeAlias, TypeVar

V = TypeVar("V")
Key: TypeAlias = tuple[int, ...]
# key, value, weight, left, right, number of entries
Node: TypeAlias = "tuple[Key, Any, int, Node | None, Node | None, int]"


class Ordered(Generic[V]):
    """Values in the order of their keys."""

    __slots__ = ("_root",)

    def __init__(self, root: "Node | None" = None) -> None:
        self._root = root

    def put(self, key: Key, value: V) -> "Ordered[V]":
        """With ``value`` at ``key``, which must be free."""
        return Ordered(_put(self._root, key, value, hash(key)))

    def take(self, key: Key) -> "Ordered[V]":
        """Without ``key``. Raises ``KeyError`` if it is not there."""
        return Ordered(_take(self._root, key))

    def first(self) -> tuple[Key, V]:
        """The smallest key and its value. Raises ``KeyError`` if there is none."""
        node = self._root
        if node is None:
            raise KeyError("an empty map has no first")
        while node[3] is not None:
            node = node[3]
        return node[0], node[1]

    def last(self) -> tuple[Key, V]:
        """The largest key and its value. Raises ``KeyError`` if there is none."""
        node = self._root
        if node is None:
            raise KeyError("an empty map has no last")
        while node[4] is not None:
            node = node[4]
        return node[0], node[1]

    def count_below(self, key: Key) -> int:
        """How many keys are smaller."""
        node, count = self._root, 0
        while node is not None:
            if node[0] < key:
                count += 1 + (node[3][5] if node[3] else 0)
                node = node[4]
            else:
                node = node[3]
        return count

    def items(self) -> Iterator[tuple[Key, V]]:
        """Keys and values, smallest key first."""
        path: list[Node] = []
        node = self._root
        while path or node:
            while node:
                path.append(node)
                node = node[3]
            node = path.pop()
            yield node[0], node[1]
            node = node[4]

    def __iter__(self) -> Iterator[V]:
        return (value for _, value in self.items())

    def __len__(self) -> int:
        return self._root[5] if self._root else 0

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Ordered) and len(self) == len(other) and list(self) == list(other)  # pyright: ignore[reportUnknownArgumentType]

    __hash__ = None  # pyright: ignore[reportAssignmentType]

    def __repr__(self) -> str:
        return f"Ordered({list(self)})"


def _node(key: Key, value: Any, weight: int, left: "Node | None", right: "Node | None") -> "Node":
    return key, value, weight, left, right, 1 + (left[5] if left else 0) + (right[5] if right else 0)


def _put(node: "Node | None", key: Key, value: Any, weight: int) -> "Node":
    if node is None:
        return key, value, weight, None, None, 1
    if weight > node[2]:
        return _node(key, value, weight, *_split(node, key))
    at, held, own, left, right, size = node
    if key < at:
        return at, held, own, _put(left, key, value, weight), right, size + 1
    return at, held, own, left, _put(right, key, value, weight), size + 1


def _split(node: "Node | None", key: Key) -> "tuple[Node | None, Node | None]":
    """Those below ``key`` and those above."""
    if node is None:
        return None, None
    at, value, weight, left, right, _ = node
    if key < at:
        below, above = _split(left, key)
        return below, _node(at, value, weight, above, right)
    below, above = _split(right, key)
    return _node(at, value, weight, left, below), above


def _take(node: "Node | None", key: Key) -> "Node | None":
    if node is None:
        raise KeyError(key)
    at, value, weight, left, right, size = node
    if key == at:
        return _merge(left, right)
    if key < at:
        return at, value, weight, _take(left, key), right, size - 1
    return at, value, weight, left, _take(right, key), size - 1


def _merge(low: "Node | None", high: "Node | None") -> "Node | None":
    if low is None or high is None:
        return low or high
    if low[2] > high[2]:
        return _node(low[0], low[1], low[2], low[3], _merge(low[4], high))
    return _node(high[0], high[1], high[2], _merge(low, high[3]), high[4])
