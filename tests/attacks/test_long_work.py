"""Callers who ask for work that takes the threads of the cloud long: what others ask meanwhile must not wait for it."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from cloud import audit_service
from cloud.blobs import Blobs
from isthmus.digests import sha256_bytes
from isthmus.v1 import audit_pb2, audit_pb2_grpc, fleet_pb2, fleet_pb2_grpc, registry_pb2, registry_pb2_grpc
from tests.cloud.tenants import Site, three_tenants

pytestmark = pytest.mark.slow

CALLS = 40  # more than there are threads


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    with three_tenants(tmp_path_factory.mktemp("long-work")) as running:
        yield running


def bearer(site: Site, role: str, tenant: str) -> tuple[tuple[str, str], ...]:
    return (("authorization", f"Bearer {site.workspace.token(role, 'eve', tenant=tenant)}"),)


def meanwhile(site: Site, attack: Callable[[grpc.aio.Channel], Awaitable[list[Any]]]) -> None:
    """Have calls begun by `attack` run, and see that another tenant is served."""

    async def story() -> None:
        async with site.workspace.channel(site.cloud) as channel, site.workspace.channel(site.cloud) as other:
            running = await attack(channel)
            fleet: Any = fleet_pb2_grpc.FleetServiceStub(other)
            metadata = bearer(site, "operator", "beta")
            for _ in range(20):
                answer = await fleet.ListDevices(fleet_pb2.ListDevicesRequest(), metadata=metadata, timeout=15)
                assert [device.device_id for device in answer.devices] == ["beta.cam"]
            for call in running:
                call.cancel()

    site.runner.run(story())


def test_asking_for_many_digests_of_large_files(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    data = os.urandom(256 << 10)
    digest, begun, intact = sha256_bytes(data), threading.Event(), Blobs.intact

    def noted(blobs: Blobs, sha256: str) -> bool:
        begun.set()
        return intact(blobs, sha256)

    monkeypatch.setattr(Blobs, "intact", noted)

    async def parts() -> AsyncIterator[Any]:
        yield registry_pb2.UploadBlobRequest(sha256=digest, length=len(data), data=data)

    async def attack(channel: grpc.aio.Channel) -> list[Any]:
        registry: Any = registry_pb2_grpc.RegistryServiceStub(channel)
        metadata = bearer(site, "operator", "acme")
        await registry.UploadBlob(parts(), metadata=metadata, timeout=60)
        request = registry_pb2.FindMissingRequest(sha256=[digest] * 20_000)
        calls = [registry.FindMissing(request, metadata=metadata, timeout=600) for _ in range(CALLS)]
        while not begun.is_set():
            await asyncio.sleep(0.01)
        return calls

    meanwhile(site, attack)


def test_searching_a_log_that_is_long(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    go_on, begun = threading.Event(), threading.Event()

    def slow(_folder: Path, _query: Any) -> Iterator[dict[str, Any]]:
        begun.set()
        go_on.wait(120)
        yield from ()

    monkeypatch.setattr(audit_service, "search", slow)

    async def attack(channel: grpc.aio.Channel) -> list[Any]:
        audit: Any = audit_pb2_grpc.AuditServiceStub(channel)
        metadata = bearer(site, "auditor", "acme")
        calls = [audit.SearchRecords(audit_pb2.SearchRecordsRequest(), metadata=metadata) for _ in range(CALLS)]
        calls += [audit.ExportRecords(audit_pb2.ExportRecordsRequest(), metadata=metadata) for _ in range(CALLS)]
        while not begun.is_set():
            await asyncio.sleep(0.01)
        return calls

    try:
        meanwhile(site, attack)
    finally:
        go_on.set()
