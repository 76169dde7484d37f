"""Weighted versions and replicas of a real cloud with two Tritons, under load."""

from __future__ import annotations

import asyncio
import math
import os
import signal
import urllib.request
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc
import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families

from cloud.bootstrap import Cloud
from cloud.replicas import Replica
from cloud.traffic_client import TrafficClient
from isthmus.errors import ConflictError, NotFoundError
from isthmus.oip import read_parameters, service_pb2_grpc, set_parameter
from isthmus.tensors import decode_outputs, encode_request
from isthmus.v1 import traffic_pb2 as pb
from tests.cloud.conftest import eventually
from tests.cloud.workspaces import Workspace, make_bundle, make_workspace, serving

pytestmark = pytest.mark.slow

X = np.array([[1, 2, 3, 4]], dtype=np.float32)
CALLERS = 6


@dataclass(frozen=True, slots=True)
class Stage:
    """A cloud with two Tritons and three versions of triage: times 10 (released), 20 and 30."""

    runner: asyncio.Runner
    workspace: Workspace
    cloud: Cloud

    def set(self, **parts: Any) -> dict[str, Any]:
        with self.workspace.client(self.cloud) as client:
            return TrafficClient(client).set(pb.SetTrafficRequest(model="triage", **parts))

    def roll_back(self) -> dict[str, Any]:
        with self.workspace.client(self.cloud) as client:
            return TrafficClient(client).roll_back("triage")

    def report(self) -> dict[str, Any]:
        with self.workspace.client(self.cloud) as client:
            return TrafficClient(client).reports("triage")[0]


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    folder = tmp_path_factory.mktemp("traffic")
    workspace = make_workspace(folder / "workspace")
    with asyncio.Runner() as runner:
        running = serving(workspace, triton_children=2, metrics_listen="127.0.0.1:0")
        cloud = runner.run(running.__aenter__())

        async def publish() -> None:
            with workspace.client(cloud) as client:
                for version in (1, 2, 3):
                    bundle = make_bundle(folder / f"v{version}", version, factor=10.0 * version)
                    await asyncio.to_thread(client.publish, bundle, workspace.operator, release=version == 1)

        runner.run(publish())
        yield Stage(runner, workspace, cloud)
        runner.run(running.__aexit__(None, None, None))


def split(*shares: tuple[int, float], sticky: bool = False, key: str = "") -> pb.Split:
    kind = pb.ASSIGNMENT_STICKY if sticky else pb.ASSIGNMENT_RANDOM
    return pb.Split(assignment=kind, shares=[pb.Share(version=v, share=s) for v, s in shares], key_parameter=key)


@dataclass(slots=True)
class Load:
    """What callers got."""

    answers: Counter[tuple[int, str]] = field(default_factory=Counter)  # by version that answered, and assignment
    failures: list[str] = field(default_factory=list)
    wrong: int = 0

    @property
    def total(self) -> int:
        return self.answers.total() + len(self.failures)


@asynccontextmanager
async def load(stage: Stage, callers: int = CALLERS) -> AsyncIterator[Load]:
    """Have callers ask without a break for as long as the block runs."""
    counted, done = Load(), asyncio.Event()
    metadata = (("authorization", f"Bearer {stage.workspace.token('client')}"),)
    request = encode_request("triage", {"x": X})

    async def ask(inference: Any) -> None:
        while not done.is_set():
            try:
                answer = await inference.ModelInfer(request, metadata=metadata, timeout=20)
            except grpc.aio.AioRpcError as error:
                counted.failures.append(f"{error.code().name}: {error.details()}")
                continue
            told = read_parameters(answer.parameters)
            version = int(told["isthmus.cloud_version"])
            counted.wrong += float(decode_outputs(answer)["logits"][0, 0]) != 10.0 * version
            counted.answers[version, str(told.get("isthmus.assignment", ""))] += 1

    async with stage.workspace.channel(stage.cloud) as channel:
        inference = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        async with asyncio.TaskGroup() as group:
            for _ in range(callers):
                group.create_task(ask(inference))
            try:
                yield counted
            finally:
                done.set()


async def more(counted: Load, requests: int) -> Counter[tuple[int, str]]:
    """Wait for so many further answers; return them."""
    before, start = Counter(counted.answers), counted.total

    async def enough() -> bool:
        return counted.total >= start + requests

    await eventually(enough, f"{requests} more answers", within_s=90)
    return counted.answers - before


def within_binomial_error(count: int, total: int, share: float) -> bool:
    return abs(count - share * total) <= 4.5 * math.sqrt(total * share * (1 - share)) + 1e-9


