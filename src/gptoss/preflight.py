"""What can be refused before anything starts: a bad address, a missing model, a data folder that cannot be written.

Every check here is quick and light: no torch, no transformers, no network beyond a bind. Each raises an error that says
which setting to change. A check that passes promises nothing, it only makes the common mistakes fail at once.
"""

import errno
import ipaddress
import socket
import tempfile
from pathlib import Path

from gptoss.config import Settings
from gptoss.devices import parse_devices
from gptoss.engine.model_folder import check_folder
from gptoss.engine.model_source import resolve_model
from gptoss.errors import AddressInUse, ConfigError, JournalWriteFailed, ModelLoadError

GGUF_MAGIC = b"GGUF"
PROBE_BYTES = 4096

_Address = tuple[socket.AddressFamily, tuple[str, int]]


def check_settings(settings: Settings) -> None:
    """Run every check, the cheapest first.

    Raises:
        ConfigError: the host is public without consent or not of this machine, or the model or the devices are the
            names of nothing.
        ModelLoadError: the model's folder or file cannot become a model.
        AddressInUse: another process listens there, and ``auto_port`` is off.
        JournalWriteFailed: the data folder cannot be written.
    """
    check_exposure(settings)
    parse_devices(settings.devices, settings.gpu_mode)
    check_model(settings.model)
    if not settings.auto_port:
        check_port(settings.host, settings.port)
    if settings.journal == "segments":
        check_data_folder(settings.data_path)


def check_exposure(settings: Settings) -> None:
    """Refuse a host that others can reach, unless ``allow_public`` says so.

    Raises:
        ConfigError: the host is not loopback, or not an address at all.
    """
    if settings.allow_public:
        return
    exposed = [address for _, (address, _) in _addresses(settings.host, settings.port) if not _is_loopback(address)]
    if exposed:
        raise ConfigError(
            f"host is {settings.host!r}, which other machines can reach, and the API has no keys: "
            "use 127.0.0.1, or pass --allow-public if the network in front of it is yours"
        )


def check_model(model: str) -> None:
    """Refuse a model that is not there or cannot be one; a hub id is believed.

    Raises:
        ConfigError: it is the name of nothing.
        ModelLoadError: its folder or file is unreadable or incomplete.
    """
    try:
        spec = resolve_model(model)
        if spec.kind == "folder":
            check_folder(Path(spec.location))
        elif spec.kind == "gguf":
            _check_magic(Path(spec.location))
    except OSError as error:
        raise ModelLoadError(f"model is {model!r}, which cannot be read: {error.strerror}") from None


def check_port(host: str, port: int) -> None:
    """Refuse an address that HTTP could not have.

    Raises:
        ConfigError: the host is not of this machine, or the port needs rights that this user lacks.
        AddressInUse: another process listens there.
    """
    for family, address in _addresses(host, port):
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            # As asyncio binds: connections in TIME_WAIT do not count, IPv6 leaves the IPv4 port alone.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            try:
                probe.bind(address)
            except OSError as error:
                raise _bind_error(host, port, error) from None


def check_data_folder(folder: Path) -> None:
    """Make the data folder if need be, and write a few bytes into it.

    Raises:
        JournalWriteFailed: it cannot be made or written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder, buffering=0) as probe:
            probe.write(bytes(PROBE_BYTES))
    except OSError as error:
        raise JournalWriteFailed(
            f"cannot write to the data folder {folder}: {error.strerror}; "
            "make it writable, or choose another with --data-dir"
        ) from None


def _addresses(host: str, port: int) -> list[_Address]:
    try:
        found = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError):
        raise ConfigError(f"host is {host!r}, which is not an address that this machine knows") from None
    return [(family, (str(address[0]), port)) for family, _, _, _, address in found]


def _is_loopback(address: str) -> bool:
    return ipaddress.ip_address(address).is_loopback


def _bind_error(host: str, port: int, error: OSError) -> AddressInUse | ConfigError:
    if error.errno == errno.EADDRINUSE:
        return AddressInUse(
            f"port {port} on {host} is in use; stop what listens there, or pass another --port or --auto-port"
        )
    if error.errno == errno.EACCES:
        return ConfigError(f"port {port} is reserved for other users; pass a --port of 1024 or more")
    return ConfigError(f"cannot listen on {host} port {port}: {error.strerror}; is it an address of this machine?")


def _check_magic(path: Path) -> None:
    with path.open("rb") as file:
        if file.read(len(GGUF_MAGIC)) != GGUF_MAGIC:
            raise ModelLoadError(f"{path} is not a GGUF file: it does not begin with {GGUF_MAGIC.decode()}")
