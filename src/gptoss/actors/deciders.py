"""The deciders of a system, made from its settings: by the live system, and by whoever runs its decisions again."""

from typing import Any

import msgspec

from gptoss.actors.admission import Admission, AdmissionPolicy
from gptoss.actors.batches import Batches
from gptoss.actors.decider import Decider
from gptoss.actors.directory import REQUEST_PREFIX
from gptoss.actors.lifecycle import Lifecycle
from gptoss.actors.memory_guard import MemoryGuard
from gptoss.actors.router import Router
from gptoss.config import Settings


class Deciders(msgspec.Struct, frozen=True, kw_only=True):
    """One of each. They hold no state; a state belongs to an actor, or to a replay."""

    memory: MemoryGuard
    admission: Admission
    router: Router
    lifecycle: Lifecycle
    batches: Batches

    def of(self, stream: str) -> Decider[Any] | None:
        """Who decides in a stream; None for streams of which nothing is decided."""
        if stream.startswith(REQUEST_PREFIX):
            return self.lifecycle
        named: dict[str, Decider[Any]] = {
            "memory": self.memory,
            "admission": self.admission,
            "router": self.router,
            "batches": self.batches,
        }
        return named.get(stream)


def deciders_of(settings: Settings) -> Deciders:
    """The deciders that these settings ask for."""
    return Deciders(
        memory=MemoryGuard(),
        admission=Admission(AdmissionPolicy(max_queue=settings.max_queue)),
        router=Router(),
        lifecycle=Lifecycle(settings.queue_timeout_s),
        batches=Batches(settings.batch_concurrency),
    )
