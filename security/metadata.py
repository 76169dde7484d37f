"""What both sides of The Update Framework share here: names, lifetimes, keys, and how a file is read.

Roles and where their keys are: root and targets with the operator, offline; snapshot and timestamp with the cloud. One
key for each role, Ed25519. A target is a bundle's manifest, `<model>/<version>/manifest.json`; the manifest carries the
digests of everything else.
"""

from __future__ import annotations

import re
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, Final

# Both packages are typed, but their public modules do not list what they re-export; this is the one place that minds.
from securesystemslib.signer import CryptoSigner  # type: ignore[attr-defined]
from tuf.api.exceptions import RepositoryError
from tuf.api.metadata import (  # type: ignore[attr-defined]
    Metadata,
    MetaFile,
    Root,
    Signed,
    Snapshot,
    T,
    TargetFile,
    Targets,
    Timestamp,
)
from tuf.api.serialization.json import JSONSerializer

from isthmus.errors import InputError, TrustError
from security.keyfiles import load_ed25519_key

__all__ = [
    "CryptoSigner",
    "MetaFile",
    "Metadata",
    "Root",
    "Signed",
    "Snapshot",
    "TargetFile",
    "Targets",
    "Timestamp",
    "expiry_of",
    "is_metadata_name",
    "is_target_path",
    "load_signer",
    "manifest_path",
    "parse",
    "parse_signed_targets",
    "sign",
]

TIMESTAMP_LIFETIME: Final = timedelta(days=1)
SNAPSHOT_LIFETIME: Final = timedelta(days=7)
TARGETS_LIFETIME: Final = timedelta(days=365)
ROOT_LIFETIME: Final = timedelta(days=730)
MAX_METADATA_BYTES: Final = 5_000_000  # tuf.ngclient's own limit for targets metadata

_METADATA_NAME: Final = re.compile(r"(timestamp|[1-9][0-9]{0,9}\.(root|snapshot|targets))\.json")
_MODEL_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_TARGET_PATH: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}/[1-9][0-9]{0,18}/manifest\.json")


def manifest_path(model: str, version: int) -> str:
    """Return the target path of a bundle version's manifest.

    Raises:
        InputError: The model's name or the version cannot be part of one.
    """
    path = f"{model}/{version}/manifest.json"
    if not _MODEL_NAME.fullmatch(model) or not _TARGET_PATH.fullmatch(path):
        raise InputError(f"expected a model name and a version of at least 1, got {model[:80]!r} and {version}")
    return path


def is_metadata_name(name: str) -> bool:
    """Return whether a file of this name may be asked for: nothing that could leave the metadata folder."""
    return _METADATA_NAME.fullmatch(name) is not None


def is_target_path(path: str) -> bool:
    """Return whether `manifest_path` could have made this path."""
    return _TARGET_PATH.fullmatch(path) is not None


def load_signer(path: Path) -> CryptoSigner:
    """Return the signer for a role's private key file.

    Raises:
        ConfigError: The file does not hold an Ed25519 key.
    """
    return CryptoSigner(load_ed25519_key(path))


def parse(data: bytes, kind: type[T]) -> Metadata[T]:
    """Parse one metadata file of a known kind; its signatures are NOT verified.

    Raises:
        TrustError: It is no metadata of this kind.
    """
    metadata: Metadata[T] = _parse_any(data)
    if not isinstance(metadata.signed, kind):
        raise TrustError(f"expected {kind.type} metadata, got {metadata.signed.type}", reason="malformed-metadata")
    return metadata


def expiry_of(data: bytes) -> datetime:
    """Return when a metadata file of any kind expires; its signatures are NOT verified.

    Raises:
        TrustError: It is no metadata.
    """
    expires: datetime = _parse_any(data).signed.expires
    return expires


def _parse_any(data: bytes) -> Metadata[Any]:
    if len(data) > MAX_METADATA_BYTES:
        raise TrustError(f"expected at most {MAX_METADATA_BYTES} bytes of metadata, got {len(data)}", reason="too-long")
    try:
        return Metadata[Any].from_bytes(data)
    except (RepositoryError, RecursionError) as error:
        raise TrustError("expected TUF metadata, got something else", reason="malformed-metadata") from error


def parse_signed_targets(data: bytes, root: Root) -> Metadata[Targets]:
    """Parse targets metadata and check that the root's targets keys signed it.

    Raises:
        TrustError: It is no targets metadata, they did not, or it delegates (which nothing here does).
    """
    metadata = parse(data, Targets)
    try:
        root.verify_delegate(Targets.type, metadata.signed_bytes, metadata.signatures)
    except RepositoryError as error:
        raise TrustError(
            "the targets metadata is not signed by the operator's targets key",
            reason="unsigned",
            hint="operator folder and cloud must be of one workspace",
        ) from error
    if metadata.signed.delegations is not None:
        raise TrustError("the targets metadata delegates to other keys", reason="malformed-metadata")
    return metadata


def sign(metadata: Metadata[T], signer: CryptoSigner) -> bytes:
    """Sign metadata with one key and return it as bytes."""
    metadata.sign(signer)
    return metadata.to_bytes(JSONSerializer(compact=False))
