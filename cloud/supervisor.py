"""Triton as a child process: started, checked, watched, started again when it dies, and stopped for certain.

The server comes from the package nvidia-pytriton, which holds the real tritonserver with the Python backend. Rules:
1. It listens on a Unix socket in a private folder only; the gateway is the only way in.
2. It gets an environment of its own: nothing of ours leaks into the models' processes but paths and devices.
3. It dies with us (cloud.child), and its shared memory carries a prefix of its own, which is purged around every run.
4. What cannot work is found before the start and said clearly: numpy 2 (corrupts tensors silently in this backend),
   a Python without a shared library, no `python3` beside this interpreter.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes.util
import importlib.util
import os
import platform
import shutil
import signal
import sys
import sysconfig
import tempfile
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import structlog

from cloud.triton import TritonClient
from isthmus.digests import sha256_bytes
from isthmus.errors import ConfigError, MissingExtraError, UnavailableError

_PORT: Final = 8001  # Triton appends its port's number to the path of a Unix socket
_POLL_S: Final = 0.05
_SHARED_MEMORY: Final = Path("/dev/shm")  # noqa: S108 - where POSIX shared memory lives on Linux
_RUN_PREFIX: Final = "isthmus-"
_MAX_LOG_BYTES: Final = 4 << 20
_PASSED_ON: Final = (
    "HOME",
    "LANG",
    "LC_ALL",
    "TZ",
    "CUDA_VISIBLE_DEVICES",
    "NVIDIA_VISIBLE_DEVICES",
    "OMP_NUM_THREADS",
)

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Installation:
    """Where the parts of an installed Triton are."""

    server: Path
    backend: Path  # folder of the Python backend
    stub: Path  # the program that runs one Python model
    libraries: tuple[Path, ...]  # for LD_LIBRARY_PATH
    python: Path  # folder whose python3 the stub takes its packages from


def find_installation(*, numpy_version: str = np.__version__) -> Installation:
    """Return where Triton is installed, after checking that it can work here.

    Raises:
        MissingExtraError: nvidia-pytriton is not installed.
        ConfigError: The machine, Python or numpy cannot host models.
    """
    spec = importlib.util.find_spec("pytriton")
    if spec is None or spec.origin is None:
        raise MissingExtraError("Triton (nvidia-pytriton)", "cloud")
    package = Path(spec.origin).parent
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    stub = package / "tritonserver" / "python_backend_stubs" / version / "triton_python_backend_stub"
    if not stub.is_file():
        raise ConfigError(f"Triton has no Python backend for Python {version} on {platform.machine()}")
    if int(numpy_version.partition(".")[0]) >= 2:
        raise ConfigError(
            f"numpy {numpy_version} corrupts tensors silently in Triton's Python backend",
            hint="pip install 'numpy<2' in the cloud's environment",
        )
    python = Path(sys.executable).parent
    if not (python / "python3").exists():
        raise ConfigError(
            f"there is no python3 in {python}", hint="Triton's models run with the python3 beside this Python"
        )
    libraries = (package.parent / "nvidia_pytriton.libs", *_libpython())
    return Installation(
        package / "tritonserver" / "bin" / "tritonserver",
        package / "tritonserver" / "backends" / "python",
        stub,
        libraries,
        python,
    )


def _libpython() -> tuple[Path, ...]:
    """Return the folder of this Python's shared library, or nothing when the system's loader finds it."""
    name = str(sysconfig.get_config_var("INSTSONAME"))
    folder = Path(str(sysconfig.get_config_var("LIBDIR")))
    if ".so" in name and (folder / name).is_file():
        return (folder,)
    if ctypes.util.find_library(f"python{sys.version_info.major}.{sys.version_info.minor}"):
        return ()
    raise ConfigError(
        "this Python was built without a shared library (libpython), which Triton's models need",
        hint="use a Python built with --enable-shared, such as the system's or the one of the python container images",
    )


class TritonServer:
    """One supervised Triton child that serves the models below `repository`.

    Args:
        repository: Folder of model folders; models are loaded by name through the client.
        log_file: Gets Triton's own output.
        start_s: How long a start may take.
        stop_s: How long Triton may take to stop before it is killed.
    """

    def __init__(self, repository: Path, *, log_file: Path, start_s: float = 30.0, stop_s: float = 5.0) -> None:
        self._repository = repository
        self._log_file = log_file
        self._start_s, self._stop_s = start_s, stop_s
        self._installation = find_installation()
        self._run_folder = _new_run_folder(log_file.with_suffix(".run"))
        self._prefix = f"isthmus-{sha256_bytes(str(log_file.resolve()).encode())[:12]}-"
        self._process: asyncio.subprocess.Process | None = None
        self._supervision: asyncio.Task[None] | None = None
        self.address = f"unix:{self._run_folder / 's'}:{_PORT}"
        self.restarts = 0
        _link_backend(self._installation, self._run_folder)

    @property
    def pid(self) -> int:
        """Return Triton's process id; 0 when it does not run."""
        return self._process.pid if self._process is not None and self._process.returncode is None else 0

    async def start(self, on_started: Callable[[], Awaitable[None]]) -> None:
        """Start Triton, call `on_started` when it is live, and keep doing both whenever it dies.

        Raises:
            ConfigError: Triton cannot start; the message holds the end of its log.
            IsthmusError: Whatever `on_started` raises the first time.
        """
        try:
            await self._launch()
            await on_started()
        except BaseException:
            await self.stop()
            raise
        self._supervision = asyncio.create_task(self._supervise(on_started), name="triton-supervision")

    async def stop(self) -> None:
        """Stop Triton: ask, wait, kill; then remove what it left behind."""
        if self._supervision is not None:
            self._supervision.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._supervision
            self._supervision = None
        process = self._process
        if process is not None and process.returncode is None:
            process.terminate()
            try:
                await asyncio.wait_for(process.wait(), self._stop_s)
            except TimeoutError:
                log.warning("Triton did not stop in time and is killed", stop_s=self._stop_s)
                process.kill()
                await process.wait()
        self._clean()
        shutil.rmtree(self._run_folder, ignore_errors=True)
        self._log_file.with_suffix(".run").unlink(missing_ok=True)

    def count_stubs(self) -> Mapping[str, int] | None:
        """Return how many processes run each model, by Triton's name of it; None while Triton does not run."""
        if not self.pid:
            return None
        counts: Counter[str] = Counter()
        for children in Path(f"/proc/{self.pid}/task").glob("*/children"):
            with contextlib.suppress(OSError):  # a thread or child may end while we look
                for child in children.read_text().split():
                    counts.update(_model_of_stub(int(child)))
        return counts

    async def _supervise(self, on_started: Callable[[], Awaitable[None]]) -> None:
        delay_s = 0.0
        while True:
            assert self._process is not None  # noqa: S101 - _launch has set it
            code = await self._process.wait()
            log.error("Triton died and is started again", exit_code=code, restarts=self.restarts)
            self.restarts += 1
            await asyncio.sleep(delay_s)
            started = asyncio.get_running_loop().time()
            try:
                await self._launch()
                await on_started()
            except Exception:  # whatever it was: giving up would leave the cloud without Triton for good
                log.exception("Triton did not start again")
                self._kill()
            # A server that lives for a while starts again at once; one that keeps dying, ever more slowly.
            lived_s = asyncio.get_running_loop().time() - started
            delay_s = 0.0 if lived_s > 60 else min(max(2 * delay_s, 0.25), 10.0)

    async def _launch(self) -> None:
        self._clean()
        self._rotate_log()
        with self._log_file.open("ab") as output:
            self._process = await asyncio.create_subprocess_exec(
                *self._command(), stdin=asyncio.subprocess.DEVNULL, stdout=output, stderr=output,
                env=self._environment(), start_new_session=True,
            )  # fmt: skip
        client = TritonClient(self.address)
        try:
            async with asyncio.timeout(self._start_s):
                while not await client.is_live():
                    if self._process.returncode is not None:
                        raise ConfigError(f"Triton ended with code {self._process.returncode}", hint=self._log_tail())
                    await asyncio.sleep(_POLL_S)
        except TimeoutError as error:
            raise UnavailableError(
                f"Triton did not start within {self._start_s:g} s", hint=self._log_tail(), reason="triton-unavailable"
            ) from error
        finally:
            await client.close()
        log.info("Triton runs", pid=self._process.pid)

    def _command(self) -> list[str]:
        return [
            sys.executable, "-I", "-S", str(Path(__file__).with_name("child.py")), str(os.getpid()),
            str(self._installation.server),
            f"--model-repository={self._repository}",
            f"--backend-directory={self._run_folder / 'backends'}",
            "--model-control-mode=explicit",
            "--disable-auto-complete-config",
            "--strict-readiness=false",  # or one failed load would make it "not ready" for good
            "--exit-on-error=false",
            "--allow-http=false",
            "--allow-metrics=false",
            f"--grpc-address=unix:{self._run_folder / 's'}",
            f"--grpc-port={_PORT}",
            f"--backend-config=python,shm-region-prefix-name={self._prefix}",
            f"--exit-timeout-secs={max(1, round(self._stop_s))}",
        ]  # fmt: skip

    def _environment(self) -> dict[str, str]:
        passed = {name: value for name, value in os.environ.items() if name in _PASSED_ON}
        libraries = ":".join(str(folder) for folder in self._installation.libraries)
        path = f"{self._installation.python}:/usr/local/bin:/usr/bin:/bin"
        return passed | {"PATH": path, "LD_LIBRARY_PATH": libraries, "PYTHONDONTWRITEBYTECODE": "1"}

    def _clean(self) -> None:
        """Remove what a killed Triton leaves: model processes, the socket and shared memory."""
        self._kill()
        (self._run_folder / f"s:{_PORT}").unlink(missing_ok=True)
        for segment in _SHARED_MEMORY.glob(f"{self._prefix}*"):
            segment.unlink(missing_ok=True)

    def _kill(self) -> None:
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)

    def _rotate_log(self) -> None:
        if self._log_file.exists() and self._log_file.stat().st_size > _MAX_LOG_BYTES:
            self._log_file.replace(self._log_file.with_suffix(".old.log"))

    def _log_tail(self) -> str:
        lines = self._log_file.read_text(errors="replace").splitlines()
        return "the end of its log: " + " / ".join(line.strip() for line in lines[-5:])


