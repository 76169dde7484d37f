"""The publishing side of signed updates (The Update Framework): what the operator signs and what the cloud signs.

`OperatorRepository` holds the targets keys, or a publisher's, and says which manifests exist. `CloudRepository` holds
the snapshot and timestamp keys and says which of the operators' statements is the newest; it checks what it is given by
the rules that devices use, although devices check everything again: a publish that devices would refuse must fail at
the operator's terminal.

Writing order of the cloud: what lists manifests, snapshot, roots, then the timestamp, each replaced whole. Until the
timestamp is there, nobody sees the others, so a crash in between changes nothing. A new root alone is seen at once; a
cloud that was stopped between it and the timestamp signs the timestamp anew when it starts.
"""

from __future__ import annotations

import fcntl
import re
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final

from isthmus.errors import ConfigError, ConflictError, InputError, NotFoundError, TrustError
from security.custom import Terms, same_file, set_terms, terms_of
from security.keyfiles import make_private_folder, read_file, replace_file
from security.metadata import (
    PUBLISHER,
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
    is_role_of_targets,
    is_target_path,
    load_signer,
    load_signers,
    manifest_path,
    parse,
    parse_signed_targets,
    sign,
    verify,
)

_TIMESTAMP: Final = "timestamp.json"
_LOCK: Final = "lock"
_ROOT_NAME: Final = re.compile(r"[1-9][0-9]{0,9}\.root\.json")


def _wall_clock() -> datetime:
    return datetime.now(UTC)


def create_repository(
    operator_dir: Path, cloud_dir: Path, now: datetime, *, root_threshold: int = 1, targets_threshold: int = 1
) -> bytes:
    """Sign the first root and an empty first version of everything else; return the root.

    The keys are in the two folders already: `root.key`, `root-2.key` and so on, `targets.key` and so on,
    `snapshot.key` and `timestamp.key`.
    """
    root = Root(expires=expiry(now, ROOT_LIFETIME), consistent_snapshot=True)
    signers: dict[str, list[CryptoSigner]] = {}
    for role, folder in (
        (Root.type, operator_dir),
        (Targets.type, operator_dir),
        (Snapshot.type, cloud_dir),
        (Timestamp.type, cloud_dir),
    ):
        signers[role] = [load_signer(path) for path in (*folder.glob(f"{role}.key"), *folder.glob(f"{role}-*.key"))]
        for signer in signers[role]:
            root.add_key(signer.public_key, role)
    root.roles[Root.type].threshold = root_threshold
    root.roles[Targets.type].threshold = targets_threshold
    root_json = sign(Metadata(root), *signers[Root.type])
    targets_json = sign(Metadata(Targets(expires=expiry(now, TARGETS_LIFETIME))), *signers[Targets.type])
    for folder in (operator_dir / "tuf", cloud_dir / "tuf"):
        make_private_folder(folder)
        replace_file(folder / "1.root.json", root_json)
    replace_file(operator_dir / "tuf" / "targets.json", targets_json)
    replace_file(cloud_dir / "tuf" / "1.targets.json", targets_json)
    meta = {"targets.json": MetaFile.from_data(1, targets_json, ["sha256"])}
    snapshot_json = sign(Metadata(Snapshot(1, None, expiry(now, SNAPSHOT_LIFETIME), meta)), *signers[Snapshot.type])
    replace_file(cloud_dir / "tuf" / "1.snapshot.json", snapshot_json)
    _write_timestamp(cloud_dir / "tuf", snapshot_json, 1, signers[Timestamp.type], now)
    return root_json