def test_a_canary_goes_up_and_back_under_load_and_a_shadow_is_never_heard(stage: Stage) -> None:
    async def story() -> None:
        async with load(stage) as counted:
            await asyncio.to_thread(stage.set, shadow=pb.Shadow(version=3, share=1.0, most_at_once=2))
            for share in (0.05, 0.5, 1.0, 0.5, 0.05):
                await asyncio.to_thread(stage.set, split=split((2, share)))
                await more(counted, CALLERS)  # those that were under way
                seen = await more(counted, 600)
                canary, total = seen[2, "canary"], seen.total()
                assert within_binomial_error(canary, total, share)
            record = await asyncio.to_thread(stage.roll_back)
            assert record["released"] == 1
            await more(counted, CALLERS)
            assert set(await more(counted, 200)) == {(1, "released")}
        assert not counted.failures
        assert not counted.wrong
        assert {version for version, _ in counted.answers} == {1, 2}  # never 3
        report = await asyncio.to_thread(stage.report)
        shadow = report["shadow_outcomes"]
        assert shadow["agreed"] > 0  # the same best class, whatever the factor
        assert not shadow["failed"]
        answered = Counter[int]()
        for row in report["versions"]:
            answered[row["version"]] += row["answered"]
        # What the cloud has counted is what callers got, and the shadow's work is nobody's answer.
        assert answered[2] == sum(count for (version, _), count in counted.answers.items() if version == 2)

    stage.runner.run(story())


def test_an_ab_test_is_sticky_by_caller_or_parameter(stage: Stage) -> None:
    async def story() -> None:
        await asyncio.to_thread(stage.set, split=split((2, 0.5), sticky=True, key="meter"))
        versions: dict[str, set[int]] = {}
        async with stage.workspace.channel(stage.cloud) as channel:
            inference = service_pb2_grpc.GRPCInferenceServiceStub(channel)
            for caller in ("anna", "bert"):
                metadata = (("authorization", f"Bearer {stage.workspace.token('client', caller)}"),)
                for meter in (*(f"m-{number}" for number in range(20)), ""):
                    request = encode_request("triage", {"x": X})
                    if meter:
                        set_parameter(request, "meter", meter)
                    for _ in range(2):
                        answer = await inference.ModelInfer(request, metadata=metadata, timeout=20)
                        told = read_parameters(answer.parameters)
                        assert told["isthmus.assignment"] in ("ab", "released")
                        versions.setdefault(meter or caller, set()).add(int(told["isthmus.cloud_version"]))
            assert all(len(found) == 1 for found in versions.values())
            assert set.union(*versions.values()) == {1, 2}
            named = encode_request("triage", {"x": X}, version="3")
            told = read_parameters((await inference.ModelInfer(named, metadata=metadata, timeout=20)).parameters)
            assert (told["isthmus.cloud_version"], told["isthmus.assignment"]) == (3, "named")
        await asyncio.to_thread(stage.roll_back)

    stage.runner.run(story())


def test_equal_requests_get_the_kept_answer_under_their_own_id(stage: Stage) -> None:
    async def story() -> None:
        await asyncio.to_thread(stage.set, cache_s=60)
        metadata = (("authorization", f"Bearer {stage.workspace.token('client')}"),)
        x = X + 0.5
        async with stage.workspace.channel(stage.cloud) as channel:
            inference = service_pb2_grpc.GRPCInferenceServiceStub(channel)
            answers = []
            for request_id in ("first", "second", ""):
                request = encode_request("triage", {"x": x}, request_id=request_id)
                answer = await inference.ModelInfer(request, metadata=metadata, timeout=20)
                assert answer.id == request_id
                assert decode_outputs(answer)["logits"].tolist() == (10 * x[:, :3]).tolist()
                answers.append(read_parameters(answer.parameters).get("isthmus.cached", False))
            assert answers == [False, True, True]
            named = encode_request("triage", {"x": x}, version="2")
            answer = await inference.ModelInfer(named, metadata=metadata, timeout=20)
            assert decode_outputs(answer)["logits"].tolist() == (20 * x[:, :3]).tolist()
            for _ in range(2):  # an error is asked for anew
                with pytest.raises(grpc.aio.AioRpcError):
                    await inference.ModelInfer(encode_request("triage", {"x": -X}), metadata=metadata, timeout=20)
        report = await asyncio.to_thread(stage.report)
        assert report["cache_hits"] == 2
        await asyncio.to_thread(stage.set, cache_s=0)

    stage.runner.run(story())


def scrape(stage: Stage) -> dict[str, float]:
    with urllib.request.urlopen(f"http://{stage.cloud.metrics}/metrics", timeout=20) as answer:
        families = text_string_to_metric_families(answer.read().decode())
    samples = [sample for family in families for sample in family.samples]
    return {
        f"{sample.name}{sorted(sample.labels.items())}" if sample.labels else sample.name: sample.value
        for sample in samples
    }


