"""Settings: layers, where each value came from, and mistakes refused by name and place."""

from pathlib import Path
from typing import Any

import pytest

from gptoss.config import Settings, load_settings
from gptoss.errors import ConfigError


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "gptoss.toml"
    path.write_text('model = "20b"\nport = 9000\nmax_queue = 10\nauto_port = true\n', encoding="utf-8")
    return path


def test_without_layers_everything_is_default() -> None:
    layered = load_settings(environ={})
    assert layered.settings == Settings()
    assert set(layered.origins.values()) == {"default"}
    assert set(layered.origins) == set(Settings.__struct_fields__)


def test_flags_beat_the_environment_which_beats_the_file(file: Path) -> None:
    environ = {"GPTOSS_PORT": "9001", "GPTOSS_MAX_QUEUE": "11", "HOME": "/root"}
    layered = load_settings({"max_queue": 12, "host": None}, environ=environ, file=file)
    settings = layered.settings
    assert (settings.model, settings.port, settings.max_queue, settings.auto_port) == ("20b", 9001, 12, True)
    assert settings.host == "127.0.0.1"


def test_each_value_names_its_origin(file: Path) -> None:
    layered = load_settings({"max_queue": 12}, environ={"GPTOSS_PORT": "9001"}, file=file)
    assert layered.origins["model"] == str(file)
    assert layered.origins["port"] == "GPTOSS_PORT"
    assert layered.origins["max_queue"] == "--max-queue"
    assert layered.origins["host"] == "default"


def test_the_process_environment_is_read_when_none_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GPTOSS_QUEUE_TIMEOUT_S", "1.5")
    assert load_settings().settings.queue_timeout_s == 1.5


@pytest.mark.parametrize(
    ("flags", "environ", "toml", "origin"),
    [
        ({"prot": 1}, {}, "", "--prot"),
        ({}, {"GPTOSS_PROT": "1"}, "", "GPTOSS_PROT"),
        ({}, {}, "prot = 1", "settings.toml"),
    ],
)
def test_an_unknown_key_is_refused_in_every_layer(
    flags: dict[str, Any], environ: dict[str, str], toml: str, origin: str, tmp_path: Path
) -> None:
    path = tmp_path / "settings.toml"
    path.write_text(toml, encoding="utf-8")
    with pytest.raises(ConfigError, match=f"{origin}: unknown setting 'prot'; known are allow_public, .*port"):
        load_settings(flags, environ=environ, file=path)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("port", "70000"),
        ("port", "many"),
        ("max_queue", "0"),
        ("queue_timeout_s", "-1"),
        ("queue_timeout_s", "nan"),
        ("dtype", "int4"),
        ("profile", "fast"),
        ("auto_port", "maybe"),
    ],
)
def test_a_bad_value_is_refused_with_its_key_and_place(key: str, value: str) -> None:
    with pytest.raises(ConfigError, match=f"^GPTOSS_{key.upper()}: {key} is '{value}'"):
        load_settings(environ={f"GPTOSS_{key.upper()}": value})


def test_a_mistake_in_a_lower_layer_is_not_hidden_by_a_higher_one(tmp_path: Path) -> None:
    path = tmp_path / "settings.toml"
    path.write_text('port = "many"\n', encoding="utf-8")
    with pytest.raises(ConfigError, match=r"settings\.toml: port is 'many'"):
        load_settings({"port": 8000}, environ={}, file=path)


def test_a_file_that_is_no_toml_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "settings.toml"
    path.write_text("port = = 1", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"settings\.toml is not valid TOML"):
        load_settings(environ={}, file=path)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match=r"settings\.toml is not valid TOML"):
        load_settings(environ={}, file=path)


def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read the settings file .*: No such file"):
        load_settings(environ={}, file=tmp_path / "missing.toml")


def test_opentelemetrys_own_variables_count_and_ours_win() -> None:
    environ = {
        "OTEL_EXPORTER_OTLP_ENDPOINT": "http://collector:4318",
        "OTEL_SERVICE_NAME": "theirs",
        "GPTOSS_OTLP_SERVICE_NAME": "ours",
        "OTEL_EXPORTER_OTLP_PROTOCOL": "",
    }
    layered = load_settings(environ=environ)
    settings = layered.settings
    assert (settings.otlp_endpoint, settings.otlp_service_name) == ("http://collector:4318", "ours")
    assert settings.otlp_protocol == "http/protobuf"
    assert layered.origins["otlp_endpoint"] == "OTEL_EXPORTER_OTLP_ENDPOINT"
    assert layered.origins["otlp_service_name"] == "GPTOSS_OTLP_SERVICE_NAME"


@pytest.mark.parametrize(("name", "value"), [("ENDPOINT", "collector:4318"), ("PROTOCOL", "http/json")])
def test_a_bad_value_in_opentelemetrys_variables_is_named(name: str, value: str) -> None:
    with pytest.raises(ConfigError, match=f"^OTEL_EXPORTER_OTLP_{name}: otlp_{name.lower()} is '{value}'"):
        load_settings(environ={f"OTEL_EXPORTER_OTLP_{name}": value})


@pytest.mark.parametrize("text", ["1", "true", "YES", " on "])
def test_words_for_true(text: str) -> None:
    assert load_settings(environ={"GPTOSS_AUTO_PORT": text}).settings.auto_port is True


@pytest.mark.parametrize("text", ["0", "false", "No", "off"])
def test_words_for_false(text: str) -> None:
    assert load_settings({"auto_port": None}, environ={"GPTOSS_AUTO_PORT": text}).settings.auto_port is False


def test_paths_default_to_the_platform_and_expand_the_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/somewhere")
    assert Settings(data_dir="~/journal").data_path == Path("/somewhere/journal")
    assert Settings().data_path.name == "gptoss"
    assert Settings(cache_dir="/models").cache_path == Path("/models")


def test_every_setting_is_documented() -> None:
    documentation = Settings.__doc__ or ""
    undocumented = {name for name in Settings.__struct_fields__ if name not in documentation}
    assert undocumented <= {"dtype", "log_level"}
