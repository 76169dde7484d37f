"""Usage where requests are split over versions and Tritons, shadowed, and answered from memory."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import grpc
import numpy as np
import pytest

from cloud.bootstrap import Cloud
from cloud.client import Address, CloudClient
from cloud.traffic_client import TrafficClient
from isthmus.oip import read_parameters, service_pb2_grpc
from isthmus.tensors import encode_request
from isthmus.v1 import traffic_pb2, usage_pb2
from security.tokens import TokenIssuer
from tests.cloud.conftest import eventually
from tests.cloud.workspaces import Workspace, make_bundle, make_workspace, serving

pytestmark = pytest.mark.slow


@dataclass(frozen=True, slots=True)
class Stage:
    """A cloud with two Tritons and two versions of triage."""

    runner: asyncio.Runner
    workspace: Workspace
    cloud: Cloud

    def token(self, subject: str, role: str = "client") -> str:
        issuer = TokenIssuer.load(self.workspace.home)
        return issuer.mint(subject, role, models=("*",), ttl=timedelta(hours=1))[0]

    def admin(self, folder: Path) -> CloudClient:
        (folder / "admin").write_text(self.token("boss", "admin"))
        return CloudClient(Address(self.cloud.address, self.workspace.trust, folder / "admin"), timeout_s=20.0)

    async def ask(self, subject: str, inputs: list[float]) -> Counter[int | str]:
        """Ask once for each input; count the answers by version, and what was refused by status."""
        metadata = (("authorization", f"Bearer {self.token(subject)}"),)
        found: Counter[int | str] = Counter()
        async with self.workspace.channel(self.cloud) as channel:
            inference = service_pb2_grpc.GRPCInferenceServiceStub(channel)
            for value in inputs:
                request = encode_request("triage", {"x": np.full((1, 4), value, np.float32)})
                try:
                    answer = await inference.ModelInfer(request, metadata=metadata, timeout=20)
                except grpc.aio.AioRpcError as error:
                    found[error.code().name] += 1
                else:
                    found[int(read_parameters(answer.parameters)["isthmus.cloud_version"])] += 1
        return found


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    folder = tmp_path_factory.mktemp("usage")
    workspace = make_workspace(folder / "workspace")
    with asyncio.Runner() as runner:
        running = serving(workspace, triton_children=2)
        cloud = runner.run(running.__aenter__())

        async def publish() -> None:
            with workspace.client(cloud) as client:
                for version in (1, 2):
                    bundle = make_bundle(folder / f"v{version}", version, factor=10.0 * version)
                    await asyncio.to_thread(client.publish, bundle, workspace.operator, release=version == 1)

        runner.run(publish())
        yield Stage(runner, workspace, cloud)
        runner.run(running.__aexit__(None, None, None))


def test_usage_is_kept_by_the_version_that_answered(stage: Stage, tmp_path: Path) -> None:
    async def story() -> None:
        with stage.admin(tmp_path) as client:
            before = {
                row.heavy_version: row.answered
                for row in await asyncio.to_thread(client.compute, usage_pb2.GetComputeRequest())
            }
            shares = [traffic_pb2.Share(version=2, share=0.5)]
            split = traffic_pb2.Split(assignment=traffic_pb2.ASSIGNMENT_RANDOM, shares=shares)
            request = traffic_pb2.SetTrafficRequest(model="triage", split=split)
            await asyncio.to_thread(TrafficClient(client).set, request)
            answers = await stage.ask("split", [1.0] * 200)
            rows = await asyncio.to_thread(client.usage, usage_pb2.GetUsageRequest(device="split", by=["version"]))
            assert {row.version: row.answered for row in rows} == answers
            assert set(answers) == {1, 2}

            async def both_tritons_told() -> bool:
                told = await asyncio.to_thread(client.compute, usage_pb2.GetComputeRequest())
                return {row.heavy_version: row.answered - before.get(row.heavy_version, 0) for row in told} == answers

            await eventually(both_tritons_told, "both Tritons' counts are those of the answers")
            await asyncio.to_thread(TrafficClient(client).roll_back, "triage")

    stage.runner.run(story())


def test_a_kept_answer_counts_as_such_and_against_quotas(stage: Stage, tmp_path: Path) -> None:
    async def story() -> None:
        with stage.admin(tmp_path) as client:
            request = traffic_pb2.SetTrafficRequest(model="triage", cache_s=60)
            await asyncio.to_thread(TrafficClient(client).set, request)
            scope = usage_pb2.QuotaScope(tenant="default", device="twice")
            limits = usage_pb2.QuotaLimits(rate="0/s", burst=30)
            await asyncio.to_thread(client.set_quota, usage_pb2.Quota(scope=scope, limits=limits))
            answers = await stage.ask("twice", [float(number % 10) for number in range(50)])
            assert answers == {1: 30, "RESOURCE_EXHAUSTED": 20}
            (row,) = await asyncio.to_thread(client.usage, usage_pb2.GetUsageRequest(device="twice"))
            assert (row.answered, row.cached, row.limited, row.calls) == (10, 20, 20, 10)
            request = traffic_pb2.SetTrafficRequest(model="triage", cache_s=0)
            await asyncio.to_thread(TrafficClient(client).set, request)

    stage.runner.run(story())


def test_a_shadow_is_in_nobodys_usage(stage: Stage, tmp_path: Path) -> None:
    async def story() -> None:
        with stage.admin(tmp_path) as client:
            shadow = traffic_pb2.Shadow(version=2, share=1.0)
            request = traffic_pb2.SetTrafficRequest(model="triage", shadow=shadow)
            await asyncio.to_thread(TrafficClient(client).set, request)
            assert await stage.ask("shadowed", [1.0] * 20) == {1: 20}
            rows = await asyncio.to_thread(client.usage, usage_pb2.GetUsageRequest(device="shadowed", by=["version"]))
            assert [(row.version, row.answered, row.calls) for row in rows] == [(1, 20, 20)]
            await asyncio.to_thread(TrafficClient(client).roll_back, "triage")

    stage.runner.run(story())
