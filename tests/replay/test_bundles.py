"""The committed bundles: one of each incident that must replay, and a doctored one that must not."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest
from scenarios import bundles_folder

from gptoss.messages import events as ev
from gptoss.messages.envelope import Event
from gptoss.replay.result import VerifyResult
from gptoss.replay.verify import verify
from gptoss.telemetry.bundle_reader import BundleReader

SIGNS: dict[str, tuple[type[Event], dict[str, Any]]] = {
    "clean": (ev.RequestCompleted, {"finish_reason": "length"}),
    "refused_for_memory": (ev.RequestRejected, {"code": "memory_exhausted"}),
    "shrunk": (ev.AdmissionDecided, {"action": "shrink"}),
    "queued_past_deadline": (ev.RequestRejected, {"code": "deadline_exceeded"}),
    "cancelled_by_disconnect": (ev.RequestCancelled, {"reason": "disconnect"}),
    "engine_killed": (ev.AttemptRetried, {"code": "engine_lost"}),
    "preempted": (ev.Preempted, {"reason": "priority"}),
}
"""Of each incident, an event that shows it."""


def path_of(name: str) -> Path:
    return bundles_folder() / f"{name}.gptoss.zip"


def replayed(name: str) -> VerifyResult:
    with BundleReader(path_of(name)) as bundle:
        return verify(bundle, source=name)


@pytest.mark.parametrize("name", SIGNS)
def test_an_incident_replays(name: str) -> None:
    result = replayed(name)
    assert result.first is None
    assert result.problems == ()
    checked = {each.decider: each for each in result.checked}
    assert all(checked[decider].decisions for decider in ("admission", "memory", "router", "request"))
    assert result.requests >= 1


@pytest.mark.parametrize("name", SIGNS)
def test_a_bundle_holds_its_incident(name: str) -> None:
    kind, fields = SIGNS[name]
    with BundleReader(path_of(name)) as bundle:
        found = [r.event for r in bundle.records() if isinstance(r.event, kind)]
    assert any(all(getattr(event, key) == value for key, value in fields.items()) for event in found)


def test_the_plans_of_a_preempted_request_are_checked() -> None:
    checked = {each.decider: each for each in replayed("preempted").checked}
    assert checked["scheduler"].decisions > 40
    assert checked["scheduler"].passed_over == 0


def test_the_doctored_bundle_is_reported_at_its_event() -> None:
    result = replayed("doctored")
    with BundleReader(path_of("doctored")) as bundle:
        changed = next(r for r in bundle.records() if isinstance(r.event, ev.AdmissionDecided))
        assert f"Record {changed.meta.pos} was changed" in bundle.manifest.reason
    first = result.first
    assert first is not None
    assert (first.pos, first.kind, first.decider) == (changed.meta.pos, "differs", "admission")
    assert [(field.field, field.recorded - field.replayed) for field in first.fields] == [("max_tokens", 1)]
    assert result.num_diverged == 1
    assert first.chain[0].summary.startswith("BeginRequest")
    assert first.chain[-1].pos == first.pos
    assert [link.pos for link in first.chain] == sorted(link.pos for link in first.chain)


def test_a_replay_says_the_same_in_every_process() -> None:
    said: set[bytes] = set()
    for seed in ("0", "1", "42"):
        command = [sys.executable, "-m", "gptoss", "replay", str(path_of("doctored")), "--json"]
        ended = subprocess.run(
            command, capture_output=True, check=False, timeout=50, env={**os.environ, "PYTHONHASHSEED": seed}
        )
        assert ended.returncode == 1, ended.stderr
        result = msgspec.json.decode(ended.stdout)
        del result["seconds"]
        said.add(msgspec.json.encode(result))
    assert len(said) == 1
