"""The deciders of a system, made from its settings: by the live system, and by whoever runs its decisions again."""

from typing import Any

import msgspec

from gptoss.actors.admission import Admission, AdmissionPolicy
from gptoss.actors.decider import Decider
from gptoss.actors.directory import REQUEST_PREFIX
from gptoss.actors.lifecycle import Lifecycle
from gptoss.actors.memory_guard import MemoryGuard
from gptoss.actors.router import Router, RouterPolicy
from gptoss.config import Settings, with_changes
from gptoss.messages.commands import SettingValue

BYTES_PER_MB = 1024 * 1024


class Deciders(msgspec.Struct, frozen=True, kw_only=True):
    """One of each. They hold no state; a state belongs to an actor, or to a replay."""

    memory: MemoryGuard
    admission: Admission
    router: Router
    lifecycle: Lifecycle

    def of(self, stream: str) -> Decider[Any] | None:
        """Who decides in a stream; None for streams of which nothing is decided."""
        if stream.startswith(REQUEST_PREFIX):
            return self.lifecycle
        return {"memory": self.memory, "admission": self.admission, "router": self.router}.get(stream)


def deciders_of(settings: Settings) -> Deciders:
    """The deciders that these settings ask for."""
    return Deciders(
        memory=MemoryGuard(),
        admission=Admission(AdmissionPolicy(max_queue=settings.max_queue)),
        router=Router(
            RouterPolicy(
                multi_prompt_len=settings.multi_prompt_len,
                multi_kv_bytes=settings.multi_kv_mb * BYTES_PER_MB,
                multi_pressure=settings.multi_pressure,
            )
        ),
        lifecycle=Lifecycle(settings.queue_timeout_s),
    )


def decider_with(settings: Settings, stream: str, changed: dict[str, SettingValue]) -> Decider[Any]:
    """The decider of a stream after a ``ConfigChanged`` there.

    Args:
        settings: that the boot started with.
        stream: of the decider.
        changed: the settings of the event; what this version does not know is passed over.
    """
    decider = deciders_of(with_changes(settings, changed)).of(stream)
    assert decider is not None
    return decider
