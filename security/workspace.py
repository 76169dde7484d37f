"""The workspace that `isthmus keys init` makes: every key and certificate of an installation, by who holds it.

    operator/   ca.key ca.pem  root.key targets.key  tuf/      offline: what may sign models and certificates
    cloud/      server.key server.pem  issuing-ca.key issuing-ca.pem  snapshot.key timestamp.key  tokens/  tuf/
                audit.key audit.pub  sealing/
    trust/      ca.pem root.json audit.pub sealing.json        public: what devices and clients start from

It is made beside its final place and renamed, so there is a whole workspace or none.
"""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Final

from cryptography.hazmat.primitives.asymmetric import ed25519

from isthmus.errors import ConfigError, ConflictError, InputError
from security.audit.keys import PUBLIC as AUDIT_PUBLIC
from security.audit.keys import create_audit_key
from security.authority import create_ca, create_issuing_ca, host_names, issue_server_certificate, load_certificate
from security.keyfiles import (
    load_private_key,
    make_private_folder,
    read_file,
    replace_file,
    save_private_key,
    sync_folder,
)
from security.metadata import PUBLISHER, expiry_of
from security.repository import create_repository
from security.sealing import FOLDER as SEALING_FOLDER
from security.sealing import rotate_sealing_keys
from security.signer import ALGORITHMS, EDDSA
from security.tokens import TokenIssuer, create_token_issuer

MAX_KEYS: Final = 16  # of one role
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,47}")

# What each private key and certificate is for; token keys are named by their id.
ROLES: Final = {
    "operator/ca.key": "root authority",
    "operator/ca.pem": "root authority",
    "operator/root.key": "update root",
    "operator/targets.key": "signs manifests",
    "cloud/server.key": "cloud's TLS identity",
    "cloud/server.pem": "cloud's TLS identity",
    "cloud/issuing-ca.key": "certifies devices",
    "cloud/issuing-ca.pem": "certifies devices",
    "cloud/snapshot.key": "signs snapshots",
    "cloud/timestamp.key": "signs timestamps",
    "cloud/audit.key": "signs the audit log",
    "trust/ca.pem": "root authority",
}


@dataclass(frozen=True, slots=True)
class Entry:
    """One key, certificate or metadata file of a workspace; never its secret."""

    role: str
    file: str
    kind: str  # "private key", "certificate" or "metadata"
    algorithm: str
    expires_at: datetime | None


@dataclass(frozen=True, slots=True)
class Holders:
    """How many keys the offline roles get, and how many of them must sign."""

    root_keys: int = 1
    root_threshold: int = 1
    targets_keys: int = 1
    targets_threshold: int = 1

    def check(self) -> None:
        """Check that the thresholds can be met.

        Raises:
            InputError: They cannot.
        """
        for role, keys, threshold in (
            ("root", self.root_keys, self.root_threshold),
            ("targets", self.targets_keys, self.targets_threshold),
        ):
            if not 1 <= threshold <= keys <= MAX_KEYS:
                raise InputError(
                    f"expected 1 <= {role} threshold <= {role} keys <= {MAX_KEYS}, got {threshold} and {keys}"
                )


def init_workspace(
    root: Path,
    hosts: Sequence[str],
    name: str,
    now: datetime,
    *,
    holders: Holders | None = None,
    token_algorithm: str = EDDSA,
) -> None:
    """Make a workspace.

    Args:
        root: Its folder, which must not exist or be empty.
        hosts: DNS names and IP addresses under which the cloud is reached.
        name: The organisation's, for certificates and tokens.
        now: The time.
        holders: How many keys root and targets get; one each where it is not given.
        token_algorithm: What access tokens are signed with, EdDSA or ES256; it stays so.

    Raises:
        ConflictError: There is something in the folder.
        InputError: A host, the name or the algorithm is unusable.
    """
    if token_algorithm not in ALGORITHMS:
        raise InputError(f"expected {' or '.join(ALGORITHMS)} for tokens, got {token_algorithm[:40]!r}")
    if not _NAME.fullmatch(name):
        raise InputError(f"expected a name of letters, digits, dots, dashes and underscores, got {name[:80]!r}")
    if not host_names(hosts):
        raise InputError("a workspace needs the host under which the cloud is reached", hint="--host NAME names one")
    if root.exists() and (not root.is_dir() or any(root.iterdir())):
        raise ConflictError(f"{root} exists already", hint="a workspace is never overwritten; choose another folder")
    (holders := holders or Holders()).check()
    try:
        root.parent.mkdir(parents=True, exist_ok=True)
        beside = Path(tempfile.mkdtemp(prefix=f".{root.name}.", dir=root.parent))
    except OSError as error:
        raise ConfigError(
            f"cannot make {root}: {error.strerror}", hint="choose a place where you may make folders"
        ) from error
    try:
        _write(beside, hosts, name, now, holders, token_algorithm)
        beside.chmod(0o755)  # the secrets are in folders of their own, for their owner only
        beside.replace(root)
    except BaseException:
        shutil.rmtree(beside)
        raise
    sync_folder(root.parent)


