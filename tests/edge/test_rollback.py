"""Trials of the whole agent against a simulated cloud: evidence, reports, restarts, and answers that never stop."""

from __future__ import annotations

import asyncio
import json
import urllib.request
from pathlib import Path

import numpy as np
import pytest

from isthmus.v1 import fleet_pb2
from tests.edge import bundles, faulty_cloud
from tests.edge.simulated_cloud import SimulatedCloud, simulated_cloud
from tests.edge.test_agent import enrolled, running, until

pytestmark = pytest.mark.slow
TRIAL = fleet_pb2.Trial(soak_s=3600, max_error_rate=0.05, min_agreement=0.8)
UPDATING, SOAKING = fleet_pb2.UPDATE_STATE_UPDATING, fleet_pb2.UPDATE_STATE_SOAKING
ROLLED_BACK = fleet_pb2.UPDATE_STATE_ROLLED_BACK


def last(cloud: SimulatedCloud, version: int) -> fleet_pb2.ReportRequest:
    found = [report for report in cloud.reports if report.version == version]
    return found[-1] if found else fleet_pb2.ReportRequest()


def unsent(home: Path) -> list[str]:
    file = home / "reports.json"
    kept: list[str] = json.loads(file.read_bytes())["unsent"] if file.exists() else []
    return kept


def scrape(home: Path) -> str:
    address = json.loads((home / "ready.json").read_bytes())["metrics"]
    with urllib.request.urlopen(f"http://{address}/metrics", timeout=10) as response:
        text: str = response.read().decode()
        return text


@pytest.mark.parametrize(("fault", "reason"), [("wrong", "trial-agreement"), ("nan", "trial-errors")])
def test_a_signed_but_bad_version_goes_back_and_says_why(tmp_path: Path, fault: str, reason: str) -> None:
    home = tmp_path / "device"

    async def scenario() -> None:
        async with simulated_cloud(SimulatedCloud(tmp_path / "workspace")) as cloud:
            cloud.inference.behaviour = faulty_cloud.answering(np.array([[9, 0, 0]], np.float32))
            await enrolled(cloud, home)
            cloud.publish(1)
            cloud.publish(2, fault=fault)
            cloud.release(1)
            async with running(
                home, audit_share=1.0, variant="onnxruntime-fp32", metrics_listen="127.0.0.1:0"
            ) as agent:
                await agent.serves(1)
                cloud.release(2, rollout="r7", attempt=1, trial=TRIAL)
                await until(lambda: last(cloud, 2).state == SOAKING)
                assert (await agent.status())["models"][0]["trial"]["soak_s"] == 3600
                failures = 0
                async with asyncio.timeout(20):
                    while last(cloud, 2).state != ROLLED_BACK:
                        answer = await agent.infer(bundles.SURE)
                        failures += answer["isthmus.route"] not in ("edge", "cloud")
                assert failures == 0
                told = last(cloud, 2)
                assert (told.reason, told.serving_version, told.rollout, told.attempt) == (reason, 1, "r7", 1)
                assert told.evidence.requests > 0
                assert max(told.evidence.errors, told.evidence.disagreed) > 0
                assert (await agent.infer(bundles.SURE))["isthmus.edge_version"] == 1
                status = (await agent.status())["models"][0]
                assert (status["last_update"]["outcome"], status["last_update"]["reason"]) == ("rolled-back", reason)

                metrics = await asyncio.to_thread(scrape, home)
                labels = f'model="triage",outcome="rolled-back",reason="{reason}"'
                assert f"isthmus_update_outcomes_total{{{labels}}} 1.0" in metrics
                assert 'isthmus_update_step{model="triage",step="idle"} 1.0' in metrics

                cloud.release(2, rollout="r7", attempt=2, trial=TRIAL)  # told so, it is tried again
                await until(lambda: last(cloud, 2).state == SOAKING and last(cloud, 2).attempt == 2)
            numbers = [report.number for report in cloud.reports]
            assert numbers == sorted(set(numbers))
            assert cloud.facts is not None
            assert cloud.facts.platform
            assert "onnxruntime" in cloud.facts.runtimes

    asyncio.run(scenario())


