"""Handshakes with a real server: TLS 1.3 and nothing older, our authority and no other, rotation without a restart."""

import asyncio
import shutil
import socket
import ssl
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import grpc
import pytest
from cryptography import x509

from isthmus.errors import ConfigError
from security.authority import Authority, create_ca, issue_server_certificate
from security.tls import channel_credentials, server_credentials
from tests.security.echo import SERVICE, call, serving, with_server


def _openssl(port: int, ca: Path, version: str) -> subprocess.CompletedProcess[str]:
    command = ["openssl", "s_client", "-connect", f"127.0.0.1:{port}", "-alpn", "h2", version]
    command += ["-CAfile", str(ca), "-verify_return_error"]
    return subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", timeout=30
    )


def _served_serial(port: int, ca: Path) -> int:
    context = ssl.create_default_context(cafile=str(ca))
    context.set_alpn_protocols(["h2"])
    with (
        socket.create_connection(("127.0.0.1", port), timeout=10) as plain,
        context.wrap_socket(plain, server_hostname="localhost") as secure,
    ):
        der = secure.getpeercert(binary_form=True)
    assert der is not None
    return x509.load_der_x509_certificate(der).serial_number


def _serial_on_disk(path: Path) -> int:
    return x509.load_pem_x509_certificate(path.read_bytes()).serial_number


def test_tls_1_2_is_refused_and_1_3_accepted(workspace: Path) -> None:
    async def story(channel: grpc.aio.Channel, port: int) -> list[subprocess.CompletedProcess[str]]:
        ca = workspace / "trust" / "ca.pem"
        return [await asyncio.to_thread(_openssl, port, ca, version) for version in ("-tls1_2", "-tls1_3")]

    old, new = with_server(workspace, [], story)
    assert old.returncode != 0
    assert "Cipher is (NONE)" in old.stdout
    assert new.returncode == 0, new.stderr
    assert "TLSv1.3" in new.stdout
    assert "Verify return code: 0 (ok)" in new.stdout


def test_a_new_pair_of_files_is_served_without_a_restart(own_workspace: Path, tmp_path: Path) -> None:
    cloud, ca = own_workspace / "cloud", own_workspace / "trust" / "ca.pem"
    new = tmp_path / "new"
    new.mkdir()
    issue_server_certificate(Authority.load(own_workspace / "operator", "ca"), new, ["localhost"], datetime.now(UTC))

    async def story(channel: grpc.aio.Channel, port: int) -> list[int]:
        serials = [await asyncio.to_thread(_served_serial, port, ca)]
        shutil.copy(new / "server.key", cloud / "server.key")  # half replaced: the pair does not fit
        serials.append(await asyncio.to_thread(_served_serial, port, ca))
        shutil.copy(new / "server.pem", cloud / "server.pem")
        serials.append(await asyncio.to_thread(_served_serial, port, ca))
        return serials

    old_serial, new_serial = _serial_on_disk(cloud / "server.pem"), _serial_on_disk(new / "server.pem")
    assert old_serial != new_serial
    assert with_server(own_workspace, [], story) == [old_serial, old_serial, new_serial]


def test_a_connection_survives_the_rotation(own_workspace: Path, tmp_path: Path) -> None:
    new = tmp_path / "new"
    new.mkdir()
    issue_server_certificate(Authority.load(own_workspace / "operator", "ca"), new, ["127.0.0.1"], datetime.now(UTC))

    async def story(channel: grpc.aio.Channel, port: int) -> list[bytes]:
        before = await call(channel, "unary_unary", None, method="public")
        for name in ("server.key", "server.pem"):
            shutil.copy(new / name, own_workspace / "cloud" / name)
        return before + await call(channel, "unary_unary", None, method="public")

    assert with_server(own_workspace, [], story) == [b"hello", b"hello"]


def test_a_server_of_another_authority_is_not_trusted(workspace: Path, tmp_path: Path) -> None:
    create_ca(tmp_path, "eve", datetime.now(UTC))

    async def story() -> grpc.StatusCode:
        async with serving(workspace / "cloud", []) as port:
            credentials = channel_credentials(tmp_path / "ca.pem")
            async with grpc.aio.secure_channel(f"127.0.0.1:{port}", credentials) as channel:
                method: Any = channel.unary_unary(f"/{SERVICE}/public")
                code: grpc.StatusCode = await method(b"", timeout=10).code()
                return code

    assert asyncio.run(story()) is grpc.StatusCode.UNAVAILABLE


def test_a_key_without_its_certificate_is_refused_at_start(workspace: Path) -> None:
    cloud = workspace / "cloud"
    with pytest.raises(ConfigError, match="does not certify"):
        server_credentials(cloud / "server.key", cloud / "issuing-ca.pem")


@pytest.mark.parametrize("content", [None, b"", b"no certificate"])
def test_a_missing_or_broken_authority_file_is_refused(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "ca.pem"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError):
        channel_credentials(path)


def test_credentials_are_refused_where_tls_1_3_is_not_enforced(workspace: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from security import tls\n"
        "from isthmus.errors import ConfigError\n"
        "cloud = Path(sys.argv[1])\n"
        "for make in (lambda: tls.channel_credentials(cloud / 'server.pem'),\n"
        "             lambda: tls.server_credentials(cloud / 'server.key', cloud / 'server.pem')):\n"
        "    try: make()\n"
        "    except ConfigError as error: print(error.message)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(workspace / "cloud")],
        env={"PYTHONPATH": ".:proto", "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.stdout.count("TLS 1.3 is not enforced") == 2, done.stderr