class OperatorRepository:
    """An operator's offline side: the keys that say which manifests exist.

    A folder with `targets.key` is the organisation's; one with `publisher-NAME.key` belongs to somebody to whom the
    organisation delegated some models.

    Args:
        operator_dir: The operator folder.
        keys: Key files of other holders, where more than one must sign.
        clock: The time.
    """

    def __init__(
        self, operator_dir: Path, *, keys: Sequence[Path] = (), clock: Callable[[], datetime] = _wall_clock
    ) -> None:
        self._folder = operator_dir
        self._keys = tuple(keys)
        self._clock = clock

    @property
    def role(self) -> str:
        """Return the role whose metadata this folder signs.

        Raises:
            ConfigError: It holds no key that could.
        """
        if next(self._folder.glob(f"{Targets.type}*.key"), None) is not None:
            return Targets.type
        found = min(self._folder.glob(f"{PUBLISHER}*.key"), key=lambda path: len(path.name), default=None)
        if found is None or not is_role_of_targets(found.stem):
            raise ConfigError(
                f"{self._folder} is not an operator folder: it lacks targets.key or a publisher's key",
                hint="isthmus keys init DIR --host NAME makes a workspace; its operator folder is DIR/operator",
            )
        return found.stem

    @property
    def root(self) -> Root:
        """Return the newest root that is known here.

        Raises:
            ConfigError: There is none.
        """
        return newest_root(self._folder / "tuf").signed

    def check(self) -> None:
        """Check that this folder can sign, before anything is uploaded.

        Raises:
            ConfigError: It is not an operator folder, or its keys are not those that the root names, or too few.
        """
        if self.role == Targets.type:
            load_signers(self._folder, Targets.type, self.root, self._keys)

    def follow_root(self, root_json: bytes) -> None:
        """Take the root that follows the newest one known here.

        Raises:
            TrustError: It does not follow it, or the keys of either did not sign it.
        """
        checked_root(root_json, self.root)
        replace_file(self._folder / "tuf" / f"{self.root.version + 1}.root.json", root_json)

    def sign_manifest(
        self,
        model: str,
        version: int,
        manifest: bytes,
        current_targets: bytes,
        *,
        current_own: bytes | None = None,
        rollback_floor: int = 0,
    ) -> bytes:
        """Return this role's next metadata, which also vouches for this manifest; keep a copy.

        Args:
            model: The bundle's model.
            version: Its version.
            manifest: The manifest's bytes.
            current_targets: The targets metadata that the cloud serves now.
            current_own: For a publisher's folder: the publisher's metadata that the cloud serves now, if any.
            rollback_floor: The oldest version to which a device that ran this one may go back; 0: never back.

        Raises:
            TrustError: What the cloud serves is not signed by the operator, or older than it can be.
            ConflictError: The version exists with another manifest.
            InputError: The model's name or version is unusable, or the model is not delegated to this publisher.
            ConfigError: The keys are missing or too few, or not the ones that the metadata names.
        """
        path = manifest_path(model, version)
        metadata, delegator = self._current(current_targets, current_own)
        self._check_delegated(path, delegator)
        target = TargetFile.from_data(path, manifest, ["sha256"])
        existing = metadata.signed.targets.get(path)
        if existing is not None and not same_file(existing, target):
            raise ConflictError(f"{model} {version} is signed already, with another manifest", hint="use a new version")
        set_terms(target, Terms(rollback_floor))
        metadata.signed.targets[path] = target
        return self._sign_next(metadata, delegator)

    def sign_withdrawal(
        self, model: str, version: int, reason: str, current_targets: bytes, *, current_own: bytes | None = None
    ) -> bytes:
        """Return this role's next metadata, which says that no device may install a version any more; keep a copy.

        Raises:
            NotFoundError: This role has not signed such a version.
            InputError: There is no reason, or it is too long.
            TrustError: As `sign_manifest`.
            ConfigError: As `sign_manifest`.
        """
        path = manifest_path(model, version)
        metadata, delegator = self._current(current_targets, current_own)
        target = metadata.signed.targets.get(path)
        if target is None:
            raise NotFoundError(
                f"{self.role} has not signed {model}@{version}", hint="whoever published a version can withdraw it"
            )
        if not reason.strip():
            raise InputError("a withdrawal needs a reason", hint="--reason TEXT says why; devices and logs show it")
        set_terms(target, Terms(terms_of(target).rollback_floor, reason.strip()))
        return self._sign_next(metadata, delegator)

    def _current(self, current_targets: bytes, current_own: bytes | None) -> tuple[Metadata[Targets], Root | Targets]:
        """Return this role's current metadata and who delegates to it, after checking both."""
        targets = parse_signed_targets(current_targets, self.root)
        if self.role == Targets.type:
            self._check_not_older(targets.signed)
            return targets, self.root
        if current_own is None:
            own = Metadata(Targets(expires=self._clock()))
            own.signed.version = 0  # so that the next one is the first
        else:
            own = parse_signed_targets(current_own, targets.signed, self.role)
        self._check_not_older(own.signed)
        return own, targets.signed

    def _check_not_older(self, served: Targets) -> None:
        copy = self._folder / "tuf" / f"{self.role}.json"
        if not copy.exists() and self.role != Targets.type:
            return  # nothing was signed here yet
        here = parse(read_file(copy), Targets).signed
        # One behind is fine: the version that was signed last may have been refused by the cloud, or never got there.
        if served.version < here.version - 1:
            raise TrustError(
                f"the cloud serves {self.role} metadata {served.version}, older than what was signed here",
                reason="rollback",
                hint="the cloud was restored from an old backup, or tampered with; restore its newest tuf folder",
            )
        if served.version < here.version and served.delegations != here.delegations:
            raise ConflictError(
                "delegations that were signed here have not reached the cloud",
                reason="not-accepted",
                hint=f"isthmus cloud accept {copy}",
            )

    def _check_delegated(self, path: str, delegator: Root | Targets) -> None:
        if isinstance(delegator, Root):
            return
        roles = (delegator.delegations.roles or {}) if delegator.delegations is not None else {}
        role = roles.get(self.role)
        if role is None or not role.is_delegated_path(path):
            raise InputError(
                f"{path} is not delegated to {self.role}",
                hint="the organisation's operator delegates models with isthmus keys delegate",
                reason="not-delegated",
            )

    def _sign_next(self, metadata: Metadata[Targets], delegator: Root | Targets) -> bytes:
        metadata.signed.version += 1
        metadata.signed.expires = expiry(self._clock(), TARGETS_LIFETIME)
        try:
            signed = sign(metadata, *load_signers(self._folder, self.role, delegator, self._keys))
        except ValueError as error:
            raise ConfigError(f"nothing is delegated to {self.role}", hint="isthmus keys delegate does that") from error
        replace_file(self._folder / "tuf" / f"{self.role}.json", signed)
        return signed


