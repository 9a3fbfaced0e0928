"""Invariants of what operators do while requests run: restarts of executors, changes of settings."""

from gptoss.actors.directory import DECIDER_NAMES
from gptoss.errors import EngineLost, NotReady
from gptoss.messages import events as ev
from gptoss.simulation.observed import Observed, ViolationError
from gptoss.simulation.scenario import LOSSES


def restarts_refuse_nobody(observed: Observed) -> None:
    """Where nothing is lost by accident, a wanted restart costs nobody the answer."""
    if any(fault.kind in LOSSES for fault in observed.scenario.faults):
        return
    can_serve = False
    for record in observed.records:
        match record.event:
            case ev.MemoryPoolSet():
                can_serve = True
            case ev.RequestRejected(code=NotReady.code, message=message) if can_serve and "loading" not in message:
                raise ViolationError(f"{record.meta.correlation} was refused at {record.meta.pos}: {message}")
            case ev.RequestFailed(code=EngineLost.code, message=message):
                raise ViolationError(f"{record.meta.correlation} failed at {record.meta.pos}: {message}")
            case _:
                pass


def draining_executors_take_nobody(observed: Observed) -> None:
    """From the moment the router knows that an executor is to be restarted, it chooses it for nobody until it is back."""
    draining: set[str] = set()
    for record in observed.streams.get("router", []):
        match record.event:
            case ev.ExecutorDrained(executor=executor):
                draining.add(executor)
            case ev.ExecutorJoined(executor=executor) | ev.ExecutorLeft(executor=executor):
                draining.discard(executor)
            case ev.RouteDecided(request_id=request_id, executor=executor) if executor in draining:
                raise ViolationError(f"{request_id} was sent to {executor} at {record.meta.pos}, which is draining")
            case _:
                pass


def large_requests_go_to_several_devices(observed: Observed) -> None:
    """A prompt over the limit runs on one device only if the executor over several could not take it just then."""
    limit = observed.settings.multi_prompt_len
    for record in observed.streams.get("router", []):
        match record.event:
            case ev.ConfigChanged(settings=settings):
                limit = int(settings["multi_prompt_len"])
            case ev.RouteDecided(executor=executor, prompt_tokens=tokens, candidates=candidates) if tokens > limit:
                able = [each for each in candidates if each.multi_device and not each.health]
                able = [
                    each for each in able if each.running < each.slots and each.kv_bytes_free >= record.event.kv_bytes
                ]
                if executor and able and executor not in {each.executor for each in able}:
                    raise ViolationError(f"{record.event.request_id}, {tokens} tokens, went to {executor}")
            case _:
                pass


def settings_reach_deciders(observed: Observed) -> None:
    """Every decider says in its own stream that it takes what has changed, once for each change."""
    if any(True for _ in observed.of_type(ev.SupervisorEscalated)):
        return
    changes = [
        record.event for record in observed.streams.get("system", []) if isinstance(record.event, ev.ConfigChanged)
    ]
    for name in DECIDER_NAMES:
        taken = [
            record.event for record in observed.streams.get(name, []) if isinstance(record.event, ev.ConfigChanged)
        ]
        if taken != changes:
            raise ViolationError(f"{name} took {len(taken)} of {len(changes)} changes of settings")
