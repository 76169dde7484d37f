"""Servers that pose as the cloud, and clients that pose as a device, by certificates that do not hold."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from cloud import database as db
from edge.identity import DeviceHome, enrol
from isthmus.errors import UnavailableError
from isthmus.v1 import fleet_pb2, fleet_pb2_grpc
from security.authority import SERVER, Authority, chain_pem, create_ca, create_issuing_ca, host_names, sign_leaf
from security.enrolment import IssuingCa, make_csr, new_device_key
from security.keyfiles import save_private_key
from security.tls import server_credentials
from tests.attacks.doors import ask, open_door

NOW = datetime.now(UTC)
DAY = timedelta(days=1)
LOCAL = ("localhost", "127.0.0.1")


# -- servers that pose as the cloud ---------------------------------------------------------------------------------


class _Trap(fleet_pb2_grpc.FleetServiceServicer):
    """A fleet service of somebody else, who would like to have a code."""

    def __init__(self) -> None:
        self.codes: list[str] = []

    async def Enrol(self, request: Any, context: Any) -> Any:  # noqa: N802
        self.codes.append(request.code)
        return fleet_pb2.EnrolResponse(device_id="camera-1", certificate_chain_pem=b"x", jwks_json=b"x")


@asynccontextmanager
async def _trap(key: Path, chain: Path) -> AsyncIterator[tuple[str, _Trap]]:
    trap = _Trap()  # type: ignore[abstract]
    server = grpc.aio.server()
    fleet_pb2_grpc.add_FleetServiceServicer_to_server(trap, server)
    port = server.add_secure_port("127.0.0.1:0", server_credentials(key, chain))
    await server.start()
    try:
        yield f"localhost:{port}", trap
    finally:
        await server.stop(None)


def _leaf(folder: Path, authority: Authority, hosts: tuple[str, ...], begin: datetime, lifetime: timedelta) -> Path:
    """Write server.key and server.pem, whatever they are worth."""
    folder.mkdir()
    key = ec.generate_private_key(ec.SECP256R1())
    certificate = sign_leaf(authority, key.public_key(), hosts[0], host_names(hosts), SERVER, begin, lifetime)
    save_private_key(folder / "server.key", key)
    (folder / "server.pem").write_bytes(chain_pem([certificate]))
    return folder


def _genuine(workspace: Path, folder: Path) -> Path:
    return _leaf(folder, Authority.load(workspace / "operator", "ca"), LOCAL, NOW, DAY)


def _another_authority(workspace: Path, folder: Path) -> Path:
    (folder.parent / "eve").mkdir()
    # Of the same name: what counts is the key.
    return _leaf(folder, create_ca(folder.parent / "eve", "acme", NOW), LOCAL, NOW, DAY)


def _expired(workspace: Path, folder: Path) -> Path:
    return _leaf(folder, Authority.load(workspace / "operator", "ca"), LOCAL, NOW - 3 * DAY, DAY)


def _not_yet_valid(workspace: Path, folder: Path) -> Path:
    return _leaf(folder, Authority.load(workspace / "operator", "ca"), LOCAL, NOW + DAY, DAY)


def _another_host(workspace: Path, folder: Path) -> Path:
    return _leaf(folder, Authority.load(workspace / "operator", "ca"), ("cloud.example.org", "192.0.2.1"), NOW, DAY)


def _self_signed(workspace: Path, folder: Path) -> Path:
    folder.mkdir()
    key, chain = _self_signed_pair(folder, "localhost", [x509.DNSName("localhost")])
    shutil.move(key, folder / "server.key")
    shutil.move(chain, folder / "server.pem")
    return folder


def _a_device(workspace: Path, folder: Path) -> Path:
    """A device's own certificate, which is good for serving, under the name that the device has."""
    folder.mkdir()
    key = new_device_key(folder / "server.key")
    csr = make_csr(key, "camera-9", ["camera-9.example.org"])
    (folder / "server.pem").write_bytes(IssuingCa.load(workspace / "cloud").sign(csr, "camera-9", NOW))
    return folder


def _try_to_enrol(workspace: Path, identity: Path, home: Path) -> list[str]:
    """Let a device enrol at a server with this identity; return the codes that the server has seen."""

    async def run() -> list[str]:
        async with _trap(identity / "server.key", identity / "server.pem") as (address, trap):
            try:
                await enrol(DeviceHome(home), cloud=address, code="a code", trust=workspace / "trust")
            except UnavailableError:
                assert not trap.codes
            return trap.codes

    return asyncio.run(run())


def test_a_device_hands_its_code_to_the_genuine_cloud(workspace: Path, tmp_path: Path) -> None:
    """Without this, every refusal below could be for the wrong reason."""
    assert _try_to_enrol(workspace, _genuine(workspace, tmp_path / "server"), tmp_path / "home") == ["a code"]


