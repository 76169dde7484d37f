"""Rollouts as operators run them: the real cloud process, killed in the middle, and the command line."""

from __future__ import annotations

import asyncio
import json
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import pytest

from benchmarks.devices import Behaviour, LightDevice
from cloud import rollout as rules
from cloud.client import Address, CloudClient
from security.tls import channel_credentials
from tests.cloud.conftest import eventually
from tests.cloud.postgresql import PostgreSql
from tests.cloud.test_serve import IMPATIENT, Command, cloud_process, command
from tests.cloud.workspaces import Workspace, make_bundle, make_workspace

__all__ = ["command"]  # a fixture
pytestmark = pytest.mark.slow

QUICK = IMPATIENT | {"ISTHMUS_CLOUD_ROLLOUT_POLL_S": "0.1"}


def client_of(workspace: Workspace, address: str) -> CloudClient:
    return CloudClient(Address(address, workspace.trust, workspace.token_file()), timeout_s=20.0)


def publish(
    workspace: Workspace, address: str, folder: Path, version: int, *, release: bool, floor: int | None = None
) -> None:
    bundle = make_bundle(folder / f"bundle-{version}", version, light=b"light model %d" % version)
    with client_of(workspace, address) as client:
        client.publish(bundle, workspace.operator, release=release, rollback_floor=floor)


async def until(condition: Callable[[], bool], what: str) -> None:
    async def holds() -> bool:
        return condition()

    await eventually(holds, what, within_s=60)


def test_a_bad_version_stops_in_its_first_stage_although_the_cloud_is_killed_in_the_middle(tmp_path: Path) -> None:
    workspace = make_workspace(tmp_path / "workspace")
    trust = channel_credentials(workspace.trust / "ca.pem")
    names = [f"camera-{number}" for number in range(12)]
    cohort = sorted(names, key=lambda name: rules.position("triage-2-1", name))[:3]
    script = dict.fromkeys(names, Behaviour.GOOD) | dict.fromkeys(cohort[1:], Behaviour.STUCK)
    devices = {
        name: LightDevice(
            name, tmp_path, "triage", script=lambda n, v: script[n] if v == 2 else Behaviour.GOOD, soak=lambda _s: 0.0
        )
        for name in names
    }
    where = {"address": ""}
    running: list[asyncio.Task[None]] = []

    async def begin(address: str) -> None:
        where["address"] = address
        async with grpc.aio.secure_channel(address, trust) as channel:
            with client_of(workspace, address) as client:
                for device in devices.values():
                    await device.enrol(channel, str(client.invite(device.name)["code"]))
        running.extend(
            asyncio.create_task(d.run(lambda: where["address"], workspace.trust / "ca.pem")) for d in devices.values()
        )
        await until(lambda: all(d.serving == 1 for d in devices.values()), "all run version 1")
        with client_of(workspace, address) as client:
            client.start_rollout(request(stages=(0.25, 0.5, 1.0)))
        await until(lambda: all(2 in devices[name].told for name in cohort), "the first stage is told")
        await until(lambda: devices[cohort[0]].serving == 2, "one takes it")

    async def go_on(address: str) -> Any:
        where["address"] = address
        with client_of(workspace, address) as client:
            await until(lambda: bool(client.rollout("triage").rollout.state == rules.State.ABORTED), "it stops")
            await until(lambda: all(d.serving == 1 for d in devices.values()), "everybody is back")
            rollout = client.rollout("triage").rollout
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
        return rollout

    with asyncio.Runner() as runner:
        with cloud_process(workspace, **QUICK) as (process, ready):
            publish(workspace, ready["address"], tmp_path, 1, release=True)
            publish(workspace, ready["address"], tmp_path, 2, release=False)
            runner.run(begin(ready["address"]))
            process.send_signal(signal.SIGKILL)
            process.wait()
        (workspace.root / "ready.json").unlink()
        script.update(dict.fromkeys(cohort[1:], Behaviour.ROLLED_BACK))
        with cloud_process(workspace, **QUICK) as (_, ready):
            rollout = runner.run(go_on(ready["address"]))
    assert (rollout.reason, rollout.stage) == ("gate-failures", 0)
    assert {name for name in names if 2 in devices[name].told} == set(cohort)
    assert devices[cohort[0]].served[-2:] == [2, 1]


