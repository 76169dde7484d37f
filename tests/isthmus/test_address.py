"""Addresses are read before gRPC makes something else of them."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from isthmus.address import check_free, split_address
from isthmus.errors import ConfigError


@pytest.mark.parametrize(
    ("address", "parts"),
    [
        ("127.0.0.1:8001", ("127.0.0.1", 8001)),
        ("cloud.example.org:443", ("cloud.example.org", 443)),
        ("my_cloud:65535", ("my_cloud", 65535)),
        ("[::1]:0", ("::1", 0)),
        ("[fe80::1%eth0]:80", ("fe80::1%eth0", 80)),
    ],
)
def test_host_and_port(address: str, parts: tuple[str, int]) -> None:
    assert split_address(address, "--cloud") == parts


@pytest.mark.parametrize(
    "address",
    [
        "", "8001", "localhost", ":8001", "localhost:", "localhost:http", "localhost:99999", "localhost:-1",
        "https://localhost:8443", "localhost:8443/", "::1:80", "a b:80", "localhost:٣", "localhost:80\n", "-x:80",
    ],
)  # fmt: skip
def test_anything_else_is_refused_with_an_example(address: str) -> None:
    with pytest.raises(ConfigError, match=r"--cloud: expected HOST:PORT") as caught:
        split_address(address, "--cloud")
    assert "127.0.0.1:8443" in caught.value.hint


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "0.0.0.0"])
def test_port_of_another_listener_is_taken(host: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        with pytest.raises(ConfigError, match="another program does") as caught:
            check_free(f"{host}:{other.getsockname()[1]}", "listen")
        assert "another port" in caught.value.hint


def test_free_port_of_this_machine_can_be_had(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
    for host in ("127.0.0.1", "localhost"):
        check_free(f"{host}:{port}", "listen")
    check_free("127.0.0.1:0", "listen")
    check_free(f"unix:{tmp_path}/agent.sock", "listen")
    with pytest.raises(ConfigError, match="there is no folder"):
        check_free(f"unix:{tmp_path}/nothere/agent.sock", "listen")


def test_address_of_another_machine_is_refused() -> None:
    with pytest.raises(ConfigError, match="Cannot assign requested address") as caught:
        check_free("192.0.2.1:8001", "listen")  # RFC 5737: no machine has it
    assert "of this machine" in caught.value.hint


def test_host_that_does_not_exist_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"there is no host 'nothere\.invalid'"):
        check_free("nothere.invalid:8001", "listen")