@dataclass(slots=True)
class _State:
    """What the cloud serves: the newest root, and what lists manifests by role."""

    root: Root
    roles: dict[str, Metadata[Targets]]
    meta: dict[str, MetaFile]
    roots: dict[str, bytes] = field(default_factory=dict)  # new ones, by file name
    files: dict[str, bytes] = field(default_factory=dict)  # new ones, by role


class CloudRepository:
    """The cloud's side: what devices fetch; safe to use from several threads, and clouds that share the folder.

    Args:
        cloud_dir: The workspace's `cloud` folder.
        clock: The time.

    Raises:
        ConfigError: The folder holds no repository, or its keys are not those that the root names.
    """

    def __init__(self, cloud_dir: Path, *, clock: Callable[[], datetime] = _wall_clock) -> None:
        self._keys = cloud_dir
        self._folder = cloud_dir / "tuf"
        self._clock = clock
        self._lock = threading.Lock()
        self._signers(newest_root(self._folder).signed)

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

    def targets_json(self, role: str = Targets.type) -> bytes:
        """Return the current metadata of a role that lists manifests.

        Raises:
            NotFoundError: It has published nothing.
        """
        entry = self._current_snapshot().meta.get(f"{role}.json")
        if entry is None:
            raise NotFoundError(f"there is no {role[:80]} metadata")
        return read_file(self._folder / f"{entry.version}.{role}.json")

    def listed(self) -> dict[str, TargetFile]:
        """Return what the operators say about every version, by target path, by the rules that devices use."""
        state = self._state()
        targets = state.roles[Targets.type].signed
        found = {
            path: target
            for role, metadata in state.roles.items()
            for path, target in metadata.signed.targets.items()
            if role == Targets.type or _may_list(targets, role, path)
        }
        return found | targets.targets

    def terms(self) -> dict[str, Terms]:
        """Return the terms of every version, by target path."""
        return {path: terms_of(target) for path, target in self.listed().items()}

    def accept_targets(self, targets_json: bytes, role: str = Targets.type) -> None:
        """Check that this may become the next metadata of a role that lists manifests.

        Raises:
            TrustError: It is not signed by the role's keys, expired, or changes or removes a target.
            ConflictError: It does not follow the current version: somebody else published.
        """
        self._next({f"{role}.json": targets_json})

    def commit(self, targets_json: bytes, role: str = Targets.type) -> None:
        """Make this the current metadata of a role that lists manifests.

        Raises:
            TrustError: It is not acceptable.
            ConflictError: It does not follow the current version.
        """
        self.commit_all({f"{role}.json": targets_json})

    def commit_all(self, offered: Mapping[str, bytes], *, known_only: bool = False) -> None:
        """Make all of these current, or none.

        Args:
            offered: Files by name: any number of "N.root.json", "targets.json", "publisher-NAME.json".
            known_only: Refuse manifests that are not listed yet: a version becomes known by being published.

        Raises:
            TrustError: One is not acceptable, or leaves what is served without enough signatures.
            ConflictError: One does not follow the current version.
            ConfigError: The cloud does not hold the snapshot and timestamp keys that a new root names.
        """
        with self._alone():
            before = self._state()
            state = self._next(offered)
            if known_only:
                _check_no_new_manifests(before, state)
            self._write(state, self._clock())

    def refresh_if_due(self, now: datetime) -> bool:
        """Sign timestamp and snapshot anew when half of their lifetime is over; return whether that was so."""
        with self._alone():
            root = newest_root(self._folder).signed
            timestamp = parse(read_file(self._folder / _TIMESTAMP), Timestamp)
            snapshot = self._current_snapshot_metadata()
            if _is_due(snapshot.signed, SNAPSHOT_LIFETIME, now) or not _is_signed(Snapshot.type, snapshot, root):
                self._write(self._state(), now)
            elif _is_due(timestamp.signed, TIMESTAMP_LIFETIME, now) or not _is_signed(Timestamp.type, timestamp, root):
                snapshot_json = read_file(self._folder / f"{timestamp.signed.snapshot_meta.version}.snapshot.json")
                _write_timestamp(self._folder, snapshot_json, timestamp.signed.version + 1, self._signers(root)[1], now)
            else:
                return False
            return True

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Keep all others out, other clouds on a shared folder too (flock, which NFS knows as well)."""
        with self._lock, (self._folder / _LOCK).open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def _state(self) -> _State:
        meta = dict(self._current_snapshot().meta)
        roles = {
            role: parse(read_file(self._folder / f"{entry.version}.{role}.json"), Targets)
            for role, entry in ((name.removesuffix(".json"), entry) for name, entry in meta.items())
        }
        return _State(newest_root(self._folder).signed, roles, meta)

    def _next(self, offered: Mapping[str, bytes]) -> _State:
        """Return the state after taking these files, in the order in which devices take them."""
        state, now = self._state(), self._clock()
        roots = {name: data for name, data in offered.items() if _ROOT_NAME.fullmatch(name)}
        for name, data in sorted(roots.items(), key=lambda item: int(item[0].split(".")[0])):
            state.root = checked_root(data, state.root)
            if name != f"{state.root.version}.root.json":
                raise TrustError(f"{name} holds root {state.root.version}", reason="malformed-metadata")
            state.roots[name] = data
        if state.root.is_expired(now):
            raise TrustError(f"the root metadata expired at {state.root.expires}", reason="expired-metadata")
        rest = {name.removesuffix(".json"): data for name, data in offered.items() if name not in roots}
        if stray := [role for role in rest if not is_role_of_targets(role)]:
            raise TrustError(f"{stray[0][:80]!r} is no metadata that an operator signs", reason="malformed-metadata")
        for role in sorted(rest, key=lambda role: role != Targets.type):
            _take_targets(state, role, rest[role], now)
        if roots:
            self._signers(state.root)
            verify(Targets.type, state.roles[Targets.type], state.root)  # a new root may have taken its keys away
        return state

    def _write(self, state: _State, now: datetime) -> None:
        timestamp = parse(read_file(self._folder / _TIMESTAMP), Timestamp).signed
        snapshot_version = timestamp.snapshot_meta.version + 1
        snapshot_signers, timestamp_signers = self._signers(state.root)
        for role, data in state.files.items():
            replace_file(self._folder / f"{state.roles[role].signed.version}.{role}.json", data)
        snapshot = Snapshot(version=snapshot_version, expires=expiry(now, SNAPSHOT_LIFETIME), meta=state.meta)
        snapshot_json = sign(Metadata(snapshot), *snapshot_signers)
        replace_file(self._folder / f"{snapshot_version}.snapshot.json", snapshot_json)
        for name, data in state.roots.items():
            replace_file(self._folder / name, data)
        _write_timestamp(self._folder, snapshot_json, timestamp.version + 1, timestamp_signers, now)

    def _signers(self, root: Root) -> tuple[list[CryptoSigner], list[CryptoSigner]]:
        return load_signers(self._keys, Snapshot.type, root), load_signers(self._keys, Timestamp.type, root)

    def _current_snapshot(self) -> Snapshot:
        return self._current_snapshot_metadata().signed

    def _current_snapshot_metadata(self) -> Metadata[Snapshot]:
        timestamp = parse(read_file(self._folder / _TIMESTAMP), Timestamp).signed
        return parse(read_file(self._folder / f"{timestamp.snapshot_meta.version}.snapshot.json"), Snapshot)


def checked_root(root_json: bytes, current: Root) -> Root:
    """Return the root that follows another.

    Raises:
        TrustError: It is none, is not the very next version, or too few keys of the old or the new one signed it.
    """
    metadata = parse(root_json, Root)
    if metadata.signed.version != current.version + 1:
        raise TrustError(f"expected root {current.version + 1}, got {metadata.signed.version}", reason="stale-metadata")
    verify(Root.type, metadata, current)
    verify(Root.type, metadata, metadata.signed)
    if not metadata.signed.consistent_snapshot:
        raise TrustError("the root does not ask for consistent snapshots", reason="malformed-metadata")
    return metadata.signed


def newest_root(folder: Path) -> Metadata[Root]:
    """Return the newest root of a folder.

    Raises:
        ConfigError: There is none.
    """
    versions = [int(path.name.split(".")[0]) for path in folder.glob("*.root.json") if is_metadata_name(path.name)]
    if not versions:
        raise ConfigError(
            f"{folder} holds no root metadata", hint="`isthmus keys init DIR --host NAME` makes a workspace"
        )
    return parse(read_file(folder / f"{max(versions)}.root.json"), Root)


def expiry(now: datetime, lifetime: timedelta) -> datetime:
    """Return when metadata that is signed now expires; TUF counts whole seconds."""
    return (now.astimezone(UTC) + lifetime).replace(microsecond=0)


def _take_targets(state: _State, role: str, data: bytes, now: datetime) -> None:
    """Put a role's next metadata into the state, checked."""
    delegator: Root | Targets = state.root if role == Targets.type else state.roles[Targets.type].signed
    offered = parse_signed_targets(data, delegator, role)
    known = state.roles.get(role)
    version = 0 if known is None else known.signed.version
    if offered.signed.version != version + 1:
        raise ConflictError(
            f"expected {role} metadata {version + 1}, got {offered.signed.version}",
            reason="stale-metadata",
            hint="somebody else published in the meantime; publish again",
        )
    if offered.signed.is_expired(now):
        raise TrustError(f"the {role} metadata expired at {offered.signed.expires}", reason="expired-metadata")
    for path, target in {} if known is None else known.signed.targets.items():
        if not same_file(offered.signed.targets.get(path), target):
            raise TrustError(f"the {role} metadata changes or removes {path}", reason="target-changed")
    for path, target in offered.signed.targets.items():
        if not is_target_path(path):
            raise TrustError(f"expected MODEL/VERSION/manifest.json as target, got {path[:120]!r}")
        is_new = known is None or path not in known.signed.targets
        if is_new and not isinstance(delegator, Root) and not _may_list(delegator, role, path):
            raise TrustError(f"{path} is not delegated to {role}", reason="not-delegated")
        terms_of(target)
    state.roles[role] = offered
    state.files[role] = data
    state.meta[f"{role}.json"] = MetaFile.from_data(offered.signed.version, data, ["sha256"])


