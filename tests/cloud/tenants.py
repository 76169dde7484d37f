"""A cloud with three tenants that each have a model, a device and a rollout, and a way to call every method of it."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import grpc
from google.protobuf.message_factory import GetMessageClass

from benchmarks.devices import LightDevice
from cloud.bootstrap import Cloud
from cloud.client import Address, CloudClient
from isthmus.digests import sha256_bytes
from isthmus.oip import service_pb2
from isthmus.v1 import access_pb2, audit_pb2, fleet_pb2, registry_pb2, sealing_pb2, traffic_pb2, usage_pb2
from security.tenants import add_tenant
from security.tls import channel_credentials
from tests.cloud.conftest import eventually
from tests.cloud.workspaces import Workspace, make_bundle, make_workspace, serving

MODELS: Final = {"default": "kiosk", "acme": "acme.triage", "beta": "beta.secret"}
DEVICES: Final = {"default": "cam", "acme": "acme.cam", "beta": "beta.cam"}
FILES: Final = (
    service_pb2, fleet_pb2, registry_pb2, access_pb2, traffic_pb2, usage_pb2, audit_pb2, sealing_pb2,
)  # fmt: skip
METHODS: Final[dict[str, Any]] = {
    f"/{service.full_name}/{method.name}": method
    for file in FILES
    for service in file.DESCRIPTOR.services_by_name.values()
    for method in service.methods
}


@dataclass(frozen=True, slots=True)
class Answer:
    """All that a caller can see of an answer; `body` holds the messages of a call that went well."""

    code: grpc.StatusCode
    detail: str
    trailing: tuple[tuple[str, str], ...]
    body: bytes

    def without(self, *names: str) -> Answer:
        """Return the answer with names taken out that the caller itself has sent."""
        detail, trailing, body = self.detail, self.trailing, self.body
        for name in names:
            detail, body = detail.replace(name, "NAME"), body.replace(name.encode(), b"NAME")
            trailing = tuple((key, value.replace(name, "NAME")) for key, value in trailing)
        return Answer(self.code, detail, trailing, body)


@dataclass(slots=True)
class Site:
    """The cloud, its tenants' folders and what is published."""

    runner: asyncio.Runner
    workspace: Workspace
    cloud: Cloud
    folder: Path
    channel: grpc.Channel
    blobs: dict[str, str] = field(default_factory=dict)  # a light model's digest by tenant
    rollouts: dict[str, str] = field(default_factory=dict)

    def operator_folder(self, tenant: str) -> Path:
        """Return the folder that signs a tenant's models."""
        return self.workspace.operator if tenant == "default" else self.folder / tenant / "operator"

    def client(self, tenant: str, role: str = "operator", acting_in: str = "") -> CloudClient:
        """Return an operator's connection, or another role's."""
        file = self.folder / f"{tenant}-{role}.token"
        file.write_text(self.workspace.token(role, "ann", tenant=tenant))
        return CloudClient(Address(self.cloud.address, self.workspace.trust, file, acting_in), timeout_s=30.0)

    def ask(self, tenant: str, question: Any, role: str = "operator", acting_in: str = "") -> Any:
        """Run a question with a blocking client while the cloud's event loop runs."""

        def work() -> Any:
            with self.client(tenant, role, acting_in) as client:
                return question(client)

        return self.runner.run(asyncio.to_thread(work))

    def publish(self, tenant: str, version: int, *, release: bool = True) -> None:
        """Publish a version of a tenant's model."""
        light = f"light model of {tenant} {version}".encode()
        bundle = make_bundle(self.folder / f"{tenant}-{version}", version, light=light, model=MODELS[tenant])
        self.ask(tenant, lambda client: client.publish(bundle, self.operator_folder(tenant), release=release))

    def call(self, method: str, request: Any, token: str, *more: tuple[str, str]) -> Answer:
        """Call a method by its path, as a stranger's client would; return everything that came back."""
        described = METHODS[method]
        metadata = (("authorization", f"Bearer {token}"), *more) if token else more

        return self.runner.run(asyncio.to_thread(_call, self.channel, method, described, request, metadata))

    def asked(self, method: str, **values: Any) -> Any:
        """Return a request of a method."""
        return GetMessageClass(METHODS[method].input_type)(**values)

    def state_files(self) -> set[str]:
        """Return what is on the disk beside what a running cloud writes for itself: its database, logs and journals."""
        found = {path.relative_to(self.workspace.root).as_posix() for path in self.workspace.root.rglob("*")}
        own = tuple(f"cloud/state/{name}/" for name in ("blobs", "deltas", "triton"))
        return {
            name
            for name in found
            if (not name.startswith("cloud/state/") or name.startswith(own)) and "/incoming/" not in name
        }


