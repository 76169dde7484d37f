"""Every TCP port that the running programs listen on, found in the kernel's tables, and old TLS on each of them."""

from __future__ import annotations

import socket
import ssl
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

import pytest

from tests.attacks.stage import Stage

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

Refusals = dict[tuple[int, tuple[str, ...]], subprocess.CompletedProcess[str]]  # by port and flags

_LISTENS: Final = "0A"
_WEAK: Final = "aNULL:eNULL:EXPORT:LOW:DES:RC4:MD5:@SECLEVEL=0"
OLD: Final = (
    ("-tls1", "-cipher", "ALL:@SECLEVEL=0"),
    ("-tls1_1", "-cipher", "ALL:@SECLEVEL=0"),
    ("-tls1_2",),
    ("-tls1_2", "-cipher", "ALL:eNULL:@SECLEVEL=0"),
    ("-tls1_2", "-cipher", _WEAK),
    ("-no_tls1_3", "-cipher", "PSK:@SECLEVEL=0", "-psk", "00" * 32),
    ("-no_tls1_3", "-cipher", "ECDHE-PSK-CHACHA20-POLY1305:@SECLEVEL=0", "-psk", "00" * 32),
)


def family(pid: int) -> list[int]:
    """Return a process and all that it started."""
    children = [int(p) for task in Path(f"/proc/{pid}/task").iterdir() for p in (task / "children").read_text().split()]
    return [pid, *(member for child in children for member in family(child))]


def listening(pid: int) -> set[tuple[str, int]]:
    """Return the addresses, as the kernel writes them, and ports that a process and its children listen on."""
    inodes = set[str]()
    for member in family(pid):
        for file in Path(f"/proc/{member}/fd").iterdir():
            try:
                inodes.add(str(file.readlink()))
            except OSError:
                continue
    found = set[tuple[str, int]]()
    for table in ("tcp", "tcp6"):
        for row in map(str.split, Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]):
            if row[3] == _LISTENS and f"socket:[{row[9]}]" in inodes:
                host, port = row[1].split(":")
                found.add((host, int(port, 16)))
    return found


def port_of(address: str) -> int:
    return int(address.rpartition(":")[2])


def handshake(port: int, *flags: str) -> subprocess.CompletedProcess[str]:
    command = ["openssl", "s_client", "-connect", f"127.0.0.1:{port}", "-alpn", "h2", *flags]
    return subprocess.run(
        command, input="", capture_output=True, encoding="utf-8", errors="replace", check=False, timeout=60
    )


@pytest.fixture(scope="module")
def refusals(stage: Stage) -> Refusals:
    """What each port answers to each old handshake; at the same time, for the port that speaks no TLS is slow to."""
    ports = [port for target in (stage.cloud, stage.agent) for _, port in listening(target.pid)]
    assert len(ports) == 4
    asked = [(port, flags) for port in ports for flags in OLD]
    with ThreadPoolExecutor(len(asked)) as pool:
        return dict(zip(asked, pool.map(lambda one: handshake(one[0], *one[1]), asked), strict=True))


def test_the_programs_listen_where_they_say_and_nowhere_else(stage: Stage) -> None:
    cloud = {port_of(stage.cloud.address), port_of(stage.devices)}
    assert {port for _, port in listening(stage.cloud.pid)} == cloud
    agent = {port_of(stage.agent.address), port_of(stage.agent.metrics)}
    assert {port for _, port in listening(stage.agent.pid)} == agent


def test_what_speaks_plain_text_is_on_loopback_only(stage: Stage) -> None:
    hosts = {host for host, port in listening(stage.agent.pid) if port == port_of(stage.agent.metrics)}
    assert hosts == {"0100007F"}  # 127.0.0.1


@pytest.mark.parametrize("flags", OLD, ids=" ".join)
def test_old_tls_and_weak_ciphers_are_refused_on_every_port(refusals: Refusals, flags: tuple[str, ...]) -> None:
    answers = {port: done for (port, offered), done in refusals.items() if offered == flags}
    assert len(answers) == 4
    for port, done in answers.items():
        assert done.returncode != 0, f"port {port} {flags}: {done.stdout}"
        assert "Cipher is (NONE)" in done.stdout, f"port {port} {flags}"  # openssl tried, and got nowhere


def test_tls_1_3_is_spoken_where_there_is_tls(stage: Stage) -> None:
    for target in (stage.cloud, stage.agent):
        done = handshake(port_of(target.address), "-tls1_3", "-CAfile", str(target.ca), "-verify_return_error")
        assert done.returncode == 0, done.stderr
        assert "TLSv1.3" in done.stdout
        assert "Verify return code: 0 (ok)" in done.stdout
    assert handshake(port_of(stage.agent.metrics), "-tls1_3").returncode != 0


def test_renegotiation_and_early_data_are_not_offered(stage: Stage) -> None:
    """Early data could be replayed; a session of an earlier connection must not carry any."""
    for target in (stage.cloud, stage.agent):
        done = handshake(port_of(target.address), "-tls1_3")
        assert "Max Early Data: 0" in done.stdout or "Early data was not sent" in done.stdout


@pytest.mark.parametrize("offered", [None, ["http/1.1"], ["h3"]])
def test_only_http2_is_spoken_over_tls(stage: Stage, offered: list[str] | None) -> None:
    for target in (stage.cloud, stage.agent):
        context = ssl.create_default_context(cafile=str(target.ca))
        if offered:
            context.set_alpn_protocols(offered)
        plain = socket.create_connection(("127.0.0.1", port_of(target.address)), timeout=30)
        try:
            with context.wrap_socket(plain, server_hostname="localhost") as secure:
                secure.sendall(b"GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n")
                assert b"HTTP/1.1 200" not in secure.recv(100)
        except (ssl.SSLError, ConnectionError):
            plain.close()  # refused: there is no protocol in common
