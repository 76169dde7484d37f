"""What both sides of The Update Framework share here: names, lifetimes, keys, and how a file is read.

Roles and where their keys are: root and targets with the operator, offline; snapshot and timestamp with the cloud; and
`publisher-<name>`, to which targets delegates some models, with whoever publishes those. All keys are Ed25519; how many
of a role's keys must sign is its threshold. A target is a bundle's manifest, `<model>/<version>/manifest.json`; the
manifest carries the digests of everything else.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, Final

# Both packages are typed, but their public modules do not list what they re-export; this is the one place that minds.
from cryptography.hazmat.primitives.asymmetric import ed25519
from securesystemslib.signer import CryptoSigner, SSlibKey  # type: ignore[attr-defined]
from tuf.api.exceptions import RepositoryError
from tuf.api.metadata import (  # type: ignore[attr-defined]
    DelegatedRole,
    Delegations,
    Key,
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

from isthmus.errors import ConfigError, InputError, TrustError
from security.keyfiles import load_ed25519_key

__all__ = [
    "CryptoSigner",
    "DelegatedRole",
    "Delegations",
    "Key",
    "MetaFile",
    "Metadata",
    "Root",
    "Signed",
    "Snapshot",
    "TargetFile",
    "Targets",
    "Timestamp",
    "delegated_path",
    "expiry_of",
    "is_metadata_name",
    "is_role_of_targets",
    "is_target_path",
    "key_of",
    "load_signer",
    "load_signers",
    "manifest_path",
    "parse",
    "parse_signed_targets",
    "sign",
    "sign_also",
    "verify",
]

TIMESTAMP_LIFETIME: Final = timedelta(days=1)
SNAPSHOT_LIFETIME: Final = timedelta(days=7)
TARGETS_LIFETIME: Final = timedelta(days=365)
ROOT_LIFETIME: Final = timedelta(days=730)
MAX_METADATA_BYTES: Final = 5_000_000  # tuf.ngclient's own limit for targets metadata

PUBLISHER: Final = "publisher-"  # prefix of the roles to which targets delegates models
_PUBLISHER_ROLE: Final = rf"{PUBLISHER}[A-Za-z0-9][A-Za-z0-9._-]{{0,63}}"
_METADATA_NAME: Final = re.compile(rf"(timestamp|[1-9][0-9]{{0,9}}\.(root|snapshot|targets|{_PUBLISHER_ROLE}))\.json")
_ROLE_OF_TARGETS: Final = re.compile(rf"targets|{_PUBLISHER_ROLE}")
_MODEL_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_MODEL_PATTERN: Final = re.compile(r"[A-Za-z0-9*?][A-Za-z0-9._*?-]{0,63}")
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


def is_role_of_targets(role: str) -> bool:
    """Return whether a role of this name lists manifests: "targets" itself, or one that it may delegate to."""
    return _ROLE_OF_TARGETS.fullmatch(role) is not None


def load_signer(path: Path) -> CryptoSigner:
    """Return the signer for a role's private key file.

    Raises:
        ConfigError: The file does not hold an Ed25519 key.
    """
    return CryptoSigner(load_ed25519_key(path))


def load_signers(folder: Path, role: str, delegator: Root | Targets, more: Sequence[Path] = ()) -> list[CryptoSigner]:
    """Return the signers for a role whose keys are here: `<role>.key` and `<role>-*.key` of a folder, and `more`.

    Keys that the role does not name (any more, or yet) are passed over.

    Raises:
        ConfigError: The keys that it names and that are here are fewer than must sign.
    """
    wanted = delegator.get_delegated_role(role)
    paths = [*sorted(folder.glob(f"{role}.key")), *sorted(folder.glob(f"{role}-*.key")), *more]
    signers = {signer.public_key.keyid: signer for signer in map(load_signer, paths)}
    usable = [signer for keyid, signer in signers.items() if keyid in wanted.keyids]
    if paths and not usable:
        raise ConfigError(f"{', '.join(map(str, paths))} is not the {role} key that the metadata names")
    if len(usable) < wanted.threshold:
        raise ConfigError(
            f"{wanted.threshold} of the {role} keys must sign, {len(usable)} of them are in {folder}",
            hint=f"--key FILE names another holder's {role} key, for example on a USB stick",
        )
    return usable


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


def verify(role: str, metadata: Metadata[T], delegator: Root | Targets) -> None:
    """Check that enough of a role's keys signed.

    Raises:
        TrustError: They did not (`unsigned`), or too few of them (`wrong-threshold`), or nobody delegates to the role.
    """
    try:
        result = delegator.get_verification_result(role, metadata.signed_bytes, metadata.signatures)
    except (RepositoryError, ValueError) as error:
        raise TrustError(f"there is no role {role}", reason="unsigned") from error
    if not result:
        needed, found = delegator.get_delegated_role(role).threshold, len(result.signed)
        raise TrustError(
            f"the {role} metadata is signed by {found} of the {needed} keys that are needed",
            reason="wrong-threshold" if found else "unsigned",
            hint="operator folder and cloud must be of one workspace",
        )


def parse_signed_targets(data: bytes, delegator: Root | Targets, role: str = Targets.type) -> Metadata[Targets]:
    """Parse metadata that lists manifests and check that its role's keys signed it.

    Args:
        data: The file.
        delegator: The root for targets, targets for a publisher.
        role: "targets" or a publisher's.

    Raises:
        TrustError: It is none, they did not, or it delegates in a way that nothing here does.
    """
    metadata = parse(data, Targets)
    verify(role, metadata, delegator)
    delegations = metadata.signed.delegations
    if delegations is None:
        return metadata
    if role != Targets.type or delegations.roles is None or not all(map(_is_publisher, delegations.roles.values())):
        raise TrustError(f"{role} delegates to other keys than publishers' of models", reason="malformed-metadata")
    return metadata


def delegated_path(pattern: str) -> str:
    """Return the pattern of target paths for a pattern of model names, for example "line3-*".

    Raises:
        InputError: It is no pattern of model names.
    """
    if not _MODEL_PATTERN.fullmatch(pattern):
        raise InputError(f"expected a model name, which may hold * and ?, got {pattern[:80]!r}")
    return f"{pattern}/*/manifest.json"


def _is_publisher(role: DelegatedRole) -> bool:
    paths = role.paths or []
    return (
        role.name.startswith(PUBLISHER)
        and is_role_of_targets(role.name)
        and role.terminating
        and bool(paths)
        and all(
            path.endswith("/*/manifest.json") and _MODEL_PATTERN.fullmatch(path.removesuffix("/*/manifest.json"))
            for path in paths
        )
    )


def sign(metadata: Metadata[T], *signers: CryptoSigner) -> bytes:
    """Sign metadata with these keys only and return it as bytes."""
    metadata.signatures.clear()
    for signer in signers:
        metadata.sign(signer, append=True)
    return metadata.to_bytes(JSONSerializer(compact=False))


def sign_also(metadata: Metadata[T], signer: CryptoSigner) -> None:
    """Add a signature to those that are there."""
    metadata.sign(signer, append=True)


def key_of(key: ed25519.Ed25519PublicKey) -> Key:
    """Return a public key as metadata holds it, with its key id."""
    return SSlibKey.from_crypto(key)
