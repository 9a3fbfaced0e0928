"""Everything else that is shipped to run the server somewhere, checked by the tools that its readers would use."""

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_type_hints

import msgspec
import pytest

from gptoss.config import ENV_PREFIX, Settings, load_settings

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
CHART = DEPLOY / "helm" / "gptoss"
VALUES = sorted((CHART / "ci").glob("*.yaml"))
CUSTOM_KINDS = {"ServiceMonitor", "PrometheusRule"}
"""Kinds of the Prometheus operator, which Kubernetes' own schemas do not know."""

Tool = Callable[[str], str]


def run(*command: str | Path, **options: Any) -> str:
    """The command's output, both streams; it must succeed."""
    done = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, timeout=50, check=False, cwd=ROOT, **options
    )
    assert done.returncode == 0, f"{command[0]}:\n{done.stdout}{done.stderr}"
    return done.stdout + done.stderr


def yaml_file(path: Path) -> dict[str, Any]:
    return msgspec.yaml.decode(path.read_bytes(), type=dict[str, Any])


# ---------------------------------------------------------------- images


def test_the_dockerfile_has_no_lint(tool: Tool) -> None:
    run(tool("hadolint"), "--failure-threshold", "style", DEPLOY / "docker" / "Dockerfile")


def test_what_the_image_copies_is_in_its_context() -> None:
    ignored = (ROOT / ".dockerignore").read_text(encoding="utf-8").split()
    sent = {line.removeprefix("!") for line in ignored if line.startswith("!")}
    copied = {
        name
        for line in (DEPLOY / "docker" / "Dockerfile").read_text(encoding="utf-8").splitlines()
        if line.startswith("COPY ") and "--from" not in line
        for name in line.split()[1:-1]
    }
    assert copied == sent
    assert all((ROOT / name).exists() for name in copied)


def test_the_image_sets_settings_that_exist_and_are_valid() -> None:
    text = (DEPLOY / "docker" / "Dockerfile").read_text(encoding="utf-8").replace("\\\n", " ")
    variables = dict(
        pair.split("=", 1) for line in text.splitlines() if line.startswith("ENV ") for pair in line.split()[1:]
    )
    settings = load_settings(environ=variables).settings
    assert (settings.host, settings.port, settings.allow_public) == ("0.0.0.0", 8000, True)
    assert settings.data_dir == "/var/lib/gptoss"


@pytest.mark.parametrize("name", ["compose.yaml", "gpu.yaml"])
def test_compose_files_follow_the_specification(name: str, tool: Tool) -> None:
    run(tool("check-jsonschema"), "--builtin-schema", "vendor.compose-spec", DEPLOY / "compose" / name)


def test_compose_mounts_what_is_here_and_opens_nothing_to_others() -> None:
    services = yaml_file(DEPLOY / "compose" / "compose.yaml")["services"]
    named = set(yaml_file(DEPLOY / "compose" / "compose.yaml")["volumes"])
    for name, service in services.items():
        for volume in service.get("volumes", ()):
            source = volume.split(":")[0]
            assert source in named or (DEPLOY / "compose" / source).exists()
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", ()))
        assert service["cap_drop"] == ["ALL"]
        assert "latest" not in service["image"], name
    settings = {key: value for key, value in services["gptoss"]["environment"].items() if key.startswith(ENV_PREFIX)}
    assert set(settings) <= {f"{ENV_PREFIX}{name.upper()}" for name in get_type_hints(Settings)}
    assert services["gptoss"]["read_only"] is True
    grace_s = float(services["gptoss"]["stop_grace_period"].removesuffix("s"))
    assert grace_s > Settings().drain_timeout_s


def test_compose_resolves_as_a_whole(tool: Tool) -> None:
    docker = tool("docker")
    if subprocess.run([docker, "compose", "version"], capture_output=True, check=False).returncode:
        pytest.skip("docker has no compose here")
    files = ("-f", DEPLOY / "compose" / "compose.yaml", "-f", DEPLOY / "compose" / "gpu.yaml")
    resolved = run(docker, "compose", *files, "config", env={"GRAFANA_PASSWORD": "x", "PATH": "/usr/bin:/bin"})
    assert "gptoss:cuda" in resolved


# ---------------------------------------------------------------- the chart


