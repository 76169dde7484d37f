"""The real Triton with its Python backend, on a TCP port as the other servers.

`python -m benchmarks.servers.triton REPOSITORY`. The cloud's own supervisor listens on a Unix
socket, which would be an advantage here; this starts the same program.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Final

import tritonclient.grpc as triton
from tritonclient.utils import InferenceServerException

from cloud.supervisor import Installation, find_installation

_START_S: Final = 30.0


def _backends(installation: Installation, folder: Path) -> Path:
    """Lay out a backend folder: the package ships the Python backend and the program that runs models apart."""
    backend = folder / "backends" / "python"
    backend.mkdir(parents=True)
    for part in (*installation.backend.iterdir(), installation.stub):
        if part.is_file():
            (backend / part.name).symlink_to(part)
    return backend.parent


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def start(repository: Path, folder: Path, options: tuple[str, ...] = ()) -> tuple[subprocess.Popen[bytes], str]:
    """Start Triton on all models of the repository; return the process and where it listens.

    Args:
        repository: Folder of model folders.
        folder: Gets what Triton needs beside them.
        options: Further arguments.
    """
    installation, port = find_installation(), _free_port()
    command = [
        str(installation.server),
        f"--model-repository={repository.absolute()}",
        f"--backend-directory={_backends(installation, folder)}",
        "--disable-auto-complete-config",
        "--allow-http=false",
        "--allow-metrics=false",
        "--grpc-address=127.0.0.1",
        f"--grpc-port={port}",
        f"--backend-config=python,shm-region-prefix-name=benchmark-{port}-",
        *options,
    ]
    environment = {
        "PATH": f"{installation.python}:/usr/local/bin:/usr/bin:/bin",
        "LD_LIBRARY_PATH": ":".join(str(library) for library in installation.libraries),
        "HOME": os.environ.get("HOME", "/"),
    }
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=sys.stderr, stderr=sys.stderr, env=environment)
    return process, f"127.0.0.1:{port}"


def wait_until_live(process: subprocess.Popen[bytes], address: str) -> None:
    """Wait until Triton has loaded what it starts with; end the program when it does not."""
    deadline = time.monotonic() + _START_S
    with triton.InferenceServerClient(address) as client:
        while process.poll() is None and time.monotonic() < deadline:
            try:
                if client.is_server_ready():
                    return
            except InferenceServerException:  # it does not listen yet
                pass
            time.sleep(0.05)
    process.kill()
    sys.exit("Triton did not start")


def main(repository: Path) -> int:
    """Serve until SIGTERM, which is passed on."""
    with tempfile.TemporaryDirectory() as folder:
        process, address = start(repository, Path(folder))
        signal.signal(signal.SIGTERM, lambda *_: process.terminate())
        wait_until_live(process, address)
        sys.stdout.write(json.dumps({"address": address}) + "\n")
        sys.stdout.flush()
        return process.wait()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
