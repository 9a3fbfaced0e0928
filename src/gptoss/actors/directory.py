"""Who is where: the addresses of the actors that talk to each other, by role and name."""

from typing import Any

from gptoss.actors.ref import Ref
from gptoss.messages.envelope import NO_CAUSE

REQUEST_PREFIX = "request/"
EXECUTOR_PREFIX = "executor/"
_PREFIX_CHARS = len(REQUEST_PREFIX)
DECIDER_NAMES = ("memory", "admission", "router")
"""The deciders that every request meets; they live as long as the system."""
STANDING_DECIDERS = (*DECIDER_NAMES, "batches")
"""All that live as long as the system."""


class Directory:
    """Addresses of the deciding actors, the executors and the running requests. Event loop and executor threads."""

    def __init__(self) -> None:
        self._refs: dict[str, Ref[Any]] = {}

    def add(self, name: str, ref: Ref[Any]) -> None:
        """Make ``ref`` known under ``name``."""
        self._refs[name] = ref

    def remove(self, name: str) -> None:
        """Forget ``name``; unknown names are fine."""
        self._refs.pop(name, None)

    def get(self, name: str) -> Ref[Any] | None:
        """The address, or None."""
        return self._refs.get(name)

    def names(self, prefix: str) -> tuple[str, ...]:
        """Known names that begin with ``prefix``, in the order they were added."""
        return tuple(name for name in tuple(self._refs) if name.startswith(prefix))

    def tell(self, name: str, message: object, *, cause: int = NO_CAUSE, control: bool = False) -> bool:
        """Tell the actor of this name; False when there is none, as for a request that has ended."""
        ref = self._refs.get(name)
        if ref is None:
            return False
        correlation = name[_PREFIX_CHARS:] if name.startswith(REQUEST_PREFIX) else getattr(message, "request_id", "")
        ref.tell(message, cause=cause, correlation=correlation, control=control)
        return True


def request_name(request_id: str) -> str:
    """The actor and stream name of a request."""
    return f"{REQUEST_PREFIX}{request_id}"


def executor_name(executor: str) -> str:
    """The actor and stream name of an executor."""
    return f"{EXECUTOR_PREFIX}{executor}"