@pytest.mark.parametrize("make", [_another_authority, _expired, _not_yet_valid, _another_host, _self_signed, _a_device])
def test_a_device_hands_its_code_to_nobody_else(
    workspace: Path, tmp_path: Path, make: Callable[[Path, Path], Path]
) -> None:
    assert _try_to_enrol(workspace, make(workspace, tmp_path / "server"), tmp_path / "home") == []


# -- clients that pose as a device ----------------------------------------------------------------------------------


def _self_signed_pair(folder: Path, name: str, names: list[x509.GeneralName]) -> tuple[Path, Path]:
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    usages = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
    certificate = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(NOW - DAY)
        .not_valid_after(NOW + DAY)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.ExtendedKeyUsage(usages), critical=False)
        .sign(key, hashes.SHA256())
    )
    save_private_key(folder / "own.key", key)
    (folder / "own.pem").write_bytes(chain_pem([certificate]))
    return folder / "own.key", folder / "own.pem"


def _device_of(cloud: Path, folder: Path, now: datetime) -> tuple[Path, Path]:
    key = new_device_key(folder / "device.key")
    (folder / "device.pem").write_bytes(IssuingCa.load(cloud).sign(make_csr(key, "", []), "camera-1", now))
    return folder / "device.key", folder / "device.pem"


def _genuine_device(workspace: Path, folder: Path) -> tuple[Path, Path]:
    return _device_of(workspace / "cloud", folder, NOW)


def _no_certificate(workspace: Path, folder: Path) -> None:
    return None


def _self_signed_device(workspace: Path, folder: Path) -> tuple[Path, Path]:
    return _self_signed_pair(folder, "camera-1", [x509.UniformResourceIdentifier("isthmus://device/camera-1")])


def _device_of_another_authority(workspace: Path, folder: Path) -> tuple[Path, Path]:
    eve = folder / "eve"
    eve.mkdir()
    shutil.copy(workspace / "cloud" / "server.pem", eve)
    create_issuing_ca(create_ca(eve, "acme", NOW), eve, "acme", NOW)
    return _device_of(eve, folder, NOW)


def _expired_device(workspace: Path, folder: Path) -> tuple[Path, Path]:
    return _device_of(workspace / "cloud", folder, NOW - 100 * DAY)


def _device_of_the_future(workspace: Path, folder: Path) -> tuple[Path, Path]:
    return _device_of(workspace / "cloud", folder, NOW + DAY)


def _the_clouds_own(workspace: Path, folder: Path) -> tuple[Path, Path]:
    return workspace / "cloud" / "server.key", workspace / "cloud" / "server.pem"


def _somebody_elses(workspace: Path, folder: Path) -> tuple[Path, Path]:
    """A genuine certificate, and another key than it is for."""
    key, _ = _self_signed_pair(folder, "x", [x509.DNSName("x")])
    return key, _genuine_device(workspace, folder)[1]


def _connect(workspace: Path, tmp_path: Path, identity: tuple[Path, Path] | None) -> grpc.StatusCode:
    """Return what a public method answers at the listener for devices."""

    async def run() -> grpc.StatusCode:
        database = db.Database(f"sqlite:///{tmp_path / 'isthmus.db'}")
        async with open_door(workspace, database) as door:
            shown = () if identity is None else (path.read_bytes() for path in identity)
            # Not our own credentials, which would refuse a pair that does not fit.
            credentials = grpc.ssl_channel_credentials(door.ca.read_bytes(), *shown)
            async with grpc.aio.secure_channel(door.device_address, credentials) as channel:
                try:
                    await ask(channel, "IssueToken", fleet_pb2.IssueTokenRequest(assertion="x"))
                except grpc.aio.AioRpcError as error:
                    return error.code()
        raise AssertionError("a token for nothing")

    return asyncio.run(run())


def test_a_genuine_device_reaches_the_door(workspace: Path, tmp_path: Path) -> None:
    """It is told that its assertion is none: without this, every refusal below could be for the wrong reason."""
    identity = _genuine_device(workspace, tmp_path)
    assert _connect(workspace, tmp_path, identity) is grpc.StatusCode.UNAUTHENTICATED


@pytest.mark.parametrize(
    "make",
    [
        _no_certificate,
        _self_signed_device,
        _device_of_another_authority,
        _expired_device,
        _device_of_the_future,
        _the_clouds_own,
        _somebody_elses,
    ],
)
def test_nobody_else_gets_past_the_handshake(
    workspace: Path, tmp_path: Path, make: Callable[[Path, Path], tuple[Path, Path] | None]
) -> None:
    assert _connect(workspace, tmp_path, make(workspace, tmp_path)) is grpc.StatusCode.UNAVAILABLE
