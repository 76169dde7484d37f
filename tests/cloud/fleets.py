"""A fleet service with its rollouts behind real TLS, in this process, on any database; and light devices on it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import grpc

from benchmarks.devices import LightDevice, Script, all_good
from cloud import database as db
from cloud.access_service import AccessService
from cloud.access_store import AccessStore
from cloud.admission import Admission
from cloud.conductor import Conductor, Releases
from cloud.fleet import FleetService
from cloud.quota_store import MemoryQuotas
from cloud.quotas import QuotaBook
from cloud.records import supersede
from cloud.rollout_service import RolloutService
from cloud.roster import Roster
from isthmus.bundle import Variant
from isthmus.status import StatusInterceptor
from isthmus.v1 import access_pb2_grpc, fleet_pb2, fleet_pb2_grpc
from security.authenticator import Authenticator
from security.custom import Terms
from security.enrolment import IssuingCa
from security.interceptors import AuthInterceptor
from security.roles import AccessBook
from security.tls import channel_credentials, server_credentials
from security.tokens import TokenIssuer
from tests.cloud.conftest import eventually
from tests.cloud.workspaces import Workspace

ANY = Variant(id="onnxruntime-fp32", runtime="onnxruntime", precision="fp32", entry="model.onnx", tolerance=0.1)


class Clock:
    """A clock that moves when it is told to."""

    def __init__(self) -> None:
        self.offset_s = 0.0

    def __call__(self) -> float:
        return datetime.now(UTC).timestamp() + self.offset_s


@dataclass(slots=True)
class Registry:
    """What the registry would say; tests change it."""

    variants: dict[int, tuple[Variant, ...]] = field(default_factory=dict)
    terms: dict[int, Terms] = field(default_factory=dict)
    prepared: list[int] = field(default_factory=list)

    def releases(self) -> Releases:
        async def prepare(_model: str, version: int) -> None:
            self.prepared.append(version)

        async def follow(_models: Any) -> None:
            return

        return Releases(
            terms=lambda _model, version: self.terms.get(version, Terms(rollback_floor=1)),
            prepare=prepare,
            follow=follow,
        )


@dataclass(slots=True)
class Fleet:
    """A running fleet service."""

    workspace: Workspace
    database: db.Database
    conductor: Conductor
    registry: Registry
    address: str
    clock: Clock
    folder: Path
    devices: dict[str, LightDevice] = field(default_factory=dict)
    tasks: dict[str, asyncio.Task[None]] = field(default_factory=dict)

    @asynccontextmanager
    async def stubs(self) -> AsyncIterator[tuple[Any, Any]]:
        """Yield the stubs of both services."""
        trust = channel_credentials(self.workspace.trust / "ca.pem")
        async with grpc.aio.secure_channel(self.address, trust) as channel:
            yield fleet_pb2_grpc.FleetServiceStub(channel), fleet_pb2_grpc.RolloutServiceStub(channel)

    def bearer(
        self, role: str, subject: str = "somebody", models: tuple[str, ...] = ("*",)
    ) -> tuple[tuple[str, str], ...]:
        """Return the metadata of a caller."""
        return (("authorization", f"Bearer {self.workspace.token(role, subject, models)}"),)

    async def publish(self, version: int, *, release: bool = False, model: str = "triage") -> None:
        """Make a version known, as the registry does at the end of a publish."""

        def write() -> None:
            with self.database.write() as session:
                if session.get(db.Model, model) is None:
                    session.add(db.Model(name=model))
                    session.flush()
                session.merge(
                    db.Version(
                        model=model, version=version, manifest_sha256="0" * 64, heavy_digest="0" * 64,
                        heavy_version=version, published_at=0.0,
                    )
                )  # fmt: skip
                row, revision = session.get_one(db.Model, model), db.next_revision(session)
                row.revision = revision
                if release:
                    supersede(session, model, revision)
                    row.released = version

        await asyncio.to_thread(write)
        await self.conductor.refresh()

    async def operator(self, service: str, method: str, request: Any) -> Any:
        """Call a method as an operator."""
        async with self.stubs() as (fleet, rollouts):
            stub = fleet if service == "fleet" else rollouts
            return await getattr(stub, method)(request, metadata=self.bearer("operator", "ann"), timeout=20)

    async def rollout(self, method: str, name: str = "triage") -> Any:
        """Call a method that takes a rollout's name, and return the rollout."""
        request = getattr(fleet_pb2, f"{method}RolloutRequest")(id=name)
        return (await self.operator("rollout", f"{method}Rollout", request)).rollout

    async def enrol(
        self, name: str, *, script: Script = all_good, facts: Any = None, model: str = "triage"
    ) -> LightDevice:
        """Enrol a light device."""
        device = LightDevice(name, self.folder, model, facts, script, soak=lambda _seconds: 0.0)
        code = (await self.operator("fleet", "Invite", fleet_pb2.InviteRequest(device_id=name))).code
        async with grpc.aio.secure_channel(
            self.address, channel_credentials(self.workspace.trust / "ca.pem")
        ) as channel:
            await device.enrol(channel, code)
        self.devices[name] = device
        return device

    def connect(self, *names: str) -> None:
        """Let devices come online."""
        trust = self.workspace.trust / "ca.pem"
        for name in names or tuple(self.devices):
            self.tasks[name] = asyncio.create_task(self.devices[name].run(lambda: self.address, trust))

    async def disconnect(self, *names: str) -> None:
        """Let devices go away."""
        tasks = [self.tasks.pop(name) for name in names or tuple(self.tasks)]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def until(self, condition: Callable[[], bool], what: str) -> None:
        """Wait until something holds."""

        async def holds() -> bool:
            return condition()

        await eventually(holds, what, within_s=60)

    async def until_state(self, state: int, name: str = "triage") -> Any:
        """Wait until a rollout is in a state; return it."""

        async def holds() -> bool:
            return bool((await self.rollout("Get", name)).state == state)

        await eventually(
            holds, f"{name} is {fleet_pb2.RolloutState.Name(fleet_pb2.RolloutState.ValueType(state))}", within_s=60
        )
        return await self.rollout("Get", name)


