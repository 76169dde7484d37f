"""One flat folder on the disk, and the few operations that the store of deferred requests is made of.

Everything that the store does to the disk goes through here, so a test can put a disk in its place that loses power.
What an operation promises, it promises once it has returned: `write` and `append` that the bytes are on the disk,
`sync` that every rename and removal before it is. Nothing is promised of what a failed one left.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Final

import structlog

_ASIDE: Final = "aside"
_MOST_ASIDE: Final = 64  # files; the oldest names go first

log = structlog.get_logger(__name__)


class Disk:
    """A folder for the owner's eyes only.

    Args:
        folder: Made when it is missing.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._aside = folder / _ASIDE
        self._aside.mkdir(parents=True, exist_ok=True, mode=0o700)
        folder.chmod(0o700)

    def names(self) -> list[str]:
        """Return the names of all files and folders but the one for what was set aside."""
        return sorted(path.name for path in self._folder.iterdir() if path.name != _ASIDE)

    def size(self, name: str) -> int:
        """Return a file's length in bytes."""
        return (self._folder / name).stat().st_size

    def read(self, name: str, limit: int = -1) -> bytes:
        """Return a file's bytes, at most `limit` of them."""
        with (self._folder / name).open("rb") as file:
            return file.read(limit)

    def write(self, name: str, data: bytes) -> None:
        """Write a file that is not there yet."""
        self._store(name, data, os.O_CREAT | os.O_EXCL)

    def append(self, name: str, data: bytes) -> None:
        """Add to a file's end; make it when it is missing."""
        self._store(name, data, os.O_CREAT | os.O_APPEND)

    def rename(self, name: str, new_name: str) -> None:
        """Give a file another name, in place of a file that has it."""
        (self._folder / name).replace(self._folder / new_name)

    def remove(self, names: Iterable[str]) -> None:
        """Remove those files that are there."""
        for name in names:
            (self._folder / name).unlink(missing_ok=True)

    def sync(self) -> None:
        """Make what was renamed and removed so far survive a power cut."""
        descriptor = os.open(self._folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def set_aside(self, name: str) -> None:
        """Move a file out of the way, for a person to look at; leave it where it is when the disk refuses."""
        try:
            (self._folder / name).replace(self._aside / name)
            for path in sorted(path for path in self._aside.iterdir() if path.is_file())[:-_MOST_ASIDE]:
                path.unlink()
        except OSError as error:
            log.warning("cannot set a file aside", file=name, error=str(error))

    def _store(self, name: str, data: bytes, flags: int) -> None:
        descriptor = os.open(self._folder / name, os.O_WRONLY | os.O_NOFOLLOW | flags, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
