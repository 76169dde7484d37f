"""The publishing side of signed updates (The Update Framework): what the operator signs and what the cloud signs.

`OperatorRepository` holds the targets key and says which manifests exist. `CloudRepository` holds the snapshot and
timestamp keys and says which of the operator's statements is the newest; it checks what it is given, although devices
check everything again: a publish that devices would refuse must fail at the operator's terminal.

Writing order of the cloud: targets, snapshot, then the timestamp, each replaced whole. Until the timestamp is there,
nobody sees the others, so a crash in between changes nothing.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final

from isthmus.errors import ConfigError, ConflictError, NotFoundError, TrustError
from security.custom import Terms, same_file, set_terms, terms_of
from security.keyfiles import make_private_folder, read_file, replace_file
from security.metadata import (
    ROOT_LIFETIME,
    SNAPSHOT_LIFETIME,
    TARGETS_LIFETIME,
    TIMESTAMP_LIFETIME,
    CryptoSigner,
    Metadata,
    MetaFile,
    Root,
    Signed,
    Snapshot,
    TargetFile,
    Targets,
    Timestamp,
    is_metadata_name,
    is_target_path,
    load_signer,
    manifest_path,
    parse,
    parse_signed_targets,
    sign,
)

_TIMESTAMP: Final = "timestamp.json"


def _wall_clock() -> datetime:
    return datetime.now(UTC)


def create_repository(operator_dir: Path, cloud_dir: Path, now: datetime) -> bytes:
    """Sign the first root and an empty first version of everything else; return the root.

    The four keys (`root.key`, `targets.key`, `snapshot.key`, `timestamp.key`) are in the two folders already.
    """
    signers = {
        Root.type: load_signer(operator_dir / "root.key"),
        Targets.type: load_signer(operator_dir / "targets.key"),
        Snapshot.type: load_signer(cloud_dir / "snapshot.key"),
        Timestamp.type: load_signer(cloud_dir / "timestamp.key"),
    }
    root = Root(expires=_expiry(now, ROOT_LIFETIME), consistent_snapshot=True)
    for role, signer in signers.items():
        root.add_key(signer.public_key, role)
    root_json = sign(Metadata(root), signers[Root.type])
    targets_json = sign(Metadata(Targets(expires=_expiry(now, TARGETS_LIFETIME))), signers[Targets.type])
    for folder in (operator_dir / "tuf", cloud_dir / "tuf"):
        make_private_folder(folder)
        replace_file(folder / "1.root.json", root_json)
    replace_file(operator_dir / "tuf" / "targets.json", targets_json)
    _write_state(cloud_dir / "tuf", targets_json, 1, 1, (signers[Snapshot.type], signers[Timestamp.type]), now)
    return root_json


class OperatorRepository:
    """The operator's offline side: root and targets keys.

    Args:
        operator_dir: The workspace's `operator` folder.
        clock: The time.
    """

    def __init__(self, operator_dir: Path, *, clock: Callable[[], datetime] = _wall_clock) -> None:
        self._folder = operator_dir
        self._clock = clock

    def check(self) -> None:
        """Check that this folder can sign, before anything is uploaded.

        Raises:
            ConfigError: It is not an operator folder, or its targets key is not the one that the root names.
        """
        if not (self._folder / "targets.key").is_file() or not (self._folder / "tuf" / "targets.json").is_file():
            raise ConfigError(
                f"{self._folder} is not the operator folder of a workspace: it lacks targets.key or tuf/targets.json",
                hint="isthmus keys init DIR --host NAME makes a workspace; its operator folder is DIR/operator",
            )
        _signer_for(Targets.type, _newest_root(self._folder / "tuf"), self._folder / "targets.key")

    def sign_manifest(
        self, model: str, version: int, manifest: bytes, current_targets: bytes, *, rollback_floor: int = 0
    ) -> bytes:
        """Return the next targets metadata, which also vouches for this manifest; keep a copy.

        Args:
            model: The bundle's model.
            version: Its version.
            manifest: The manifest's bytes.
            current_targets: The targets metadata that the cloud serves now.
            rollback_floor: The oldest version to which a device that ran this one may go back; 0: never back.

        Raises:
            TrustError: What the cloud serves is not signed by the operator, or older than it can be.
            ConflictError: The version exists with another manifest.
            InputError: The model's name or version is unusable.
            ConfigError: The targets key is missing, or not the one that the root names.
        """
        path = manifest_path(model, version)
        root = _newest_root(self._folder / "tuf")
        metadata = parse_signed_targets(current_targets, root)
        local_copy = self._folder / "tuf" / "targets.json"
        # One behind is fine: the version that was signed last may have been refused by the cloud, or never got there.
        if metadata.signed.version < parse(read_file(local_copy), Targets).signed.version - 1:
            raise TrustError(
                f"the cloud serves targets metadata {metadata.signed.version}, older than what was signed here",
                reason="rollback",
                hint="the cloud was restored from an old backup, or tampered with; restore its newest tuf folder",
            )
        target = TargetFile.from_data(path, manifest, ["sha256"])
        existing = metadata.signed.targets.get(path)
        if existing is not None and not same_file(existing, target):
            raise ConflictError(f"{model} {version} is signed already, with another manifest", hint="use a new version")
        set_terms(target, Terms(rollback_floor))
        metadata.signed.targets[path] = target
        metadata.signed.version += 1
        metadata.signed.expires = _expiry(self._clock(), TARGETS_LIFETIME)
        signed = sign(metadata, _signer_for(Targets.type, root, self._folder / "targets.key"))
        replace_file(local_copy, signed)
        return signed


class CloudRepository:
    """The cloud's side: what devices fetch; safe to use from several threads.

    Args:
        cloud_dir: The workspace's `cloud` folder.
        clock: The time.

    Raises:
        ConfigError: The folder holds no repository, or its keys are not those that the root names.
    """

    def __init__(self, cloud_dir: Path, *, clock: Callable[[], datetime] = _wall_clock) -> None:
        self._folder = cloud_dir / "tuf"
        self._clock = clock
        self._lock = threading.Lock()
        self._root = _newest_root(self._folder)
        self._signers = (
            _signer_for(Snapshot.type, self._root, cloud_dir / "snapshot.key"),
            _signer_for(Timestamp.type, self._root, cloud_dir / "timestamp.key"),
        )

    def metadata(self, name: str) -> bytes:
        """Return a metadata file by its name, for example "timestamp.json" or "2.root.json".

        Raises:
            NotFoundError: There is none of this name.
        """
        if not is_metadata_name(name):
            raise NotFoundError(f"there is no metadata file {name[:80]!r}")
        try:
            return (self._folder / name).read_bytes()
        except FileNotFoundError as error:
            raise NotFoundError(f"there is no metadata file {name!r}") from error

    def targets_json(self) -> bytes:
        """Return the current targets metadata."""
        return read_file(self._folder / f"{self._current_snapshot().meta['targets.json'].version}.targets.json")

    def accept_targets(self, targets_json: bytes) -> None:
        """Check that this may become the next targets metadata.

        Raises:
            TrustError: It is not signed by the operator, expired, or changes or removes a target.
            ConflictError: It does not follow the current version: somebody else published.
        """
        offered = parse_signed_targets(targets_json, self._root).signed
        current = parse(self.targets_json(), Targets).signed
        if offered.version != current.version + 1:
            raise ConflictError(
                f"expected targets metadata {current.version + 1}, got {offered.version}",
                reason="stale-metadata",
                hint="somebody else published in the meantime; publish again",
            )
        if offered.is_expired(self._clock()):
            raise TrustError(f"the targets metadata expired at {offered.expires}", reason="expired-metadata")
        for path, target in current.targets.items():
            if not same_file(offered.targets.get(path), target):
                raise TrustError(f"the targets metadata changes or removes {path}", reason="target-changed")
        for path, target in offered.targets.items():
            if not is_target_path(path):
                raise TrustError(f"expected MODEL/VERSION/manifest.json as target, got {path[:120]!r}")
            terms_of(target)

    def commit(self, targets_json: bytes) -> None:
        """Make this the current targets metadata.

        Raises:
            TrustError: It is not acceptable.
            ConflictError: It does not follow the current version.
        """
        with self._lock:
            self.accept_targets(targets_json)
            self._write(targets_json, self._clock())

    def refresh_if_due(self, now: datetime) -> bool:
        """Sign timestamp and snapshot anew when half of their lifetime is over; return whether that was so."""
        with self._lock:
            timestamp = parse(read_file(self._folder / _TIMESTAMP), Timestamp).signed
            if _is_due(self._current_snapshot(), SNAPSHOT_LIFETIME, now):
                self._write(self.targets_json(), now)
            elif _is_due(timestamp, TIMESTAMP_LIFETIME, now):
                snapshot_json = read_file(self._folder / f"{timestamp.snapshot_meta.version}.snapshot.json")
                _write_timestamp(self._folder, snapshot_json, timestamp.version + 1, self._signers[1], now)
            else:
                return False
            return True

    def _write(self, targets_json: bytes, now: datetime) -> None:
        timestamp = parse(read_file(self._folder / _TIMESTAMP), Timestamp).signed
        snapshot_version = timestamp.snapshot_meta.version + 1
        _write_state(self._folder, targets_json, snapshot_version, timestamp.version + 1, self._signers, now)

    def _current_snapshot(self) -> Snapshot:
        timestamp = parse(read_file(self._folder / _TIMESTAMP), Timestamp).signed
        name = f"{timestamp.snapshot_meta.version}.snapshot.json"
        return parse(read_file(self._folder / name), Snapshot).signed


def _write_state(
    folder: Path,
    targets_json: bytes,
    snapshot_version: int,
    timestamp_version: int,
    signers: tuple[CryptoSigner, CryptoSigner],
    now: datetime,
) -> None:
    targets_version = parse(targets_json, Targets).signed.version
    replace_file(folder / f"{targets_version}.targets.json", targets_json)
    snapshot = Snapshot(
        version=snapshot_version,
        expires=_expiry(now, SNAPSHOT_LIFETIME),
        meta={"targets.json": MetaFile.from_data(targets_version, targets_json, ["sha256"])},
    )
    snapshot_json = sign(Metadata(snapshot), signers[0])
    replace_file(folder / f"{snapshot_version}.snapshot.json", snapshot_json)
    _write_timestamp(folder, snapshot_json, timestamp_version, signers[1], now)


def _write_timestamp(folder: Path, snapshot_json: bytes, version: int, signer: CryptoSigner, now: datetime) -> None:
    snapshot_version = parse(snapshot_json, Snapshot).signed.version
    timestamp = Timestamp(
        version=version,
        expires=_expiry(now, TIMESTAMP_LIFETIME),
        snapshot_meta=MetaFile.from_data(snapshot_version, snapshot_json, ["sha256"]),
    )
    replace_file(folder / _TIMESTAMP, sign(Metadata(timestamp), signer))


def _newest_root(folder: Path) -> Root:
    versions = [int(path.name.split(".")[0]) for path in folder.glob("*.root.json") if is_metadata_name(path.name)]
    if not versions:
        raise ConfigError(
            f"{folder} holds no root metadata", hint="`isthmus keys init DIR --host NAME` makes a workspace"
        )
    return parse(read_file(folder / f"{max(versions)}.root.json"), Root).signed


def _signer_for(role: str, root: Root, path: Path) -> CryptoSigner:
    signer = load_signer(path)
    if signer.public_key.keyid not in root.get_delegated_role(role).keyids:
        raise ConfigError(f"{path} is not the {role} key that the root metadata names")
    return signer


def _is_due(signed: Signed, lifetime: timedelta, now: datetime) -> bool:
    return signed.expires - now < lifetime / 2


def _expiry(now: datetime, lifetime: timedelta) -> datetime:
    return (now.astimezone(UTC) + lifetime).replace(microsecond=0)  # TUF counts whole seconds