def test_two_cloud_processes_on_one_postgresql_serve_one_fleet(tmp_path: Path, postgresql: PostgreSql) -> None:
    first = make_workspace(tmp_path / "first")
    for name in ("operator", "trust", "cloud"):
        shutil.copytree(first.root / name, tmp_path / "second" / name)
    second = Workspace(tmp_path / "second")
    # What docs/deployment.md tells operators to share.
    shutil.rmtree(second.home / "tuf")
    (second.home / "tuf").symlink_to(first.home / "tuf")
    (second.home / "state").mkdir()
    for name in ("blobs", "deltas"):
        (first.home / "state" / name).mkdir(parents=True)
        (second.home / "state" / name).symlink_to(first.home / "state" / name)
    trust = channel_credentials(first.trust / "ca.pem")
    device = LightDevice("camera-1", tmp_path, "triage", soak=lambda _s: 0.0)
    settings = QUICK | {"ISTHMUS_CLOUD_DATABASE": postgresql.new_database()}

    async def story(here: str, there: str) -> None:
        where = {"address": there}
        with client_of(first, here) as one, client_of(second, there) as other:
            code = str(one.invite("camera-1")["code"])
            async with grpc.aio.secure_channel(there, trust) as channel:
                await device.enrol(channel, code)  # invited here, enrolled there
            running = asyncio.create_task(device.run(lambda: where["address"], first.trust / "ca.pem"))
            await until(lambda: device.serving == 1, "it runs what was released at the other cloud")
            await until(lambda: {r["version"] for r in other.list_versions()} == {1, 2}, "both know both versions")
            await until(lambda: one.list_devices()[0]["serving"] == 1, "the other cloud knows it")
            one.start_rollout(request(stages=(1.0,)))
            await until(lambda: device.serving == 2, "it follows a rollout that was started at the other cloud")
            await until(lambda: bool(one.rollout("triage").rollout.state == rules.State.COMPLETED), "it ends")
            await until(lambda: any(r["released"] and r["version"] == 2 for r in other.list_versions()), "released")
            status = other.status()["models"]
            assert {row["model"] for row in status} == {row["model"] for row in one.status()["models"]}
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)

    with cloud_process(first, **settings) as (_, here), cloud_process(second, **settings) as (_, there):
        publish(first, here["address"], tmp_path, 1, release=True)
        publish(first, here["address"], tmp_path, 2, release=False)
        asyncio.run(story(here["address"], there["address"]))


def request(version: int = 2, stages: tuple[float, ...] = (0.5, 1.0)) -> Any:
    from isthmus.v1 import fleet_pb2

    return fleet_pb2.StartRolloutRequest(
        model="triage", version=version, stages=[fleet_pb2.RolloutStage(share=share) for share in stages]
    )


