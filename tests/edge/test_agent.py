"""The whole agent against a simulated cloud: enrolment, first install, escalation, update, refusal, offline start."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import tritonclient.grpc.aio as triton
from grpc_health.v1 import health_pb2, health_pb2_grpc
from safetensors.numpy import load_file
from typer.testing import CliRunner

from edge.bootstrap import build_agent
from edge.cli import app
from edge.config import EdgeSettings
from edge.identity import DeviceHome, enrol
from edge.spool import export_captures
from edge.status_client import fetch_status
from edge.store import SlotStore
from isthmus.errors import ConfigError, ConflictError, IdentityError, UnavailableError
from isthmus.oip import service_pb2, service_pb2_grpc
from isthmus.settings import load_settings
from isthmus.tensors import Array, encode_request
from isthmus.v1 import fleet_pb2
from security.tls import channel_credentials
from tests.edge import bundles, faulty_cloud
from tests.edge.serving import explanation
from tests.edge.simulated_cloud import CODE, DEVICE, SimulatedCloud, simulated_cloud

pytestmark = pytest.mark.slow
PATIENCE_S = 20


@dataclass
class Running:
    address: str
    client: triton.InferenceServerClient

    async def infer(self, x: Array, **kwargs: Any) -> dict[str, Any]:
        tensor = triton.InferInput("x", list(x.shape), "FP32").set_data_from_numpy(x)
        return explanation(await self.client.infer("triage", [tensor], **kwargs))

    async def status(self) -> dict[str, Any]:
        return await asyncio.to_thread(fetch_status, self.address)

    async def serves(self, version: int) -> None:
        await until(lambda: self._version_is(version))

    async def _version_is(self, version: int) -> bool:
        return bool((await self.status())["models"][0]["version"] == version)


async def until(condition: Callable[[], Any]) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while True:
            met = condition()
            if await met if asyncio.iscoroutine(met) else met:
                return
            await asyncio.sleep(0.02)


def settings(home: Path, **changes: Any) -> EdgeSettings:
    given = {"home": home, "models": ("triage",), "listen": "127.0.0.1:0", "ready_file": home / "ready.json"}
    given |= {"updates": {"trial": {"soak_s": 0}}}  # versions are kept at once
    return load_settings(EdgeSettings, None, given | {"shutdown_s": 0.5} | changes).value


@asynccontextmanager
async def running(home: Path, **changes: Any) -> AsyncIterator[Running]:
    stop = asyncio.Event()
    ready = home / "ready.json"
    ready.unlink(missing_ok=True)
    async with asyncio.TaskGroup() as group:
        group.create_task(build_agent(settings(home, **changes)).run(stop))
        await until(ready.exists)
        address = json.loads(ready.read_bytes())["address"]
        client = triton.InferenceServerClient(address)
        try:
            yield Running(address, client)
        finally:
            await client.close()
            stop.set()


async def enrolled(cloud: SimulatedCloud, home: Path) -> None:
    await enrol(DeviceHome(home), cloud=cloud.address, code=CODE, trust=cloud.trust)


def test_life_of_a_device(tmp_path: Path) -> None:
    home = tmp_path / "device"

    async def scenario() -> None:
        async with simulated_cloud(SimulatedCloud(tmp_path / "workspace")) as cloud:
            await enrolled(cloud, home)
            async with running(home) as agent:
                assert not await agent.client.is_server_ready()
                cloud.publish(1)
                cloud.release(1)
                await agent.serves(1)
                assert (await agent.infer(bundles.SURE))["isthmus.route"] == "edge"
                assert (await agent.infer(bundles.HARD))["isthmus.route"] == "cloud"

                cloud.publish(2)
                cloud.release(2)
                await agent.serves(2)
                told = await agent.infer(bundles.HARD)
                assert (told["isthmus.route"], told["isthmus.edge_version"]) == ("cloud", 2)

                cloud.publish(3, golden=bundles.golden_tensors(500))
                cloud.release(3)
                await until(lambda: cloud.reports[-1].state == fleet_pb2.UPDATE_STATE_REFUSED)
                report = cloud.reports[-1]
                assert (report.version, report.serving_version, report.reason) == (3, 2, "golden-mismatch")
                assert (await agent.infer(bundles.SURE))["isthmus.edge_version"] == 2

                status = await agent.status()
                assert status["device_id"] == DEVICE
                assert status["models"][0]["answers"] == {"edge": 2, "cloud": 2, "fallback": 0}
                assert status["uplink"]["retries"] == 0
                shown = await asyncio.to_thread(CliRunner().invoke, app, ["status", "--address", agent.address])
                assert "uplink failures" in shown.stdout  # none, which is good to know
                assert not [row for row in ("uplink retries", "uplink lost", "uplink skipped") if row in shown.stdout]
                last = status["models"][0]["last_update"]
                assert (last["outcome"], last["reason"]) == ("refused", "golden-mismatch")
                assert (status["uplink"]["attempts"], status["uplink"]["successes"]) == (2, 2)
            states = [(r.version, r.state) for r in cloud.reports]
            active, refused = fleet_pb2.UPDATE_STATE_ACTIVE, fleet_pb2.UPDATE_STATE_REFUSED
            states = [told for told in states if told[1] != fleet_pb2.UPDATE_STATE_UPDATING]
            assert states == [(1, active), (2, active), (3, refused)]
            assert cloud.reports[1].bytes_fetched > 0
        # The cloud is gone: the device starts all the same.
        async with running(home) as agent:
            await agent.serves(2)
            told = await agent.infer(bundles.HARD, client_timeout=2)
            assert (told["isthmus.route"], told["isthmus.reason"]) == ("fallback", "unavailable")
            assert await agent.client.is_server_ready()

    asyncio.run(scenario())


def test_a_version_refused_for_its_bytes_is_tried_again_when_the_order_has_changed(tmp_path: Path) -> None:
    """Somebody put the bytes right, released the version before and then this one again."""
    home = tmp_path / "device"

    async def scenario() -> None:
        async with simulated_cloud(SimulatedCloud(tmp_path / "workspace")) as cloud:
            await enrolled(cloud, home)
            cloud.publish(1)
            cloud.release(1)
            async with running(home) as agent:
                await agent.serves(1)
                cloud.publish(2)
                right = {digest: data for digest, data in cloud.blobs.items() if not data.startswith(b"{")}
                cloud.blobs.update({digest: data[:-1] + bytes([data[-1] ^ 1]) for digest, data in right.items()})
                cloud.release(2)
                await until(lambda: cloud.reports[-1].state == fleet_pb2.UPDATE_STATE_REFUSED)
                assert cloud.reports[-1].reason == "digest-mismatch"
                cloud.blobs.update(right)

                async def released_again() -> bool:
                    cloud.release(1)
                    await asyncio.sleep(0.1)  # what comes at once may be seen as one order
                    cloud.release(2)
                    return await agent._version_is(2)

                await until(released_again)

    asyncio.run(scenario())


def test_cloud_that_comes_back_is_escalated_to_again(tmp_path: Path) -> None:
    home = tmp_path / "device"

    async def scenario() -> None:
        cloud = SimulatedCloud(tmp_path / "workspace")
        async with simulated_cloud(cloud):
            await enrolled(cloud, home)
            cloud.publish(1)
            cloud.release(1)
            async with running(home) as first:
                await first.serves(1)
        async with running(home, breaker_first_wait_s=30.0) as agent:  # starts without a cloud, so without a token
            await agent.serves(1)
            for _ in range(5):
                assert (await agent.infer(bundles.HARD))["isthmus.route"] == "fallback"
            async with simulated_cloud(cloud, port=int(cloud.address.rpartition(":")[2])):
                cloud.publish(2)
                cloud.release(2)
                async with asyncio.timeout(5):
                    while (await agent.infer(bundles.HARD))["isthmus.route"] != "cloud":
                        await asyncio.sleep(0.05)
                await agent.serves(2)

    asyncio.run(scenario())


def test_short_lived_tokens_are_renewed_before_they_end(tmp_path: Path) -> None:
    home = tmp_path / "device"

    async def scenario() -> None:
        cloud = SimulatedCloud(tmp_path / "workspace", token_ttl=timedelta(seconds=3))
        async with simulated_cloud(cloud):
            await enrolled(cloud, home)
            cloud.publish(1)
            cloud.release(1)
            async with running(home) as agent:
                await agent.serves(1)
                while cloud.tokens_issued < 4:
                    assert (await agent.infer(bundles.HARD))["isthmus.route"] == "cloud"
                    await asyncio.sleep(0.05)

    asyncio.run(scenario())


def test_captures_are_what_the_cloud_answered(tmp_path: Path) -> None:
    home = tmp_path / "device"

    async def scenario() -> None:
        async with simulated_cloud(SimulatedCloud(tmp_path / "workspace")) as cloud:
            await enrolled(cloud, home)
            cloud.publish(1)
            cloud.release(1)
            async with running(home, capture=True) as agent:
                await agent.serves(1)
                await agent.infer(bundles.SURE)
                await agent.infer(np.concatenate([bundles.HARD, bundles.SURE]))
                cloud.inference.behaviour = faulty_cloud.garbage
                await agent.infer(bundles.HARD)

    asyncio.run(scenario())
    assert export_captures(home / "spool" / "triage", tmp_path / "captures.safetensors") == 2
    captures = load_file(tmp_path / "captures.safetensors")
    np.testing.assert_array_equal(captures["input.x"], np.concatenate([bundles.HARD, bundles.SURE]))
    np.testing.assert_array_equal(captures["output.logits"], captures["input.x"] + np.float32(100))


def test_first_install_may_measure_and_says_what_it_found(tmp_path: Path) -> None:
    home = tmp_path / "device"

    async def scenario() -> None:
        async with simulated_cloud(SimulatedCloud(tmp_path / "workspace")) as cloud:
            await enrolled(cloud, home)
            cloud.publish(1)
            cloud.release(1)
            async with running(home, choose_by="install") as agent:
                await agent.serves(1)
                (model,) = (await agent.status())["models"]
                shown = await asyncio.to_thread(CliRunner().invoke, app, ["status", "--address", agent.address])
            assert model["measured"]["variant"] == model["variant"]
            assert model["measured"]["version"] == 1
            assert 0 < model["measured"]["latency_ms"] < 1000
            assert {file["path"].split("/")[1] for file in model["last_update"]["files"] if "/" in file["path"]} == {
                "onnxruntime-fp32",
                "openvino-fp32",
            }
            assert "fastest measured" in shown.output
            async with running(home, choose_by="order") as agent:
                await agent.serves(1)
                (model,) = (await agent.status())["models"]
            assert model["measured"] is None, "it does not count"

    asyncio.run(scenario())


def test_captures_take_answers_that_came_too_late(tmp_path: Path) -> None:
    home = tmp_path / "device"

    async def scenario() -> None:
        let = asyncio.Event()

        async def slow(raw: bytes, context: Any) -> bytes:
            await let.wait()
            return await faulty_cloud.right(raw, context)

        async with simulated_cloud(SimulatedCloud(tmp_path / "workspace")) as cloud:
            await enrolled(cloud, home)
            cloud.publish(1)
            cloud.release(1)
            async with running(home, capture=True, capture_late_s=60) as agent:
                await agent.serves(1)
                cloud.inference.behaviour = slow
                told = await agent.infer(bundles.HARD, timeout=500_000)
                assert (told["isthmus.route"], told["isthmus.reason"]) == ("fallback", "deadline")
                let.set()
                await until(lambda: _late_is(agent, 1))

    async def _late_is(agent: Running, count: int) -> bool:
        return bool((await agent.status())["uplink"]["late"] == count)

    asyncio.run(scenario())
    assert export_captures(home / "spool" / "triage", tmp_path / "captures.safetensors") == 1


def test_metrics_are_told_where_the_ready_file_says(tmp_path: Path) -> None:
    home = tmp_path / "device"

    def scrape() -> str:
        address = json.loads((home / "ready.json").read_bytes())["metrics"]
        with urllib.request.urlopen(f"http://{address}/metrics", timeout=10) as response:
            return str(response.read().decode())

    async def scenario() -> None:
        async with simulated_cloud(SimulatedCloud(tmp_path / "workspace")) as cloud:
            await enrolled(cloud, home)
            cloud.publish(1)
            cloud.release(1)
            async with running(home, metrics_listen="127.0.0.1:0", capture=True) as agent:
                await agent.serves(1)
                await agent.infer(bundles.HARD)
                told = await asyncio.to_thread(scrape)
        assert 'isthmus_requests_total{model="triage",reason="uncertain",route="cloud"} 1.0' in told
        assert 'isthmus_captures_dropped_rows_total{model="triage"} 0.0' in told
        assert f'isthmus_agent_info{{device="{DEVICE}",version=' in told

    asyncio.run(scenario())


def test_listener_beyond_loopback_wants_tls_and_a_token(tmp_path: Path) -> None:
    home = tmp_path / "device"

    async def infer(address: str, token: str) -> Any:
        credentials = channel_credentials(home / "trust" / "ca.pem")
        async with grpc.aio.secure_channel(address, credentials) as channel:
            stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
            metadata = (("authorization", f"Bearer {token}"),) if token else ()
            return await stub.ModelInfer(encode_request("triage", {"x": bundles.SURE}), metadata=metadata)

    async def scenario() -> None:
        async with simulated_cloud(SimulatedCloud(tmp_path / "workspace")) as cloud:
            await enrol(DeviceHome(home), cloud=cloud.address, code=CODE, trust=cloud.trust, hosts=["127.0.0.1"])
            cloud.publish(1)
            cloud.release(1)
            async with running(home) as local:
                await local.serves(1)
            stop = asyncio.Event()
            agent = build_agent(settings(home, listen="0.0.0.0:0"))
            async with asyncio.TaskGroup() as group:
                group.create_task(agent.run(stop))
                await until(lambda: agent.models.ready)
                address = json.loads((home / "ready.json").read_bytes())["address"].replace("0.0.0.0", "127.0.0.1")
                mint = cloud.issuer.mint
                good, _ = mint("app", "client", ttl=timedelta(minutes=1))
                assert isinstance(await infer(address, good), service_pb2.ModelInferResponse)
                other, _ = mint("app", "client", models=("other",), ttl=timedelta(minutes=1))
                for token, code in (
                    ("", grpc.StatusCode.UNAUTHENTICATED),
                    (good[:-4] + "AAAA", grpc.StatusCode.UNAUTHENTICATED),
                    (other, grpc.StatusCode.NOT_FOUND),
                ):
                    with pytest.raises(grpc.aio.AioRpcError) as caught:
                        await infer(address, token)
                    assert caught.value.code() is code
                async with grpc.aio.insecure_channel(address) as channel:
                    with pytest.raises(grpc.aio.AioRpcError) as caught:
                        await service_pb2_grpc.GRPCInferenceServiceStub(channel).ServerLive(
                            service_pb2.ServerLiveRequest(), timeout=5
                        )
                    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
                stop.set()

    asyncio.run(scenario())


def test_enrolment_leaves_a_private_key_and_happens_once(tmp_path: Path) -> None:
    home = tmp_path / "device"

    async def scenario() -> None:
        async with simulated_cloud(SimulatedCloud(tmp_path / "workspace")) as cloud:
            with pytest.raises(IdentityError, match="not valid"):
                await enrol(DeviceHome(home), cloud=cloud.address, code="wrong", trust=cloud.trust)
            with pytest.raises(ConfigError, match="not the folder of an enrolled device"):
                DeviceHome(home).enrolment()
            await enrolled(cloud, home)
            assert DeviceHome(home).enrolment().device_id == DEVICE
            assert (home / "device.key").stat().st_mode & 0o077 == 0
            with pytest.raises(ConflictError, match="enrolled already"):
                await enrolled(cloud, home)
            with pytest.raises(ConfigError, match=r"missing ca.pem and root.json"):
                await enrol(DeviceHome(tmp_path / "d2"), cloud=cloud.address, code=CODE, trust=tmp_path)
        with pytest.raises(UnavailableError):
            await enrol(DeviceHome(tmp_path / "d3"), cloud=cloud.address, code=CODE, trust=cloud.trust)

    asyncio.run(scenario())


def test_runtime_that_is_gone_costs_no_version_and_another_variant_takes_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "device"

    async def scenario() -> None:
        async with simulated_cloud(SimulatedCloud(tmp_path / "workspace")) as cloud:
            await enrolled(cloud, home)
            cloud.publish(1)
            async with running(home) as agent:
                cloud.release(1)
                await agent.serves(1)
            assert SlotStore(home / "models" / "triage").state.variant == "onnxruntime-fp32"
            cloud.release(0)
            for module in ("edge.runtimes", "edge.bootstrap"):
                monkeypatch.setattr(f"{module}.is_installed", lambda name: name == "openvino")
            async with running(home) as agent:
                state = SlotStore(home / "models" / "triage").state
                assert (state.current, state.failed) == (1, {})
                cloud.release(1)
                await agent.serves(1)
                assert (await agent.status())["models"][0]["variant"] == "openvino-fp32"

    asyncio.run(scenario())


def test_folder_belongs_to_one_agent(tmp_path: Path) -> None:
    home = tmp_path / "device"

    async def scenario() -> None:
        async with simulated_cloud(SimulatedCloud(tmp_path / "workspace")) as cloud:
            await enrolled(cloud, home)
            async with running(home):
                with pytest.raises(ConflictError, match="another agent runs in"):
                    build_agent(settings(home))
            async with running(home):
                pass

    asyncio.run(scenario())


def test_agent_that_cannot_start_lets_go_of_everything(tmp_path: Path) -> None:
    home = tmp_path / "device"

    async def scenario() -> None:
        async with simulated_cloud(SimulatedCloud(tmp_path / "workspace")) as cloud:
            await enrolled(cloud, home)
            with socket.create_server(("127.0.0.1", 0)) as other:
                port = other.getsockname()[1]
                with pytest.raises(ConfigError, match="another program does"):
                    await build_agent(settings(home, listen=f"127.0.0.1:{port}")).run(asyncio.Event())
            agent = build_agent(settings(home, listen=f"127.0.0.1:{port}", ready_file=home / "nothere" / "ready"))
            with pytest.raises(ConfigError, match="ready_file: cannot write"):
                await agent.run(asyncio.Event())
            async with running(home, listen=f"127.0.0.1:{port}"):
                pass

    asyncio.run(scenario())


def test_sigterm_lets_requests_end_and_takes_no_new_ones(tmp_path: Path) -> None:
    home, ready = tmp_path / "device", tmp_path / "ready.json"
    command = [sys.executable, "-m", "isthmus", "edge", "run", "--home", str(home), "--model", "triage"]
    environment = os.environ | {"PYTHONPATH": ".:proto", "ISTHMUS_EDGE_SHUTDOWN_S": "30"}

    async def scenario() -> None:
        async with simulated_cloud(SimulatedCloud(tmp_path / "workspace")) as cloud:
            await enrolled(cloud, home)
            cloud.publish(1)
            cloud.release(1)
            cloud.inference.behaviour = faulty_cloud.black_hole
            agent = await asyncio.create_subprocess_exec(
                *command, "--listen", "127.0.0.1:0", "--ready-file", str(ready), env=environment
            )
            await until(ready.exists)
            address = json.loads(ready.read_bytes())["address"]
            async with triton.InferenceServerClient(address) as client, grpc.aio.insecure_channel(address) as channel:
                running_agent = Running(address, client)
                await running_agent.serves(1)
                health = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
                states = aiter(health)
                while (await anext(states)).status is not health_pb2.HealthCheckResponse.SERVING:
                    pass
                hard = asyncio.create_task(running_agent.infer(bundles.HARD, client_timeout=4))
                await until(lambda: len(cloud.inference.requests) == 1)
                agent.send_signal(signal.SIGTERM)
                assert (await anext(states)).status is health_pb2.HealthCheckResponse.NOT_SERVING
                health.cancel()
                await until(lambda: refuses(address))
                assert not hard.done()
                told = await hard
                assert (told["isthmus.route"], told["isthmus.reason"]) == ("fallback", "deadline")
            async with asyncio.timeout(10):
                assert await agent.wait() == 0

    async def refuses(address: str) -> bool:
        async with grpc.aio.insecure_channel(address) as channel:
            stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
            try:
                await stub.ServerLive(service_pb2.ServerLiveRequest(), timeout=2)
            except grpc.aio.AioRpcError as error:
                return error.code() is grpc.StatusCode.UNAVAILABLE
            return False

    asyncio.run(scenario())


def test_agent_process_stops_on_sigterm_and_answers_the_command_line(tmp_path: Path) -> None:
    home = tmp_path / "device"
    command = [sys.executable, "-m", "isthmus", "edge"]
    environment = os.environ | {"PYTHONPATH": ".:proto"}

    async def scenario() -> None:
        async with simulated_cloud(SimulatedCloud(tmp_path / "workspace")) as cloud:
            cloud.publish(1)
            cloud.release(1)
            enrolment = await asyncio.create_subprocess_exec(
                *command, "enrol", "--cloud", cloud.address, "--code", CODE,
                "--trust", str(cloud.trust), "--home", str(home), "--json",
                env=environment, stdout=subprocess.PIPE,
            )  # fmt: skip
            output, _ = await enrolment.communicate()
            assert json.loads(output)["device_id"] == DEVICE
            agent = await asyncio.create_subprocess_exec(
                *command, "run", "--home", str(home), "--model", "triage", "--listen", "127.0.0.1:0",
                "--ready-file", str(tmp_path / "ready.json"), env=environment,
            )  # fmt: skip
            await until((tmp_path / "ready.json").exists)
            ready = json.loads((tmp_path / "ready.json").read_bytes())
            assert ready["pid"] == agent.pid
            client = triton.InferenceServerClient(ready["address"])
            await Running(ready["address"], client).serves(1)
            told = await Running(ready["address"], client).infer(bundles.HARD, client_timeout=5)
            assert told["isthmus.route"] == "cloud"
            await client.close()
            status = await asyncio.create_subprocess_exec(
                *command, "status", "--address", ready["address"], "--json", env=environment, stdout=subprocess.PIPE
            )
            output, _ = await status.communicate()
            assert json.loads(output)["models"][0]["answers"]["cloud"] == 1
            agent.send_signal(signal.SIGTERM)
            async with asyncio.timeout(10):
                assert await agent.wait() == 0

    asyncio.run(scenario())
