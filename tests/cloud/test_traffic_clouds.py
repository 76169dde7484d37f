"""Two clouds on one database: a policy that one is given counts in both, and so does a roll back."""

from __future__ import annotations

import asyncio
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sqlalchemy import select
from sqlalchemy.exc import OperationalError

from cloud import database as db
from cloud.bootstrap import Cloud
from cloud.catalog import Catalog
from cloud.heavy import HeavyId
from cloud.replicas import Replicas
from cloud.traffic_client import TrafficClient
from cloud.traffic_desk import Serving, TrafficDesk
from isthmus.errors import ConflictError
from isthmus.oip import read_parameters, service_pb2_grpc
from isthmus.tensors import encode_request
from isthmus.v1 import traffic_pb2 as pb
from tests.cloud.conftest import eventually
from tests.cloud.workspaces import Workspace, make_bundle, make_workspace, serving

pytestmark = pytest.mark.slow

X = np.array([[1, 2, 3, 4]], dtype=np.float32)
ALL_TO_2 = pb.Split(assignment=pb.ASSIGNMENT_RANDOM, shares=[pb.Share(version=2, share=1.0)])


def second_workspace(first: Workspace, root: Path) -> Workspace:
    """Return what a second machine has: a copy of the keys, and the signed metadata in a shared folder."""
    shutil.copytree(first.root, root)
    shutil.rmtree(root / "cloud" / "tuf")
    (root / "cloud" / "tuf").symlink_to(first.home / "tuf")
    return Workspace(root)


async def versions(workspace: Workspace, cloud: Cloud, count: int = 8) -> Counter[int]:
    """Return which versions answer requests that name none."""
    metadata = (("authorization", f"Bearer {workspace.token('client')}"),)
    found = Counter[int]()
    async with workspace.channel(cloud) as channel:
        inference: Any = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        for _ in range(count):
            answer = await inference.ModelInfer(encode_request("triage", {"x": X}), metadata=metadata, timeout=30)
            found[int(read_parameters(answer.parameters)["isthmus.cloud_version"])] += 1
    return found


def test_policies_and_roll_backs_count_in_both_clouds_and_survive_them(tmp_path: Path) -> None:
    workspace = make_workspace(tmp_path / "first")
    other = second_workspace(workspace, tmp_path / "second")
    database = f"sqlite:///{tmp_path / 'shared.db'}"
    shared: dict[str, Any] = {
        "database": database, "blobs": str(tmp_path / "shared"), "rollout_poll_s": 0.1, "heavy_versions": 1,
    }  # fmt: skip

    async def story() -> None:
        async with serving(workspace, **shared) as first, serving(other, **shared) as second:
            with workspace.client(first) as client:
                for version in (1, 2, 3):
                    bundle = make_bundle(tmp_path / f"v{version}", version, factor=10.0 * version)
                    await asyncio.to_thread(client.publish, bundle, workspace.operator, release=version == 1)
                request = pb.SetTrafficRequest(model="triage", split=ALL_TO_2)
                await asyncio.to_thread(TrafficClient(client).set, request)
            assert set(await versions(workspace, first)) == {2}  # loaded for it: only the newest and the released are

            async def follows() -> bool:
                return set(await versions(other, second)) == {2}

            await eventually(follows, "the other cloud follows", within_s=60)
            with other.client(second) as client:
                await asyncio.to_thread(TrafficClient(client).roll_back, "triage")
            assert set(await versions(other, second)) == {1}

            async def back() -> bool:
                return set(await versions(workspace, first)) == {1}

            await eventually(back, "the first cloud follows", within_s=60)
            with workspace.client(first) as client:
                await asyncio.to_thread(TrafficClient(client).set, request)
        async with serving(workspace, **shared) as again:
            assert set(await versions(workspace, again)) == {2}
            with workspace.client(again) as client:
                await asyncio.to_thread(client.release, "triage", 2)
                await asyncio.to_thread(client.withdraw, "triage", 3, "it is bad", workspace.operator)
                to_3 = pb.SetTrafficRequest(model="triage", shadow=pb.Shadow(version=3, share=1.0))
                with pytest.raises(ConflictError, match="withdrawn"):
                    await asyncio.to_thread(TrafficClient(client).set, to_3)

            async def share_ended() -> bool:
                with workspace.client(again) as client:
                    (report,) = await asyncio.to_thread(TrafficClient(client).reports)
                return not report["shares"]

            await eventually(share_ended, "a version that is released needs no share", within_s=60)

    asyncio.run(story())
    record = db.Database(database)
    with record.read() as session:
        events = session.scalars(select(db.Event).where(db.Event.kind == "traffic").order_by(db.Event.id)).all()
    record.close()
    assert [event.detail for event in events] == ["canary 2=1", "released version only", "canary 2=1"]
    assert {event.reason for event in events} == {"somebody"}


def _away(_session: Any) -> int:
    raise OperationalError("UPDATE", {}, ConnectionError("the database went away"))


def test_a_roll_back_that_the_database_did_not_hear_of_gives_way_to_what_it_says_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "isthmus.db"

    async def story() -> None:
        mine, others = db.open_database(file), db.open_database(file)
        with mine.write() as session:
            session.add(db.Model(name="triage", released=1))
            session.flush()
            session.add(
                db.Version(
                    model="triage", version=1, manifest_sha256="0" * 64, heavy_digest="0" * 64, heavy_version=1,
                    published_at=0.0,
                )
            )  # fmt: skip
        catalog = Catalog()
        catalog.publish("triage", 1, HeavyId("triage", 1))
        catalog.release("triage", 1)
        here, there = (TrafficDesk(database, catalog, Replicas([]), poll_s=0.01) for database in (mine, others))
        for desk in (here, there):
            desk.serve_with(Serving(lambda *_: None, lambda _: asyncio.sleep(0)))
        await here.change(pb.SetTrafficRequest(model="triage", cache_s=5), "ann")
        with monkeypatch.context() as away:
            away.setattr(db, "next_revision", _away)
            with pytest.raises(OperationalError):
                await here.roll_back("triage", "ann")
        there.read()
        await there.change(pb.SetTrafficRequest(model="triage", cache_s=9), "bob")
        following = asyncio.create_task(here.follow())

        async def follows() -> bool:
            return bool(here.policies()["triage"].cache_s == 9)

        await eventually(follows, "the policy of the other cloud", within_s=10)
        following.cancel()
        await asyncio.gather(following, return_exceptions=True)
        mine.close()
        others.close()

    asyncio.run(story())
