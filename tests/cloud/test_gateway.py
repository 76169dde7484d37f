"""The gateway over real TLS with real tokens and a real Triton behind it."""

from __future__ import annotations

import asyncio
import os
import signal
import statistics
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import grpc
import numpy as np
import pytest

from cloud.bootstrap import Cloud
from isthmus.oip import MODEL_INFER, read_parameters, service_pb2, service_pb2_grpc
from isthmus.status import REASON_KEY
from isthmus.tensors import decode_outputs, encode_request
from tests.cloud.conftest import eventually
from tests.cloud.workspaces import Workspace, make_bundle, make_workspace, serving

pytestmark = pytest.mark.slow

X = np.array([[1, 2, 3, 4]], dtype=np.float32)


@dataclass(frozen=True, slots=True)
class Stage:
    """A cloud with triage 1 (times 10) and 2 (times 20, released)."""

    runner: asyncio.Runner
    workspace: Workspace
    cloud: Cloud


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    folder = tmp_path_factory.mktemp("gateway")
    workspace = make_workspace(folder / "workspace")
    with asyncio.Runner() as runner:
        running = serving(workspace)
        cloud = runner.run(running.__aenter__())

        async def publish() -> None:
            with workspace.client(cloud) as client:
                for version in (1, 2):
                    bundle = make_bundle(folder / f"v{version}", version, factor=10.0 * version)
                    await asyncio.to_thread(client.publish, bundle, workspace.operator)

        runner.run(publish())
        yield Stage(runner, workspace, cloud)
        runner.run(running.__aexit__(None, None, None))


@asynccontextmanager
async def stub(stage: Stage) -> AsyncIterator[Any]:
    async with stage.workspace.channel(stage.cloud) as channel:
        yield service_pb2_grpc.GRPCInferenceServiceStub(channel)


def bearer(token: str) -> tuple[tuple[str, str], ...]:
    return (("authorization", f"Bearer {token}"),)


async def refusal(call: Any) -> tuple[grpc.StatusCode, str, str]:
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await call
    reason = dict(raised.value.trailing_metadata()).get(REASON_KEY, "")
    return raised.value.code(), str(raised.value.details()), str(reason)


def test_answers_with_the_version_that_was_asked_for(stage: Stage) -> None:
    async def story() -> None:
        metadata = bearer(stage.workspace.token("client"))
        async with stub(stage) as inference:
            for version, served, factor in (("", "2", 20), ("1", "1", 10), ("2", "2", 20)):
                request = encode_request("triage", {"x": X}, version=version, request_id="r-7")
                answer = await inference.ModelInfer(request, metadata=metadata, timeout=10)
                assert decode_outputs(answer)["logits"].tolist() == (factor * X[:, :3]).tolist()
                assert (answer.model_name, answer.model_version, answer.id) == ("triage", served, "r-7")
                assert read_parameters(answer.parameters)["isthmus.cloud_version"] == int(served)

    stage.runner.run(story())


def test_a_model_that_is_not_permitted_looks_like_an_unknown_one(stage: Stage) -> None:
    async def story() -> None:
        limited = bearer(stage.workspace.token("client", models=("other",)))
        everything = bearer(stage.workspace.token("client"))
        async with stub(stage) as inference:
            request = encode_request("triage", {"x": X})
            forbidden = await refusal(inference.ModelInfer(request, metadata=limited, timeout=10))
            request = encode_request("triagf", {"x": X})
            unknown = await refusal(inference.ModelInfer(request, metadata=everything, timeout=10))
            assert forbidden[0] is unknown[0] is grpc.StatusCode.NOT_FOUND
            assert forbidden[1] == unknown[1].replace("triagf", "triage")
            assert forbidden[2] == unknown[2]
            asked = service_pb2.ModelReadyRequest(name="triage")
            assert not (await inference.ModelReady(asked, metadata=limited, timeout=10)).ready
            assert (await inference.ModelReady(asked, metadata=everything, timeout=10)).ready
            statistics = await inference.ModelStatistics(
                service_pb2.ModelStatisticsRequest(), metadata=limited, timeout=10
            )
            assert not statistics.model_stats

    stage.runner.run(story())