def _write(root: Path, hosts: Sequence[str], name: str, now: datetime, holders: Holders, token_algorithm: str) -> None:
    operator, cloud, trust = root / "operator", root / "cloud", root / "trust"
    make_private_folder(operator)
    make_private_folder(cloud)
    trust.mkdir()
    ca = create_ca(operator, name, now)
    create_issuing_ca(ca, cloud, name, now)
    issue_server_certificate(ca, cloud, hosts, now)
    create_token_issuer(
        cloud / "tokens",
        issuer=f"isthmus://{name}/tokens",
        audience=f"isthmus://{name}/cloud",
        algorithm=token_algorithm,
    )
    for path in (
        *_key_files(operator, "root", holders.root_keys),
        *_key_files(operator, "targets", holders.targets_keys),
        cloud / "snapshot.key",
        cloud / "timestamp.key",
    ):
        save_private_key(path, ed25519.Ed25519PrivateKey.generate())
    create_audit_key(cloud)
    root_json = create_repository(
        operator,
        cloud,
        now,
        root_threshold=holders.root_threshold,
        targets_threshold=holders.targets_threshold,
    )
    replace_file(trust / "ca.pem", read_file(operator / "ca.pem"))
    replace_file(trust / "root.json", root_json)
    rotate_sealing_keys(root, now)
    replace_file(trust / AUDIT_PUBLIC, read_file(cloud / AUDIT_PUBLIC))


def _key_files(folder: Path, role: str, count: int) -> list[Path]:
    """Return `<role>.key`, `<role>-2.key` and so on: one for each holder, to be taken apart after the making."""
    return [folder / f"{role}.key", *(folder / f"{role}-{number}.key" for number in range(2, count + 1))]


def describe_workspace(root: Path) -> list[Entry]:
    """Return what is in a workspace, or in the part of one that is on this machine.

    Raises:
        ConfigError: There is nothing of a workspace here, or a file of it is damaged.
    """
    entries = [_describe(root, root / file) for file in ROLES if (root / file).exists()]
    entries += [_describe(root, path) for path in _further_keys(root)]
    entries += _describe_tokens(root) if (root / "cloud/tokens/issuer.json").exists() else []
    sealing = sorted((root / "cloud" / SEALING_FOLDER).glob("*.key"))
    entries += [
        Entry("opens sealed inputs", path.relative_to(root).as_posix(), "private key", "X25519", None)
        for path in sealing
    ]
    entries += _describe_metadata(root)
    if not entries:
        raise ConfigError(f"{root} holds no workspace", hint=f"isthmus keys init {root} --host NAME")
    return entries


def _describe(root: Path, path: Path) -> Entry:
    file = path.relative_to(root).as_posix()
    if path.suffix == ".key":
        return Entry(_role_of_key(file), file, "private key", _algorithm(path), None)
    certificate = load_certificate(path)
    return Entry(ROLES[file], file, "certificate", "ECDSA P-256", certificate.not_valid_after_utc)


def _further_keys(root: Path) -> list[Path]:
    """Return the keys of a role's second and later holders, rotated keys, and publishers' keys."""
    found = (path for folder in ("operator", "cloud", ".") for path in sorted((root / folder).glob("*-*.key")))
    return [path for path in found if path.relative_to(root).as_posix() not in ROLES]


def _role_of_key(file: str) -> str:
    if file in ROLES:
        return ROLES[file]
    folder, _, name = file.rpartition("/")
    return ROLES.get(f"{folder}/{name.split('-')[0]}.key", "signs manifests of some models")


def _describe_tokens(root: Path) -> list[Entry]:
    current = TokenIssuer.load(root / "cloud").kid
    return [
        Entry(
            "signs tokens" if path.stem == current else "will sign tokens",
            path.relative_to(root).as_posix(),
            "private key",
            _algorithm(path),
            None,
        )
        for path in sorted((root / "cloud" / "tokens").glob("*.key"))
    ]


def _describe_metadata(root: Path) -> list[Entry]:
    folder = root / "cloud" / "tuf"
    publishers = sorted({path.stem.partition(".")[2] for path in folder.glob(f"*.{PUBLISHER}*.json")})
    newest = [
        max(found, key=lambda path: int(path.name.split(".")[0]))
        for role in ("root", "targets", *publishers, "snapshot")
        if (found := list(folder.glob(f"*.{role}.json")))
    ]
    current = [path for path in (folder / "timestamp.json", root / "trust" / "root.json") if path.exists()]
    return [_metadata_entry(root, path) for path in (*newest, *current)]


def _metadata_entry(root: Path, path: Path) -> Entry:
    role = path.name.removesuffix(".json").split(".")[-1]
    file = path.relative_to(root).as_posix()
    return Entry(f"update {role}", file, "metadata", "Ed25519", expiry_of(read_file(path)))


def _algorithm(path: Path) -> str:
    return "Ed25519" if isinstance(load_private_key(path), ed25519.Ed25519PrivateKey) else "ECDSA P-256"
