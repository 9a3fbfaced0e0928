"""The snapshot of a whole system."""

import json
from typing import TYPE_CHECKING

from gptoss.actors.journal import JournalHealth
from gptoss.config import Settings
from gptoss.telemetry.metrics import Metrics
from gptoss.telemetry.projection import Projection
from gptoss.telemetry.system_snapshot import system_snapshot, without_secrets

if TYPE_CHECKING:
    from telemetry.conftest import Script

HEALTHY = JournalHealth(ok=True, reason="", last_pos=9, committed_pos=9, stored_bytes=100)


def snapshot(script: "Script", settings: Settings | None = None) -> str:
    projection, metrics = Projection(), Metrics()
    for record in script.records:
        projection.fold(record)
        metrics.fold(record)
    document = system_snapshot(
        projection=projection,
        metrics=metrics,
        settings=settings or Settings(),
        journal=HEALTHY,
        now_ns=script.now_ns,
    )
    return json.dumps(document)


def test_the_bundle_holds_what_the_older_server_gave(busy: "Script") -> None:
    document = json.loads(snapshot(busy))
    assert {"gpu", "memory", "configuration", "metrics", "stats", "versions", "recent_errors"} <= document.keys()
    assert document["versions"] == {"gptoss": "0.1.0", "python": "3.11.0", "packages": {"torch": "2.13"}}
    assert document["gpu"]["cpu"]["capabilities"]["model_name"] == "demo-20b"
    assert document["configuration"]["profile"] == "latency_first"
    assert document["recent_errors"][0]["event"] == "executor_faulted"
    assert "vllm:num_requests_running" in document["metrics"]


def test_the_same_records_give_the_same_bundle(busy: "Script") -> None:
    assert snapshot(busy) == snapshot(busy)


def test_a_server_that_has_not_started_has_a_bundle_too() -> None:
    document = system_snapshot(
        projection=Projection(), metrics=Metrics(), settings=Settings(), journal=HEALTHY, now_ns=0
    )
    assert document["health"]["status"] == "starting"
    assert document["versions"]["gptoss"] == ""


def test_secrets_are_masked_by_name_and_in_urls() -> None:
    masked = without_secrets(
        {
            "api_key": "canary",
            "admin_token": "canary",
            "db_password": "canary",
            "otlp_endpoint": "http://me:canary@collector:4317/x",
            "nested": {"client_secret": "canary", "port": 1},
            "hosts": ["postgres://u:canary@db/x"],
            "content": "tokens",
            "max_model_len": 5,
        }
    )
    assert "canary" not in json.dumps(masked)
    assert masked["otlp_endpoint"] == "http://***@collector:4317/x"
    assert (masked["content"], masked["max_model_len"], masked["nested"]["port"]) == ("tokens", 5, 1)


def test_no_setting_of_today_is_masked(busy: "Script") -> None:
    assert "***" not in snapshot(busy)
