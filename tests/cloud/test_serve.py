"""`isthmus cloud serve` as operators run it: a process, its signals, its refusals, and an external Triton."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, cast

import grpc
import numpy as np
import pytest
import structlog
from grpc_health.v1 import health_pb2, health_pb2_grpc

from cloud import background, triton
from cloud.bootstrap import start_cloud
from cloud.config import CloudSettings
from isthmus.cli import main
from isthmus.errors import ConflictError
from isthmus.oip import SERVICE, service_pb2_grpc
from isthmus.tensors import decode_outputs, encode_request
from security.tokens import TokenIssuer
from security.workspace import init_workspace
from tests.cloud.conftest import eventually
from tests.cloud.tritons import external_triton, free_port
from tests.cloud.workspaces import Workspace, make_bundle, make_workspace, serving

pytestmark = pytest.mark.slow

REPOSITORY = Path(__file__).parents[2]
Command = Callable[..., subprocess.CompletedProcess[str]]
IMPATIENT = {"ISTHMUS_CLOUD_TRITON_STOP_S": "0.2"}  # a Triton with models takes two seconds to leave by itself
X = np.array([[1, 2, 3, 4]], dtype=np.float32)


def isthmus(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "isthmus", *map(str, arguments)],
        capture_output=True, text=True, timeout=60, check=False, env=_environment(environment),
    )  # fmt: skip


def _environment(more: dict[str, str]) -> dict[str, str]:
    return os.environ | {"PYTHONPATH": f"{REPOSITORY}:{REPOSITORY / 'proto'}", "COLUMNS": "200"} | more


@contextmanager
def cloud_process(workspace: Workspace, **environment: str) -> Iterator[tuple[subprocess.Popen[bytes], dict[str, Any]]]:
    ready = workspace.root / "ready.json"
    command = [sys.executable, "-m", "isthmus", "cloud", "serve", "--home", workspace.home, "--ready-file", ready]
    process = subprocess.Popen([*map(str, command), "--listen", "127.0.0.1:0"], env=_environment(environment))
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


@dataclass(frozen=True, slots=True)
class Refusal:
    """How a command ended that must not have worked."""

    code: int
    error: str
    hint: str


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Command]:
    """Run a command as the `isthmus` program does, but in this process; a traceback fails the test."""
    monkeypatch.setenv("COLUMNS", "200")

    def run(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
        with monkeypatch.context() as patch:
            patch.setattr(sys, "argv", ["isthmus", *map(str, arguments)])
            for name, value in environment.items():
                patch.setenv(name, value)
            capsys.readouterr()
            with pytest.raises(SystemExit) as ended:
                main()
        shown = capsys.readouterr()
        assert isinstance(ended.value.code, int)
        return subprocess.CompletedProcess([*map(str, arguments)], ended.value.code, shown.out, shown.err)

    yield run
    structlog.reset_defaults()  # a command's log goes to the standard error that the test has captured


@pytest.fixture
def refused(command: Command) -> Callable[..., Refusal]:
    """Run a command that must not work."""

    def run(*arguments: object) -> Refusal:
        done = command(*arguments)
        lines = [line for line in done.stderr.splitlines() if line.startswith(("error: ", "hint: "))]
        assert len(lines) == 2, lines  # one line of what was expected and what came, one of what to do
        return Refusal(done.returncode, lines[0].removeprefix("error: "), lines[1].removeprefix("hint: "))

    return run


def test_the_operators_commands_from_publish_to_status(workspace: Workspace, tmp_path: Path, command: Command) -> None:
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
        published = command("model", "publish", bundle, "--no-release", "--json", **environment)
        assert published.returncode == 0, published.stderr
        record = json.loads(published.stdout)
        assert (record["version"], record["released"]) == (2, False)
        again = command("model", "publish", bundle, **environment)
        assert again.returncode == 2
        assert "version = 3" in again.stderr
        listed = json.loads(command("model", "list", "--json", **environment).stdout)
        assert [(row["version"], row["released"]) for row in listed] == [(1, True), (2, False)]
        typo = command("model", "release", "triag@2", **environment)
        assert (typo.returncode, "did you mean triage?" in typo.stderr) == (2, True)
        released = json.loads(command("model", "release", "triage@2", "--json", **environment).stdout)
        assert released == {"model": "triage", "version": 2, "replaced": [1], "kept": []}
        renewed = json.loads(command("keys", "renew", "--dir", workspace.operator, "--json").stdout)
        assert (renewed["complete"], renewed["version"]) == (True, 2)
        accepted = json.loads(command("cloud", "accept", renewed["file"], "--json", **environment).stdout)
        assert accepted == {"files": ["2.root.json"]}
        invited = command("device", "invite", "camera-1", "--json", **environment)
        assert len(json.loads(invited.stdout)["code"]) >= 22
        assert command("device", "list", **environment).returncode == 0
        status = json.loads(command("cloud", "status", "--json", **environment).stdout)
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
    with cloud_process(workspace, **IMPATIENT) as (process, ready):
        assert not left_over.exists()
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 0


def test_the_ready_file_follows_a_restarted_triton(workspace: Workspace) -> None:
    with cloud_process(workspace, **IMPATIENT) as (process, ready):
        os.kill(ready["triton_pid"], signal.SIGKILL)

        async def has_another_triton() -> bool:
            return bool(json.loads((workspace.root / "ready.json").read_text())["triton_pid"] != ready["triton_pid"])

        asyncio.run(eventually(has_another_triton, "the ready file names the new Triton"))
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0


def test_what_cannot_serve_says_what_to_do(
    workspace: Workspace, tmp_path: Path, refused: Callable[..., Refusal]
) -> None:
    serve = ("cloud", "serve", "--home", workspace.home)
    wrong = refused("cloud", "serve", "--home", tmp_path)
    assert (wrong.code, "isthmus keys init" in wrong.hint) == (2, True)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        busy = refused(*serve, "--listen", address)
        assert (busy.code, address in busy.error, "another port" in busy.hint) == (2, True, True)
    unreachable = refused(*serve, "--triton", "127.0.0.1:1", "--listen", "127.0.0.1:0")
    assert (unreachable.code, unreachable.error) == (7, "no Triton answers at 127.0.0.1:1")
    plain = refused(*serve, "--triton", "triton.example:8001")
    assert (plain.code, "plain text" in plain.error) == (2, True)
    nowhere = refused(*serve, "--listen", "127.0.0.1:0", "--ready-file", tmp_path / "no" / "folder")
    assert (nowhere.code, "ready file" in nowhere.error) == (2, True)


def test_commands_without_a_cloud_say_what_to_do(
    workspace: Workspace, tmp_path: Path, refused: Callable[..., Refusal]
) -> None:
    missing = refused("model", "list")
    assert (missing.code, "ISTHMUS_TRUST" in missing.hint) == (2, True)
    known = ("--trust", workspace.trust, "--token-file", workspace.token_file())
    down = refused("cloud", "status", "--cloud", "127.0.0.1:1", *known)
    assert (down.code, down.error) == (7, "cannot ask for status: no answer from the cloud at 127.0.0.1:1")
    assert "isthmus cloud serve" in down.hint
    unnamed = refused("cloud", "status", "--cloud", "nosuchhost.invalid:1", *known)
    assert (unnamed.code, "--cloud" in unnamed.hint) == (7, True)
    no_port = refused("cloud", "status", "--cloud", "localhost", *known)
    assert (no_port.code, "HOST:PORT" in no_port.error) == (2, True)
    no_file = refused("model", "list", "--trust", workspace.trust, "--token-file", tmp_path / "typo")
    assert (no_file.code, "isthmus token mint" in no_file.hint) == (2, True)
    no_token = refused("model", "list", "--trust", workspace.trust, "--token-file", workspace.trust / "ca.pem")
    assert (no_token.code, "isthmus token mint" in no_token.hint) == (2, True)
    no_trust = refused("model", "list", "--trust", tmp_path, "--token-file", workspace.token_file())
    assert (no_trust.code, "isthmus keys init" in no_trust.hint) == (2, True)
    no_version = refused("model", "release", "triage", *known)
    assert (no_version.code, "MODEL@VERSION" in no_version.error) == (2, True)
    endless = refused("device", "invite", "camera", "--ttl", "90000d", *known)
    assert (endless.code, "at most" in endless.error) == (2, True)
    no_bundle = refused("model", "publish", tmp_path, "--operator", workspace.operator, *known)
    assert (no_bundle.code, "isthmus compile" in no_bundle.hint) == (5, True)
    bundle = make_bundle(tmp_path / "v1", 1)
    no_operator = refused("model", "publish", bundle, "--operator", workspace.home, *known)
    assert (no_operator.code, "operator folder" in no_operator.error) == (2, True)


def test_commands_that_a_cloud_refuses_say_what_to_do(tmp_path: Path, refused: Callable[..., Refusal]) -> None:
    workspace, stranger = make_workspace(tmp_path / "here"), make_workspace(tmp_path / "elsewhere")
    token, address = tmp_path / "token", ""
    issuer = TokenIssuer.load(workspace.home)

    def ask(*arguments: object, text: str = "", trust: Workspace = workspace) -> Refusal:
        token.write_text(text or workspace.token("operator"))
        return refused(*arguments, "--cloud", address, "--trust", trust.trust, "--token-file", token)

    async def story() -> None:
        nonlocal address
        async with serving(workspace) as cloud:
            address = cloud.address
            old = issuer.mint("me", "operator", ttl=timedelta(hours=1), now=datetime.now(UTC) - timedelta(hours=2))[0]
            expired = await asyncio.to_thread(ask, "model", "list", text=old)
            assert (expired.code, "isthmus token mint" in expired.hint) == (4, True)
            foreign = await asyncio.to_thread(ask, "model", "list", text=stranger.token("operator"))
            assert (foreign.code, "isthmus token mint" in foreign.hint) == (4, True)
            small = await asyncio.to_thread(ask, "device", "list", text=workspace.token("client"))
            assert (small.code, "fleet:admin" in small.error, "--role" in small.hint) == (4, True, True)
            untrusted = await asyncio.to_thread(ask, "model", "list", trust=stranger)
            assert (untrusted.code, "another workspace" in untrusted.hint) == (7, True)
            bundle = make_bundle(tmp_path / "v1", 1)
            unsigned = await asyncio.to_thread(ask, "model", "publish", bundle, "--operator", stranger.operator)
            assert (unsigned.code, "one workspace" in unsigned.hint) == (5, True)
            with pytest.raises(ConflictError, match="another cloud") as raised:
                await start_cloud(CloudSettings(home=workspace.home, listen="127.0.0.1:0"))
            assert raised.value.exit_code == 3

    asyncio.run(story())


def test_a_host_that_is_not_in_the_certificate_is_named(tmp_path: Path, refused: Callable[..., Refusal]) -> None:
    init_workspace(tmp_path / "workspace", ["cloud.example"], "test", datetime.now(UTC))
    workspace = Workspace(tmp_path / "workspace")

    async def story() -> Refusal:
        async with serving(workspace) as cloud:
            arguments = ("--trust", workspace.trust, "--token-file", workspace.token_file())
            return await asyncio.to_thread(refused, "cloud", "status", "--cloud", cloud.address, *arguments)

    wrong = asyncio.run(story())
    assert (wrong.code, "isthmus keys init --host" in wrong.hint) == (7, True)


def test_health_answers_without_a_token_and_follows_triton(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(triton, "CONTROL_S", 0.3)
    status = health_pb2.HealthCheckResponse

    async def story() -> None:
        async with serving(workspace) as cloud, workspace.channel(cloud) as channel:
            stub: Any = health_pb2_grpc.HealthStub(channel)

            async def says(service: str, wanted: int) -> bool:
                asked = health_pb2.HealthCheckRequest(service=service)
                return bool((await stub.Check(asked, timeout=10)).status == wanted)

            assert await says("", status.SERVING)
            assert await says(SERVICE, status.SERVING)
            assert cloud.triton is not None
            os.kill(cloud.triton.pid, signal.SIGSTOP)
            await eventually(lambda: says(SERVICE, status.NOT_SERVING), "inference is not served")
            assert await says("", status.SERVING)  # devices still get tokens and updates
            assert await says("isthmus.v1.FleetService", status.SERVING)
            os.kill(cloud.triton.pid, signal.SIGKILL)
            await eventually(lambda: says(SERVICE, status.SERVING), "inference is served again")

    asyncio.run(story())


def test_a_full_disk_does_not_end_the_renewal_of_metadata(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(background, "_REFRESH_AGAIN_S", 0.0)
    renewed = asyncio.Event()
    loop = asyncio.new_event_loop()

    class Repository:
        """The disk is full once."""

        tries = 0

        def refresh_if_due(self, now: datetime) -> bool:
            self.tries += 1
            if self.tries == 1:
                raise OSError(errno.ENOSPC, "No space left on device")
            loop.call_soon_threadsafe(renewed.set)
            return True

    async def story() -> None:
        async with background.background(background.keep_fresh(cast("Any", Repository())), name="refresh"):
            await asyncio.wait_for(renewed.wait(), 10)

    with asyncio.Runner(loop_factory=lambda: loop) as runner:
        runner.run(story())


def test_an_external_triton_gets_models_pushed_and_again_after_it_restarted(tmp_path: Path) -> None:
    workspace = make_workspace(tmp_path / "workspace")
    port = free_port()

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
            assert time.monotonic() - started < 5
            with external_triton(tmp_path / "second", port):
                await eventually(lambda: answers(inference, token), "the models are pushed to the new Triton")
                await running.__aexit__(None, None, None)

    asyncio.run(story())