def test_the_chart_has_no_lint(tool: Tool) -> None:
    for values in VALUES:
        out = run(tool("helm"), "lint", "--strict", CHART, "--values", values)
        assert "0 chart(s) failed" in out


@pytest.mark.parametrize("values", VALUES, ids=lambda path: path.stem)
def test_what_the_chart_makes_is_valid_kubernetes(values: Path, tool: Tool, tmp_path: Path) -> None:
    objects = render(tool, values)
    known = tmp_path / "objects.yaml"
    known.write_bytes(b"---\n".join(msgspec.yaml.encode(o) for o in objects if o["kind"] not in CUSTOM_KINDS))
    run(tool("kubernetes-validate"), "--strict", "--kubernetes-version", "1.32", known)
    names = [(o["kind"], o["metadata"]["name"]) for o in objects]
    assert len(set(names)) == len(names)


def test_the_container_may_do_nothing_but_serve(tool: Tool) -> None:
    pod = the(render(tool, CHART / "ci" / "cpu-values.yaml"), "StatefulSet")["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert pod["automountServiceAccountToken"] is False
    security = container["securityContext"]
    assert security["readOnlyRootFilesystem"] is True
    assert security["allowPrivilegeEscalation"] is False
    assert security["capabilities"] == {"drop": ["ALL"]}
    assert {mount["mountPath"] for mount in container["volumeMounts"]} == {
        "/var/lib/gptoss",
        "/var/cache/gptoss",
        "/tmp",
    }
    # A Service called gptoss would otherwise put GPTOSS_PORT=tcp://... into the environment, and the server would refuse it.
    assert pod["enableServiceLinks"] is False


@pytest.mark.parametrize("values", VALUES, ids=lambda path: path.stem)
def test_the_settings_that_a_pod_gets_are_settings(values: Path, tool: Tool) -> None:
    pod = the(render(tool, values), "StatefulSet")["spec"]["template"]["spec"]
    variables = {item["name"]: item.get("value", "") for item in pod["containers"][0]["env"]}
    settings = load_settings(environ=variables).settings
    asked = yaml_file(values)["settings"]
    assert {name: getattr(settings, name) for name in asked} == asked
    assert pod["terminationGracePeriodSeconds"] > settings.drain_timeout_s + 5


def test_numbers_of_settings_arrive_as_numbers(tool: Tool) -> None:
    objects = render(tool, CHART / "ci" / "cpu-values.yaml", "--set", "settings.kv_budget_mb=123456789012")
    (container,) = the(objects, "StatefulSet")["spec"]["template"]["spec"]["containers"]
    assert {"name": "GPTOSS_KV_BUDGET_MB", "value": "123456789012"} in container["env"]


def test_gpus_are_asked_for_where_they_are_wanted(tool: Tool) -> None:
    (container,) = the(render(tool, CHART / "ci" / "gpu-values.yaml"), "StatefulSet")["spec"]["template"]["spec"][
        "containers"
    ]
    assert container["resources"]["limits"] == {"memory": "64Gi", "nvidia.com/gpu": 1}
    assert container["image"].endswith("-cuda")
    plain = the(render(tool, CHART / "ci" / "cpu-values.yaml"), "StatefulSet")["spec"]["template"]["spec"][
        "containers"
    ][0]
    assert "nvidia.com/gpu" not in plain["resources"]["limits"]
    assert plain["image"].endswith("-cpu")


def test_the_autoscaler_owns_the_number_of_replicas(tool: Tool) -> None:
    objects = render(tool, CHART / "ci" / "gpu-values.yaml")
    assert "replicas" not in the(objects, "StatefulSet")["spec"]
    target = the(objects, "HorizontalPodAutoscaler")["spec"]["scaleTargetRef"]
    assert target["name"] == the(objects, "StatefulSet")["metadata"]["name"]


def test_rules_and_dashboard_are_those_of_the_files(tool: Tool) -> None:
    objects = render(tool, CHART / "ci" / "full-values.yaml")
    assert the(objects, "PrometheusRule")["spec"] == yaml_file(DEPLOY / "prometheus" / "gptoss.rules.yml")
    board = (DEPLOY / "grafana" / "dashboards" / "gptoss.json").read_bytes()
    assert msgspec.json.decode(the(objects, "ConfigMap")["data"]["gptoss.json"]) == msgspec.json.decode(board)
    monitor = the(objects, "ServiceMonitor")["spec"]
    selected = [
        o
        for o in objects
        if o["kind"] == "Service" and monitor["selector"]["matchLabels"].items() <= o["metadata"]["labels"].items()
    ]
    assert [o["metadata"]["name"] for o in selected] == ["test-gptoss-pods"]
    assert {"targetLabel": "job", "replacement": "gptoss"} in monitor["endpoints"][0]["relabelings"]


@pytest.mark.parametrize(
    "wrong",
    ["replica=2", "settings.host=0.0.0.0", "settings.Model=demo", "gpu.count=half", "tracing.endpoint=collector:4317"],
)
def test_wrong_values_are_refused(wrong: str, tool: Tool) -> None:
    done = subprocess.run(
        [tool("helm"), "template", "test", CHART, "--set", wrong],
        capture_output=True,
        text=True,
        check=False,
        timeout=50,
    )
    assert done.returncode != 0
    assert "values don't meet the specifications of the schema" in done.stderr


def render(tool: Tool, values: Path, *more: str) -> list[dict[str, Any]]:
    done = subprocess.run(
        [tool("helm"), "template", "test", CHART, "--values", values, *more],
        capture_output=True,
        text=True,
        check=False,
        timeout=50,
    )
    assert done.returncode == 0, done.stderr
    parts = [part for part in done.stdout.split("\n---\n") if part.strip().strip("-")]
    return [msgspec.yaml.decode(part, type=dict[str, Any]) for part in parts]


def the(objects: list[dict[str, Any]], kind: str) -> dict[str, Any]:
    (found,) = (o for o in objects if o["kind"] == kind)
    return found


# ---------------------------------------------------------------- one machine


def test_the_unit_is_one_that_systemd_takes(tool: Tool, tmp_path: Path) -> None:
    analyze = tool("systemd-analyze")
    unit = tmp_path / "gptoss.service"
    text = (DEPLOY / "systemd" / "gptoss.service").read_text(encoding="utf-8")
    # Where the package will be once it is installed is nothing yet, and systemd looks.
    unit.write_text(text.replace("/opt/gptoss/bin/gptoss", sys.executable), encoding="utf-8")
    dropin = tmp_path / "gptoss.service.d" / "gpu.conf"
    dropin.parent.mkdir()
    shutil.copy(DEPLOY / "systemd" / "gpu.conf", dropin)
    out = run(analyze, "verify", "--man=no", unit)
    assert "gptoss.service" not in out, out


def test_the_unit_leaves_the_server_little(tool: Tool) -> None:
    analyze = tool("systemd-analyze")
    out = run(analyze, "security", "--offline=yes", "--threshold=25", DEPLOY / "systemd" / "gptoss.service")
    assert "OK" in out


def test_the_units_settings_are_valid() -> None:
    unit = (DEPLOY / "systemd" / "gptoss.service").read_text(encoding="utf-8")
    lines = [line.removeprefix("Environment=") for line in unit.splitlines() if line.startswith("Environment=")]
    variables = dict(pair.split("=", 1) for line in lines for pair in line.split())
    settings = load_settings(environ=variables, file=DEPLOY / "systemd" / "gptoss.toml").settings
    assert settings.data_dir == "/var/lib/gptoss"
    assert settings.host == "127.0.0.1"
    stop_s = float(next(line for line in unit.splitlines() if line.startswith("TimeoutStopSec=")).partition("=")[2])
    assert stop_s > settings.drain_timeout_s


def test_scripts_have_no_lint(tool: Tool) -> None:
    scripts = [ROOT / ".ci" / "run", *ROOT.glob("deploy/**/*.sh"), *ROOT.glob("tests/deploy/*.sh")]
    assert len(scripts) >= 3
    run(tool("shellcheck"), *scripts)


def test_yaml_has_no_lint(tool: Tool) -> None:
    rules = "{extends: default, rules: {line-length: disable, document-start: disable, braces: {max-spaces-inside: 0}}}"
    folders = ("compose", "grafana", "kubernetes", "otel", "prometheus", "helm/gptoss/ci")
    files = [*(DEPLOY / folder for folder in folders), CHART / "values.yaml", CHART / "Chart.yaml"]
    run(tool("yamllint"), "--strict", "--config-data", rules, *files)