def test_metrics_tell_what_was_counted(stage: Stage) -> None:
    async def story() -> None:
        await asyncio.to_thread(stage.set, split=split((2, 1.0)))
        before = await asyncio.to_thread(scrape, stage)
        async with load(stage, callers=2) as counted:
            await more(counted, 50)
        after = await asyncio.to_thread(scrape, stage)
        labels = [("assignment", "canary"), ("model", "triage"), ("outcome", "answered"), ("version", "2")]
        name = f"isthmus_gateway_requests_total{labels}"
        assert after[name] - before.get(name, 0.0) == counted.answers.total()
        count = "isthmus_gateway_seconds_count[('model', 'triage')]"
        assert after[count] - before.get(count, 0.0) == counted.answers.total()
        assert after["isthmus_triton_state[('state', 'serving'), ('triton', 'child-1')]"] == 1
        sent = [f"isthmus_triton_requests_total[('triton', 'child-{number}')]" for number in (1, 2)]
        assert sum(after[name] - before[name] for name in sent) == counted.answers.total()
        await asyncio.to_thread(stage.roll_back)

    stage.runner.run(story())


def test_a_version_that_does_not_exist_is_no_canary(stage: Stage) -> None:
    async def story() -> None:
        with pytest.raises(NotFoundError, match="no version 9"):
            await asyncio.to_thread(stage.set, split=split((9, 0.1)))
        with stage.workspace.client(stage.cloud) as client:
            reports = await asyncio.to_thread(TrafficClient(client).reports)
        assert not any(report["shares"] for report in reports)

    stage.runner.run(story())


def test_a_caller_that_leaves_takes_its_request_along(stage: Stage) -> None:
    async def story() -> None:
        metadata = (("authorization", f"Bearer {stage.workspace.token('client')}"),)
        slow = encode_request("triage", {"x": np.array([[-2, 0, 0, 0]], np.float32)})

        async def under_way(count: int) -> bool:
            return bool(sum(replica.under_way for replica in stage.cloud.pool) == count)

        async with stage.workspace.channel(stage.cloud) as channel:
            inference = service_pb2_grpc.GRPCInferenceServiceStub(channel)
            call = inference.ModelInfer(slow, metadata=metadata, timeout=20)
            await eventually(lambda: under_way(1), "the request is at a Triton")
            call.cancel()
            await eventually(lambda: under_way(0), "the request has left")
            late = inference.ModelInfer(slow, metadata=metadata, timeout=0.1)
            with pytest.raises(grpc.aio.AioRpcError) as raised:
                await late
            assert raised.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
            set_parameter(slow, "timeout", 100_000)  # microseconds
            with pytest.raises(grpc.aio.AioRpcError) as raised:
                await inference.ModelInfer(slow, metadata=metadata, timeout=20)
            assert raised.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
            await eventually(lambda: under_way(0), "those have left, too")

    stage.runner.run(story())


def test_draining_a_triton_loses_no_request(stage: Stage) -> None:
    async def story() -> None:
        first, second = stage.cloud.pool
        with stage.workspace.client(stage.cloud) as client:
            traffic = TrafficClient(client)
            async with load(stage) as counted:
                await more(counted, 100)
                assert first.requests
                assert second.requests
                row = await asyncio.to_thread(traffic.drain, first.name, 20)
                assert (row["state"], row["under_way"]) == ("drained", 0)
                taken = first.requests
                await more(counted, 200)
                assert first.requests == taken
                with pytest.raises(ConflictError, match="only Triton"):
                    await asyncio.to_thread(traffic.drain, second.name, 1)
                await asyncio.to_thread(traffic.resume, first.name)
                await more(counted, 200)
                assert first.requests > taken
            assert not counted.failures
            with pytest.raises(NotFoundError, match="no Triton"):
                await asyncio.to_thread(traffic.resume, "child-9")

    stage.runner.run(story())


def test_a_triton_that_is_killed_under_load_costs_only_what_it_was_running(stage: Stage) -> None:
    async def story() -> None:
        first, second = stage.cloud.pool
        async with load(stage) as counted:
            await more(counted, 100)
            assert first.server is not None
            os.kill(first.server.pid, signal.SIGKILL)
            await more(counted, 300)

            async def is_back() -> bool:
                return _serves(first)

            await eventually(is_back, "the Triton is back")
            taken = first.requests
            await more(counted, 300)
            assert first.requests > taken
        # A request that may have run is not sent again: those that were there at the moment, and no others.
        assert len(counted.failures) <= CALLERS
        assert all("UNAVAILABLE" in failure for failure in counted.failures)
        assert not counted.wrong
        assert second.ejections == 0

    stage.runner.run(story())


def _serves(replica: Replica) -> bool:
    return replica.state == "serving" and replica.server is not None and replica.server.restarts > 0
