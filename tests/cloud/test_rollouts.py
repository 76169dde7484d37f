"""Rollouts from end to end: light devices on a real fleet service, over TLS, on every database that it may run on."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from benchmarks.devices import Behaviour
from cloud import database as db
from cloud import rollout as rules
from isthmus.v1 import fleet_pb2
from tests.cloud.fleets import Fleet, fleet_on
from tests.cloud.workspaces import Workspace, make_workspace

pytestmark = pytest.mark.slow

NO_SOAK = tuple(fleet_pb2.RolloutStage(share=share) for share in (0.1, 0.5, 1.0))


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    return make_workspace(tmp_path_factory.mktemp("fleet") / "workspace")


def ask(version: int = 2, stages: Any = NO_SOAK, **more: Any) -> Any:
    return fleet_pb2.StartRolloutRequest(model="triage", version=version, stages=stages, **more)


async def fill(fleet: Fleet, count: int, script: Any) -> None:
    await fleet.publish(1, release=True)
    await fleet.publish(2)
    for number in range(count):
        await fleet.enrol(f"camera-{number}", script=script)
    fleet.connect()
    await fleet.until(lambda: all(d.serving == 1 for d in fleet.devices.values()), "all run version 1")


def test_a_good_version_reaches_every_device_stage_by_stage(
    database: db.Database, workspace: Workspace, tmp_path: Path
) -> None:
    async def story() -> None:
        async with fleet_on(database, workspace, tmp_path) as fleet:
            await fill(fleet, 12, lambda _device, _version: Behaviour.GOOD)
            started = await fleet.operator("rollout", "StartRollout", ask())
            assert (started.matching, [s.devices for s in started.rollout.stages]) == (12, [2, 6, 12])
            done = await fleet.until_state(fleet_pb2.ROLLOUT_STATE_COMPLETED)
            assert {d.serving for d in fleet.devices.values()} == {2}
            assert [stage.HasField("started_at") for stage in done.stages] == [True] * 3
            assert fleet.conductor.roster.released["triage"] == 2
            newcomer = await fleet.enrol("late")
            fleet.connect("late")
            await fleet.until(lambda: newcomer.serving == 2, "a new device runs it, too")

    asyncio.run(story())


def test_a_bad_version_stops_in_its_first_stage_and_everybody_goes_back(
    database: db.Database, workspace: Workspace, tmp_path: Path
) -> None:
    async def story() -> None:
        async with fleet_on(database, workspace, tmp_path) as fleet:
            await fill(fleet, 20, lambda device, version: Behaviour.GOOD)
            # One of the two devices of the first stage takes it, the others would roll it back.
            first = sorted(fleet.devices, key=lambda name: rules.position("triage-2-1", name))[:2]
            for device in fleet.devices.values():
                device.script = lambda name, version: (
                    Behaviour.ROLLED_BACK if version == 2 and name != first[0] else Behaviour.GOOD
                )
            await fleet.operator("rollout", "StartRollout", ask())
            aborted = await fleet.until_state(fleet_pb2.ROLLOUT_STATE_ABORTED)
            assert (aborted.reason, aborted.stage) == ("gate-failures", 0)
            await fleet.until(lambda: {d.serving for d in fleet.devices.values()} == {1}, "all run version 1 again")
            assert {name for name, d in fleet.devices.items() if 2 in d.told} == set(first)
            assert fleet.devices[first[0]].served == [1, 2, 1]

            async def all_are_back() -> Any:
                rollout = await fleet.rollout("Get")
                return rollout.tally.taken, rollout.tally.returned

            await fleet.until(lambda: fleet.conductor.roster.serving(first[0], "triage") == 1, "the device says so")
            assert await all_are_back() == (2, 2)

    asyncio.run(story())
