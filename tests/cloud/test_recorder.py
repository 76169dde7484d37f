"""What is recorded beside calls: rollouts that move by themselves, failed versions."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import pytest

from cloud import recorder as module
from cloud.recorder import Recorder
from cloud.rollout import Gates, Plan, Stage
from isthmus.v1 import fleet_pb2
from security.audit.budget import Budget
from security.audit.records import Event, Who


class Kept:
    """A trail in memory."""

    def __init__(self) -> None:
        self.events: list[Event] = []

    def note(self, event: Event) -> None:
        self.events.append(event)

    async def write(self, event: Event) -> None:
        self.events.append(event)

    async def ready(self) -> None:
        pass


CONTEXT = SimpleNamespace(peer=lambda: "ipv4:192.0.2.1:4711", auth_context=dict, invocation_metadata=tuple)


def report(state: Any) -> fleet_pb2.ReportRequest:
    return fleet_pb2.ReportRequest(model="triage", version=3, state=state, reason="trial-errors", serving_version=2)


def test_only_failed_versions_of_devices_are_recorded() -> None:
    kept = Kept()
    recorder = Recorder(kept)
    for state in fleet_pb2.UpdateState.values():
        recorder.device_reports(report(state), CONTEXT)
    assert [event.detail["state"] for event in kept.events] == ["refused", "rolled-back"]
    assert {(event.model, event.version, event.reason) for event in kept.events} == {("triage", 3, "trial-errors")}


def test_a_device_that_reports_for_ever_does_not_fill_the_disk() -> None:
    kept = Kept()
    recorder = Recorder(kept)
    for _ in range(10_000):
        recorder.device_reports(report(fleet_pb2.UPDATE_STATE_REFUSED), CONTEXT)
    assert len(kept.events) < 200


def test_what_a_rollout_does_by_itself_is_recorded() -> None:
    kept = Kept()
    plan = Plan("triage-3", "triage", 3, (Stage(share=1.0),), Gates())
    Recorder(kept).rollout_moves(plan, "acme", "aborted", "gate-failures", "2 of 4 failed")
    (event,) = kept.events
    assert (event.action, event.rollout, event.reason, event.who) == (
        "rollout.aborted", "triage-3", "gate-failures", Who("cloud", "acme"),
    )  # fmt: skip


def test_the_share_of_inference_is_the_one_that_was_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_by_lot", random.Random(5).random)
    for share, low, high in ((0.0, 0, 0), (0.05, 60, 140), (1.0, 2000, 2000)):
        kept = Kept()
        recorder = Recorder(kept, share=share, samples=Budget(per_s=1.0, burst=10_000))
        for number in range(2000):
            if recorder.draws():
                recorder.answered("triage", 1, str(number), sealed=False, context=CONTEXT)
        assert low <= len(kept.events) <= high


def test_samples_of_one_caller_are_bounded() -> None:
    kept = Kept()
    recorder = Recorder(kept, share=1.0)
    for number in range(5000):
        recorder.answered("triage", 1, str(number), sealed=True, context=CONTEXT)
    assert len(kept.events) < 400
    assert kept.events[0].detail["sealed"] == "yes"
