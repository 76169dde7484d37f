"""`isthmus cloud serve` as operators run it: a process, its signals, its refusals, and an external Triton."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from cloud.supervisor import TritonServer
from isthmus.oip import service_pb2_grpc
from isthmus.tensors import decode_outputs, encode_request
from tests.cloud.conftest import eventually
from tests.cloud.workspaces import Workspace, make_bundle, make_workspace, serving

pytestmark = pytest.mark.slow

REPOSITORY = Path(__file__).parents[2]
X = np.array([[1, 2, 3, 4]], dtype=np.float32)


def isthmus(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "isthmus", *map(str, arguments)],
        capture_output=True, text=True, timeout=60, check=False, env=_environment(environment),
    )  # fmt: skip


def _environment(more: dict[str, str]) -> dict[str, str]:
    return os.environ | {"PYTHONPATH": f"{REPOSITORY}:{REPOSITORY / 'proto'}", "COLUMNS": "200"} | more


@contextmanager
def cloud_process(workspace: Workspace, *more: object) -> Iterator[tuple[subprocess.Popen[bytes], dict[str, Any]]]:
    ready = workspace.root / "ready.json"
    command = [sys.executable, "-m", "isthmus", "cloud", "serve", "--home", workspace.home, "--ready-file", ready]
    process = subprocess.Popen([*map(str, command), "--listen", "127.0.0.1:0", *map(str, more)], env=_environment({}))
    try:

        async def is_ready() -> bool:
            assert process.poll() is None
            return ready.exists()

        asyncio.run(eventually(is_ready, "the cloud is ready", within_s=40))
        yield process, json.loads(ready.read_text())
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait(20)


def is_running(pid: int) -> bool:
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    return make_workspace(tmp_path_factory.mktemp("serve") / "workspace")


def test_the_operators_commands_from_publish_to_status(workspace: Workspace, tmp_path: Path) -> None:
    with cloud_process(workspace) as (process, ready):
        environment = {
            "ISTHMUS_CLOUD": ready["address"],
            "ISTHMUS_TRUST": str(workspace.trust),
            "ISTHMUS_TOKEN_FILE": str(workspace.token_file()),
            "ISTHMUS_OPERATOR": str(workspace.operator),
        }
        bundle = make_bundle(tmp_path / "v1", 1)
        published = isthmus("model", "publish", bundle, **environment)
        assert published.returncode == 0, published.stderr
        assert "triage" in published.stdout
        bundle = make_bundle(tmp_path / "v2", 2, light=b"light model of this bundlf")
        published = isthmus("model", "publish", bundle, "--no-release", "--json", **environment)
        assert published.returncode == 0, published.stderr
        record = json.loads(published.stdout)
        assert (record["version"], record["released"]) == (2, False)
        again = isthmus("model", "publish", bundle, **environment)
        assert again.returncode == 2
        assert "version = 3" in again.stderr
        listed = json.loads(isthmus("model", "list", "--json", **environment).stdout)
        assert [(row["version"], row["released"]) for row in listed] == [(1, True), (2, False)]
        typo = isthmus("model", "release", "triag@2", **environment)
        assert (typo.returncode, "did you mean triage?" in typo.stderr) == (2, True)
        assert isthmus("model", "release", "triage@2", **environment).returncode == 0
        invited = isthmus("device", "invite", "camera-1", "--json", **environment)
        assert len(json.loads(invited.stdout)["code"]) >= 22
        assert isthmus("device", "list", **environment).returncode == 0
        status = json.loads(isthmus("cloud", "status", "--json", **environment).stdout)
        assert status["triton_version"] == "2.51.0"
        assert [model["heavy_version"] for model in status["models"]] == [1]
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
        assert not is_running(ready["triton_pid"])
        assert not (workspace.root / "ready.json").exists()


def test_triton_dies_with_a_killed_cloud_and_the_next_one_starts(workspace: Workspace) -> None:
    record = workspace.home / "state" / "triton.run"
    with cloud_process(workspace) as (process, ready):
        assert is_running(ready["triton_pid"])
        left_over = Path(record.read_text())
        assert left_over.is_dir()
        process.kill()
        process.wait(20)

        async def is_gone() -> bool:
            return not is_running(ready["triton_pid"])

        asyncio.run(eventually(is_gone, "Triton is gone"))
    (workspace.root / "ready.json").unlink()
    with cloud_process(workspace) as (process, ready):
        assert not left_over.exists()
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 0


def test_the_ready_file_follows_a_restarted_triton(workspace: Workspace) -> None:
    with cloud_process(workspace) as (process, ready):
        os.kill(ready["triton_pid"], signal.SIGKILL)

        async def has_another_triton() -> bool:
            return bool(json.loads((workspace.root / "ready.json").read_text())["triton_pid"] != ready["triton_pid"])

        asyncio.run(eventually(has_another_triton, "the ready file names the new Triton"))
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0


def test_refusals_say_what_to_do(workspace: Workspace, tmp_path: Path) -> None:
    wrong = isthmus("cloud", "serve", "--home", tmp_path)
    assert (wrong.returncode, "isthmus keys init" in wrong.stderr) == (2, True)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        busy = isthmus("cloud", "serve", "--home", workspace.home, "--listen", address)
        assert (busy.returncode, f"cannot listen on {address}" in busy.stderr) == (2, True)
    malformed = isthmus("cloud", "serve", "--home", workspace.home, "--listen", "8443")
    assert (malformed.returncode, "HOST:PORT" in malformed.stderr) == (2, True)
    unreachable = isthmus(
        "cloud", "serve", "--home", workspace.home, "--triton", "127.0.0.1:1", "--listen", "127.0.0.1:0"
    )
    assert (unreachable.returncode, "Triton" in unreachable.stderr) == (7, True)
    plain = isthmus("cloud", "serve", "--home", workspace.home, "--triton", "triton.example:8001")
    assert (plain.returncode, "plain text" in plain.stderr) == (2, True)
    missing = isthmus("model", "list")
    assert (missing.returncode, "ISTHMUS_TRUST" in missing.stderr) == (2, True)


def test_one_cloud_for_one_workspace(workspace: Workspace) -> None:
    with cloud_process(workspace):
        second = isthmus("cloud", "serve", "--home", workspace.home, "--listen", "127.0.0.1:0")
        assert (second.returncode, "another cloud" in second.stderr) == (3, True)


def test_health_answers_without_a_token(workspace: Workspace) -> None:
    async def story() -> Any:
        async with serving(workspace) as cloud, workspace.channel(cloud) as channel:
            stub: Any = health_pb2_grpc.HealthStub(channel)
            return await stub.Check(health_pb2.HealthCheckRequest(), timeout=10)

    assert asyncio.run(story()).status == health_pb2.HealthCheckResponse.SERVING


@contextmanager
def external_triton(folder: Path, port: int) -> Iterator[None]:
    """Run a Triton of its own on loopback, which shares no folder with the cloud."""
    (folder / "repository").mkdir(parents=True)
    server = TritonServer(folder / "repository", log_file=folder / "log")
    command = [part for part in server._command()[5:] if not part.startswith(("--grpc-address", "--grpc-port"))]
    process = subprocess.Popen(
        [*command, "--grpc-address=127.0.0.1", f"--grpc-port={port}"],
        env=server._environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        yield
    finally:
        process.kill()
        process.wait(20)
        shutil.rmtree(server._run_folder)


def test_an_external_triton_gets_models_pushed_and_again_after_it_restarted(tmp_path: Path) -> None:
    workspace = make_workspace(tmp_path / "workspace")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    async def answers(inference: Any, token: str) -> bool:
        metadata = (("authorization", f"Bearer {token}"),)
        try:
            answer = await inference.ModelInfer(encode_request("triage", {"x": X}), metadata=metadata, timeout=5)
        except grpc.aio.AioRpcError:
            return False
        return bool(decode_outputs(answer)["logits"][0, 0] == 10.0)

    async def story() -> None:
        token = workspace.token("client")
        with external_triton(tmp_path / "first", port):

            async def listens() -> bool:
                with socket.socket() as probe:
                    return probe.connect_ex(("127.0.0.1", port)) == 0

            await eventually(listens, "the external Triton listens")
            running = serving(workspace, triton=f"127.0.0.1:{port}")
            cloud = await running.__aenter__()
            with workspace.client(cloud) as client:
                await asyncio.to_thread(client.publish, make_bundle(tmp_path / "v1", 1), workspace.operator)
            async with workspace.channel(cloud) as channel:
                assert await answers(service_pb2_grpc.GRPCInferenceServiceStub(channel), token)
        async with workspace.channel(cloud) as channel:
            inference = service_pb2_grpc.GRPCInferenceServiceStub(channel)
            started = time.monotonic()
            assert not await answers(inference, token)
            assert time.monotonic() - started < 0.5
            with external_triton(tmp_path / "second", port):
                await eventually(lambda: answers(inference, token), "the models are pushed to the new Triton")
                await running.__aexit__(None, None, None)

    asyncio.run(story())
