"""A whole cloud in this process: real workspace, TLS, tokens, signed metadata and deltas; everything else in memory.

The real cloud is tested end to end elsewhere; this one lets a test corrupt one thing and look at what devices sent.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc

from isthmus.delta import make_delta
from isthmus.digests import sha256_bytes
from isthmus.errors import IdentityError, NotFoundError, UnavailableError
from isthmus.oip import SERVICE
from isthmus.status import StatusInterceptor
from isthmus.v1 import fleet_pb2, fleet_pb2_grpc, registry_pb2, registry_pb2_grpc
from security.assertions import read_assertion_subject, verify_assertion
from security.enrolment import IssuingCa, public_key_of
from security.interceptors import AuthInterceptor, current_claims
from security.repository import CloudRepository, OperatorRepository
from security.tls import server_credentials
from security.tokens import TokenIssuer
from security.workspace import init_workspace
from tests.edge import bundles
from tests.edge.faulty_cloud import FaultyCloud

CODE = "the-code"
DEVICE = "kiosk-1"
CHUNK = 128  # bytes: small, so that small files come in many pieces


@dataclass
class SimulatedCloud:
    workspace: Path
    token_ttl: timedelta = timedelta(minutes=10)
    inference: FaultyCloud = field(default_factory=lambda: FaultyCloud(""))
    reports: list[fleet_pb2.ReportRequest] = field(default_factory=list)
    released: int = 0
    order: dict[str, Any] = field(default_factory=dict)  # further fields of the WatchResponse
    takes_reports: bool = True
    refused_reports: int = 0
    facts: fleet_pb2.DeviceFacts | None = None
    tokens_issued: int = 0
    address: str = ""
    blobs: dict[str, bytes] = field(default_factory=dict)
    deltas: bool = True

    def __post_init__(self) -> None:
        if not self.workspace.exists():
            init_workspace(self.workspace, ["localhost", "127.0.0.1"], "acme", datetime.now(UTC))
        self.issuer = TokenIssuer.load(self.workspace / "cloud")
        self.repository = CloudRepository(self.workspace / "cloud")
        self.operator = OperatorRepository(self.workspace / "operator")
        self.released_changed = asyncio.Event()
        self.public_key = b""

    @property
    def trust(self) -> Path:
        return self.workspace / "trust"

    def publish(self, version: int, **changes: Any) -> None:
        """Build, sign and store a bundle; `changes` go to `bundles.build_bundle`."""
        folder = self.workspace / "bundles" / str(version)
        manifest = bundles.build_bundle(folder, version, **changes)
        data = (folder / "manifest.json").read_bytes()
        targets = self.operator.sign_manifest("triage", version, data, self.repository.targets_json())
        self.repository.commit(targets)
        for path in [*manifest.files, "manifest.json"]:
            content = (folder / path).read_bytes()
            self.blobs[sha256_bytes(content)] = content

    def release(self, version: int, **order: Any) -> None:
        self.released, self.order = version, order
        self.released_changed.set()
        self.released_changed = asyncio.Event()


class Fleet(fleet_pb2_grpc.FleetServiceServicer):
    def __init__(self, cloud: SimulatedCloud) -> None:
        self._cloud = cloud

    async def Enrol(self, request: fleet_pb2.EnrolRequest, context: Any) -> fleet_pb2.EnrolResponse:  # noqa: N802
        if request.code != CODE:
            raise IdentityError("this code is not valid", reason="wrong-code")
        cloud = self._cloud
        cloud.public_key = public_key_of(request.csr_pem)
        return fleet_pb2.EnrolResponse(
            device_id=DEVICE,
            certificate_chain_pem=IssuingCa.load(cloud.workspace / "cloud").sign(
                request.csr_pem, DEVICE, datetime.now(UTC)
            ),
            jwks_json=cloud.issuer.jwks,
            token_issuer=cloud.issuer.issuer,
            token_audience=cloud.issuer.audience,
        )

    async def IssueToken(self, request: fleet_pb2.IssueTokenRequest, context: Any) -> fleet_pb2.IssueTokenResponse:  # noqa: N802
        cloud = self._cloud
        assert read_assertion_subject(request.assertion) == DEVICE
        verify_assertion(request.assertion, cloud.public_key, cloud.issuer.audience, datetime.now(UTC))
        token, expires = cloud.issuer.mint(DEVICE, "device", ttl=cloud.token_ttl)
        cloud.tokens_issued += 1
        response = fleet_pb2.IssueTokenResponse(access_token=token)
        response.expires_at.FromDatetime(expires)
        return response

    async def Watch(self, request: fleet_pb2.WatchRequest, context: Any) -> AsyncIterator[fleet_pb2.WatchResponse]:  # noqa: N802
        assert list(request.models) == ["triage"]
        self._cloud.facts = request.facts
        while True:
            changed = self._cloud.released_changed
            if self._cloud.released:
                yield fleet_pb2.WatchResponse(model="triage", version=self._cloud.released, **self._cloud.order)
            await changed.wait()

    async def Report(self, request: fleet_pb2.ReportRequest, context: Any) -> fleet_pb2.ReportResponse:  # noqa: N802
        assert current_claims().subject == DEVICE
        if not self._cloud.takes_reports:
            self._cloud.refused_reports += 1
            raise UnavailableError("not now")
        self._cloud.reports.append(request)
        return fleet_pb2.ReportResponse()


class RegistryServer(registry_pb2_grpc.RegistryServiceServicer):
    def __init__(self, cloud: SimulatedCloud) -> None:
        self._cloud = cloud

    async def FetchMetadata(  # noqa: N802
        self, request: registry_pb2.FetchMetadataRequest, context: Any
    ) -> AsyncIterator[registry_pb2.FetchMetadataResponse]:
        yield registry_pb2.FetchMetadataResponse(data=self._cloud.repository.metadata(request.name))

    async def FetchBlob(  # noqa: N802
        self, request: registry_pb2.FetchBlobRequest, context: Any
    ) -> AsyncIterator[registry_pb2.FetchBlobResponse]:
        if request.sha256 not in self._cloud.blobs:
            raise NotFoundError("no such blob")
        data = self._cloud.blobs[request.sha256]
        for start in range(request.offset, len(data), CHUNK):
            yield registry_pb2.FetchBlobResponse(data=data[start : start + CHUNK])

    async def FetchDelta(  # noqa: N802
        self, request: registry_pb2.FetchDeltaRequest, context: Any
    ) -> AsyncIterator[registry_pb2.FetchDeltaResponse]:
        if not self._cloud.deltas:
            raise NotFoundError("no delta")
        folder = self._cloud.workspace
        (folder / "old").write_bytes(self._cloud.blobs[request.from_sha256])
        (folder / "new").write_bytes(self._cloud.blobs[request.to_sha256])
        make_delta(folder / "old", folder / "new", folder / "delta")
        data = (folder / "delta").read_bytes()
        if len(data) >= (folder / "new").stat().st_size:
            raise NotFoundError("not worth its bytes")
        yield registry_pb2.FetchDeltaResponse(data=data[request.offset :])


@asynccontextmanager
async def simulated_cloud(cloud: SimulatedCloud, *, port: int = 0) -> AsyncIterator[SimulatedCloud]:
    """Run it on a free port, or again on the port of before."""
    server = grpc.aio.server(interceptors=(StatusInterceptor(), AuthInterceptor(cloud.issuer.verifier())))
    fleet_pb2_grpc.add_FleetServiceServicer_to_server(Fleet(cloud), server)  # type: ignore[abstract]
    registry_pb2_grpc.add_RegistryServiceServicer_to_server(RegistryServer(cloud), server)  # type: ignore[abstract]
    infer: grpc.RpcMethodHandler[bytes, bytes] = grpc.unary_unary_rpc_method_handler(cloud.inference.infer)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, {"ModelInfer": infer}),))
    credentials = server_credentials(cloud.workspace / "cloud/server.key", cloud.workspace / "cloud/server.pem")
    bound = server.add_secure_port(f"127.0.0.1:{port}", credentials)
    cloud.address = f"localhost:{bound}"
    await server.start()
    try:
        yield cloud
    finally:
        await server.stop(None)
