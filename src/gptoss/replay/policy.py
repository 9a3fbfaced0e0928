"""A changed policy: which settings may be tried on a recording, and what they change in what was recorded.

Only settings that a decider or the scheduler goes by can be tried; anything else would change what happened outside of
them, of which the recording says nothing.
"""

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_type_hints

import msgspec

from gptoss.actors.admission_state import AdmissionState
from gptoss.actors.decider import Decider, keeper_of
from gptoss.actors.deciders import Deciders, decider_with, deciders_of
from gptoss.actors.memory_state import GuardState
from gptoss.actors.router_state import RouterState
from gptoss.clock import NS_PER_S
from gptoss.config import BYTES_PER_MB, Settings
from gptoss.engine.scheduler import SchedulerState
from gptoss.errors import ConfigError
from gptoss.messages import commands as cmd
from gptoss.messages.commands import Command, SettingValue
from gptoss.messages.model import EngineCapabilities

NUMBERS = ("kv_budget_mb", "max_batch_size", "max_queue", "queue_timeout_s", "request_timeout_s")
"""Settings that must be given as numbers: 0 would be automatic, of which a recording knows nothing."""
TRIABLE = (
    *NUMBERS,
    "queue_order",
    "queue_ageing_s",
    "pressure_evict",
    "pressure_shrink",
    "pressure_queue",
    "pressure_refuse",
    "multi_prompt_len",
    "multi_kv_mb",
    "session_kv_mb",
    "sessions_kv_mb",
    "session_idle_s",
    "policy_version",
)

replace = msgspec.structs.replace


def read_policy(file: Path) -> dict[str, Any]:
    """The settings of a TOML file.

    Raises:
        ConfigError: it cannot be read, or names a setting that cannot be tried, or a value that it cannot have.
    """
    try:
        given = tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read the policy file {file}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file} is not valid TOML: {error}") from None
    if not given:
        raise ConfigError(f"{file} sets nothing; settings that can be tried are {', '.join(TRIABLE)}")
    return check_changes(given, str(file))


