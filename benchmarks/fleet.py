"""One cloud process and thousands of devices: a staged rollout to all of them, on SQLite and on PostgreSQL.

The devices speak the real protocol over real TLS, a channel each, from one other process (benchmarks.devices); their
updates are scripted. The cloud is `isthmus cloud serve` with its Triton. Measured are, at two sizes of the fleet: how
long enrolment, connecting, a rollout in four stages without soaking and the push of a release take; the cloud's
processor time for each; its memory; and whether any device was lost. Both processes share the machine's cores.
"""

from __future__ import annotations

import asyncio
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from json import loads
from pathlib import Path
from statistics import quantiles
from typing import Annotated, Any, Final

import typer

from benchmarks.result import Goal, publish
from isthmus import tls13

tls13.enforce()  # before anything imports grpc

import grpc  # noqa: E402

from benchmarks.devices import Behaviour, LightDevice  # noqa: E402
from cloud.client import Address, CloudClient  # noqa: E402
from isthmus.v1 import fleet_pb2, fleet_pb2_grpc  # noqa: E402
from security.tls import channel_credentials  # noqa: E402
from tests.cloud.postgresql import find_postgresql, postgresql_server  # noqa: E402
from tests.cloud.workspaces import Workspace, make_bundle, make_workspace  # noqa: E402

STAGES: Final = (0.01, 0.1, 0.5, 1.0)
SIZES: Final = (200, 2000)
QUICK_SIZES: Final = (20, 100)
IDLE_S: Final = 20.0
QUICK_IDLE_S: Final = 2.0
GIVE_UP_S: Final = 900.0
AT_ONCE: Final = 12  # enrolments: a cloud lets no more than 16 calls of one address be in progress
_ACTIVE: Final = fleet_pb2.ROLLOUT_STATE_ACTIVE
_TICK: Final = os.sysconf("SC_CLK_TCK")

app = typer.Typer()


@dataclass(frozen=True, slots=True)
class CloudProcess:
    """A running `isthmus cloud serve`."""

    address: str
    pid: int

    def cpu_s(self) -> float:
        """Return the processor seconds that it took so far, without its Triton's."""
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / _TICK

    def rss_mib(self) -> float:
        """Return its memory now."""
        lines = Path(f"/proc/{self.pid}/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS:")) / 1024


@app.command()
def main(
    quick: Annotated[bool, typer.Option(help="A shorter form for checks.")] = False,
    json: Annotated[Path | None, typer.Option(help="Where the figures go.")] = None,
) -> None:
    """Roll a version out to fleets of two sizes on each database."""
    raise_file_limit()
    databases = ["sqlite", *(["postgresql"] if find_postgresql() is not None else [])]
    if len(databases) == 1:
        typer.echo("no PostgreSQL server is installed: SQLite only", err=True)
    sizes, idle_s = (QUICK_SIZES, QUICK_IDLE_S) if quick else (SIZES, IDLE_S)
    rows = [run(database, size, idle_s) for database in databases for size in sizes]
    publish("fleet", rows, goals_of(rows), json)


