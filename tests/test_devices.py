"""From the settings to executors."""

from typing import Any

import pytest

from gptoss import devices
from gptoss.devices import Device, gpu_memory_bytes, parse_devices, weights_fit_one
from gptoss.errors import ConfigError


def parsed(setting: str, mode: Any = "single", **options: Any) -> list[tuple[str, str, str]]:
    return [(each.executor, each.device, each.mode) for each in parse_devices(setting, mode, **options)]


def test_each_device_is_an_executor() -> None:
    assert parsed("cpu:2") == [("cpu:0", "cpu", "pipeline"), ("cpu:1", "cpu", "pipeline")]
    assert [name for name, *_ in parsed("cuda:0, cuda:3")] == ["cuda:0", "cuda:3"]
    assert [name for name, *_ in parsed("cuda")] == ["cuda:0"]


@pytest.mark.parametrize("mode", ["pipeline", "tensor"])
def test_a_mode_joins_all_devices(mode: str) -> None:
    assert parsed("cuda:0,cuda:1", mode) == [("cuda:0+cuda:1", "cuda:0+cuda:1", mode)]
    assert parsed("cpu:2", mode) == [("cpu:0+cpu:1", "cpu+cpu", mode)]


def test_joined_devices_stand_beside_single_ones() -> None:
    assert parsed("cuda:0,cuda:1+cuda:2", "auto") == [
        ("cuda:0", "cuda:0", "pipeline"),
        ("cuda:1+cuda:2", "cuda:1+cuda:2", "pipeline"),
    ]
    assert [each[2] for each in parsed("cpu,cpu+cpu", "tensor")] == ["tensor", "tensor"]
    assert [each[0] for each in parsed("cpu:2,cpu+cpu", "auto")] == ["cpu:0", "cpu:1", "cpu:2+cpu:3"]
    assert Device(executor="x", device="cuda:1+cuda:2").devices == ("cuda:1", "cuda:2")


def test_auto_joins_gpus_only_if_the_model_fits_none_of_them() -> None:
    assert len(parsed("cuda:0,cuda:1", "auto")) == 2
    assert [name for name, *_ in parsed("cuda:0,cuda:1", "auto", fits_one=False)] == ["cuda:0+cuda:1"]
    assert [name for name, *_ in parsed("cpu", "auto", fits_one=False)] == ["cpu:0"]
    assert weights_fit_one(70, (100, 100))
    assert not weights_fit_one(90, (200, 100))
    assert weights_fit_one(90, ())


@pytest.mark.parametrize(
    ("setting", "mode"),
    [
        ("", "single"),
        ("gpu", "single"),
        ("cuda:0,cuda:0", "single"),
        ("cuda:0,cuda:00", "single"),
        ("cuda:1+cuda:1", "auto"),
        ("cpu:65", "single"),
        ("cpu:0", "single"),
        ("cpu:1", "pipeline"),
        ("cpu", "tensor"),
        ("cuda:0+cuda:1", "single"),
        ("cpu:2+cpu", "auto"),
        ("cuda:0+", "auto"),
        ("cpu:17", "tensor"),
    ],
)
def test_what_makes_no_sense_is_refused(setting: str, mode: Any) -> None:
    with pytest.raises(ConfigError, match=r"devices|gpu_mode"):
        parse_devices(setting, mode)


def test_memory_of_gpus_is_asked_of_the_driver(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    script = tmp_path / "nvidia-smi"
    script.write_text("#!/bin/sh\necho '0, 81559'\necho '1, 40960'\n")
    script.chmod(0o755)
    monkeypatch.setattr(devices, "NVIDIA_SMI", (str(script),))
    assert gpu_memory_bytes(["cuda:1", "cuda:0"]) == (40960 << 20, 81559 << 20)
    monkeypatch.setattr(devices, "NVIDIA_SMI", (str(tmp_path / "missing"),))
    assert gpu_memory_bytes(["cuda:0"]) == ()
