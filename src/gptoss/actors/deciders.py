"""The deciders of a system, made from its settings: by the live system, and by whoever runs its decisions again."""

from typing import Any

import msgspec

from gptoss.actors.admission import Admission
from gptoss.actors.admission_fit import AdmissionPolicy
from gptoss.actors.batches import Batches
from gptoss.actors.decider import Decider
from gptoss.actors.directory import REQUEST_PREFIX
from gptoss.actors.lifecycle import Lifecycle
from gptoss.actors.memory_guard import GuardPolicy, MemoryGuard
from gptoss.actors.pressure import PressureLevels
from gptoss.actors.router import Router, RouterPolicy
from gptoss.clock import NS_PER_S
from gptoss.config import BYTES_PER_MB, Settings, with_changes
from gptoss.messages.commands import SettingValue


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
        memory=MemoryGuard(_guard_policy(settings)),
        admission=Admission(_admission_policy(settings)),
        router=Router(
            RouterPolicy(
                multi_prompt_len=settings.multi_prompt_len,
                multi_kv_bytes=settings.multi_kv_mb * BYTES_PER_MB,
                multi_pressure=settings.multi_pressure,
            )
        ),
        lifecycle=Lifecycle(settings.queue_timeout_s),
        batches=Batches(settings.batch_concurrency),
    )


def _admission_policy(settings: Settings) -> AdmissionPolicy:
    if settings.policy_version == 1:
        return AdmissionPolicy(max_queue=settings.max_queue)
    return AdmissionPolicy(
        max_queue=settings.max_queue,
        version=settings.policy_version,
        ageing_s=settings.queue_ageing_s if settings.queue_order == "fair" else 0.0,
        levels=_levels(settings),
        route_multi_tokens=settings.multi_prompt_len,
        route_multi_kv_bytes=settings.multi_kv_mb * BYTES_PER_MB,
    )


def _guard_policy(settings: Settings) -> GuardPolicy:
    if settings.policy_version == 1:
        return GuardPolicy()
    return GuardPolicy(
        version=settings.policy_version,
        levels=_levels(settings),
        session_bytes_max=settings.session_kv_mb * BYTES_PER_MB,
        sessions_bytes_max=settings.sessions_kv_mb * BYTES_PER_MB,
        session_idle_ns=int(settings.session_idle_s * NS_PER_S),
    )


def _levels(settings: Settings) -> PressureLevels:
    return PressureLevels(
        evict=settings.pressure_evict,
        shrink=settings.pressure_shrink,
        queue=settings.pressure_queue,
        refuse=settings.pressure_refuse,
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
