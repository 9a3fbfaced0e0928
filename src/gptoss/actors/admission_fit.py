"""How a request can be served: whole, with fewer output tokens, on several devices, or not at all. Pure arithmetic.

The memory guard has computed the bytes (``MemoryAdvice``); here is decided which of its numbers is taken.
"""

import hashlib

import msgspec

from gptoss.actors.admission_state import AdmissionState
from gptoss.actors.pressure import PressureLevels, is_reached
from gptoss.messages import commands as cmd
from gptoss.messages.commands import AdmissionNote
from gptoss.messages.events import AdmissionDecided, Ask

# A shrunk answer shorter than this is of no use to anyone.
MIN_USEFUL_TOKENS = 16
MS_PER_S = 1000


class AdmissionPolicy(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Settings that admission decides by.

    Attributes:
        version: of the rules. 1, which recordings of older servers need, knows no pressure, tenants, parking or forecasts.
        ageing_s: see ``fair_line``; 0 is by priority alone.
        levels: of pressure.
        route_multi_tokens, route_multi_kv_bytes: a prompt or a request above goes to several devices; 0 is never.
    """

    max_queue: int
    version: int = 1
    ageing_s: float = 0.0
    levels: PressureLevels = PressureLevels()
    route_multi_tokens: int = 0
    route_multi_kv_bytes: int = 0

    @property
    def fingerprint(self) -> str:
        """Short hash, so that a decision names the policy it was made under."""
        return hashlib.sha256(msgspec.json.encode(self)).hexdigest()[:12]


def fit(policy: AdmissionPolicy, state: AdmissionState, command: cmd.AdmitRequest) -> Ask | None:
    """The request as it can be served; None if not even a useful part of it fits an executor."""
    whole = Ask(
        max_tokens=command.max_tokens,
        kv_bytes=command.kv_bytes,
        priority=command.priority,
        deadline_ns=command.deadline_ns,
        shrunk=False,
        tenant=command.tenant,
        session_id=command.session_id,
    )
    advice = command.advice
    fits = command.kv_bytes <= state.kv_bytes_max
    if advice is None:
        return whole if fits else _shrunk_by_guess(whole, command, state.kv_bytes_max)
    tokens, kv_bytes = (
        (advice.max_tokens_half, advice.kv_bytes_half) if fits else (advice.max_tokens_fit, advice.kv_bytes_fit)
    )
    can_shrink = command.can_shrink and tokens >= MIN_USEFUL_TOKENS and kv_bytes <= state.kv_bytes_max
    if fits and not (can_shrink and is_reached(policy.levels.shrink, advice.pressure)):
        return whole
    return msgspec.structs.replace(whole, max_tokens=tokens, kv_bytes=kv_bytes, shrunk=True) if can_shrink else None


def with_route(
    policy: AdmissionPolicy, state: AdmissionState, command: cmd.AdmitRequest, ask: Ask, *, is_tight: bool
) -> Ask:
    """The request with the wish for several devices, if an executor has them and it is large or memory is tight."""
    is_long = 0 < policy.route_multi_tokens < command.prompt_tokens
    is_large = 0 < policy.route_multi_kv_bytes < ask.kv_bytes
    if not (is_long or is_large or is_tight) or not state.has_multi_device:
        return ask
    return msgspec.structs.replace(ask, multi_device=True)


def _shrunk_by_guess(whole: Ask, command: cmd.AdmitRequest, kv_bytes_max: int) -> Ask | None:
    """With as many tokens as fit if every token takes the same, which windows and blocks only come near."""
    room = kv_bytes_max - command.kv_bytes_prompt
    per_token = (command.kv_bytes - command.kv_bytes_prompt) / max(1, command.max_tokens)
    max_tokens = int(room / per_token) if per_token > 0 else 0
    if max_tokens < MIN_USEFUL_TOKENS:
        return None
    return msgspec.structs.replace(whole, max_tokens=max_tokens, kv_bytes=kv_bytes_max, shrunk=True)


def note_of(event: AdmissionDecided) -> AdmissionNote:
    """What the client is told of a decision."""
    return AdmissionNote(
        action=event.action,
        reason=event.reason,
        max_tokens=event.max_tokens,
        kv_bytes=event.kv_bytes,
        pressure=round(event.pressure, 4),
        running=event.running,
        slots=event.slots,
        queued=event.queued,
        waited_ms=round(event.wait_s * MS_PER_S, 1) if event.action != "reject" else 0.0,
    )