def check_changes(given: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The settings, checked. Raises ``ConfigError`` as ``read_policy`` does; ``where`` names their source."""
    kinds = get_type_hints(Settings, include_extras=True)
    changes: dict[str, Any] = {}
    for name, value in given.items():
        if name not in TRIABLE:
            raise ConfigError(f"{where}: {name} cannot be tried on a recording; these can: {', '.join(TRIABLE)}")
        try:
            changes[name] = msgspec.convert(value, kinds[name])
        except msgspec.ValidationError as error:
            raise ConfigError(f"{where}: {name} is {value!r}: {error}") from None
        if value == 0 and name in NUMBERS:
            raise ConfigError(f"{where}: {name} is 0, which is automatic; a recording needs a number")
    return changes


class Policy:
    """Recorded settings with changes.

    Attributes:
        settings: with the changes.
        deciders: made from them.
        live: of each stream, the settings that it took while the server ran.
    """

    def __init__(self, recorded: Settings, changes: Mapping[str, Any]) -> None:
        self._changes = changes
        self._recorded = recorded
        self.settings = replace(recorded, **changes)
        self.deciders: Deciders = deciders_of(self.settings)
        self.live: dict[str, dict[str, SettingValue]] = {}
        self._remade: dict[str, Decider[Any]] = {}
        self._slots: int | None = changes.get("max_batch_size")
        budget_mb: int | None = changes.get("kv_budget_mb")
        self._budget = budget_mb * BYTES_PER_MB if budget_mb else None

    def decider(self, stream: str) -> Decider[Any] | None:
        """Who decides in a stream by now."""
        return self._remade.get(stream) or self.deciders.of(stream)

    def take(self, stream: str, settings: dict[str, SettingValue]) -> None:
        """A stream takes other settings; those that are tried stay as they are tried."""
        self.live[stream] = settings
        self._remade[stream] = decider_with(self._recorded, stream, {**settings, **self._changes})

    @property
    def is_changed(self) -> bool:
        """Whether it is another than the recorded one."""
        return bool(self._changes)

    @property
    def changes_engines(self) -> bool:
        """Whether plans may differ."""
        return self._slots is not None or self._budget is not None

    def command(self, command: Command, request_deadline_ns: int | None = None) -> Command:
        """What a recorded command would have been.

        Args:
            command: as recorded.
            request_deadline_ns: of an ``AdmitRequest``, the end of its request's life; None if that is not known.
        """
        match command:
            case cmd.SetMemoryPool():
                return replace(command, capabilities=self.capabilities(command.capabilities))
            case cmd.SetExecutor() | cmd.SetCapacity() if command.slots:
                return replace(
                    command,
                    slots=self._slots or command.slots,
                    kv_budget_bytes=self._budget or command.kv_budget_bytes,
                )
            case cmd.AdmitRequest() if "queue_timeout_s" in self._changes or "request_timeout_s" in self._changes:
                deadline_ns = command.now_ns + int(self.settings.queue_timeout_s * NS_PER_S)
                return replace(command, deadline_ns=min(deadline_ns, request_deadline_ns or deadline_ns))
            case cmd.BeginRequest() if command.queue_timeout_s and "queue_timeout_s" in self._changes:
                return self._begin(replace(command, queue_timeout_s=self.settings.queue_timeout_s))
            case cmd.BeginRequest():
                return self._begin(command)
            case _:
                return command

    def _begin(self, command: cmd.BeginRequest) -> Command:
        timeout_ns = int(self._recorded.request_timeout_s * NS_PER_S)
        if "request_timeout_s" not in self._changes or command.deadline_ns - command.now_ns != timeout_ns:
            return command  # as recorded, or the client set its own
        timeout_ns = int(self.settings.request_timeout_s * NS_PER_S)
        return replace(command, deadline_ns=command.now_ns + timeout_ns)

    def capabilities(self, recorded: EngineCapabilities) -> EngineCapabilities:
        """What an engine would have said of itself."""
        slots = self._slots or recorded.max_batch_size
        return replace(
            recorded,
            max_batch_size=slots,
            kv_budget_bytes=self._budget or recorded.kv_budget_bytes,
            limits=replace(recorded.limits, max_batch_size=slots) if recorded.limits else None,
        )

    def scheduler_state(self, recorded: SchedulerState, capabilities: EngineCapabilities) -> SchedulerState:
        """What a scheduler would have seen; a budget that memory had shortened stays short."""
        is_whole = recorded.kv_budget_bytes == capabilities.kv_budget_bytes
        limits = replace(recorded.limits, max_batch_size=self._slots or recorded.limits.max_batch_size)
        budget = self._budget if is_whole and self._budget else recorded.kv_budget_bytes
        return replace(recorded, limits=limits, kv_budget_bytes=budget)

    def own(self, stream: str, state: Any) -> Any:
        """A state as this policy's decider of the stream would have it: its line may be ordered otherwise."""
        keeper = keeper_of(self.deciders.of(stream))
        return state if keeper is None else keeper.restored(keeper.recorded(state))

    def state(self, recorded: Any) -> Any:
        """A decider's recorded state, as it would have been."""
        match recorded:
            case GuardState():
                pools = {name: self.capabilities(pool) for name, pool in recorded.pools.items()}
                return replace(recorded, pools=pools)
            case AdmissionState():
                capacities = {
                    name: replace(
                        each,
                        slots=self._slots or each.slots,
                        kv_budget_bytes=self._budget or each.kv_budget_bytes,
                    )
                    if each.slots
                    else each
                    for name, each in recorded.capacities.items()
                }
                return replace(recorded, capacities=capacities)
            case RouterState():
                executors = {
                    name: replace(
                        each,
                        slots=self._slots or each.slots,
                        kv_budget_bytes=self._budget or each.kv_budget_bytes,
                    )
                    for name, each in recorded.executors.items()
                }
                return replace(recorded, executors=executors)
            case _:
                return recorded
