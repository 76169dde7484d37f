"""The file by which scripts learn where the cloud listens."""

from __future__ import annotations

import json
import os
from pathlib import Path

from cloud.replicas import Replicas
from isthmus.errors import ConfigError


class ReadyFile:
    """Tells scripts where the cloud listens; exists while it serves."""

    def __init__(self, path: Path | None, address: str, device_address: str, replicas: Replicas) -> None:
        self._path, self._address, self._device_address, self._replicas = path, address, device_address, replicas
        self._written = False
        self.metrics: str | None = None

    def check(self) -> None:
        """Check that the file can be written, before anything is started.

        Raises:
            ConfigError: It cannot.
        """
        if self._path is not None and (self._path.is_dir() or not os.access(self._path.parent, os.W_OK | os.X_OK)):
            raise ConfigError(
                f"cannot write the ready file {self._path}", hint="--ready-file needs a file in a folder that exists"
            )

    def write(self) -> None:
        """Write the file, whole or not at all."""
        if self._path is None:
            return
        pids = [replica.server.pid for replica in self._replicas if replica.server is not None]
        record = {
            "address": self._address,
            "device_address": self._device_address,
            "pid": os.getpid(),
            "triton_pid": pids[0] if pids else 0,
            "triton_pids": pids,
        }
        record |= {} if self.metrics is None else {"metrics": self.metrics}
        temporary = self._path.with_name(f".{self._path.name}.{os.getpid()}")
        temporary.write_text(json.dumps(record) + "\n")
        temporary.replace(self._path)
        self._written = True

    def rewrite(self) -> None:
        """Write the file again when it was written: Triton has another process id."""
        if self._written:
            self.write()

    def remove(self) -> None:
        """Remove the file."""
        if self._written and self._path is not None:
            self._path.unlink(missing_ok=True)
