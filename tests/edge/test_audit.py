"""Audits: the agent finds out that its confident answers have gone wrong, and callers notice nothing of it."""

from __future__ import annotations

import asyncio
from pathlib import Path

import numpy as np
import pytest

from edge.audit import Auditor
from isthmus.bundle import CurvePoint, VariantCalibration
from isthmus.policies import make_policy
from tests.edge import bundles, faulty_cloud
from tests.edge.serving import MODEL, explanation, serving

SAMPLES = 2000


def record(*, agreement: float = 0.95) -> VariantCalibration:
    point = bundles.calibration(1).variants["onnxruntime-fp32"]
    curve = (CurvePoint(threshold=point.threshold, escalation_rate=0.2, accuracy=0.9, risk=0.04),)
    return point.model_copy(update={"edge_agreement": agreement, "curve": curve})


def audits_until_alarm(auditor: Auditor, rate: float, rng: np.random.Generator, most: int) -> int | None:
    return next((count for count in range(1, most + 1) if auditor.note(agreed=rng.random() >= rate)), None)


@pytest.mark.slow
def test_without_a_change_alarms_are_as_rare_as_promised() -> None:
    """The rate is the expected one itself, which is the worst that still counts as no change."""
    rng, audits, alarms = np.random.default_rng(1), 0, 0
    while audits < 200_000:
        auditor = Auditor(record(), SAMPLES)
        found = audits_until_alarm(auditor, auditor.expected, rng, 200_000 - audits)
        audits += found or 200_000 - audits
        alarms += found is not None

    assert alarms <= 200_000 / 10_000


@pytest.mark.parametrize(("rate", "most"), [(0.1, 600), (0.2, 120), (0.5, 40)])
def test_a_change_is_found_within_so_many_audits(rate: float, most: int) -> None:
    rng = np.random.default_rng(2)
    found = []
    for _ in range(50):
        auditor = Auditor(record(), SAMPLES)
        for _ in range(500):  # all is well, for a while
            auditor.note(agreed=rng.random() >= 0.05)
        found.append(audits_until_alarm(auditor, rate, rng, 10_000) or 10_000)

    assert np.median(found) <= most


def test_the_report_says_how_often_with_an_interval_and_what_that_means_for_the_risk() -> None:
    auditor = Auditor(record(), SAMPLES)
    before = auditor.report()
    for place in range(400):
        auditor.note(agreed=place % 10 != 0)
    report = auditor.report()

    assert (before.low, before.high, before.audited) == (0.0, 1.0, 0)
    assert (report.audited, report.disagreed) == (400, 40)
    assert report.low < 0.1 < report.high
    assert report.high - report.low < 0.07
    assert report.expected == pytest.approx(0.05 + 2 * np.sqrt(0.05 * 0.95 / 1600))
    assert report.risk == pytest.approx(0.04 + 0.1 - 0.05)


def test_confident_answers_are_compared_behind_the_callers_backs(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with serving(tmp_path, audit_share=1.0) as agent:
            agent.cloud.behaviour = faulty_cloud.answering(np.array([[0, 9, 0]], np.float32))
            told = explanation(await agent.infer(bundles.SURE))
            assert (told["isthmus.route"], told["isthmus.reason"]) == ("edge", "confident")
            assert agent.audit is not None
            await agent.audit.settle()
            report = agent.audit.report(agent.models.find(MODEL))
            assert (report.audited, report.disagreed, report.failed) == (1, 1, 0)
            assert len(agent.cloud.requests) == agent.uplink.counters.successes == 1
            assert agent.models.counters[MODEL].routes["cloud"].answers == 0

    asyncio.run(scenario())


def test_a_batch_is_as_many_audits_as_it_has_rows(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with serving(tmp_path, audit_share=1.0) as agent:
            heavy = np.array([[9, 0, 0], [9, 0, 0], [0, 9, 0], [9, 0, 0]], np.float32)
            agent.cloud.behaviour = faulty_cloud.answering(heavy)
            await agent.infer(np.repeat(bundles.SURE, 4, axis=0))
            assert agent.audit is not None
            await agent.audit.settle()
            report = agent.audit.report(agent.models.find(MODEL))
            assert (report.audited, report.disagreed) == (4, 1)

    asyncio.run(scenario())


def test_what_another_policy_keeps_below_the_records_threshold_is_not_audited(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with serving(tmp_path, audit_share=1.0) as agent:
            live = agent.models.find(MODEL)
            live.policy = make_policy("threshold:at=0", live.operating_point)
            assert explanation(await agent.infer(bundles.HARD))["isthmus.reason"] == "confident"
            assert agent.audit is not None
            await agent.audit.settle()
            assert agent.cloud.requests == []

    asyncio.run(scenario())


def test_who_asked_for_the_edge_is_never_sent_up(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with serving(tmp_path, audit_share=1.0) as agent:
            await agent.infer(bundles.SURE, parameters={"isthmus.route": "edge"})
            assert agent.audit is not None
            await agent.audit.settle()
            assert agent.cloud.requests == []

    asyncio.run(scenario())


def test_a_dead_cloud_costs_no_caller_anything_and_is_no_disagreement(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with serving(tmp_path, audit_share=1.0) as agent:
            agent.cloud.behaviour = faulty_cloud.garbage
            for _ in range(3):
                assert explanation(await agent.infer(bundles.SURE))["isthmus.route"] == "edge"
            assert agent.audit is not None
            await agent.audit.settle()
            report = agent.audit.report(agent.models.find(MODEL))
            assert (report.audited, report.failed, report.alarm) == (0, 3, False)

    asyncio.run(scenario())


def test_drift_that_scores_do_not_show_raises_the_alarm(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with serving(tmp_path, audit_share=1.0) as agent:
            agent.cloud.behaviour = faulty_cloud.answering(np.array([[0, 9, 0]], np.float32))
            assert agent.audit is not None
            for _ in range(60):
                await agent.infer(bundles.SURE)
                await agent.audit.settle()
            assert agent.audit.report(agent.models.find(MODEL)).alarm
            [told] = agent.alarms  # once, however long it lasts
            assert "of the confident answers disagree" in told

    asyncio.run(scenario())
