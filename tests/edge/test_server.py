"""The agent as its callers see it, through an unmodified tritonclient."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import tritonclient.grpc as sync_triton
import tritonclient.grpc.aio as aio_triton
from grpc_health.v1 import health_pb2, health_pb2_grpc
from tritonclient.utils import InferenceServerException

from edge.runtimes import Worker
from edge.server import AgentServer, InferenceService
from isthmus.address import is_local
from isthmus.errors import ConfigError, InputError
from isthmus.oip import SERVICE, service_pb2
from isthmus.tensors import Array
from isthmus.v1 import agent_pb2
from tests.edge import bundles
from tests.edge.serving import MODEL, computed_by, explanation, open_variant, serving


def test_confident_request_is_answered_on_the_edge(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with serving(tmp_path) as agent:
            result = await agent.infer(bundles.SURE, request_id="r1")
            np.testing.assert_allclose(result.as_numpy("logits"), bundles.SURE @ bundles.weights(1), atol=1e-5)
            assert result.as_numpy("label").tolist() == [0]
            told = explanation(result)
            assert told["isthmus.route"] == "edge"
            assert told["isthmus.reason"] == "confident"
            assert told["isthmus.score"] > told["isthmus.threshold"] == bundles.THRESHOLD
            assert told["isthmus.edge_version"] == 1
            assert len(told["isthmus.calibration"]) == 16
            assert "isthmus.cloud_version" not in told
            assert result.get_response().id == "r1"
            assert result.get_response().model_version == "1"
            assert agent.cloud.requests == []

    asyncio.run(scenario())


def test_a_request_without_id_gets_one_that_the_cloud_sees_too(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with serving(tmp_path) as agent:
            sure = (await agent.infer(bundles.SURE)).get_response().id
            hard = (await agent.infer(bundles.HARD, client_timeout=5)).get_response().id
            assert len(sure) == len(hard) == 16
            assert sure != hard
            [raw] = agent.cloud.requests
            assert service_pb2.ModelInferRequest.FromString(raw).id == hard

    asyncio.run(scenario())


def test_hard_request_is_escalated_as_it_came(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with serving(tmp_path) as agent:
            result = await agent.infer(bundles.HARD, request_id="r2", client_timeout=5)
            np.testing.assert_array_equal(result.as_numpy("logits"), bundles.HARD + np.float32(100))
            told = explanation(result)
            assert told["isthmus.route"] == "cloud"
            assert told["isthmus.reason"] == "uncertain"
            assert told["isthmus.score"] < told["isthmus.threshold"]
            assert told["isthmus.cloud_version"] == "7"
            assert result.get_response().id == "r2"
            assert result.get_response().model_version == "1"
            [raw] = agent.cloud.requests
            forwarded = service_pb2.ModelInferRequest.FromString(raw)
            assert forwarded.model_version == "1"
            assert forwarded.raw_input_contents[0] == bundles.HARD.tobytes()
            assert agent.cloud.metadata[0]["authorization"] == "Bearer token"

    asyncio.run(scenario())


def test_one_hard_row_makes_the_request_hard(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with serving(tmp_path) as agent:
            result = await agent.infer(np.concatenate([bundles.SURE, bundles.HARD, bundles.SURE]))
            assert explanation(result)["isthmus.route"] == "cloud"
            assert result.as_numpy("logits").shape == (3, 3)

    asyncio.run(scenario())


@pytest.mark.parametrize(("x", "route"), [(bundles.SURE, "cloud"), (bundles.HARD, "edge")])
def test_caller_may_ask_for_a_route(tmp_path: Path, x: Array, route: str) -> None:
    async def scenario() -> None:
        async with serving(tmp_path) as agent:
            told = explanation(await agent.infer(x, parameters={"isthmus.route": route}))
            assert told["isthmus.route"] == route
            assert told["isthmus.reason"] == "requested"
            with pytest.raises(InferenceServerException, match=r"expected 'edge' or 'cloud', got 'moon'"):
                await agent.infer(x, parameters={"isthmus.route": "moon"})

    asyncio.run(scenario())


def test_subset_of_outputs_on_both_routes(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with serving(tmp_path) as agent:
            for x, route in ((bundles.SURE, "edge"), (bundles.HARD, "cloud")):
                wanted = [sync_triton.InferRequestedOutput("label")]
                result = await agent.infer(x, outputs=wanted)
                assert [output.name for output in result.get_response().outputs] == ["label"]
                assert explanation(result)["isthmus.route"] == route

    asyncio.run(scenario())


def test_description_of_server_and_model(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with serving(tmp_path) as agent:
            client = agent.client
            assert await client.is_server_live()
            assert await client.is_server_ready()
            assert await client.is_model_ready(MODEL)
            assert await client.is_model_ready(MODEL, "1")
            assert (await client.get_server_metadata()).name == "isthmus-agent"
            metadata = await client.get_model_metadata(MODEL)
            assert (metadata.versions, metadata.platform) == (["1"], "onnxruntime")
            assert [(t.name, t.datatype, list(t.shape)) for t in metadata.inputs] == [("x", "FP32", [-1, 3])]
            config = (await client.get_model_config(MODEL)).config
            assert config.max_batch_size == 8
            assert list(config.input[0].dims) == [3]
            index = await client.get_model_repository_index()
            assert [(m.name, m.version, m.state) for m in index.models] == [(MODEL, "1", "READY")]

    asyncio.run(scenario())


def test_statistics_count_every_request_once(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with serving(tmp_path) as agent:
            for x in (bundles.SURE, bundles.SURE, bundles.HARD):
                await agent.infer(x)
            agent.cloud.behaviour = _unavailable
            await agent.infer(bundles.HARD)
            with pytest.raises(InferenceServerException):
                await agent.infer(np.zeros((1, 4), np.float32))
            stats = (await agent.client.get_inference_statistics(MODEL)).model_stats[0]
            routes = {route: s.success.count for route, s in stats.response_stats.items()}
            assert routes == {"edge": 2, "cloud": 1, "fallback": 1}
            assert stats.inference_stats.success.count == sum(routes.values())
            assert stats.inference_stats.fail.count == 1
            counters = agent.uplink.counters
            assert (counters.attempts, counters.successes, counters.failures, counters.skipped) == (2, 1, 1, 0)
            assert counters.bytes_up == sum(len(raw) for raw in agent.cloud.requests)

    asyncio.run(scenario())


async def _unavailable(raw: bytes, context: grpc.aio.ServicerContext[Any, Any]) -> bytes:
    await context.abort(grpc.StatusCode.UNAVAILABLE, "not now")
    return b""


def test_unknown_model_and_version_are_not_found(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with serving(tmp_path) as agent:
            with pytest.raises(InferenceServerException, match="models served: triage") as caught:
                await agent.client.get_model_metadata("nothere")
            assert caught.value.status() == "StatusCode.NOT_FOUND"
            with pytest.raises(InferenceServerException, match="version served: 1") as caught:
                await agent.infer(bundles.SURE, model_version="9")
            assert caught.value.status() == "StatusCode.NOT_FOUND"

    asyncio.run(scenario())


@pytest.mark.parametrize("method", ["ModelInfer", "ModelMetadata", "ModelStatistics", "RepositoryIndex"])
def test_malformed_protobuf_is_the_callers_error(tmp_path: Path, method: str) -> None:
    async def scenario() -> None:
        async with serving(tmp_path) as agent, grpc.aio.insecure_channel(agent.address) as channel:
            call: Any = channel.unary_unary(f"/{SERVICE}/{method}")
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await call(b"\x0a\xff\xff\xff")
            assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT

    asyncio.run(scenario())


def test_other_methods_are_unimplemented(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with serving(tmp_path) as agent:
            with pytest.raises(InferenceServerException) as caught:
                await agent.client.load_model(MODEL)
            assert caught.value.status() == "StatusCode.UNIMPLEMENTED"

    asyncio.run(scenario())


def test_health_and_not_ready_before_the_first_version(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with serving(tmp_path) as agent, grpc.aio.insecure_channel(agent.address) as channel:
            health = health_pb2_grpc.HealthStub(channel)
            assert (await health.Check(health_pb2.HealthCheckRequest())).status == 1
            agent.models.swap(MODEL, None)
            assert not await agent.client.is_server_ready()
            assert not await agent.client.is_model_ready(MODEL)
            with pytest.raises(InferenceServerException, match="not installed yet") as caught:
                await agent.infer(bundles.SURE)
            assert caught.value.status() == "StatusCode.UNAVAILABLE"

    asyncio.run(scenario())


def test_synchronous_tritonclient(tmp_path: Path) -> None:
    def call(address: str) -> Array:
        with sync_triton.InferenceServerClient(address) as client:
            tensor = sync_triton.InferInput("x", [1, 3], "FP32").set_data_from_numpy(bundles.HARD)
            logits: Array = client.infer(MODEL, [tensor], client_timeout=5).as_numpy("logits")
            return logits

    async def scenario() -> None:
        async with serving(tmp_path) as agent:
            logits = await asyncio.to_thread(call, agent.address)
            np.testing.assert_array_equal(logits, bundles.HARD + np.float32(100))

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("address", "local"),
    [
        ("127.0.0.1:8001", True),
        ("127.8.8.8:1", True),
        ("[::1]:8001", True),
        ("localhost:8001", True),
        ("unix:/run/agent.sock", True),
        ("0.0.0.0:8001", False),
        ("[::]:8001", False),
        ("192.168.1.7:8001", False),
        ("localhost.example.com:8001", False),
    ],
)
def test_only_local_addresses_may_lack_tls(address: str, local: bool) -> None:
    assert is_local(address) is local
    if not local:
        with pytest.raises(ConfigError, match="expected TLS credentials"):
            AgentServer(address, InferenceService(None, None), agent_pb2.GetStatusResponse)  # type: ignore[arg-type]


@pytest.mark.slow
def test_swaps_under_load_fail_no_call(tmp_path: Path) -> None:
    async def scenario() -> None:
        for version in range(2, 6):
            bundles.build_bundle(tmp_path / str(version), version)
        async with serving(tmp_path) as agent:
            done = asyncio.Event()
            versions: set[str] = set()

            async def caller() -> None:
                while not done.is_set():
                    result = await agent.infer(bundles.SURE, client_timeout=10)
                    version = result.get_response().model_version
                    logits = bundles.SURE @ bundles.weights(int(version))
                    np.testing.assert_allclose(result.as_numpy("logits"), logits, atol=1e-5)
                    versions.add(version)

            async with asyncio.TaskGroup() as group:
                for _ in range(8):
                    group.create_task(caller())
                for version in range(2, 6):
                    while str(version - 1) not in versions:
                        await agent.infer(bundles.SURE)
                    live = await asyncio.to_thread(open_variant, tmp_path / str(version))
                    agent.models.swap(MODEL, live)
                while "5" not in versions:
                    await agent.infer(bundles.SURE)
                done.set()
            assert versions == {"1", "2", "3", "4", "5"}
            assert agent.models.counters[MODEL].errors == 0

    asyncio.run(scenario())


def test_callers_see_only_the_models_that_they_may_use(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with serving(tmp_path, may_use=lambda model: False) as agent:
            assert list((await agent.client.get_model_repository_index()).models) == []
            assert list((await agent.client.get_inference_statistics()).model_stats) == []
            for call in (agent.infer(bundles.SURE), agent.client.get_model_metadata(MODEL)):
                with pytest.raises(InferenceServerException) as caught:
                    await call
                assert caught.value.status() == "StatusCode.NOT_FOUND"

    asyncio.run(scenario())


def test_busy_port_is_a_configuration_error(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with serving(tmp_path) as agent:
            service = InferenceService(agent.models, None)  # type: ignore[arg-type]
            second = AgentServer(agent.address, service, agent_pb2.GetStatusResponse)
            with pytest.raises(ConfigError, match=f"cannot listen on {agent.address}: another program does") as caught:
                await second.start()
            assert "another port" in caught.value.hint

    asyncio.run(scenario())


@pytest.mark.parametrize("address", ["8001", "localhost", ":8001", "localhost:99999", "http://localhost:8001"])
def test_what_is_no_address_is_not_listened_on(address: str) -> None:
    with pytest.raises(ConfigError, match="listen: expected HOST:PORT"):
        AgentServer(address, InferenceService(None, None), agent_pb2.GetStatusResponse)  # type: ignore[arg-type]


def test_socket_in_a_missing_folder_is_a_configuration_error(tmp_path: Path) -> None:
    async def scenario() -> None:
        service = InferenceService(None, None)  # type: ignore[arg-type]
        server = AgentServer(f"unix:{tmp_path}/nothere/agent.sock", service, agent_pb2.GetStatusResponse)
        with pytest.raises(ConfigError, match="cannot listen on unix:") as caught:
            await server.start()
        assert "GRPC_VERBOSITY" not in caught.value.message

    asyncio.run(scenario())


def test_unix_socket_and_tcp_at_once(tmp_path: Path) -> None:
    socket = tmp_path / "agent.sock"

    async def scenario() -> None:
        async with serving(tmp_path, unix_socket=socket) as agent:
            async with aio_triton.InferenceServerClient(f"unix:{socket}") as client:
                assert await client.is_server_ready()
                assert await agent.client.is_server_ready()
            service = InferenceService(agent.models, None)  # type: ignore[arg-type]
            second = AgentServer(
                "127.0.0.1:0", service, agent_pb2.GetStatusResponse, unix_socket=tmp_path / "nothere" / "agent.sock"
            )
            with pytest.raises(ConfigError, match="unix_socket: cannot listen on"):
                await second.start()

    asyncio.run(scenario())


class Secretive:
    """A runtime that fails with its own words."""

    def infer(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        raise InputError("cannot compute: /home/jenkins/plugin.cpp:33", reason="cannot-infer")

    def close(self) -> None:
        return None


def test_words_of_the_runtime_stay_on_the_device(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with serving(tmp_path) as agent:
            whole = agent.models.find("triage")
            worker = Worker(Secretive())
            agent.models.swap("triage", computed_by(whole, worker))
            with pytest.raises(InferenceServerException) as caught:
                await agent.infer(bundles.SURE)
            assert caught.value.status() == "StatusCode.INVALID_ARGUMENT"
            assert caught.value.message() == "the light model cannot compute these values"

    asyncio.run(scenario())


def test_unix_socket(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with serving(tmp_path, listen=f"unix:{tmp_path / 'agent.sock'}") as agent:
            assert explanation(await agent.infer(bundles.HARD))["isthmus.route"] == "cloud"

    asyncio.run(scenario())
