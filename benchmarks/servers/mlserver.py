"""MLServer, in an environment of its own: `python -m benchmarks.servers.mlserver` installs it under build/peers.

It serves in its own process (`parallel_workers` 0), which is its fastest form for one model on one thread.
"""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import tritonclient.grpc as triton
from tritonclient.utils import InferenceServerException

from benchmarks.servers import ServedModel, ServerError, child
from examples.quickstart.programs import environment

ENVIRONMENT: Final = Path("build/peers/mlserver")
# A newer uvloop kills its workers at their start; the runtime is the one of our own environment.
_PACKAGES: Final = ("mlserver==1.7.1", "uvloop==0.21.0", "numpy<2")
_RUNTIME: Final = Path(__file__).with_name("mlserver_runtime.py")
_START_S: Final = 60.0


def install() -> None:
    """Make the environment."""
    import onnxruntime

    subprocess.run([sys.executable, "-m", "venv", str(ENVIRONMENT)], check=True)
    pip = [str(ENVIRONMENT / "bin" / "pip"), "install", "--quiet"]
    subprocess.run([*pip, *_PACKAGES, f"onnxruntime=={onnxruntime.__version__}"], check=True)


def is_installed() -> bool:
    """Return whether the environment is there."""
    return (ENVIRONMENT / "bin" / "mlserver").exists()


@contextmanager
def serving(models: Iterable[ServedModel], folder: Path) -> Iterator[str]:
    """Serve the models; yield where it listens."""
    shutil.copyfile(_RUNTIME, folder / _RUNTIME.name)
    ports = [_free_port() for _ in range(3)]
    settings = dict(zip(("http_port", "grpc_port", "metrics_port"), ports, strict=True))
    common = {"host": "127.0.0.1", "parallel_workers": 0, "debug": False, "metrics_endpoint": None}
    (folder / "settings.json").write_text(json.dumps(settings | common))
    for model in models:
        (folder / model.name).mkdir()
        told = {
            "name": model.name,
            "implementation": "mlserver_runtime.OnnxRuntime",
            "parameters": {"uri": str(model.onnx.absolute())},
        }
        (folder / model.name / "model-settings.json").write_text(json.dumps(told))
    programs = ENVIRONMENT.absolute() / "bin"
    variables = environment() | {"PYTHONPATH": str(folder.absolute())}
    arguments, python = (programs / "mlserver", "start", folder.absolute()), str(programs / "python")
    with child("mlserver", arguments, folder, python=python, variables=variables, quiet=True) as server:
        address = f"127.0.0.1:{settings['grpc_port']}"
        _wait_until_ready(server.process, address)
        yield address


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _wait_until_ready(process: subprocess.Popen[str], address: str) -> None:
    deadline = time.monotonic() + _START_S
    with triton.InferenceServerClient(address) as client:
        while process.poll() is None and time.monotonic() < deadline:
            try:
                if client.is_server_ready():
                    return
            except InferenceServerException:  # it does not listen yet
                pass
            time.sleep(0.1)
    raise ServerError("MLServer did not start; its log is mlserver.log")


if __name__ == "__main__":
    install()
