"""What is counted three times over, by agents, by the gateway and by Triton, is the same number each time.

A real agent (light model, router, uplink) and plain clients ask a real cloud with a real Triton; answers, failures of
the model, requests that are refused and requests whose callers go away are mixed.
"""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Final

import grpc
import numpy as np
import pytest
import tritonclient.grpc.aio as triton
from tritonclient.utils import InferenceServerException

from cloud.bootstrap import Cloud
from cloud.client import Address, CloudClient
from edge.breaker import Breaker
from edge.uplink import UplinkCounters
from isthmus.bundle import Heavy, index_files, parse_manifest
from isthmus.digests import tree_digest
from isthmus.oip import MODEL_INFER, read_parameters, service_pb2, service_pb2_grpc
from isthmus.tensors import encode_request
from isthmus.v1 import usage_pb2
from security.tls import channel_credentials
from security.tokens import TokenIssuer
from tests.cloud.conftest import eventually
from tests.cloud.test_serve import cloud_process, isthmus
from tests.cloud.workspaces import Workspace, make_bundle, make_workspace, serving
from tests.edge import bundles
from tests.edge.faulty_cloud import Identity, make_identity
from tests.edge.serving import serving as agent_serving

pytestmark = pytest.mark.slow

CONFIG: Final = """
backend: "python"
max_batch_size: 0
input { name: "x" data_type: TYPE_FP32 dims: [ -1, 3 ] }
output [ { name: "logits" data_type: TYPE_FP32 dims: [ -1, 3 ] }, { name: "label" data_type: TYPE_INT64 dims: [ -1 ] } ]
instance_group { kind: KIND_CPU count: 1 }
"""
# Writes down each request that it begins. The third element of x asks for trouble: -1 fails, -2 waits for a file.
MODEL: Final = """
import pathlib
import time

import numpy as np
import triton_python_backend_utils as utils

FOLDER = pathlib.Path({folder!r})


class TritonPythonModel:
    def execute(self, requests):
        answers = []
        for request in requests:
            x = utils.get_input_tensor_by_name(request, "x").as_numpy()
            with (FOLDER / "begun").open("a") as file:
                file.write("%g\\n" % x[0, 2])
            if x[0, 2] == -1:
                raise ValueError("this one fails")
            if x[0, 2] == -2:
                while not (FOLDER / "go").exists():
                    time.sleep(0.01)
                (FOLDER / "go").unlink()
            label = x.argmax(axis=1).astype(np.int64)
            outputs = [utils.Tensor("logits", x.astype(np.float32)), utils.Tensor("label", label)]
            answers.append(utils.InferenceResponse(outputs))
        return answers
"""
HARD = np.array([[0.2, 0.1, 0.0]], dtype=np.float32)
FAILS = np.array([[0.2, 0.1, -1.0]], dtype=np.float32)
WAITS = np.array([[0.2, 0.1, -2.0]], dtype=np.float32)


def watched_bundle(folder: Path, record: Path) -> Path:
    """Make a bundle of the agents' form whose heavy model writes to `record` what it does."""
    bundles.build_bundle(folder)
    manifest = parse_manifest((folder / "manifest.json").read_bytes())
    for path in (folder / "heavy" / "1" / "model.onnx", folder / "manifest.json"):
        path.unlink()
    (folder / "heavy" / "config.pbtxt").write_text(CONFIG)
    (folder / "heavy" / "1" / "model.py").write_text(MODEL.format(folder=str(record)))
    files = index_files(folder)
    heavy = {path: entry.sha256 for path, entry in files.items() if path.startswith("heavy/")}
    changed = {"files": files, "heavy": Heavy(platform="python", digest=tree_digest(heavy))}
    (folder / "manifest.json").write_bytes(manifest.model_copy(update=changed).to_json())
    return folder


@dataclass(frozen=True, slots=True)
class OtherAuthority(Identity):
    """An identity whose peer's certificate is from an authority."""

    authority: Path

    @property
    def ca(self) -> Path:
        return self.authority


