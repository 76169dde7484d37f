"""The cloud's door as `isthmus cloud serve` opens it: both TLS listeners, interceptors, fleet service; no Triton.

As a program (`python -m tests.attacks.doors WORKSPACE DATABASE`) it is a cloud process of its own, to be raced and
killed: it prints its two addresses as JSON and serves until its standard input ends.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc

from cloud import database as db
from cloud.admission import Admission
from cloud.conductor import Conductor, Releases
from cloud.fleet import FleetService
from cloud.quota_store import MemoryQuotas
from cloud.quotas import QuotaBook
from cloud.revocations import Revocations
from cloud.roster import Roster
from edge.identity import DeviceHome, enrol
from isthmus.status import StatusInterceptor
from isthmus.v1 import fleet_pb2, fleet_pb2_grpc
from security.binding import Guard
from security.custom import Terms
from security.enrolment import IssuingCa
from security.guard import CallGuard
from security.interceptors import AuthInterceptor
from security.limits import ListenerLimits
from security.tls import channel_credentials, server_credentials
from security.tokens import TokenIssuer, make_assertion

REVOKED_WITHIN_S = 5.0
_CALL_S = 20.0


@dataclass(frozen=True, slots=True)
class Door:
    """Where a cloud listens, and the workspace that it serves."""

    workspace: Path
    address: str
    device_address: str

    @property
    def ca(self) -> Path:
        return self.workspace / "trust" / "ca.pem"

    def mint(self, role: str, subject: str, **more: Any) -> str:
        """Return a token that this cloud accepts."""
        issuer = TokenIssuer.load(self.workspace / "cloud")
        return issuer.mint(subject, role, **({"ttl": timedelta(hours=1)} | more))[0]

    async def ask(self, method: str, request: Any, token: str = "") -> Any:
        """Call a method at the address for everybody."""
        async with grpc.aio.secure_channel(self.address, channel_credentials(self.ca)) as channel:
            return await ask(channel, method, request, token)

    async def invite(self, name: str) -> str:
        """Return a one-time code."""
        request = fleet_pb2.InviteRequest(device_id=name)
        return str((await self.ask("Invite", request, self.mint("operator", "ann"))).code)

    async def enrol(self, name: str, folder: Path) -> EnrolledDevice:
        """Enrol a device as the agent does."""
        home = DeviceHome(folder)
        await enrol(home, cloud=self.address, code=await self.invite(name), trust=self.workspace / "trust")
        return EnrolledDevice(self, name, home)

    async def revoke(self, **chosen: str) -> Any:
        """Revoke as an administrator does."""
        return await self.ask("RevokeDevice", fleet_pb2.RevokeDeviceRequest(**chosen), self.mint("admin", "root"))


@dataclass(frozen=True, slots=True)
class EnrolledDevice:
    """A device with its key and certificate."""

    door: Door
    name: str
    home: DeviceHome

    def at(self, door: Door) -> EnrolledDevice:
        """Return the device at another door of the same cloud."""
        return EnrolledDevice(door, self.name, self.home)

    def channel(self) -> grpc.aio.Channel:
        """Return a connection that shows the device's certificate."""
        credentials = channel_credentials(self.door.ca, self.home.key, self.home.certificate)
        return _own_channel(self.door.device_address, credentials)

    def assertion(self, *, key: Path | None = None, name: str = "") -> str:
        """Return a fresh proof of who the device is."""
        audience = self.home.enrolment().token_audience
        return make_assertion(key or self.home.key, name or self.name, audience, datetime.now(UTC))

    async def ask(self, method: str, request: Any, token: str = "") -> Any:
        """Call a method on the device's own connection."""
        async with self.channel() as channel:
            return await ask(channel, method, request, token)

    async def token(self, assertion: str = "") -> str:
        """Return an access token."""
        request = fleet_pb2.IssueTokenRequest(assertion=assertion or self.assertion())
        return str((await self.ask("IssueToken", request)).access_token)


def _own_channel(address: str, credentials: grpc.ChannelCredentials) -> grpc.aio.Channel:
    # Channels of one process share a connection when their arguments are equal; each caller has one of its own.
    return grpc.aio.secure_channel(address, credentials, options=(("grpc.use_local_subchannel_pool", 1),))


async def ask(channel: grpc.aio.Channel, method: str, request: Any, token: str = "") -> Any:
    """Call a method of the fleet service."""
    stub: Any = fleet_pb2_grpc.FleetServiceStub(channel)
    metadata = (("authorization", f"Bearer {token}"),) if token else ()
    return await getattr(stub, method)(request, metadata=metadata, timeout=_CALL_S)


async def refusal(call: Any) -> tuple[grpc.StatusCode, str]:
    """Return status and reason of a call that must be refused."""
    try:
        answer = await call
    except grpc.aio.AioRpcError as error:
        told = dict(error.trailing_metadata() or ())
        return error.code(), str(told.get("isthmus-reason", ""))
    raise AssertionError(f"answered {answer}")


@asynccontextmanager
async def open_door(
    workspace: Path, database: db.Database, *, clock: Callable[[], float] = time.time
) -> AsyncIterator[Door]:
    """Serve a workspace from a database."""
    home = workspace / "cloud"
    issuer, guard = TokenIssuer.load(home), Guard()
    revocations = Revocations(database, guard)
    await revocations.refresh()
    conductor = Conductor(database, Roster(database, lambda *_: (), clock), _no_releases(), clock=clock, poll_s=0.1)
    await conductor.refresh()
    access = AuthInterceptor(issuer.verifier(), guard=guard)
    server = grpc.aio.server(
        interceptors=(StatusInterceptor(), access, CallGuard(ListenerLimits())), options=(("grpc.so_reuseport", 0),)
    )
    pair = (home / "server.key", home / "server.pem")
    port = server.add_secure_port("127.0.0.1:0", server_credentials(*pair))
    device_port = server.add_secure_port("127.0.0.1:0", server_credentials(*pair, home / "issuing-ca.pem"))
    service = FleetService(
        database, conductor, issuer, IssuingCa.load(home), admission=Admission(QuotaBook(), MemoryQuotas()),
        revocations=revocations, device_address=f":{device_port}", clock=clock,
    )  # fmt: skip
    fleet_pb2_grpc.add_FleetServiceServicer_to_server(service, server)
    await server.start()
    running = [asyncio.create_task(work) for work in (conductor.run(), revocations.run())]
    try:
        yield Door(workspace, f"localhost:{port}", f"localhost:{device_port}")
    finally:
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
        conductor.close()
        await server.stop(0)


def _no_releases() -> Releases:
    async def nothing(*_: Any) -> None:
        return

    return Releases(terms=lambda *_: Terms(), prepare=nothing, follow=nothing)


@contextmanager
def door_process(workspace: Path, url: str) -> Iterator[tuple[Door, subprocess.Popen[str]]]:
    """Run a door as a process."""
    command = [sys.executable, "-m", "tests.attacks.doors", str(workspace), url]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        told = json.loads(process.stdout.readline())
        yield Door(workspace, told["address"], told["device_address"]), process
    finally:
        process.kill()
        process.communicate()


async def _serve(workspace: Path, url: str) -> None:
    async with open_door(workspace, db.Database(url)) as door:
        print(json.dumps({"address": door.address, "device_address": door.device_address}), flush=True)  # noqa: T201
        await asyncio.to_thread(sys.stdin.read)


if __name__ == "__main__":
    from isthmus import tls13

    tls13.enforce()
    asyncio.run(_serve(Path(sys.argv[1]), sys.argv[2]))
