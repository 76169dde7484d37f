"""A real Redis server on a Unix socket, from the system's package."""

from __future__ import annotations

import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import pytest
import redis

_START_S: Final = 60.0


@contextmanager
def redis_server(folder: Path) -> Iterator[str]:
    """Run a server that keeps nothing on the disk; yield its address."""
    with redis_process(folder) as (address, _):
        yield address


@contextmanager
def redis_process(folder: Path) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """Run a server; yield its address and process."""
    program = shutil.which("redis-server")
    if program is None:
        pytest.skip("no Redis server is installed (Debian: apt-get install redis-server)")
    socket = folder / "redis.sock"
    socket.unlink(missing_ok=True)
    command = [program, "--port", "0", "--unixsocket", str(socket), "--save", "", "--dir", str(folder)]
    log = (folder / "redis.log").open("ab")
    process = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        _wait(process, socket)
        yield f"unix://{socket}", process
    finally:
        process.kill()
        process.wait(30)
        log.close()


def _wait(process: subprocess.Popen[bytes], socket: Path) -> None:
    until = time.monotonic() + _START_S
    with redis.Redis(unix_socket_path=str(socket)) as client:
        while True:
            try:
                client.ping()
            except redis.exceptions.ConnectionError:
                if process.poll() is not None or time.monotonic() > until:
                    raise
                time.sleep(0.02)
            else:
                return