def test_a_version_that_failed_is_not_tried_again_after_a_restart_and_the_cloud_hears_of_it_again(
    tmp_path: Path,
) -> None:
    home = tmp_path / "device"

    async def scenario() -> None:
        async with simulated_cloud(SimulatedCloud(tmp_path / "workspace")) as cloud:
            await enrolled(cloud, home)
            cloud.publish(1)
            cloud.publish(2, fault="nan")
            cloud.release(1)
            async with running(home, variant="onnxruntime-fp32") as agent:
                await agent.serves(1)
                cloud.release(2, rollout="r", attempt=1, trial=TRIAL)
                async with asyncio.timeout(20):
                    while last(cloud, 2).state != ROLLED_BACK:
                        await agent.infer(bundles.SURE)
            newest = cloud.reports[-1].number
            cloud.reports.clear()
            async with running(home, variant="onnxruntime-fp32") as agent:
                await until(lambda: last(cloud, 2).state == ROLLED_BACK)
                assert last(cloud, 2).reason == "trial-errors"
                assert last(cloud, 2).evidence.errors > 0
                assert last(cloud, 2).number > newest
                assert (await agent.infer(bundles.SURE))["isthmus.edge_version"] == 1
            assert {report.state for report in cloud.reports} == {ROLLED_BACK}

    asyncio.run(scenario())


def test_a_report_that_was_not_taken_comes_after_a_restart(tmp_path: Path) -> None:
    home = tmp_path / "device"

    async def scenario() -> None:
        cloud = SimulatedCloud(tmp_path / "workspace")
        async with simulated_cloud(cloud):
            await enrolled(cloud, home)
            cloud.publish(1)
            cloud.publish(2, golden=bundles.golden_tensors(500))
            cloud.release(1)
            async with running(home) as agent:
                await agent.serves(1)
                cloud.takes_reports = False
                cloud.release(2)
                await until(lambda: len(unsent(home)) > 0 and cloud.refused_reports > 1)
        port = int(cloud.address.rpartition(":")[2])
        cloud.takes_reports = True
        async with running(home), simulated_cloud(cloud, port=port):
            await until(lambda: last(cloud, 2).reason == "golden-mismatch")
            await until(lambda: not unsent(home))

    asyncio.run(scenario())


def test_the_cloud_takes_back_a_version_on_trial(tmp_path: Path) -> None:
    home = tmp_path / "device"

    async def scenario() -> None:
        async with simulated_cloud(SimulatedCloud(tmp_path / "workspace")) as cloud:
            await enrolled(cloud, home)
            for version in (1, 2):
                cloud.publish(version)
            cloud.release(1)
            async with running(home) as agent:
                await agent.serves(1)
                cloud.release(2, rollout="r", attempt=1, trial=TRIAL)
                await until(lambda: last(cloud, 2).state == SOAKING)
                await agent.serves(2)
                cloud.release(1)
                await agent.serves(1)
                await until(lambda: last(cloud, 2).reason == "taken-back")
            async with running(home) as agent:
                await agent.serves(1)

    asyncio.run(scenario())


def test_a_rollout_to_the_version_that_serves_already_gets_its_word(tmp_path: Path) -> None:
    home = tmp_path / "device"

    async def scenario() -> None:
        async with simulated_cloud(SimulatedCloud(tmp_path / "workspace")) as cloud:
            await enrolled(cloud, home)
            cloud.publish(1)
            cloud.release(1)
            async with running(home) as agent:
                await agent.serves(1)
                cloud.release(1, rollout="r9", attempt=2)
                await until(lambda: (last(cloud, 1).rollout, last(cloud, 1).attempt) == ("r9", 2))
                assert last(cloud, 1).state == fleet_pb2.UPDATE_STATE_ACTIVE

    asyncio.run(scenario())