@dataclass(slots=True)
class Site:
    """A cloud that serves the watched model, and what is known of it from three sides."""

    workspace: Workspace
    cloud: Cloud
    record: Path
    before: tuple[int, int] = (0, 0)  # Triton's counts of the publish itself

    def bearer(self, subject: str, role: str = "client", tenant: str = "default") -> str:
        issuer = TokenIssuer.load(self.workspace.home)
        return issuer.mint(subject, role, models=("*",), ttl=timedelta(hours=1), tenant=tenant)[0]

    async def triton(self) -> tuple[int, int]:
        """Return how many requests Triton has answered and failed since the publish."""
        async with self.workspace.channel(self.cloud) as channel:
            stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
            metadata = (("authorization", f"Bearer {self.bearer('reader')}"),)
            request = service_pb2.ModelStatisticsRequest()
            answer = await stub.ModelStatistics(request, metadata=metadata, timeout=20)
        (model,) = answer.model_stats
        counts = model.inference_stats
        return counts.success.count - self.before[0], counts.fail.count - self.before[1]

    async def compute(self) -> Any:
        """Return what the cloud has kept of Triton's sums."""
        file = self.workspace.root / "admin.token"
        file.write_text(self.bearer("boss", "admin"))
        with CloudClient(Address(self.cloud.address, self.workspace.trust, file), timeout_s=20.0) as client:
            (row,) = await asyncio.to_thread(client.compute, usage_pb2.GetComputeRequest())
        return row

    async def usage(self, *by: str) -> dict[tuple[str, ...], Any]:
        file = self.workspace.root / "admin.token"
        file.write_text(self.bearer("boss", "admin"))
        with CloudClient(Address(self.cloud.address, self.workspace.trust, file), timeout_s=20.0) as client:
            rows = await asyncio.to_thread(client.usage, usage_pb2.GetUsageRequest(by=by))
        return {tuple(getattr(row, name) for name in by): row for row in rows}

    async def begun(self, mark: str) -> int:
        path = self.record / "begun"
        return path.read_text().split().count(mark) if path.exists() else 0


@asynccontextmanager
async def site(folder: Path) -> AsyncIterator[Site]:
    workspace, record = make_workspace(folder / "workspace"), folder / "record"
    record.mkdir()
    async with serving(workspace) as cloud:
        with workspace.client(cloud) as client:
            bundle = watched_bundle(folder / "bundle", record)
            await asyncio.to_thread(client.publish, bundle, workspace.operator)
        made = Site(workspace, cloud, record)
        made.before = await made.triton()
        yield made


async def ask(infer: Any, x: Any) -> str:
    tensor = triton.InferInput("x", list(x.shape), "FP32")
    tensor.set_data_from_numpy(x)
    try:
        result = await infer("triage", [tensor], client_timeout=30.0)
    except InferenceServerException as error:
        return str(error.status()).removeprefix("StatusCode.").lower()
    return str(read_parameters(result.get_response().parameters).get("isthmus.route", "answered"))


def test_agents_gateway_and_triton_count_the_same(tmp_path: Path) -> None:
    async def story() -> None:
        async with site(tmp_path) as stage:
            sent = await asyncio.gather(_agent(stage, tmp_path), _plain_clients(stage))
            agent, outcomes = sent
            usage = await stage.usage("device")
            device = usage[("camera",)]

            # The agent's counters and the gateway's.
            assert agent.attempts == 400 + 40 + 6
            assert agent.attempts == agent.successes + agent.failures + agent.cancelled
            assert (agent.successes, agent.failures, agent.cancelled) == (400, 40, 6)
            assert (device.answered, device.failed, device.cancelled) == (400, 40, 6)
            assert device.limited + device.refused + device.cached == 0
            assert device.calls == agent.attempts + agent.retries - agent.lost
            assert device.bytes_in == agent.bytes_up

            # The plain clients' own counts and the gateway's.
            for name, counted in outcomes.items():
                row = usage[(name,)]
                refused = counted["invalid_argument"] + counted["not_found"]
                assert (row.answered, row.refused) == (counted["answered"], refused)
                assert row.limited == counted["resource_exhausted"]

            # Triton's statistics and the gateway's, to the request: each one that was sent there came to an end there.
            total = (await stage.usage())[()]
            expected = (
                total.answered + 6,
                total.failed,
            )  # those that were given up had begun, and Triton ends what it begins

            async def settled() -> bool:
                return await stage.triton() == expected

            await eventually(settled, f"Triton counts {expected}, and now {await stage.triton()}")
            assert total.answered + total.failed + total.cancelled == sum(expected)
            compute = await stage.compute()
            assert (compute.model, compute.answered - stage.before[0], compute.failed - stage.before[1]) == (
                "triage",
                *expected,
            )
            # Triton goes on with what was given up, and computes several requests at once as if each were alone.
            assert compute.compute_ns > 0
            assert total.call_us > 0

    asyncio.run(story())


async def _agent(stage: Site, folder: Path) -> UplinkCounters:
    """Ask an agent; give some requests up while the heavy model is at them."""
    (folder / "agent").mkdir()
    made = make_identity(folder / "agent")
    identity = OtherAuthority(made.key, made.certificate, stage.workspace.trust / "ca.pem")
    async with agent_serving(
        folder / "agent",
        outside=(stage.cloud.address, identity),
        token=stage.bearer("camera", "device"),
        breaker=Breaker(failures=1000),
        default_deadline_s=25.0,
    ) as agent:
        routes = [await ask(agent.client.infer, x) for _ in range(40) for x in (*[HARD] * 10, FAILS)]
        assert (routes.count("cloud"), routes.count("fallback")) == (400, 40)
        calls = [asyncio.ensure_future(ask(agent.client.infer, WAITS))]
        for number in range(6):

            async def has_begun(number: int = number) -> bool:
                return await stage.begun("-2") == number + 1

            await eventually(has_begun, f"request {number} has begun")
            calls[-1].cancel()
            await asyncio.gather(calls[-1], return_exceptions=True)

            async def has_ended(number: int = number) -> bool:
                return agent.uplink.counters.cancelled == number + 1

            await eventually(has_ended, "the agent has given it up")
            (stage.record / "go").touch()
            if number < 5:
                calls.append(asyncio.ensure_future(ask(agent.client.infer, WAITS)))
        return agent.uplink.counters


