"""Where programs listen and call: HOST:PORT, [IPV6]:PORT, and unix:PATH on one machine.

gRPC takes almost anything for an address: "localhost" listens on port 443, port 99999 on 34463, and a URL is looked up
as a host's name. So what a person types is read here first.
"""

from __future__ import annotations

import errno
import ipaddress
import os
import re
import socket
from contextlib import closing
from pathlib import Path
from typing import Final

from isthmus.errors import ConfigError

UNIX: Final = "unix:"
_HOST: Final = re.compile(r"\[[0-9A-Fa-f:.]+(%[A-Za-z0-9]+)?\]|[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?\.?")
_LAST_PORT: Final = 65535


def split_address(address: str, what: str) -> tuple[str, int]:
    """Return host and port of HOST:PORT; an IPv6 host comes without its brackets.

    Args:
        address: What somebody typed.
        what: The option or setting that it was typed for.

    Raises:
        ConfigError: It is anything else.
    """
    host, _, port = address.rpartition(":")
    if not _HOST.fullmatch(host) or not port.isascii() or not port.isdecimal() or int(port) > _LAST_PORT:
        raise ConfigError(
            f"{what}: expected HOST:PORT with a port of at most {_LAST_PORT}, got {address[:120]!r}",
            hint="for example 127.0.0.1:8443, cloud.example.org:8443 or [::1]:8443",
        )
    return host.strip("[]"), int(port)


def is_local(address: str, what: str = "listen") -> bool:
    """Return whether only this machine can reach a listener at `address` (HOST:PORT or unix:PATH).

    Raises:
        ConfigError: It is no address; `what` names the option that it was given for.
    """
    if address.startswith(UNIX):
        return True
    host, _ = split_address(address, what)
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def check_free(address: str, what: str) -> None:
    """Check that a listener at HOST:PORT or unix:PATH can be had; port 0 always can.

    gRPC itself says only that it "failed to bind", and is content with one of a name's addresses: with another
    program's listener on the other one, callers would reach whichever they try first.

    Raises:
        ConfigError: The port is taken, HOST is not this machine, or PATH has no folder; the message says which.
    """
    if address.startswith(UNIX):
        folder = Path(address.removeprefix(UNIX)).parent
        if not folder.is_dir():
            raise ConfigError(f"{what}: cannot listen on {address}: there is no folder {folder}", hint="make it first")
        return
    host, port = split_address(address, what)
    if port == 0:
        return
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError as error:
        raise ConfigError(f"{what}: there is no host {host!r}", hint="127.0.0.1 is this machine only") from error
    errors = [_bind(family, sockaddr) for family, _, _, _, sockaddr in found]
    if errno.EADDRINUSE in errors:
        raise ConfigError(
            f"{what}: cannot listen on {address}: another program does",
            hint="stop it, or listen on another port; port 0 takes a free one",
        )
    if errors and all(errors):
        raise ConfigError(
            f"{what}: cannot listen on {address}: {os.strerror(errors[0])}",
            hint="expected an address of this machine; 127.0.0.1 always is",
        )


def _bind(family: int, sockaddr: tuple[object, ...]) -> int:
    try:
        with closing(socket.socket(family, socket.SOCK_STREAM)) as listener:
            listener.setsockopt(
                socket.SOL_SOCKET, socket.SO_REUSEADDR, 1
            )  # as gRPC does: past connections do not count
            if family == socket.AF_INET6:
                listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            listener.bind(sockaddr)
    except OSError as error:
        return error.errno or errno.EINVAL
    return 0
