"""A real PostgreSQL server on a Unix socket, from the system's package, run by a user without rights."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any, Final

import pytest
from sqlalchemy import create_engine, text
from sqlalchemy.exc import OperationalError

_NOBODY: Final = 65534  # the server refuses to run as root
_START_S: Final = 60.0


@dataclass(slots=True)
class PostgreSql:
    """A running server."""

    socket: Path
    _numbers: Iterator[int] = field(default_factory=count)

    def new_database(self) -> str:
        """Make an empty database; return its address."""
        name = f"isthmus_{next(self._numbers)}"
        engine = create_engine(self._url("postgres"), isolation_level="AUTOCOMMIT")
        with engine.connect() as connection:
            connection.execute(text(f"CREATE DATABASE {name}"))
        engine.dispose()
        return self._url(name)

    def _url(self, name: str) -> str:
        return f"postgresql+psycopg://postgres@/{name}?host={self.socket}"


def find_postgresql() -> Path | None:
    """Return the folder with the newest server's programs, or None."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/postgres"))
    return found[-1].parent if found else None


@contextmanager
def postgresql_server(folder: Path) -> Iterator[PostgreSql]:
    """Run a server whose files lie in `folder`."""
    binaries = find_postgresql()
    if binaries is None:
        pytest.skip("no PostgreSQL server is installed (Debian: apt-get install postgresql)")
    data, user = folder / "data", _unprivileged()
    data.mkdir()
    if user:
        os.chown(data, _NOBODY, _NOBODY)
        os.chown(folder, _NOBODY, _NOBODY)
        for parent in folder.parents:  # pytest's folders are for their owner only
            if parent.stat().st_uid == os.getuid() and not parent.stat().st_mode & 0o001:
                parent.chmod(parent.stat().st_mode | 0o011)
    log = (folder / "log").open("wb")
    log_to: Any = {"stdout": log, "stderr": log}
    initdb = [binaries / "initdb", "-D", data, "-U", "postgres", "-A", "trust", "-E", "UTF8", "--locale=C"]
    subprocess.run([*map(str, initdb)], check=True, **log_to, **user)
    server = [binaries / "postgres", "-D", data, "-k", folder, "-c", "listen_addresses=", "-c", "max_connections=60"]
    process = subprocess.Popen([*map(str, server)], **log_to, **user)
    try:
        _wait(process, folder)
        yield PostgreSql(folder)
    finally:
        process.send_signal(signal.SIGINT)  # SIGTERM would wait for clients to leave
        process.wait(30)
        log.close()


def _unprivileged() -> dict[str, Any]:
    return {"user": _NOBODY, "group": _NOBODY, "extra_groups": []} if os.getuid() == 0 else {}


def _wait(process: subprocess.Popen[bytes], folder: Path) -> None:
    until = time.monotonic() + _START_S
    engine = create_engine(f"postgresql+psycopg://postgres@/postgres?host={folder}")
    while True:
        try:
            engine.connect().close()
        except OperationalError:
            if process.poll() is not None or time.monotonic() > until:
                raise
            time.sleep(0.02)
        else:
            engine.dispose()
            return
