"""Tritons of their own, as an operator runs them beside a cloud."""

from __future__ import annotations

import shutil
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cloud.supervisor import TritonServer


def free_port() -> int:
    """Return a port of loopback that nobody had a moment ago."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@contextmanager
def external_triton(folder: Path, port: int) -> Iterator[None]:
    """Run a Triton of its own on loopback, which shares no folder with the cloud."""
    (folder / "repository").mkdir(parents=True)
    server = TritonServer(folder / "repository", log_file=folder / "log")
    command = [part for part in server._command()[5:] if not part.startswith(("--grpc-address", "--grpc-port"))]
    process = subprocess.Popen(
        [*command, "--grpc-address=127.0.0.1", f"--grpc-port={port}"],
        env=server._environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        yield
    finally:
        process.kill()
        process.wait(20)
        shutil.rmtree(server._run_folder)
