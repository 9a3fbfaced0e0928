import errno
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from gptoss.config import Settings
from gptoss.errors import AddressInUse, ConfigError, JournalWriteFailed, ModelLoadError
from gptoss.preflight import check_data_folder, check_exposure, check_model, check_port, check_settings


@pytest.fixture
def taken_port() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


@pytest.fixture
def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def test_good_settings_pass_and_the_data_folder_is_made(tmp_path: Path, free_port: int) -> None:
    settings = Settings(port=free_port, data_dir=str(tmp_path / "a" / "data"))
    check_settings(settings)
    assert settings.data_path.is_dir()
    assert not list(settings.data_path.iterdir())


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "localhost", "::1"])
def test_loopback_needs_no_consent(host: str) -> None:
    assert check_exposure(Settings(host=host)) is None


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "", "192.0.2.1"])
def test_a_host_that_others_can_reach_needs_consent(host: str) -> None:
    with pytest.raises(ConfigError, match="--allow-public"):
        check_exposure(Settings(host=host))
    check_exposure(Settings(host=host, allow_public=True))


def test_a_host_that_is_no_address_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="'not an address'"):
        check_exposure(Settings(host="not an address"))


def test_a_taken_port_is_refused_unless_the_next_one_may_be_taken(tmp_path: Path, taken_port: int) -> None:
    with pytest.raises(AddressInUse, match=f"port {taken_port} on 127.0.0.1 is in use.*--auto-port"):
        check_port("127.0.0.1", taken_port)
    check_settings(Settings(port=taken_port, auto_port=True, data_dir=str(tmp_path)))


def test_port_zero_is_never_taken() -> None:
    assert check_port("127.0.0.1", 0) is None


def test_an_address_of_another_machine_is_a_bad_setting() -> None:
    with pytest.raises(ConfigError, match="is it an address of this machine"):
        check_port("192.0.2.1", 8000)


def test_a_privileged_port_is_a_bad_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: socket.socket, address: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(socket.socket, "bind", refuse)
    with pytest.raises(ConfigError, match=r"port 80 is reserved.*1024"):
        check_port("127.0.0.1", 80)


def test_a_data_folder_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "data").write_text("")
    with pytest.raises(JournalWriteFailed, match=r"cannot write to the data folder .*/data: .*--data-dir"):
        check_data_folder(tmp_path / "data")


def test_a_read_only_data_folder_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**_: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    with pytest.raises(JournalWriteFailed, match="Read-only file system"):
        check_data_folder(tmp_path)


def test_a_journal_in_memory_needs_no_data_folder(tmp_path: Path, free_port: int) -> None:
    (tmp_path / "data").write_text("")
    settings = Settings(port=free_port, data_dir=str(tmp_path / "data"), journal="memory")
    assert check_settings(settings) is None


def test_bad_devices_are_refused_before_anything_is_touched(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="devices is 'tpu'"):
        check_settings(Settings(devices="tpu", data_dir=str(tmp_path / "data")))
    assert not (tmp_path / "data").exists()


def test_known_names_and_hub_ids_are_believed() -> None:
    for model in ("demo", "20b", "openai/gpt-oss-20b"):
        assert check_model(model) is None


def test_an_empty_model_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match=r"has no config\.json"):
        check_model(str(tmp_path))


def test_a_model_that_is_the_name_of_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such file or folder"):
        check_model(str(tmp_path / "missing"))


def test_a_gguf_file_must_begin_as_one(tmp_path: Path) -> None:
    good, bad = tmp_path / "good.gguf", tmp_path / "bad.gguf"
    good.write_bytes(b"GGUF\x03\0\0\0")
    bad.write_bytes(b"<!DOCTYPE html>")
    check_model(str(good))
    with pytest.raises(ModelLoadError, match=r"bad\.gguf is not a GGUF file"):
        check_model(str(bad))


def test_a_model_folder_that_may_not_be_read_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Path) -> bool:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "is_dir", refuse)
    with pytest.raises(ModelLoadError, match="cannot be read: Permission denied"):
        check_model(str(tmp_path))