@asynccontextmanager
async def fleet_on(
    database: db.Database,
    workspace: Workspace,
    folder: Path,
    *,
    clock: Clock | None = None,
    registry: Registry | None = None,
) -> AsyncIterator[Fleet]:
    """Serve a fleet on a database."""
    issuer, clock, registry = TokenIssuer.load(workspace.home), clock or Clock(), registry or Registry()
    roster = Roster(database, lambda _model, version: registry.variants.get(version, (ANY,)), clock)
    conductor = Conductor(database, roster, registry.releases(), clock=clock, poll_s=0.05)
    await conductor.refresh()
    book = AccessBook()
    access = AccessStore(database, book, clock=clock)
    await access.refresh()
    authenticator = Authenticator(issuer.verifier(), book=book, clock=clock)
    server = grpc.aio.server(interceptors=(StatusInterceptor(), AuthInterceptor(authenticator)))
    admission = Admission(QuotaBook(), MemoryQuotas(), streams=1000)  # a test's devices share few names
    service = FleetService(
        database,
        conductor,
        issuer,
        IssuingCa.load(workspace.home),
        admission=admission,
        unbound_tokens=True,
        clock=clock,
    )
    fleet_pb2_grpc.add_FleetServiceServicer_to_server(service, server)
    fleet_pb2_grpc.add_RolloutServiceServicer_to_server(RolloutService(conductor), server)
    access_pb2_grpc.add_AccessServiceServicer_to_server(AccessService(access), server)
    credentials = server_credentials(workspace.home / "server.key", workspace.home / "server.pem")
    port = server.add_secure_port("127.0.0.1:0", credentials)
    await server.start()
    running = [asyncio.create_task(work) for work in (conductor.run(), access.run())]
    fleet = Fleet(workspace, database, conductor, registry, f"127.0.0.1:{port}", clock, folder)
    try:
        yield fleet
    finally:
        await fleet.disconnect()
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
        conductor.close()
        await server.stop(0)
