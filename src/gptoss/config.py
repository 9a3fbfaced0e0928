"""Settings: one frozen value, layered from command line, environment, TOML file and defaults.

Only this module reads the environment. Later layers never hide a mistake in an earlier one: an unknown key or a bad
value in any layer refuses to start and is named together with where it stands.
"""

import contextlib
import os
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias, get_type_hints

import msgspec
import platformdirs
from msgspec import Meta

from gptoss.errors import ConfigError

ENV_PREFIX = "GPTOSS_"
BYTES_PER_MB = 1024 * 1024
"""Of the settings whose names end in ``_mb``."""
OTEL_VARIABLES = {
    "OTEL_EXPORTER_OTLP_ENDPOINT": "otlp_endpoint",
    "OTEL_EXPORTER_OTLP_PROTOCOL": "otlp_protocol",
    "OTEL_SERVICE_NAME": "otlp_service_name",
}
"""OpenTelemetry's own names for settings; one of ours for the same setting wins."""

Port = Annotated[int, Meta(ge=0, le=65535)]
Count = Annotated[int, Meta(ge=1, le=1_000_000)]
CountOrAuto = Annotated[int, Meta(ge=0, le=1_000_000_000_000)]
CountOrNone = Annotated[int, Meta(ge=-1, le=1_000_000_000_000)]
CountOrNever = Annotated[int, Meta(ge=0, le=1_000_000_000)]
Seconds = Annotated[float, Meta(gt=0, le=86_400)]
Share = Annotated[float, Meta(ge=0, le=1)]
HttpUrl = Annotated[str, Meta(pattern=r"^(https?://[^\s/]+\S*)?$")]

ProfileName: TypeAlias = Literal["latency_first", "quality_first"]
PromptVersion: TypeAlias = Literal["SYS/v1", "SYS/v2"]


class Profile(msgspec.Struct, frozen=True, kw_only=True):
    """Defaults that go together; settings and requests override each of them.

    Attributes:
        max_batch_size: requests that run at once on each executor.
        max_tokens: of an answer to a request that names no length.
        temperature: of a request that names none.
    """

    max_batch_size: int
    max_tokens: int
    temperature: float


PROFILES: dict[str, Profile] = {
    "latency_first": Profile(max_batch_size=32, max_tokens=512, temperature=0.7),
    "quality_first": Profile(max_batch_size=16, max_tokens=2048, temperature=0.8),
}

LIVE = (
    "max_queue",
    "queue_timeout_s",
    "request_timeout_s",
    "step_timeout_s",
    "drain_timeout_s",
    "multi_prompt_len",
    "multi_kv_mb",
    "multi_pressure",
    "pressure_evict",
    "pressure_shrink",
    "pressure_queue",
    "pressure_refuse",
    "sessions_kv_mb",
    "session_idle_s",
)
"""Settings that can change while the server runs: those that deciders and executors look up each time. Whatever shapes
what exists already, such as a model, a port or a journal, needs a restart."""


