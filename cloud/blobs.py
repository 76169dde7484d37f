"""Files by the digest of their content, and deltas by the digests that they lead between.

Any fsspec folder will do. Rules: a name is built from checked digests only; a file appears under its name whole or
not at all (temporary name, fsync, rename); a blob is stored only when its bytes have the digest that they came under.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final

import fsspec
from fsspec.implementations.local import LocalFileSystem

from isthmus.digests import check_file, check_sha256, sha256_bytes
from isthmus.errors import ConfigError, DigestMismatchError, InputError, NotFoundError
from security.keyfiles import sync_folder

CHUNK: Final = 256 << 10  # bytes of one message of a stream
_LONGEST_UPLOAD: Final = timedelta(days=1)


class Folder:
    """Write-once files in an fsspec folder.

    Args:
        url: A path, or an address such as s3://bucket/folder.

    Raises:
        ConfigError: fsspec knows no such kind of address, or what it needs for this kind is not installed.
    """

    def __init__(self, url: str) -> None:
        self._fs: Any
        try:
            # Listings are not remembered: another cloud may write to the same bucket.
            self._fs, self._root = fsspec.url_to_fs(url, use_listings_cache=False)
        except (ImportError, ValueError) as error:
            raise ConfigError(f"cannot open {url}: {error}", hint="s3:// needs pip install 'isthmus[s3]'") from error
        self._incoming = f"{self._root}/incoming"
        self._fs.makedirs(self._incoming, exist_ok=True)
        for left_over in self._fs.find(self._incoming):  # a bucket has no folders: nothing to list is no error
            with suppress(FileNotFoundError):
                self._remove_if_old(left_over)

    def has(self, name: str) -> bool:
        """Return whether there is a file of this name."""
        return bool(self._fs.exists(self._path(name)))

    def length(self, name: str) -> int:
        """Return the file's length in bytes.

        Raises:
            NotFoundError: There is no such file.
        """
        try:
            return int(self._fs.size(self._path(name)))
        except FileNotFoundError as error:
            raise NotFoundError(f"there is no {name}") from error

    def read(self, name: str, offset: int = 0) -> Iterator[bytes]:
        """Yield the file's bytes from `offset` on, in chunks.

        Raises:
            NotFoundError: There is no such file.
            InputError: `offset` lies beyond its end.
        """
        length = self.length(name)
        if not 0 <= offset <= length:
            raise InputError(f"expected an offset of at most {length}, got {offset}")
        with self._fs.open(self._path(name), "rb", block_size=CHUNK) as file:
            file.seek(offset)
            while chunk := file.read(CHUNK):
                yield chunk

    @contextmanager
    def writer(self, name: str) -> Iterator[Any]:
        """Yield a binary file that becomes `name` when the block ends, and nothing when an error leaves it."""
        temporary = f"{self._incoming}/{secrets.token_hex(8)}"
        try:
            with self._fs.open(temporary, "wb") as file:
                yield file
                file.flush()
                if isinstance(self._fs, LocalFileSystem):
                    os.fsync(file.fileno())
            self._fs.makedirs(os.path.dirname(self._path(name)), exist_ok=True)  # noqa: PTH120 - may be a key in a bucket
            self._fs.mv(temporary, self._path(name))
        except BaseException:
            with suppress(FileNotFoundError):
                self._fs.rm(temporary)
            raise
        self._sync_folder(name)

    @contextmanager
    def as_path(self, name: str) -> Iterator[Path]:
        """Yield a path on this machine that holds the file's bytes, to be read only."""
        if isinstance(self._fs, LocalFileSystem):
            yield Path(self._path(name))
            return
        with tempfile.TemporaryDirectory(prefix="isthmus-") as folder:
            path = Path(folder) / "file"
            self._fs.get_file(self._path(name), str(path))
            yield path

    def _sync_folder(self, name: str) -> None:
        if isinstance(self._fs, LocalFileSystem):
            sync_folder(Path(self._path(name)).parent)  # or a power cut could forget the rename
            sync_folder(Path(self._root))  # or the folder, which may be new

    def _remove_if_old(self, left_over: str) -> None:
        """Remove what a crash left; a younger file may be what another cloud is writing to this place now."""
        if datetime.now(UTC) - self._fs.modified(left_over).astimezone(UTC) > _LONGEST_UPLOAD:
            self._fs.rm(left_over)

    def _path(self, name: str) -> str:
        return f"{self._root}/{name[:2]}/{name}"


