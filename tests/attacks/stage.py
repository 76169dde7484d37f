"""What is attacked: `isthmus cloud serve` with its Triton, and `isthmus edge run` with TLS, each its own process."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import grpc

from cloud.client import Address, CloudClient
from edge.identity import DeviceHome, enrol
from isthmus.bundle import Heavy, Manifest, index_files
from isthmus.digests import tree_digest
from isthmus.oip import MODEL_INFER
from isthmus.tensors import encode_request
from security.tls import channel_credentials
from tests.cloud.conftest import CONFIG, MODEL
from tests.cloud.workspaces import Workspace, make_workspace
from tests.edge import bundles

WHO_AM_I: Final = "/isthmus.v1.FleetService/WhoAmI"
DEVICE: Final = "kiosk-1"
_LISTENER: Final = "[listener]\nhandshake_s = 2.0\nconnections = 200\n"


@dataclass(frozen=True, slots=True)
class Target:
    """A running server."""

    name: str
    address: str
    ca: Path
    pid: int
    token: str
    log: Path
    method: str  # what a well-behaved client calls
    request: bytes
    metrics: str = ""

    @property
    def bearer(self) -> tuple[tuple[str, str], ...]:
        """Return the metadata of a caller with a token."""
        return (("authorization", f"Bearer {self.token}"),)

    def channel(self) -> grpc.Channel:
        """Return a channel of its own connection."""
        options = (("grpc.use_local_subchannel_pool", 1), ("grpc.enable_retries", 0))
        return grpc.secure_channel(self.address, channel_credentials(self.ca), options=options)

    def ask(self, channel: grpc.Channel) -> bytes:
        """Make one call as well-behaved clients do."""
        call: Any = channel.unary_unary(self.method)
        answer: bytes = call(self.request, metadata=self.bearer, timeout=30, wait_for_ready=True)
        return answer

    def usage(self) -> Usage:
        """Return what the process uses."""
        lines = Path(f"/proc/{self.pid}/status").read_text().splitlines()
        status = dict(line.split(":", 1) for line in lines)
        files = len(list(Path(f"/proc/{self.pid}/fd").iterdir()))
        return Usage(int(status["VmRSS"].split()[0]) >> 10, int(status["Threads"]), files)


@dataclass(frozen=True, slots=True)
class Usage:
    """Resident memory in MiB, threads, open files."""

    memory: int
    threads: int
    files: int


@dataclass
class Stage:
    """Both servers."""

    root: Path
    workspace: Workspace
    cloud: Target
    agent: Target
    devices: str  # where the cloud asks for device certificates


@dataclass
class GoodClient:
    """A well-behaved client that calls on one connection while an attack runs."""

    target: Target
    answered: int = 0
    failures: list[str] = field(default_factory=list)

    @contextmanager
    def calling(self) -> Iterator[GoodClient]:
        """Call again and again until the block ends."""
        stopping, ready = threading.Event(), threading.Event()

        def run() -> None:
            with self.target.channel() as channel:
                while not stopping.is_set():
                    try:
                        self.target.ask(channel)
                        self.answered += 1
                    except grpc.RpcError as error:
                        self.failures.append(str(error))
                    ready.set()
                    stopping.wait(0.01)

        thread = threading.Thread(target=run)
        thread.start()
        try:
            assert ready.wait(30)
            yield self
        finally:
            stopping.set()
            thread.join(60)


def wait_until(holds: Callable[[], bool], what: str, within_s: float = 60.0) -> None:
    """Wait until a condition holds."""
    end = time.monotonic() + within_s
    while not holds():
        assert time.monotonic() < end, f"not within {within_s} s: {what}"
        time.sleep(0.05)


@contextmanager
def program(folder: Path, name: str, *words: object, files: int = 0) -> Iterator[tuple[dict[str, Any], Path]]:
    """Run an `isthmus` server; yield what its ready file says, and its log. `files` limits its open files."""
    ready, log = folder / f"{name}.ready.json", folder / f"{name}.log"
    ready.unlink(missing_ok=True)
    checkout = Path(__file__).parents[2]
    command = [sys.executable, "-m", "isthmus", "--log-json", *map(str, words), "--ready-file", str(ready)]
    if files:
        command = ["sh", "-c", f'ulimit -n {files} && exec "$@"', "sh", *command]
    environment = os.environ | {"PYTHONPATH": f"{checkout}:{checkout / 'proto'}", "ISTHMUS_CLOUD_TRITON_STOP_S": "0.2"}
    if "cloud" not in words:
        del environment["ISTHMUS_CLOUD_TRITON_STOP_S"]
    with log.open("ab") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out, cwd=folder, env=environment)
        try:
            wait_until(lambda: ready.exists() or process.poll() is not None, f"{name} is ready", 90)
            assert process.poll() is None, log.read_text()
            yield json.loads(ready.read_text()), log
        finally:
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def make_bundle(folder: Path) -> Path:
    """Make a bundle whose light and heavy halves both run."""
    manifest = bundles.build_bundle(folder)
    shutil.rmtree(folder / "heavy")
    (folder / "heavy" / "1").mkdir(parents=True)
    (folder / "heavy" / "config.pbtxt").write_text(CONFIG.replace("[ 4 ]", "[ 3 ]"))
    (folder / "heavy" / "1" / "model.py").write_text(MODEL.format(factor=10.0))
    (folder / "manifest.json").unlink()
    files = index_files(folder)
    heavy = {path: entry.sha256 for path, entry in files.items() if path.startswith("heavy/")}
    changed: Manifest = manifest.model_copy(
        update={
            "files": files,
            "heavy": Heavy(platform="python", digest=tree_digest(heavy)),
            "outputs": manifest.outputs[:1],
        }
    )
    (folder / "manifest.json").write_bytes(changed.to_json())
    return folder


@contextmanager
def running_stage(root: Path) -> Iterator[Stage]:
    """Start a cloud with one published model and an agent that serves it beyond loopback."""
    workspace = make_workspace(root / "workspace")
    ca, home = workspace.trust / "ca.pem", root / "device"
    (root / "cloud.toml").write_text(_LISTENER)
    (root / "edge.toml").write_text(f'metrics_listen = "127.0.0.1:0"\nvariant = "onnxruntime-fp32"\n{_LISTENER}')
    words = ("cloud", "serve", "--home", workspace.home, "--config", root / "cloud.toml", "--listen", "127.0.0.1:0")
    with program(root, "cloud", *words) as (ready, log):
        address, pid = str(ready["address"]), int(ready["pid"])
        cloud = Target("cloud", address, ca, pid, workspace.token("admin"), log, WHO_AM_I, b"")
        with CloudClient(Address(address, workspace.trust, workspace.token_file()), timeout_s=30) as client:
            client.publish(make_bundle(root / "bundle"), workspace.operator)
            code = client.invite(DEVICE)["code"]
        asyncio.run(
            enrol(DeviceHome(home), cloud=address, code=code, trust=workspace.trust, hosts=("localhost", "127.0.0.1"))
        )
        run = ("edge", "run", "--home", home, "--model", "triage", "--config", root / "edge.toml")
        with program(root, "agent", *run, "--listen", "0.0.0.0:0") as (told, agent_log):
            request = encode_request("triage", {"x": bundles.SURE}).SerializeToString()
            agent = Target(
                "agent", f"127.0.0.1:{str(told['address']).rpartition(':')[2]}", ca, int(told["pid"]),
                workspace.token("operator"), agent_log, MODEL_INFER, request, str(told["metrics"]),
            )  # fmt: skip
            wait_until(lambda: is_served(agent), "the agent serves the model")
            yield Stage(root, workspace, cloud, agent, str(ready["device_address"]))


def is_served(target: Target) -> bool:
    """Return whether a well-behaved client is answered."""
    with target.channel() as channel:
        try:
            target.ask(channel)
        except grpc.RpcError:
            return False
    return True