def test_the_operators_commands_of_a_rollout(tmp_path: Path, command: Command) -> None:
    workspace = make_workspace(tmp_path / "workspace")
    trust = channel_credentials(workspace.trust / "ca.pem")
    with cloud_process(workspace, **QUICK) as (_, ready):
        environment = {
            "ISTHMUS_CLOUD": ready["address"],
            "ISTHMUS_TRUST": str(workspace.trust),
            "ISTHMUS_TOKEN_FILE": str(workspace.token_file()),
        }

        def run(*arguments: object, code: int = 0) -> str:
            done = command(*arguments, **environment)
            assert done.returncode == code, done.stderr
            return done.stdout + done.stderr

        def shown(*arguments: object) -> Any:
            return json.loads(command(*arguments, "--json", **environment).stdout)

        publish(workspace, ready["address"], tmp_path, 1, release=True)
        publish(workspace, ready["address"], tmp_path, 2, release=False, floor=0)
        device = LightDevice("camera-1", tmp_path, "triage", soak=lambda _s: 0.0)
        with client_of(workspace, ready["address"]) as client:
            code = str(client.invite("camera-1")["code"])

        async def go_online() -> None:
            async with grpc.aio.secure_channel(ready["address"], trust) as channel:
                await device.enrol(channel, code)

        async def be_online(condition: Callable[[], bool]) -> None:
            running = asyncio.create_task(device.run(lambda: ready["address"], workspace.trust / "ca.pem"))
            await until(condition, "the device does what it is told")
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)

        asyncio.run(go_online())
        with client_of(workspace, ready["address"]) as client:  # the cloud has heard of it, too
            asyncio.run(be_online(lambda: client.list_devices()[0]["serving"] == 1))
        assert shown("device", "label", "camera-1", "group=line-3", "site=a") == {"group": "line-3", "site": "a"}
        assert shown("device", "label", "camera-1", "site-") == {"group": "line-3"}
        (row,) = shown("device", "list", "--selector", "group=line-3")
        assert (row["device"], row["serving"], row["told"], row["labels"]) == (
            "camera-1", 1, "1 by release", "group=line-3",
        )  # fmt: skip
        assert shown("device", "list", "--selector", "group=line-4") == []

        start = ("rollout", "start", "triage@2", "--stages", "1,100%", "--soak", "0s,1s")
        plan = shown(*start, "--to", "group=line-4", "--dry-run")
        assert plan["matching"] == 0
        assert plan["left_out"] == [{"device": "camera-1", "reason": "label", "detail": "its labels are group=line-3"}]
        assert "no device is there" in run(*start, "--to", "group=line-4", code=2)
        assert "cannot be sent back to 1" in run(*start, "--to", "group=line-3", "--dry-run")
        assert shown("rollout", "list") == []
        assert "rollout triage-2-1 runs" in run(*start, "--to", "group=line-3")
        assert "triage-2-1" in run("rollout", "start", "triage@2", code=3)  # the devices have one already
        assert "is not over" in run("model", "release", "triage@2", code=3)
        assert "paused" in run("rollout", "pause", "triage")
        assert shown("rollout", "status", "triage")["state"] == "paused"
        assert shown("rollout", "resume", "triage-2-1")["state"] == "active"
        asyncio.run(be_online(lambda: shown("rollout", "status", "triage")["state"] == "completed"))
        record = shown("rollout", "status", "triage-2-1")
        assert record["history"][0]["what"] in ("completed", "active")
        assert "completed" in run("rollout", "status", "triage", "--watch")
        assert "completed already" in run("rollout", "abort", "triage", code=3)

        assert "is held at triage@1" in run("device", "pin", "camera-1", "triage@1")
        asyncio.run(be_online(lambda: device.serving == 1))
        held = shown("device", "pin", "camera-1", "triage@1")
        assert held == {"device": "camera-1", "model": "triage", "pinned": 1}
        assert shown("device", "pin", "camera-1", "triage", "--release")["pinned"] is None
        assert "follows releases" in run("device", "pin", "camera-1", "triage", "--release")
        assert "attempt 1" in run("device", "retry", "camera-1", "triage")
        again = shown("device", "retry", "camera-1", "triage")
        assert again == {"device": "camera-1", "model": "triage", "attempt": 2}
        told = shown("device", "show", "camera-1")
        assert told["models"][0]["told"] == "2 by triage-2-1"
        assert {"pinned", "unpinned", "retry", "labelled", "active"} <= {event["what"] for event in told["history"]}
        for wrong in (
            ("rollout", "start", "triage@2", "--stages", "10%,5%,100%"),
            ("rollout", "start", "triage@2", "--stages", "10%"),
            ("rollout", "start", "triage@2", "--stages", "ten,100%"),
            ("rollout", "start", "triage@2", "--soak", "1m,2m"),
            ("rollout", "start", "triage@2", "--confidence", "20%"),
            ("rollout", "start", "triage@9"),
            ("rollout", "status", "nothing"),
            ("device", "show", "nobody"),
            ("device", "pin", "camera-1", "triage@9"),
            ("device", "label", "camera-1", "gr oup=1"),
        ):
            assert "error: " in run(*wrong, code=2)