class Blobs:
    """Content-addressed files."""

    def __init__(self, url: str) -> None:
        self._folder = Folder(url)

    def has(self, sha256: str) -> bool:
        """Return whether the blob is stored.

        Raises:
            InputError: `sha256` is not a digest (so for all methods here).
        """
        return self._folder.has(check_sha256(sha256))

    def intact(self, sha256: str) -> bool:
        """Return whether the blob is stored and its bytes are still those that its name says."""
        if not self.has(sha256):
            return False
        digest = hashlib.sha256()
        for chunk in self.read(sha256):
            digest.update(chunk)
        return hmac.compare_digest(digest.hexdigest(), sha256)

    def length(self, sha256: str) -> int:
        """Return the blob's length.

        Raises:
            NotFoundError: It is not stored.
        """
        return self._folder.length(check_sha256(sha256))

    def read(self, sha256: str, offset: int = 0) -> Iterator[bytes]:
        """Yield the blob's bytes from `offset` on.

        Raises:
            NotFoundError: It is not stored.
            InputError: `offset` lies beyond its end.
        """
        return self._folder.read(check_sha256(sha256), offset)

    def read_all(self, sha256: str) -> bytes:
        """Return a small blob's bytes.

        Raises:
            NotFoundError: It is not stored.
            DigestMismatchError: The disk has changed it.
        """
        data = b"".join(self.read(sha256))
        if not hmac.compare_digest(sha256_bytes(data), sha256):
            raise DigestMismatchError(f"blob {sha256} is damaged")
        return data

    @contextmanager
    def upload(self, sha256: str, length: int) -> Iterator[Upload]:
        """Yield what takes a blob's bytes; the blob is stored when the block ends.

        Raises:
            DigestMismatchError: More, fewer or other bytes came than were announced; nothing is stored.
        """
        with self._folder.writer(check_sha256(sha256)) as file:
            upload = Upload(file, length)
            yield upload
            upload.check(sha256)

    def store(self, data: bytes) -> str:
        """Store bytes and return their digest."""
        sha256 = sha256_bytes(data)
        if not self.has(sha256):
            with self.upload(sha256, len(data)) as upload:
                upload.write(data)
        return sha256

    def copy_to(self, sha256: str, path: Path) -> None:
        """Copy a blob to a new file, verified.

        Raises:
            NotFoundError: It is not stored.
            DigestMismatchError: The disk has changed it.
        """
        length = self.length(sha256)
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("xb") as file:
            for chunk in self.read(sha256):
                file.write(chunk)
        check_file(path, sha256=sha256, length=length, what=f"blob {sha256}")

    @contextmanager
    def as_path(self, sha256: str) -> Iterator[Path]:
        """Yield a path that holds the blob's bytes, to be read only."""
        with self._folder.as_path(check_sha256(sha256)) as path:
            yield path


class Upload:
    """Bytes on their way to becoming a blob."""

    def __init__(self, file: Any, length: int) -> None:
        self._file, self._left, self._length = file, length, length
        self._digest = hashlib.sha256()

    def write(self, data: bytes) -> None:
        """Take some bytes.

        Raises:
            DigestMismatchError: They are more than were announced.
        """
        self._left -= len(data)
        if self._left < 0:
            raise DigestMismatchError(f"blob: expected {self._length} bytes, got more")
        self._digest.update(data)
        self._file.write(data)

    def check(self, sha256: str) -> None:
        """Check that exactly the announced bytes came.

        Raises:
            DigestMismatchError: They did not.
        """
        if self._left:
            raise DigestMismatchError(f"blob: expected {self._length} bytes, got {self._length - self._left}")
        actual = self._digest.hexdigest()
        if not hmac.compare_digest(actual, sha256):
            raise DigestMismatchError(f"blob: expected SHA-256 {sha256}, got {actual}")


class Deltas:
    """Deltas between blobs. A device checks what it rebuilds, so a delta has no digest of its own."""

    def __init__(self, url: str) -> None:
        self._folder = Folder(url)

    def has(self, old: str, new: str) -> bool:
        """Return whether there is a delta from blob `old` to blob `new`."""
        return self._folder.has(_delta_name(old, new))

    def length(self, old: str, new: str) -> int:
        """Return the delta's length.

        Raises:
            NotFoundError: There is none.
        """
        return self._folder.length(_delta_name(old, new))

    def read(self, old: str, new: str, offset: int = 0) -> Iterator[bytes]:
        """Yield the delta's bytes from `offset` on.

        Raises:
            NotFoundError: There is none.
            InputError: `offset` lies beyond its end.
        """
        return self._folder.read(_delta_name(old, new), offset)

    def store(self, old: str, new: str, path: Path) -> None:
        """Store the delta in `path`."""
        with self._folder.writer(_delta_name(old, new)) as file, path.open("rb") as source:
            while chunk := source.read(CHUNK):
                file.write(chunk)


def _delta_name(old: str, new: str) -> str:
    return f"{check_sha256(old)}-{check_sha256(new)}"