def test_refuses_what_is_not_a_request(stage: Stage) -> None:
    async def story() -> None:
        metadata = bearer(stage.workspace.token("client"))
        async with stage.workspace.channel(stage.cloud) as channel, stub(stage) as inference:
            raw: Any = channel.unary_unary(MODEL_INFER)
            code, detail, _ = await refusal(raw(b"\xff\xff\xff", metadata=metadata, timeout=10))
            assert code is grpc.StatusCode.INVALID_ARGUMENT
            assert "not a ModelInferRequest" in detail
            request = encode_request("triage", {"x": X[:, :2]})
            code, detail, _ = await refusal(inference.ModelInfer(request, metadata=metadata, timeout=10))
            assert code is grpc.StatusCode.INVALID_ARGUMENT
            assert "[-1,4]" in detail
            request = encode_request("triage", {"x": -X})
            code, detail, reason = await refusal(inference.ModelInfer(request, metadata=metadata, timeout=10))
            assert (code, reason) == (grpc.StatusCode.INTERNAL, "heavy-failed")
            assert "secret" not in detail
            for version in ("9", "one", "-1", "²"):
                request = encode_request("triage", {"x": X}, version=version)
                code, _, reason = await refusal(inference.ModelInfer(request, metadata=metadata, timeout=10))
                assert (code, reason) == (grpc.StatusCode.NOT_FOUND, "unknown-version")

    stage.runner.run(story())


def test_needs_a_token_with_the_scope(stage: Stage) -> None:
    async def story() -> None:
        async with stub(stage) as inference:
            request = encode_request("triage", {"x": X})
            code, _, reason = await refusal(inference.ModelInfer(request, timeout=10))
            assert (code, reason) == (grpc.StatusCode.UNAUTHENTICATED, "missing-token")
            metadata = bearer(stage.workspace.token("client"))
            unload = service_pb2.RepositoryModelUnloadRequest(model_name="triage@2")
            code, _, _ = await refusal(inference.RepositoryModelUnload(unload, metadata=metadata, timeout=10))
            assert code is grpc.StatusCode.UNIMPLEMENTED

    stage.runner.run(story())


def test_describes_itself_and_its_models(stage: Stage) -> None:
    async def story() -> None:
        metadata = bearer(stage.workspace.token("client"))
        async with stub(stage) as inference:
            about = await inference.ServerMetadata(service_pb2.ServerMetadataRequest(), metadata=metadata, timeout=10)
            assert about.name == "isthmus-gateway"
            assert "triton:2.51.0" in about.extensions
            assert (await inference.ServerReady(service_pb2.ServerReadyRequest(), metadata=metadata, timeout=10)).ready
            asked = service_pb2.ModelMetadataRequest(name="triage", version="1")
            model = await inference.ModelMetadata(asked, metadata=metadata, timeout=10)
            assert (model.name, list(model.versions)) == ("triage", ["1", "2"])
            assert list(model.inputs[0].shape) == [-1, 4]
            everything = service_pb2.ModelStatisticsRequest()
            statistics = await inference.ModelStatistics(everything, metadata=metadata, timeout=10)
            assert {(model.name, model.version) for model in statistics.model_stats} == {
                ("triage", "1"),
                ("triage", "2"),
            }

    stage.runner.run(story())


def test_the_callers_deadline_ends_a_request(stage: Stage) -> None:
    async def story() -> None:
        metadata = bearer(stage.workspace.token("client"))
        async with stub(stage) as inference:
            slow = encode_request("triage", {"x": np.array([[-2, 0, 0, 0]], np.float32)})
            code, _, _ = await refusal(inference.ModelInfer(slow, metadata=metadata, timeout=0.1))
            assert code is grpc.StatusCode.DEADLINE_EXCEEDED

    stage.runner.run(story())


def test_a_dead_triton_is_unavailable_at_once_and_comes_back(stage: Stage) -> None:
    async def story() -> None:
        metadata = bearer(stage.workspace.token("client"))
        request = encode_request("triage", {"x": X})
        assert stage.cloud.triton is not None
        async with stub(stage) as inference:
            os.kill(stage.cloud.triton.pid, signal.SIGKILL)
            took, codes = list[float](), set[grpc.StatusCode]()

            async def answers() -> bool:
                started = time.monotonic()
                try:
                    await inference.ModelInfer(request, metadata=metadata, timeout=10)
                except grpc.aio.AioRpcError as error:
                    codes.add(error.code())
                    took.append(time.monotonic() - started)
                    return False
                return bool(codes)

            await eventually(answers, "the gateway answers again")
            assert codes == {grpc.StatusCode.UNAVAILABLE}
            assert statistics.median(took) < 0.25  # not the slowest: other tests may have the processor

    stage.runner.run(story())
