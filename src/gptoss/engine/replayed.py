"""An engine that is told what to do: submits, cancels and the plans of a log, and the tokens that come of it.

It has no loop and no thread: whoever replays calls it. With the recorded plans it computes what the recorded engine
computed, whoever else was in the batch then (``engine.port``).
"""

from collections.abc import Collection

import msgspec
import torch

from gptoss.clock import SystemClock
from gptoss.engine.core import EngineCore, core_options
from gptoss.engine.load import LoadedModel, load_model
from gptoss.engine.model_folder import Progress
from gptoss.engine.port import Cancel, Failed, Finished, Load, StepDone, StepRow, Submit
from gptoss.messages.model import EngineCapabilities, ModelFingerprint
from gptoss.messages.plan import StepPlan

TERMINALS = (Finished, Failed)


class ReplayedModel:
    """A loaded model, for any number of engine lives; on the CPU where ``load`` names a device that is not here.

    Raises:
        ModelLoadError: it cannot be loaded.
    """

    def __init__(self, load: Load, progress: Progress) -> None:
        if load.num_threads:
            torch.set_num_threads(load.num_threads)
        if load.device != "cpu" and not torch.cuda.is_available():
            load = msgspec.structs.replace(load, device="cpu")
        self._load = load
        self._model: LoadedModel = load_model(load, progress)
        self.fingerprint: ModelFingerprint = self._model.fingerprint

    def engine(self) -> "ReplayedEngine":
        """A fresh engine, as after a start."""
        core = EngineCore(
            self._model.runner,
            self._model.capabilities,
            self._model.tokenizer,
            SystemClock(),
            core_options(self._load, self._model),
        )
        return ReplayedEngine(core)


class ReplayedEngine:
    """One life of an engine.

    Attributes:
        capabilities: of the engine that runs here.
        requests: that it has.
    """

    def __init__(self, core: EngineCore) -> None:
        self._core = core
        self.capabilities: EngineCapabilities = core.capabilities
        self.requests: set[str] = set()

    def submit(self, submit: Submit) -> None:
        """Take a request. One that the engine refuses, or that is over already, is not among ``requests`` afterwards."""
        ends = {event.request_id for event in self._core.handle(submit) if isinstance(event, TERMINALS)}
        if submit.request_id not in ends:
            self.requests.add(submit.request_id)

    def cancel(self, request_ids: Collection[str]) -> None:
        """Let go of requests; unknown ones are fine."""
        for request_id in request_ids:
            self._core.handle(Cancel(request_id=request_id))
            self.requests.discard(request_id)

    def step(self, plan: StepPlan) -> tuple[StepRow, ...]:
        """Carry out the part of a plan that concerns ``requests``."""
        mine = msgspec.structs.replace(
            plan,
            preemptions=tuple(each for each in plan.preemptions if each.request_id in self.requests),
            starts=tuple(each for each in plan.starts if each.request_id in self.requests),
            rows=tuple(each for each in plan.rows if each.request_id in self.requests),
        )
        if not (mine.preemptions or mine.starts or mine.rows):
            return ()
        events = self._core.step(mine)
        self.requests -= {event.request_id for event in events if isinstance(event, TERMINALS)}
        return next(event.rows for event in events if isinstance(event, StepDone))