def _call(channel: grpc.Channel, method: str, described: Any, request: Any, metadata: Sequence[Any]) -> Answer:
    kind = (
        f"{'stream' if described.client_streaming else 'unary'}_{'stream' if described.server_streaming else 'unary'}"
    )
    stub: Any = getattr(channel, kind)(
        method,
        request_serializer=lambda message: message.SerializeToString(),
        response_deserializer=lambda data: data,
    )
    argument = iter(request if isinstance(request, list) else [request]) if described.client_streaming else request
    try:
        if described.server_streaming:
            call = stub(argument, metadata=metadata, timeout=20)
            body = next(call, b"") if method.endswith("Watch") else b"".join(call)
            call.cancel()
            return Answer(grpc.StatusCode.OK, "", (), body)
        body, call = stub.with_call(argument, metadata=metadata, timeout=20)
    except grpc.RpcError as error:
        refused: Any = error
        trailing = tuple((key, value) for key, value in refused.trailing_metadata() or () if key.startswith("isthmus"))
        return Answer(refused.code(), refused.details(), trailing, b"")
    return Answer(grpc.StatusCode.OK, "", (), body)


@contextmanager
def three_tenants(folder: Path, **settings: Any) -> Iterator[Site]:
    """Run a cloud with the tenants default, acme and beta."""
    workspace = make_workspace(folder / "workspace")
    for tenant in ("acme", "beta"):
        add_tenant(workspace.home, tenant, folder / tenant, workspace.trust / "ca.pem", datetime.now(UTC))
    with asyncio.Runner() as runner:
        running = serving(workspace, **settings)
        cloud = runner.run(running.__aenter__())
        channel = grpc.secure_channel(cloud.address, channel_credentials(workspace.trust / "ca.pem"))
        site = Site(runner, workspace, cloud, folder, channel)
        tasks: list[asyncio.Task[None]] = []
        try:
            for tenant in MODELS:
                site.publish(tenant, 1)
            _start_rollouts(site, tasks)
            yield site
        finally:
            for task in tasks:
                task.cancel()
            runner.run(_gather(tasks))
            channel.close()
            runner.run(running.__aexit__(None, None, None))


async def _gather(tasks: list[asyncio.Task[None]]) -> None:
    await asyncio.gather(*tasks, return_exceptions=True)


def _start_rollouts(site: Site, tasks: list[asyncio.Task[None]]) -> None:
    """Let a device of each tenant run its model, and begin a rollout of a second version to it."""
    ca = site.workspace.trust / "ca.pem"

    async def connect(tenant: str, code: str) -> None:
        device = LightDevice(DEVICES[tenant], site.folder, MODELS[tenant], soak=lambda _seconds: 3600.0)
        async with grpc.aio.secure_channel(site.cloud.address, channel_credentials(ca)) as channel:
            await device.enrol(channel, code)
        tasks.append(asyncio.create_task(device.run(lambda: site.cloud.address, site.workspace.trust / "ca.pem")))
        await asyncio.wait_for(device.watching.wait(), 30)

        async def serves() -> bool:
            return device.serving == 1

        await eventually(serves, f"{device.name} serves the first version", within_s=60)

    for tenant in MODELS:
        code = site.ask(tenant, lambda client, tenant=tenant: client.invite(DEVICES[tenant])["code"])
        site.runner.run(connect(tenant, code))
        site.publish(tenant, 2, release=False)
        request = fleet_pb2.StartRolloutRequest(
            model=MODELS[tenant], version=2, stages=[fleet_pb2.RolloutStage(share=1.0, soak_s=3600)],
            gates=fleet_pb2.RolloutGates(
                max_failure_rate=0.05, confidence=0.99, max_error_rate=0.02, min_samples=100, done_share=0.95,
                stage_limit_s=86400,
            ),
        )  # fmt: skip
        started = site.ask(tenant, lambda client, request=request: client.start_rollout(request))
        site.rollouts[tenant] = started.rollout.id
        site.blobs[tenant] = sha256_bytes(f"light model of {tenant} 1".encode())
