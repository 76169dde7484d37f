"""Rollouts from end to end: light devices on a real fleet service, over TLS, on every database that it may run on."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import grpc
import pytest

from benchmarks.devices import Behaviour
from cloud import database as db
from cloud import rollout as rules
from cloud.rollout import POSITIONS
from isthmus.status import REASON_KEY
from isthmus.v1 import fleet_pb2
from security.custom import Terms
from tests.cloud.fleets import ANY, Fleet, fleet_on
from tests.cloud.postgresql import PostgreSql
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


async def refused(call: Any) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await call
    return raised.value.code(), str(dict(raised.value.trailing_metadata()).get(REASON_KEY, ""))


def test_an_operator_pauses_resumes_and_aborts(database: db.Database, workspace: Workspace, tmp_path: Path) -> None:
    async def story() -> None:
        async with fleet_on(database, workspace, tmp_path) as fleet:
            stuck = {"now": True}
            await fill(
                fleet, 6, lambda _d, version: Behaviour.STUCK if version == 2 and stuck["now"] else Behaviour.GOOD
            )
            stages = [fleet_pb2.RolloutStage(count=2), fleet_pb2.RolloutStage(share=1.0)]
            await fleet.operator("rollout", "StartRollout", ask(stages=stages))
            await fleet.until(lambda: sum(2 in d.told for d in fleet.devices.values()) == 2, "the first stage is told")
            code = refused(fleet.operator("rollout", "StartRollout", ask(stages=stages)))
            assert await code == (grpc.StatusCode.ABORTED, "rollout-active")
            assert (await fleet.rollout("Pause")).state == fleet_pb2.ROLLOUT_STATE_PAUSED
            stuck["now"] = False
            first = {name for name, d in fleet.devices.items() if 2 in d.told}
            await fleet.disconnect()
            late = next(f"late-{n}" for n in range(1000) if rules.position("triage-2-1", f"late-{n}") < POSITIONS // 50)
            await fleet.enrol(late)  # the stage would take it in, but the rollout stands still
            fleet.connect()
            await fleet.until(lambda: fleet.devices[late].serving == 1, "it runs what is released")
            await fleet.until(lambda: {n for n, d in fleet.devices.items() if d.serving == 2} == first, "they take it")
            for _ in range(5):  # decisions are made meanwhile, and none of them goes on
                await fleet.conductor.decide_all()
            assert (await fleet.rollout("Get")).stage == 0
            assert 2 not in fleet.devices[late].told
            await fleet.rollout("Resume")
            await fleet.until_state(fleet_pb2.ROLLOUT_STATE_COMPLETED)
            assert await refused(fleet.rollout("Abort")) == (grpc.StatusCode.ABORTED, "rollout-over")
            assert await refused(fleet.rollout("Get", "nothing")) == (grpc.StatusCode.NOT_FOUND, "unknown-rollout")

            await fleet.publish(3)
            await fleet.operator("rollout", "StartRollout", ask(3, [fleet_pb2.RolloutStage(share=1.0, soak_s=3600)]))
            await fleet.until(lambda: all(d.serving == 3 for d in fleet.devices.values()), "all run version 3")
            aborted = (await fleet.operator(
                "rollout", "AbortRollout", fleet_pb2.AbortRolloutRequest(id="triage", reason="a bad feeling")
            )).rollout  # fmt: skip
            assert (aborted.state, aborted.reason) == (fleet_pb2.ROLLOUT_STATE_ABORTED, "a bad feeling")
            await fleet.until(lambda: all(d.serving == 2 for d in fleet.devices.values()), "all run version 2 again")

            again = await fleet.operator("rollout", "StartRollout", ask(3, [fleet_pb2.RolloutStage(share=1.0)]))
            assert (again.rollout.id, again.rollout.attempt) == ("triage-3-2", 1)  # where it failed, it is tried again

    asyncio.run(story())


def test_rollouts_are_for_devices_by_label_hardware_and_pin(
    database: db.Database, workspace: Workspace, tmp_path: Path
) -> None:
    async def story() -> None:
        async with fleet_on(database, workspace, tmp_path) as fleet:
            fleet.registry.variants[2] = (ANY.model_copy(update={"platform": "aarch64"}),)
            await fleet.publish(1, release=True)
            await fleet.publish(2)
            arm = fleet_pb2.DeviceFacts(platform="aarch64", runtimes=["onnxruntime"])
            for name in ("fits", "pinned", "elsewhere"):
                await fleet.enrol(name, facts=arm)
            await fleet.enrol("intel", facts=fleet_pb2.DeviceFacts(platform="x86_64", runtimes=["onnxruntime"]))
            for name in ("fits", "pinned", "intel"):
                labels = fleet_pb2.SetLabelsRequest(device_id=name, set={"group": "line-3"})
                await fleet.operator("fleet", "SetLabels", labels)
            fleet.connect()
            await fleet.until(lambda: all(d.serving == 1 for d in fleet.devices.values()), "all run version 1")
            await fleet.operator("fleet", "Pin", fleet_pb2.PinRequest(device_id="pinned", model="triage", version=1))
            to = {"group": "line-3"}
            stages = [fleet_pb2.RolloutStage(share=1.0)]
            plan = await fleet.operator("rollout", "StartRollout", ask(stages=stages, selector=to, dry_run=True))
            assert plan.matching == 1
            assert {(row.device_id, row.reason) for row in plan.left_out} == {
                ("elsewhere", "label"), ("intel", "no-fitting-variant"), ("pinned", "pinned"),
            }  # fmt: skip
            assert (await fleet.operator("rollout", "ListRollouts", fleet_pb2.ListRolloutsRequest())).rollouts == []
            await fleet.operator("rollout", "StartRollout", ask(stages=stages, selector=to))
            await fleet.until_state(fleet_pb2.ROLLOUT_STATE_COMPLETED)
            assert {name: d.serving for name, d in fleet.devices.items()} == {
                "fits": 2, "pinned": 1, "elsewhere": 1, "intel": 1,
            }  # fmt: skip
            assert fleet.conductor.roster.released["triage"] == 1  # only the devices that were meant moved
            await fleet.operator("fleet", "Unpin", fleet_pb2.UnpinRequest(device_id="pinned", model="triage"))
            await fleet.until(lambda: fleet.devices["pinned"].serving == 2, "it follows the rollout when let go")
            await fleet.publish(3, release=True)
            await fleet.until(lambda: all(d.serving == 3 for d in fleet.devices.values()), "a release moves all")
            fleet.registry.variants[4] = fleet.registry.variants[2]
            await fleet.publish(4, release=True)
            await fleet.until(lambda: fleet.devices["fits"].serving == 4, "those that it fits move")
            shown = await fleet.operator("fleet", "GetDevice", fleet_pb2.GetDeviceRequest(device_id="intel"))
            assert [(told.version, told.why) for told in shown.device.desired] == [(0, "no-fitting-variant")]
            assert 4 not in fleet.devices["intel"].told

    asyncio.run(story())


def test_what_a_rollout_cannot_be_is_said_at_its_start(
    database: db.Database, workspace: Workspace, tmp_path: Path
) -> None:
    async def story() -> None:
        async with fleet_on(database, workspace, tmp_path) as fleet:
            fleet.registry.terms |= {2: Terms(), 3: Terms(rollback_floor=1, withdrawn="it leaks")}
            for version in (2, 3):
                await fleet.publish(version)
            await fleet.publish(1, release=True)
            assert await refused(fleet.operator("rollout", "StartRollout", ask())) == (
                grpc.StatusCode.INVALID_ARGUMENT, "no-devices",
            )  # fmt: skip
            assert (await refused(fleet.operator("rollout", "StartRollout", ask(3))))[1] == "withdrawn"
            assert (await refused(fleet.operator("rollout", "StartRollout", ask(1))))[1] == "not-newer"
            assert (await refused(fleet.operator("rollout", "StartRollout", ask(9))))[1] == "unknown-version"
            plan = await fleet.operator("rollout", "StartRollout", ask(dry_run=True))
            assert "cannot be sent back to 1" in plan.warnings[0]
            fleet.registry.terms[2] = Terms(rollback_floor=1)
            assert not (await fleet.operator("rollout", "StartRollout", ask(dry_run=True))).warnings
            async with fleet.stubs() as (_, rollouts):
                for bearer, code in (
                    (fleet.bearer("device", "camera-1"), grpc.StatusCode.PERMISSION_DENIED),
                    (fleet.bearer("operator", models=("other",)), grpc.StatusCode.NOT_FOUND),
                ):
                    call = rollouts.StartRollout(ask(dry_run=True), metadata=bearer, timeout=10)
                    assert (await refused(call))[0] is code

    asyncio.run(story())


def test_reports_are_kept_by_their_number_and_make_a_history(
    database: db.Database, workspace: Workspace, tmp_path: Path
) -> None:
    async def story() -> None:
        async with fleet_on(database, workspace, tmp_path) as fleet, fleet.stubs() as (stub, _):
            await fleet.publish(2, release=True)
            await fleet.enrol("camera-1")

            async def report(number: int, state: int, serving: int, **more: Any) -> None:
                message = fleet_pb2.ReportRequest(
                    model="triage", version=2, state=fleet_pb2.UpdateState.ValueType(state), serving_version=serving,
                    number=number, **more,
                )  # fmt: skip
                await stub.Report(message, metadata=fleet.bearer("device", "camera-1"), timeout=10)

            evidence = fleet_pb2.Evidence(requests=10, errors=1, latency_p50_ms=2.0)
            await report(1, fleet_pb2.UPDATE_STATE_UPDATING, 1, step="fetch")
            await report(3, fleet_pb2.UPDATE_STATE_ACTIVE, 2, evidence=evidence)
            await report(2, fleet_pb2.UPDATE_STATE_SOAKING, 2)  # overtaken
            await report(3, fleet_pb2.UPDATE_STATE_ACTIVE, 2, evidence=evidence)  # sent again
            shown = await fleet.operator("fleet", "GetDevice", fleet_pb2.GetDeviceRequest(device_id="camera-1"))
            (kept,) = shown.device.reports
            assert (kept.number, kept.state, kept.evidence) == (3, fleet_pb2.UPDATE_STATE_ACTIVE, evidence)
            assert [event.kind for event in shown.events] == ["active", "updating"]
            wrong = fleet_pb2.Evidence(requests=1, errors=2)
            assert (await refused(report(4, fleet_pb2.UPDATE_STATE_ACTIVE, 2, evidence=wrong)))[0] is (
                grpc.StatusCode.INVALID_ARGUMENT
            )
            fleet.devices["camera-1"].key.unlink()
            await fleet.enrol("camera-1")  # with a new disk: it counts from 1
            await report(1, fleet_pb2.UPDATE_STATE_UPDATING, 0, step="plan")
            await fleet.until(lambda: fleet.conductor.roster.serving("camera-1", "triage") == 0, "it is kept")

    asyncio.run(story())


def test_two_clouds_on_one_database_agree(workspace: Workspace, tmp_path: Path, postgresql: PostgreSql) -> None:
    url = postgresql.new_database()
    databases = [db.Database(url), db.Database(url)]
    stages = [fleet_pb2.RolloutStage(count=2), fleet_pb2.RolloutStage(share=0.5), fleet_pb2.RolloutStage(share=1.0)]

    async def story() -> None:
        async with (
            fleet_on(databases[0], workspace, tmp_path) as one,
            fleet_on(databases[1], workspace, tmp_path) as other,
        ):
            await one.publish(1, release=True)
            await one.publish(2)
            for number in range(10):  # half of the devices at each cloud
                fleet = one if number % 2 else other
                await fleet.enrol(f"camera-{number}")
            one.connect()
            other.connect()
            devices = one.devices | other.devices
            await one.until(lambda: all(d.serving == 1 for d in devices.values()), "all run version 1")
            await one.until(lambda: len(one.conductor.roster.devices) == 10, "each knows the other's devices")
            await one.operator("rollout", "StartRollout", ask(stages=stages))
            await other.until_state(fleet_pb2.ROLLOUT_STATE_COMPLETED)
            await other.until(lambda: all(d.serving == 2 for d in devices.values()), "all run version 2")
            events = await one.conductor.events(rollout="triage-2-1")
            # Both decided all the time, and each step was taken once.
            assert [event.kind for event in reversed(events) if not event.device_id] == [
                "started", "promoted", "promoted", "completed",
            ]  # fmt: skip
            states = []
            for fleet in (one, other):
                await fleet.conductor.refresh()
                roster = fleet.conductor.roster
                told = {name: roster.told(device, "triage") for name, device in roster.devices.items()}
                states.append((roster.revision, told, roster.rollouts["triage-2-1"].progress))
            assert states[0][1:] == states[1][1:]

            await one.publish(3)
            await one.operator("rollout", "StartRollout", ask(3, [fleet_pb2.RolloutStage(share=1.0, soak_s=3600)]))

            async def at_once(fleet: Fleet, method: str) -> str:
                try:
                    await fleet.rollout(method)
                except grpc.aio.AioRpcError as error:
                    return error.code().name
                return "OK"

            await other.until(lambda: "triage-3-1" in other.conductor.roster.rollouts, "the other cloud knows it")
            results = await asyncio.gather(at_once(one, "Abort"), at_once(other, "Abort"))
            assert sorted(results) == ["ABORTED", "OK"]

    asyncio.run(story())
    for database in databases:
        database.close()


def test_a_restarted_cloud_tells_everybody_the_same(
    database: db.Database, workspace: Workspace, tmp_path: Path
) -> None:
    async def told_by(folder: Path, *, prepare: bool) -> dict[str, Any]:
        async with fleet_on(database, workspace, folder) as fleet:
            if prepare:
                await fill(fleet, 8, lambda _d, version: Behaviour.STUCK if version == 2 else Behaviour.GOOD)
                stages = [fleet_pb2.RolloutStage(count=3, soak_s=60), fleet_pb2.RolloutStage(share=1.0)]
                await fleet.operator("rollout", "StartRollout", ask(stages=stages))
                await fleet.until(lambda: sum(2 in d.told for d in fleet.devices.values()) == 3, "the cohort is told")
            roster = fleet.conductor.roster
            layer = roster.rollouts["triage-2-1"]
            return {name: roster.told(device, "triage") for name, device in roster.devices.items()} | {
                "": (layer.plan, layer.progress)
            }

    before = asyncio.run(told_by(tmp_path, prepare=True))
    assert asyncio.run(told_by(tmp_path, prepare=False)) == before
    assert sum(told.version == 2 for name, told in before.items() if name) == 3