async def _plain_clients(stage: Site) -> dict[str, Counter[str]]:
    """Ask the gateway itself: what is right, what is not a request, what is unknown, and more than a quota allows."""
    file = stage.workspace.root / "boss.token"
    file.write_text(stage.bearer("boss", "admin"))
    with CloudClient(Address(stage.cloud.address, stage.workspace.trust, file), timeout_s=20.0) as client:
        quota = usage_pb2.Quota(
            scope=usage_pb2.QuotaScope(tenant="default", device="greedy"),
            limits=usage_pb2.QuotaLimits(rate="0/s", burst=25),
        )
        await asyncio.to_thread(client.set_quota, quota)
    right = encode_request("triage", {"x": HARD}).SerializeToString()
    wrong = [
        encode_request("triage", {"x": HARD[:, :2]}).SerializeToString(),  # Triton's refusal
        encode_request("triagf", {"x": HARD}).SerializeToString(),
        encode_request("triage", {"x": HARD}, version="7").SerializeToString(),
        b"\xff\xff",
    ]

    async def client_(name: str, requests: list[bytes]) -> Counter[str]:
        counted: Counter[str] = Counter()
        metadata = (("authorization", f"Bearer {stage.bearer(name)}"),)
        async with stage.workspace.channel(stage.cloud) as channel:
            method: Any = channel.unary_unary(MODEL_INFER)
            for request in requests:
                try:
                    await method(request, metadata=metadata, timeout=60)
                except grpc.aio.AioRpcError as error:
                    counted[error.code().name.lower()] += 1
                else:
                    counted["answered"] += 1
        return counted

    names = ("mixed", "greedy")
    found = await asyncio.gather(client_("mixed", [right, *wrong] * 20), client_("greedy", [right] * 60))
    assert found[0] == {"answered": 20, "invalid_argument": 40, "not_found": 40}
    assert found[1] == {"answered": 25, "resource_exhausted": 35}
    return dict(zip(names, found, strict=True))


def test_a_cloud_that_is_killed_loses_no_count(tmp_path: Path) -> None:
    workspace = make_workspace(tmp_path / "workspace")
    settings = {"ISTHMUS_CLOUD_METERING_FLUSH_S": "3600", "ISTHMUS_CLOUD_TRITON_STOP_S": "0.2"}
    operator = {"ISTHMUS_TRUST": str(workspace.trust), "ISTHMUS_TOKEN_FILE": str(workspace.token_file())}

    async def infer(address: str, times: int) -> None:
        metadata = (("authorization", f"Bearer {workspace.token('client', 'plain')}"),)
        async with grpc.aio.secure_channel(address, channel_credentials(workspace.trust / "ca.pem")) as channel:
            method: Any = channel.unary_unary(MODEL_INFER)
            request = encode_request("triage", {"x": np.ones((1, 4), np.float32)}).SerializeToString()
            for _ in range(times):
                await method(request, metadata=metadata, timeout=20)

    def counted(address: str, *flags: str) -> subprocess.CompletedProcess[str]:
        shown = isthmus("usage", "--cloud", address, *flags, **operator)
        assert shown.returncode == 0, shown.stderr
        return shown

    with cloud_process(workspace, **settings) as (process, ready):
        with CloudClient(Address(ready["address"], workspace.trust, workspace.token_file()), timeout_s=20.0) as client:
            client.publish(make_bundle(tmp_path / "v1", 1), workspace.operator)
        asyncio.run(infer(ready["address"], 137))
        process.kill()
        process.wait(20)
    (workspace.root / "ready.json").unlink()
    with cloud_process(workspace, **settings) as (process, ready):
        asyncio.run(infer(ready["address"], 5))
        flags = ("--by", "tenant,device,model,version")
        (row,) = json.loads(counted(ready["address"], "--json", *flags, "--since", "2h").stdout)
        assert {name: row[name] for name in ("tenant", "device", "model", "version", "requests", "answered")} == {
            "tenant": "default", "device": "plain", "model": "triage", "version": 1, "requests": 142, "answered": 142,
        }  # fmt: skip
        lines = counted(ready["address"], "--csv", "-", *flags).stdout.splitlines()
        assert lines[0].startswith("tenant,device,model,version,requests,answered,")
        assert lines[1].startswith("default,plain,triage,1,142,142,")
        assert "142" in counted(ready["address"]).stdout
        assert json.loads(counted(ready["address"], "--json", "--until", "2020-01-01").stdout) == []
        wrong = isthmus("usage", "--cloud", ready["address"], "--by", "colour", **operator)
        assert (wrong.returncode, "colour" in wrong.stderr) == (2, True)
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
    assert not list((workspace.home / "state" / "metering").iterdir())
