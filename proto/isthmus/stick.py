"""Updates that travel without a network: what `isthmus model export` writes and `isthmus edge import` reads.

A folder, or a tar file of one, for example on a USB stick:

    stick.json             {"format": 1, "model": "triage", "version": 3, "bases": [2]}
    metadata/<name>        signed metadata: timestamp.json, 4.snapshot.json, 2.root.json and so on
    blobs/<sha256>         the manifest and the files that devices need
    deltas/<old>-<new>     what turns one blob into another

Nothing of it is trusted: `stick.json` says what to ask for, and everything else is verified by whoever installs it, as
if it came from the network. Names are checked here, so nothing outside the folder is read or written.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import tarfile
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any, Final, Self

from isthmus.digests import check_sha256
from isthmus.errors import BundleError, ConfigError, ConflictError, NotFoundError

INDEX: Final = "stick.json"
FORMAT: Final = 1
MAX_INDEX_BYTES: Final = 64 << 10
_METADATA: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,100}\.json")
_CHUNK: Final = 1 << 20


@dataclass(frozen=True, slots=True)
class Index:
    """What a stick is for."""

    model: str
    version: int
    bases: tuple[int, ...]


def metadata_name(name: str) -> str:
    """Return where a metadata file is.

    Raises:
        NotFoundError: It cannot be one's name.
    """
    if not _METADATA.fullmatch(name):
        raise NotFoundError(f"there is no metadata file {name[:80]!r}")
    return f"metadata/{name}"


def blob_name(sha256: str) -> str:
    """Return where a blob is.

    Raises:
        InputError: `sha256` is no digest.
    """
    return f"blobs/{check_sha256(sha256)}"


def delta_name(old: str, new: str) -> str:
    """Return where a delta is.

    Raises:
        InputError: One of them is no digest.
    """
    return f"deltas/{check_sha256(old)}-{check_sha256(new)}"


class Stick:
    """A folder or a tar file that is read; use it as a context manager.

    Args:
        path: The folder or file.

    Raises:
        ConfigError: It cannot be read.
        BundleError: It is no stick.
    """

    def __init__(self, path: Path) -> None:
        self._folder = path
        self._tar: tarfile.TarFile | None = None
        self._members: dict[str, tarfile.TarInfo] = {}
        try:
            if not path.is_dir():
                self._tar = tarfile.open(path, "r:")  # noqa: SIM115 - closed with the stick
                self._members = {member.name.removeprefix("./"): member for member in self._tar if member.isreg()}
        except (OSError, tarfile.TarError) as error:
            raise ConfigError(
                f"cannot read {path}: {error}", hint="isthmus model export writes what is read here"
            ) from error
        try:
            self.index = self._read_index()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the tar file."""
        if self._tar is not None:
            self._tar.close()

    def has(self, name: str) -> bool:
        """Return whether there is a file of this name, as `blob_name` and the others make it."""
        return name in self._members if self._tar is not None else (self._folder / name).is_file()

    def read(self, name: str, offset: int = 0) -> Iterator[bytes]:
        """Yield a file's bytes from `offset` on.

        Raises:
            NotFoundError: There is no such file.
        """
        with self._open(name) as file:
            file.seek(offset)
            while chunk := file.read(_CHUNK):
                yield chunk

    def _open(self, name: str) -> IO[bytes]:
        if not self.has(name):
            raise NotFoundError(f"there is no {name}")
        if self._tar is None:
            return (self._folder / name).open("rb")
        file = self._tar.extractfile(self._members[name])
        if file is None:
            raise NotFoundError(f"there is no {name}")
        return file

    def _read_index(self) -> Index:
        try:
            with self._open(INDEX) as file:
                content: Any = json.loads(file.read(MAX_INDEX_BYTES))
            if content["format"] != FORMAT:
                raise BundleError(f"{INDEX}: expected format {FORMAT}, got {content['format']!r}")
            model, version, bases = content["model"], content["version"], content["bases"]
            if not isinstance(model, str) or not all(
                type(number) is int and number > 0 for number in (version, *bases)
            ):
                raise BundleError(f"{INDEX}: expected a model and versions")
        except (NotFoundError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise BundleError(
                f"{self._folder} holds no exported model: no usable {INDEX}", hint="isthmus model export writes one"
            ) from error
        return Index(model, version, tuple(bases))


class StickWriter:
    """A folder or tar file that is written: beside its final place, renamed when it is whole.

    Args:
        path: The folder to make, which must not exist or be empty; a tar file where it ends in .tar.

    Raises:
        ConflictError: There is something.
        ConfigError: It cannot be written.
    """

    def __init__(self, path: Path) -> None:
        if path.exists() and not (path.is_dir() and path.suffix != ".tar" and not any(path.iterdir())):
            raise ConflictError(f"{path} exists already", hint="export into a new folder or file")
        self._path = path
        self._beside = path.with_name(f".{path.name}.{os.getpid()}.new")
        try:
            for name in ("metadata", "blobs", "deltas"):
                (self._beside / name).mkdir(parents=True)
        except OSError as error:
            raise ConfigError(f"cannot write {self._beside}: {error.strerror}") from error

    def write(self, name: str, chunks: Iterator[bytes]) -> int:
        """Write a file; return its length."""
        with (self._beside / name).open("xb") as file:
            for chunk in chunks:
                file.write(chunk)
            file.flush()
            os.fsync(file.fileno())
            return file.tell()

    def finish(self, index: Index) -> None:
        """Write the index and give the whole its name."""
        content = json.dumps({"format": FORMAT, **asdict(index)}, indent=1).encode()
        self.write(INDEX, iter([content]))
        if self._path.suffix != ".tar":
            with suppress(FileNotFoundError):
                self._path.rmdir()
            self._beside.rename(self._path)
            return
        tar = self._beside.with_suffix(".tar-new")
        with tarfile.open(tar, "x") as file:
            file.add(self._beside, arcname=".")
        tar.rename(self._path)
        self.abandon()

    def abandon(self) -> None:
        """Remove what was written so far."""
        shutil.rmtree(self._beside, ignore_errors=True)