def _new_run_folder(record: Path) -> Path:
    """Return a new private folder, and remove the one that a killed cloud has left; `record` remembers it.

    It lies in the system's folder for temporary files because the path of a socket may have 107 bytes only.
    """
    if record.is_file():
        previous = Path(record.read_text().strip())
        if previous.name.startswith(_RUN_PREFIX) and previous.parent == Path(tempfile.gettempdir()):
            shutil.rmtree(previous, ignore_errors=True)
    folder = Path(tempfile.mkdtemp(prefix=_RUN_PREFIX))  # mode 0700
    record.write_text(str(folder))
    return folder


def _link_backend(installation: Installation, folder: Path) -> None:
    """Lay out a backend folder: the package ships the Python backend and the stubs apart from each other."""
    backend = folder / "backends" / "python"
    backend.mkdir(parents=True)
    for part in (*installation.backend.iterdir(), installation.stub):
        if part.is_file():
            (backend / part.name).symlink_to(part)


def _model_of_stub(pid: int) -> list[str]:
    """Return the model that a child of Triton runs: the stub's last argument but one is MODEL_GROUP_INSTANCE."""
    arguments = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")[:-1]
    if len(arguments) < 3 or not arguments[0].endswith("triton_python_backend_stub"):
        return []
    return [arguments[-2].rsplit("_", 2)[0]]
