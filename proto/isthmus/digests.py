"""SHA-256 of bytes, files and folders, and the check that a file is the one that was meant."""

from __future__ import annotations

import hashlib
import hmac
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from isthmus.errors import DigestMismatchError, InputError

CHUNK: Final = 1 << 20  # bytes read at a time
_HEX64: Final = re.compile(r"[0-9a-f]{64}")


def check_sha256(value: str) -> str:
    """Return `value` when it is 64 lower-case hexadecimal digits.

    Raises:
        InputError: It is anything else (it may be used in a path, so nothing else passes).
    """
    if not _HEX64.fullmatch(value):
        raise InputError(f"expected a SHA-256 of 64 lower-case hexadecimal digits, got {value[:80]!r}")
    return value


def sha256_bytes(data: bytes) -> str:
    """Return the SHA-256 of `data` as 64 hexadecimal digits."""
    return hashlib.sha256(data).hexdigest()


def sha256_file(path: Path) -> str:
    """Return the SHA-256 of the file's bytes, read in chunks."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def tree_digest(files: Mapping[str, str]) -> str:
    """Return one digest for a folder, given the SHA-256 of each relative path."""
    lines = "".join(f"{digest}  {path}\n" for path, digest in sorted(files.items()))
    return sha256_bytes(lines.encode())


def check_file(path: Path, *, sha256: str, length: int, what: str) -> None:
    """Check that the file has this length and digest.

    Raises:
        DigestMismatchError: It has not; `what` names the file for the reader.
    """
    actual_length = path.stat().st_size
    if actual_length != length:
        raise DigestMismatchError(f"{what}: expected {length} bytes, got {actual_length}")
    actual = sha256_file(path)
    if not hmac.compare_digest(actual, sha256):
        raise DigestMismatchError(f"{what}: expected SHA-256 {sha256}, got {actual}")