def _may_list(targets: Targets, role: str, path: str) -> bool:
    """Return whether devices would ask this publisher about the path: it is the first to whom it is delegated."""
    if targets.delegations is None:
        return False
    return next((name for name, _ in targets.delegations.get_roles_for_target(path)), None) == role


def _check_no_new_manifests(before: _State, after: _State) -> None:
    known = {path for metadata in before.roles.values() for path in metadata.signed.targets}
    new = {path for metadata in after.roles.values() for path in metadata.signed.targets} - known
    if new:
        raise TrustError(
            f"{min(new)} has not been published",
            reason="not-published",
            hint="isthmus model publish makes a version known, with its files",
        )


def _write_timestamp(
    folder: Path, snapshot_json: bytes, version: int, signers: Sequence[CryptoSigner], now: datetime
) -> None:
    snapshot_version = parse(snapshot_json, Snapshot).signed.version
    timestamp = Timestamp(
        version=version,
        expires=expiry(now, TIMESTAMP_LIFETIME),
        snapshot_meta=MetaFile.from_data(snapshot_version, snapshot_json, ["sha256"]),
    )
    replace_file(folder / _TIMESTAMP, sign(Metadata(timestamp), *signers))


def _is_signed(role: str, metadata: Metadata[Snapshot] | Metadata[Timestamp], root: Root) -> bool:
    return bool(root.get_verification_result(role, metadata.signed_bytes, metadata.signatures))


def _is_due(signed: Signed, lifetime: timedelta, now: datetime) -> bool:
    return signed.expires - now < lifetime / 2