class Settings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Everything that can be set. A number that ends in ``_s`` is seconds, ``_mb`` mebibytes; 0 means automatic.

    Attributes:
        model: ``demo``, ``20b``, ``120b``, a hub id, a folder or a ``.gguf`` file.
        served_model_name: the name clients use; empty derives it from ``model``.
        host, port: where HTTP listens; ``auto_port`` takes the next free port when this one is in use.
        allow_public: permit a ``host`` other than loopback although the API has no keys.
        data_dir: journal and node key; ``cache_dir``: prepared models.
        devices: ``auto``, ``cpu``, ``cpu:2`` (two CPU executors), or a list such as ``cuda:0,cuda:1``; ``cuda:0+cuda:1`` is
            one executor over both.
        gpu_mode: how a model lies on several devices: ``single`` has a whole one on each, ``pipeline`` some layers on each,
            ``tensor`` a part of every layer on each; ``auto`` is ``single`` if the model fits one device, else ``pipeline``.
        multi_prompt_len, multi_kv_mb: a request with a longer prompt or more KV memory goes to an executor over several
            devices, where there is one; so does every request while the others are fuller than ``multi_pressure``. 0: never.
        kernels: ``native`` insists on this package's CPU kernels, ``torch`` leaves them out.
        quantization: ``int8`` or ``int4`` packs weights, with the CPU kernels; see docs/performance.md for what it costs.
        num_threads: threads of each CPU executor.
        profile: ``latency_first`` or ``quality_first``; sets the defaults for batch, tokens and temperature.
        prompt_version: ``SYS/v1`` renders conversations as they come; ``SYS/v2`` gives one without a system message its own.
        max_batch_size, max_model_len, kv_budget_mb: limits of each executor.
        kv_layout: ``slots``, contiguous for each request, or ``paged``, from one pool; ``auto`` is slots on a CPU.
        prefix_cache_mb: the part of its KV memory that cached prefixes may take while no request needs it; -1 is none.
        speculation: ``ngram`` guesses tokens that stood in the request before and verifies several in a step.
        max_queue: requests that may wait for admission.
        queue_order: ``fair`` lets tenants take turns; ``priority`` knows none, the lowest number and the oldest go first.
        queue_ageing_s: in a fair queue, the waiting that a step of priority is worth, and after which a tenant's turn is due.
        pressure_evict, pressure_shrink, pressure_queue, pressure_refuse: shares of the KV memory that is spoken for, from
            which on idle sessions are given up, newcomers shrunk, queued, and refused if late; 0 is never.
        session_kv_mb: KV that one session may keep between turns; 0 keeps none. ``sessions_kv_mb`` bounds all of them.
        session_idle_s: a session that is unused for so long is given up.
        policy_version: of the deciders' rules; 1 decides as servers before tenants, pressure and sessions did.
        queue_timeout_s: how long one may wait there; ``request_timeout_s`` bounds its whole life.
        step_timeout_s: an engine with running requests that is silent for this long is replaced.
        drain_timeout_s: how long running requests may go on after SIGTERM.
        client_stall_s: a client that reads nothing for this long is dropped.
        journal: ``segments`` on disk, or ``memory``.
        content: what the content family keeps: ``none``, ``tokens`` (and stop strings), or ``full``, which is text too.
        journal_segment_mb, journal_retention_mb, content_retention_mb: sizes of the embedded store.
        body_limit_mb: largest request body.
        batch_concurrency: items of batches that run at once, behind everything else.
        file_limit_mb: largest uploaded file; ``files_limit_mb`` bounds all files together.
        log_format: ``console``, ``json``, or ``auto`` by terminal.
        otlp_endpoint: base URL of an OpenTelemetry collector; empty exports no traces. ``otlp_protocol`` is how it is
            spoken to, ``otlp_service_name`` what it calls this server.
        trace_errors, trace_cancelled: keep every trace of a request that the server failed, or gave up.
        trace_slow_s: keep every trace that took longer; ``trace_ratio``: keep this share of all others.
    """

    model: str = "demo"
    served_model_name: str = ""
    host: str = "127.0.0.1"
    port: Port = 8000
    auto_port: bool = False
    allow_public: bool = False
    data_dir: str = ""
    cache_dir: str = ""
    devices: str = "auto"
    gpu_mode: Literal["auto", "single", "pipeline", "tensor"] = "auto"
    multi_prompt_len: CountOrNever = 8000
    multi_kv_mb: CountOrNever = 6000
    multi_pressure: Share = 0.85
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    kernels: Literal["auto", "native", "torch"] = "auto"
    quantization: Literal["none", "int8", "int4"] = "none"
    num_threads: CountOrAuto = 0
    profile: ProfileName = "latency_first"
    prompt_version: PromptVersion = "SYS/v1"
    max_batch_size: CountOrAuto = 0
    max_model_len: CountOrAuto = 0
    kv_budget_mb: CountOrAuto = 0
    kv_layout: Literal["auto", "slots", "paged"] = "auto"
    prefix_cache_mb: CountOrNone = 0
    speculation: Literal["off", "ngram"] = "off"
    max_queue: Count = 512
    queue_order: Literal["fair", "priority"] = "fair"
    queue_ageing_s: Seconds = 10.0
    pressure_evict: Share = 0.70
    pressure_shrink: Share = 0.80
    pressure_queue: Share = 0.85
    pressure_refuse: Share = 0.90
    session_kv_mb: CountOrNever = 512
    sessions_kv_mb: CountOrNever = 20_480
    session_idle_s: Seconds = 180.0
    policy_version: Annotated[int, Meta(ge=1, le=2)] = 2
    queue_timeout_s: Seconds = 60.0
    request_timeout_s: Seconds = 600.0
    step_timeout_s: Seconds = 60.0
    drain_timeout_s: Seconds = 30.0
    client_stall_s: Seconds = 30.0
    journal: Literal["segments", "memory"] = "segments"
    content: Literal["full", "tokens", "none"] = "tokens"
    journal_segment_mb: Count = 64
    journal_retention_mb: Count = 2048
    content_retention_mb: Count = 512
    body_limit_mb: Count = 2
    batch_concurrency: Count = 4
    file_limit_mb: Count = 200
    files_limit_mb: Count = 2048
    log_format: Literal["auto", "console", "json"] = "auto"
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    otlp_endpoint: HttpUrl = ""
    otlp_protocol: Literal["http/protobuf", "grpc"] = "http/protobuf"
    otlp_service_name: str = "gptoss"
    trace_errors: bool = True
    trace_cancelled: bool = True
    trace_slow_s: Seconds = 10.0
    trace_ratio: Share = 0.03

    @property
    def data_path(self) -> Path:
        """Folder of everything that a server keeps."""
        return Path(self.data_dir or platformdirs.user_data_dir("gptoss")).expanduser()

    @property
    def journal_path(self) -> Path:
        """Folder of the segments."""
        return self.data_path / "journal"

    @property
    def cache_path(self) -> Path:
        """Folder of prepared models."""
        return Path(self.cache_dir or platformdirs.user_cache_dir("gptoss")).expanduser()


class Layered(msgspec.Struct, frozen=True):
    """Effective settings, and for each key which layer it came from: a flag, a variable, a file or ``default``.

    ``reload`` reads all layers again and raises what ``load_settings`` does.
    """

    settings: Settings
    origins: dict[str, str]
    reload: Callable[[], "Layered"]


def load_settings(
    flags: Mapping[str, Any] | None = None, *, environ: Mapping[str, str] | None = None, file: Path | None = None
) -> Layered:
    """Merge the layers: flags over environment (``GPTOSS_*``, then ``OTEL_*``) over the TOML file over defaults.

    Args:
        flags: values given on the command line, by setting name; None values count as not given.
        environ: the environment; None reads the process's own.
        file: a TOML file whose top-level keys are setting names.

    Raises:
        ConfigError: a key is unknown, a value is bad, or the file cannot be read; names key, value and layer.
    """
    variables = os.environ if environ is None else environ
    layers: list[tuple[str, dict[str, Any]]] = []
    if file is not None:
        layers.append((str(file), _read_toml(file)))
    otel = {name: value for key, name in OTEL_VARIABLES.items() if (value := variables.get(key))}
    layers.append(("otel", otel))
    prefixed = {key: value for key, value in variables.items() if key.startswith(ENV_PREFIX)}
    layers.append(("environment", {key.removeprefix(ENV_PREFIX).lower(): value for key, value in prefixed.items()}))
    layers.append(("flag", {key: value for key, value in (flags or {}).items() if value is not None}))

    types = get_type_hints(Settings, include_extras=True)
    values: dict[str, Any] = {}
    origins = dict.fromkeys(Settings.__struct_fields__, "default")
    for layer, given in layers:
        for key, value in given.items():
            origin = _origin(layer, key)
            if key not in types:
                raise ConfigError(f"{origin}: unknown setting {key!r}; known are {', '.join(sorted(types))}")
            values[key] = _convert(value, types[key], origin, key)
            origins[key] = origin
    return Layered(Settings(**values), origins, lambda: load_settings(flags, environ=environ, file=file))


def put_environment(**variables: str) -> None:
    """Set variables of this process, for libraries that take nothing else."""
    os.environ.update(variables)


def live_settings(settings: Settings) -> dict[str, bool | int | float | str]:
    """Every setting that can change while the server runs, with its value."""
    return {name: getattr(settings, name) for name in LIVE}


def needing_restart(before: Settings, after: Settings) -> tuple[str, ...]:
    """The settings that differ and cannot change while the server runs."""
    names = (name for name in Settings.__struct_fields__ if name not in LIVE)
    return tuple(name for name in names if getattr(before, name) != getattr(after, name))


def check_live(changes: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Changes to a running server, checked.

    Args:
        changes: by setting name.
        where: their source, for the message.

    Raises:
        ConfigError: a setting is unknown or needs a restart, or a value is bad; names it.
    """
    types = get_type_hints(Settings, include_extras=True)
    for name in changes:
        if name not in types:
            raise ConfigError(f"{where}: unknown setting {name!r}; those that can change are {', '.join(LIVE)}")
        if name not in LIVE:
            raise ConfigError(f"{where}: {name} needs a restart; those that can change are {', '.join(LIVE)}")
    return {name: _convert(value, types[name], where, name) for name, value in changes.items()}