def raise_file_limit() -> None:
    """Let this process and its children open as many connections as the system permits."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard) if hard > soft else (soft, hard))


def goals_of(rows: list[dict[str, Any]]) -> list[Goal]:
    """Return what must hold: nobody lost, and no more than linear growth."""
    goals = []
    for database in dict.fromkeys(row["database"] for row in rows):
        small, large = (row for row in rows if row["database"] == database)
        growth = large["devices"] / small["devices"]
        goals += [
            Goal(f"{database}: devices lost", small["lost"] + large["lost"], 0),
            Goal(f"{database}: KiB per device", large["kib_per_device"], 200),
            Goal(
                f"{database}: rollout CPU per device, large / small",
                round(large["rollout_cpu_s"] / max(small["rollout_cpu_s"], 0.01) / growth, 3), 1.5,
            ),
            Goal(f"{database}: idle CPU of the whole fleet, % of a core", large["idle_cpu_pct"], 10),
        ]  # fmt: skip
    return goals


def run(database: str, size: int, idle_s: float) -> dict[str, Any]:
    """Measure one fleet on one database."""
    with tempfile.TemporaryDirectory(prefix="fleet-") as scratch:
        folder = Path(scratch)
        workspace = make_workspace(folder / "workspace")
        with _database(database, folder) as url, open_cloud(workspace, ("--database", url) if url else ()) as cloud:
            for version in (1, 2, 3):
                bundle = make_bundle(folder / f"bundle-{version}", version, light=b"light model %d" % version)
                with _client(workspace, cloud) as client:
                    client.publish(bundle, workspace.operator, release=version == 1)
            return {"database": database, "devices": size} | asyncio.run(
                _measure(workspace, cloud, folder, size, idle_s)
            )


async def _measure(workspace: Workspace, cloud: CloudProcess, folder: Path, size: int, idle_s: float) -> dict[str, Any]:
    ca = workspace.trust / "ca.pem"
    devices = [LightDevice(f"device-{n}", folder, "triage", soak=lambda _seconds: 0.0) for n in range(size)]
    began = time.monotonic()
    await _enrol(workspace, cloud, devices)
    enrol_s = time.monotonic() - began

    rss_before, cpu_before, began = cloud.rss_mib(), cloud.cpu_s(), time.monotonic()
    running = [asyncio.create_task(device.run(lambda: cloud.address, ca)) for device in devices]
    await _until(lambda: all(device.serving == 1 and device.reports >= 2 for device in devices))
    connect_s, connect_cpu_s = time.monotonic() - began, cloud.cpu_s() - cpu_before
    kib = (cloud.rss_mib() - rss_before) * 1024 / size

    cpu_before = cloud.cpu_s()
    await asyncio.sleep(idle_s)
    idle_pct = 100 * (cloud.cpu_s() - cpu_before) / idle_s

    cpu_before, began = cloud.cpu_s(), time.monotonic()
    rollout = await _roll_out(workspace, cloud, devices)
    rollout_s, rollout_cpu_s = time.monotonic() - began, cloud.cpu_s() - cpu_before
    lost = sum(device.serving != 2 or 1 not in device.served for device in devices) + size - rollout.tally.cohort

    push_ms = await _push(workspace, cloud, devices)
    rss = cloud.rss_mib()
    for task in running:
        task.cancel()
    await asyncio.gather(*running, return_exceptions=True)
    cuts = quantiles(push_ms, n=100, method="inclusive")
    return {
        "enrol_s": round(enrol_s, 1),
        "connect_s": round(connect_s, 1),
        "connect_cpu_s": round(connect_cpu_s, 1),
        "rollout_s": round(rollout_s, 1),
        "rollout_cpu_s": round(rollout_cpu_s, 1),
        "rollout_cpu_ms_per_device": round(1000 * rollout_cpu_s / size, 2),
        "push_p50_ms": round(cuts[49]),
        "push_p99_ms": round(cuts[98]),
        "idle_cpu_pct": round(idle_pct, 2),
        "rss_mib": round(rss),
        "kib_per_device": round(kib),
        "lost": lost,
    }


@asynccontextmanager
async def connect_devices(
    workspace: Workspace, cloud: CloudProcess, folder: Path, size: int
) -> AsyncIterator[list[LightDevice]]:
    """Enrol devices, and keep each connected with an open Watch stream."""
    ca = workspace.trust / "ca.pem"
    devices = [LightDevice(f"{folder.name}-{n}", folder, "triage", soak=lambda _seconds: 0.0) for n in range(size)]
    await _enrol(workspace, cloud, devices)
    running = [asyncio.create_task(device.run(lambda: cloud.address, ca)) for device in devices]
    try:
        await _until(lambda: all(device.watching.is_set() and device.reports >= 2 for device in devices))
        yield devices
    finally:
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)


async def _enrol(workspace: Workspace, cloud: CloudProcess, devices: list[LightDevice]) -> None:
    credentials = channel_credentials(workspace.trust / "ca.pem")
    operator = (("authorization", f"Bearer {workspace.token('operator')}"),)
    turns = asyncio.Semaphore(AT_ONCE)
    async with grpc.aio.secure_channel(cloud.address, credentials) as channel:
        stub: Any = fleet_pb2_grpc.FleetServiceStub(channel)

        async def enrol(device: LightDevice) -> None:
            async with turns:
                request = fleet_pb2.InviteRequest(device_id=device.name)
                await device.enrol(channel, (await stub.Invite(request, metadata=operator, timeout=60)).code)

        await asyncio.gather(*map(enrol, devices))


async def _roll_out(workspace: Workspace, cloud: CloudProcess, devices: list[LightDevice]) -> Any:
    request = fleet_pb2.StartRolloutRequest(
        model="triage", version=2, stages=[fleet_pb2.RolloutStage(share=share) for share in STAGES]
    )

    def start() -> None:
        with _client(workspace, cloud) as client:
            client.start_rollout(request)

    def status() -> Any:
        with _client(workspace, cloud) as client:
            return client.rollout("triage").rollout

    await asyncio.to_thread(start)
    await _until(lambda: all(device.serving == 2 for device in devices))
    while (rollout := await asyncio.to_thread(status)).state == _ACTIVE:  # noqa: ASYNC110
        await asyncio.sleep(0.2)
    return rollout


async def _push(workspace: Workspace, cloud: CloudProcess, devices: list[LightDevice]) -> list[float]:
    """Return how long after a release was asked for each device heard of it."""
    heard: dict[str, float] = {}

    def note(name: str, _version: int) -> Behaviour:
        heard.setdefault(name, time.monotonic())
        return Behaviour.STUCK

    for device in devices:
        device.script = note

    def release() -> float:
        with _client(workspace, cloud) as client:
            began = time.monotonic()
            client.release("triage", 3)
            return began

    began = await asyncio.to_thread(release)
    await _until(lambda: len(heard) == len(devices))
    return [1000 * (at - began) for at in heard.values()]


async def _until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(GIVE_UP_S):
        while not condition():  # noqa: ASYNC110 - one look for all devices is cheaper than an event from each
            await asyncio.sleep(0.05)


def _client(workspace: Workspace, cloud: CloudProcess) -> CloudClient:
    return CloudClient(Address(cloud.address, workspace.trust, workspace.token_file()), timeout_s=60.0)


@contextmanager
def _database(kind: str, folder: Path) -> Iterator[str]:
    if kind == "sqlite":
        yield ""
        return
    (folder / "postgresql").mkdir()
    with postgresql_server(folder / "postgresql") as server:
        yield server.new_database()


@contextmanager
def open_cloud(workspace: Workspace, options: Sequence[str]) -> Iterator[CloudProcess]:
    """Run `isthmus cloud serve` with these options."""
    ready, log = workspace.root / "ready.json", workspace.root / "cloud.log"
    command = [
        sys.executable, "-m", "isthmus", "--log-level", "warning", "cloud", "serve", "--home", workspace.home,
        "--listen", "127.0.0.1:0", "--ready-file", ready, *options,
    ]  # fmt: skip
    with log.open("wb") as out:
        process = subprocess.Popen([*map(str, command)], stdout=out, stderr=out)
    try:
        while not ready.exists():
            if process.poll() is not None:
                raise SystemExit(f"the cloud did not start:\n{log.read_text()}")
            time.sleep(0.05)
        record = loads(ready.read_text())
        yield CloudProcess(record["address"], record["pid"])
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)


if __name__ == "__main__":
    app()
