"""Files that hold keys and certificates: how they are created, read and replaced.

- A private key is PKCS#8 PEM, created with mode 0600 by the same system call that makes the file, so there is no
  moment at which another user can read it; an existing key is never overwritten.
- Other files are replaced whole: written beside the old one, flushed to the disk, renamed.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)

from isthmus.errors import ConfigError, ConflictError

PRIVATE_MODE: Final = 0o600
PUBLIC_MODE: Final = 0o644
_WORKSPACE_HINT: Final = "`isthmus keys init DIR --host NAME` makes a workspace: DIR/operator, DIR/cloud and DIR/trust"

PrivateKey = ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey


def make_private_folder(path: Path) -> None:
    """Create the folder, for its owner only; its parents are created as usual."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.mkdir(mode=0o700, exist_ok=True)


def create_secret(path: Path, data: bytes) -> None:
    """Write a new file that only its owner can read.

    Raises:
        ConflictError: There is a file already.
    """
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, PRIVATE_MODE)
    except FileExistsError as error:
        raise ConflictError(
            f"{path} exists already", hint="secrets are never overwritten; choose another place"
        ) from error
    with os.fdopen(descriptor, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def replace_file(path: Path, data: bytes, *, mode: int = PUBLIC_MODE) -> None:
    """Write `path` so that a reader, or a power cut, sees the old bytes or the new ones and nothing between."""
    beside = path.with_name(f".{path.name}.{os.getpid()}.new")
    beside.unlink(missing_ok=True)
    descriptor = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, mode)
    with os.fdopen(descriptor, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)
    sync_folder(path.parent)


def sync_folder(path: Path) -> None:
    """Make renames inside the folder survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def save_private_key(path: Path, key: PrivateKey) -> None:
    """Write a new private key file.

    Raises:
        ConflictError: There is a file already.
    """
    create_secret(path, key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))


def replace_private_key(path: Path, key: PrivateKey) -> None:
    """Write a private key in the place of another one, whole or not at all."""
    replace_file(path, key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()), mode=PRIVATE_MODE)


def load_ec_key(path: Path) -> ec.EllipticCurvePrivateKey:
    """Read an ECDSA P-256 private key.

    Raises:
        ConfigError: There is no such file, or it holds something else.
    """
    key = load_private_key(path)
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise ConfigError(f"{path}: expected an ECDSA P-256 private key, got Ed25519")
    return key


def load_ed25519_key(path: Path) -> ed25519.Ed25519PrivateKey:
    """Read an Ed25519 private key.

    Raises:
        ConfigError: There is no such file, or it holds something else.
    """
    key = load_private_key(path)
    if not isinstance(key, ed25519.Ed25519PrivateKey):
        raise ConfigError(f"{path}: expected an Ed25519 private key, got ECDSA P-256")
    return key


def load_private_key(path: Path) -> PrivateKey:
    """Read a private key of one of the two kinds that this project makes.

    Raises:
        ConfigError: There is no such file, or it holds something else.
    """
    try:
        key = load_pem_private_key(read_file(path), None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise ConfigError(f"{path}: expected an unencrypted PEM private key") from error
    if isinstance(key, ed25519.Ed25519PrivateKey):
        return key
    if isinstance(key, ec.EllipticCurvePrivateKey) and isinstance(key.curve, ec.SECP256R1):
        return key
    raise ConfigError(f"{path}: expected an Ed25519 or ECDSA P-256 private key, got {type(key).__name__}")


def read_file(path: Path, *, hint: str = _WORKSPACE_HINT) -> bytes:
    """Read a key, certificate, token or metadata file; `hint` says where it comes from.

    Raises:
        ConfigError: It cannot be read.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}", hint=hint) from error