def with_changes(settings: Settings, changes: Mapping[str, Any]) -> Settings:
    """Settings after a recorded change; a name or value that this version does not know is passed over."""
    types = get_type_hints(Settings, include_extras=True)
    known: dict[str, Any] = {}
    for name, value in changes.items():
        if name in types:
            with contextlib.suppress(msgspec.ValidationError):
                known[name] = msgspec.convert(value, types[name])
    return msgspec.structs.replace(settings, **known)


def _origin(layer: str, key: str) -> str:
    if layer == "environment":
        return f"{ENV_PREFIX}{key.upper()}"
    if layer == "otel":
        return next(variable for variable, name in OTEL_VARIABLES.items() if name == key)
    if layer == "flag":
        return f"--{key.replace('_', '-')}"
    return layer


def _convert(value: Any, kind: Any, origin: str, key: str) -> Any:
    if kind is bool and isinstance(value, str):
        lowered = value.strip().lower()
        if lowered in {"1", "true", "yes", "on"}:
            return True
        if lowered in {"0", "false", "no", "off"}:
            return False
        raise ConfigError(f"{origin}: {key} is {value!r}; it must be true or false")
    try:
        return msgspec.convert(value, kind, strict=not isinstance(value, str))
    except msgspec.ValidationError as error:
        raise ConfigError(f"{origin}: {key} is {value!r}: {error}") from None


def _read_toml(file: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read the settings file {file}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file} is not valid TOML: {error}") from None
