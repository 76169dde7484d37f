"""Changing who may sign: roots that several holders sign in turn, key rotation, and publishers of single models.

A new root is a candidate first, `operator/tuf/candidate.root.json`. Each holder signs it, on whatever machine their key
is on; any change throws the signatures away. It becomes `N.root.json` when enough keys of the root before it AND of
itself have signed (the rule by which devices follow it). Nothing here talks to a cloud: `isthmus cloud accept` does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ed25519
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_public_key

from isthmus.errors import ConflictError, InputError, NotFoundError, TrustError
from security.keyfiles import make_private_folder, read_file, replace_file, save_private_key
from security.metadata import (
    PUBLISHER,
    ROOT_LIFETIME,
    TARGETS_LIFETIME,
    DelegatedRole,
    Delegations,
    Key,
    Metadata,
    Root,
    Snapshot,
    Targets,
    Timestamp,
    delegated_path,
    is_role_of_targets,
    key_of,
    load_signer,
    load_signers,
    parse,
    parse_signed_targets,
    sign,
    sign_also,
    verify,
)
from security.repository import expiry, newest_root

CANDIDATE: Final = "candidate.root.json"
ROLES: Final = (Root.type, Targets.type, Snapshot.type, Timestamp.type)


@dataclass(frozen=True, slots=True)
class Progress:
    """Where a root is on its way: it is in force when nothing is missing."""

    version: int
    file: Path
    signed: int
    missing: int

    @property
    def complete(self) -> bool:
        """Return whether enough keys have signed."""
        return self.missing == 0


@dataclass(frozen=True, slots=True)
class RoleKeys:
    """Who signs for a role; `expires_at` is that of what they signed last, where that is known here."""

    role: str
    keyids: tuple[str, ...]
    threshold: int
    paths: tuple[str, ...] = ()
    expires_at: datetime | None = None


def new_key_pair(path: Path) -> Path:
    """Make a private key file, and its public half beside it with the suffix .pub; return the public one.

    Raises:
        ConflictError: There is a file already.
    """
    key = ed25519.Ed25519PrivateKey.generate()
    save_private_key(path, key)
    public = path.with_suffix(".pub")
    replace_file(public, key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    return public


def load_public_key(path: Path) -> Key:
    """Read an Ed25519 public key in PEM.

    Raises:
        InputError: It is none.
        ConfigError: It cannot be read.
    """
    try:
        key = load_pem_public_key(read_file(path, hint="isthmus keys new FILE makes a key pair, FILE and FILE.pub"))
    except (ValueError, UnsupportedAlgorithm) as error:
        raise InputError(f"{path} is no public key in PEM") from error
    if not isinstance(key, ed25519.Ed25519PublicKey):
        raise InputError(f"{path}: expected an Ed25519 public key")
    return key_of(key)


def new_publisher(folder: Path, name: str, root_json: bytes) -> Path:
    """Make an operator folder for somebody who will publish delegated models; return the public key's file.

    Raises:
        InputError: The name is unusable.
        ConflictError: There is a key already.
        TrustError: `root_json` is no root.
    """
    role = PUBLISHER + name
    if not is_role_of_targets(role):
        raise InputError(f"expected a name of letters, digits, dots, dashes and underscores, got {name[:80]!r}")
    root = parse(root_json, Root).signed
    make_private_folder(folder)
    public = new_key_pair(folder / f"{role}.key")
    make_private_folder(folder / "tuf")
    replace_file(folder / "tuf" / f"{root.version}.root.json", root_json)
    return public


def sign_file(path: Path, key: Path) -> Progress:
    """Add one holder's signature to a root candidate, in place; whether it is enough shows at `Ceremony.finish`.

    Raises:
        TrustError: It is no root.
    """
    metadata = parse(read_file(path), Root)
    sign_also(metadata, load_signer(key))
    replace_file(path, metadata.to_bytes())
    return Progress(metadata.signed.version, path, len(metadata.signatures), _missing(metadata, metadata.signed))


class Ceremony:
    """The operator folder, seen as what says who may sign.

    Args:
        operator_dir: The workspace's operator folder.
        keys: Key files that are elsewhere, for example on USB sticks.
        clock: The time.
    """

    def __init__(
        self,
        operator_dir: Path,
        *,
        keys: Sequence[Path] = (),
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self._folder, self._keys, self._clock = operator_dir, tuple(keys), clock
        self._tuf = operator_dir / "tuf"

    @property
    def candidate(self) -> Path:
        """Return where a root waits for signatures."""
        return self._tuf / CANDIDATE

    @property
    def targets(self) -> Path:
        """Return where the targets metadata is that was signed here last."""
        return self._tuf / "targets.json"

    def roles(self) -> list[RoleKeys]:
        """Return who signs for what now, publishers included."""
        root = newest_root(self._tuf).signed
        targets = parse(read_file(self.targets), Targets).signed if self.targets.exists() else None
        expiries = {Root.type: root.expires} | ({} if targets is None else {Targets.type: targets.expires})
        rows = [
            RoleKeys(name, tuple(root.roles[name].keyids), root.roles[name].threshold, expires_at=expiries.get(name))
            for name in ROLES
        ]
        delegations = None if targets is None else targets.delegations
        publishers = (delegations.roles or {}).values() if delegations is not None else ()
        return rows + [
            RoleKeys(role.name, tuple(role.keyids), role.threshold, tuple(role.paths or ())) for role in publishers
        ]

    def add(self, role: str, key: Key, threshold: int | None = None) -> Progress:
        """Let one more key sign for a role.

        Raises:
            InputError: There is no such role, or the threshold does not fit its keys.
        """
        return self._change(lambda root: root.add_key(key, _known(role)), role, threshold)

    def revoke(self, role: str, keyid: str, threshold: int | None = None) -> Progress:
        """Let a key no longer sign for a role; `keyid` may be its first characters.

        Raises:
            NotFoundError: The role has no such key.
            InputError: It would leave the role with fewer keys than must sign.
        """
        return self._change(lambda root: root.revoke_key(_keyid(root, role, keyid), _known(role)), role, threshold)

    def rotate(self, role: str, key: Key, old: str | None = None) -> Progress:
        """Replace a role's key by another; `old` names it where there are several.

        Raises:
            InputError: The role has several keys and none was named.
            NotFoundError: It has no such key.
        """

        def change(root: Root) -> None:
            keyids = root.roles[_known(role)].keyids
            if old is None and len(keyids) != 1:
                raise InputError(f"{role} has {len(keyids)} keys", hint="--old KEYID names the one to replace")
            gone = keyids[0] if old is None else _keyid(root, role, old)
            root.add_key(key, role)
            root.revoke_key(gone, role)

        return self._change(change, role, None)

    def renew(self) -> Progress:
        """Start a root that differs from the last one only in when it expires."""
        return self._change(lambda _: None, Root.type, None)

    def finish(self) -> Progress:
        """Sign the candidate with the keys that are here; put it into force when that is enough.

        Raises:
            NotFoundError: No root waits for signatures.
        """
        if not self.candidate.exists():
            raise NotFoundError("no root waits for signatures", hint="isthmus keys renew starts one")
        metadata = parse(read_file(self.candidate), Root)
        current = newest_root(self._tuf).signed
        if metadata.signed.version != current.version + 1:
            raise TrustError(f"the candidate is root {metadata.signed.version}, expected {current.version + 1}")
        allowed = {*current.roles[Root.type].keyids, *metadata.signed.roles[Root.type].keyids}
        for path in (*self._folder.glob("root.key"), *self._folder.glob("root-*.key"), *self._keys):
            signer = load_signer(path)
            if signer.public_key.keyid in allowed:
                sign_also(metadata, signer)
        return self._settle(metadata, current)

    def sign_targets(self, change: Callable[[Targets], None]) -> Path:
        """Sign the next targets metadata with one thing changed; return its file, for `isthmus cloud accept`.

        Raises:
            ConfigError: Too few targets keys are here.
        """
        root = newest_root(self._tuf).signed
        metadata = parse(read_file(self.targets), Targets)
        change(metadata.signed)
        metadata.signed.version += 1
        metadata.signed.expires = expiry(self._clock(), TARGETS_LIFETIME)
        signed = sign(metadata, *load_signers(self._folder, Targets.type, root, self._keys))
        parse_signed_targets(signed, root)
        replace_file(self.targets, signed)
        return self.targets

    def renew_targets(self) -> Path:
        """Sign the targets metadata anew: with the keys that the newest root names, for another lifetime."""
        return self.sign_targets(lambda _: None)

    def delegate(self, pattern: str, name: str, keys: Sequence[Key], threshold: int = 1) -> Path:
        """Let a publisher, and nobody else but this operator, publish the models of a pattern; return the file.

        A publisher who is known gets these keys instead of the old ones, and the pattern beside the old ones.

        Raises:
            InputError: The pattern or the name is unusable, or the threshold does not fit the keys.
        """
        path, role = delegated_path(pattern), PUBLISHER + name
        if not is_role_of_targets(role):
            raise InputError(f"expected a name of letters, digits, dots, dashes and underscores, got {name[:80]!r}")
        if not 1 <= threshold <= len({key.keyid for key in keys}):
            raise InputError(f"expected a threshold of 1 to {len(keys)}, got {threshold}")

        def change(targets: Targets) -> None:
            delegations = targets.delegations or Delegations({}, {})
            roles = dict(delegations.roles or {})
            paths = list(roles[role].paths or []) if role in roles else []
            roles[role] = DelegatedRole(
                role, [key.keyid for key in keys], threshold, terminating=True, paths=[*dict.fromkeys([*paths, path])]
            )
            targets.delegations = _delegations(roles, {**delegations.keys, **{key.keyid: key for key in keys}})

        return self.sign_targets(change)

    def undelegate(self, name: str) -> Path:
        """Take all models from a publisher; what was published stays signed, but devices no longer find it.

        Raises:
            NotFoundError: There is no such publisher.
        """

        def change(targets: Targets) -> None:
            roles = dict(targets.delegations.roles or {}) if targets.delegations is not None else {}
            if roles.pop(PUBLISHER + name, None) is None or targets.delegations is None:
                raise NotFoundError(f"nothing is delegated to {name[:80]}", hint="isthmus keys show lists publishers")
            targets.delegations = _delegations(roles, targets.delegations.keys) if roles else None

        return self.sign_targets(change)

    def _change(self, change: Callable[[Root], object], role: str, threshold: int | None) -> Progress:
        current = newest_root(self._tuf).signed
        if self.candidate.exists():
            metadata = parse(read_file(self.candidate), Root)
            if metadata.signed.version != current.version + 1:
                raise ConflictError(f"{self.candidate} is left from another ceremony", hint="delete it")
        else:
            metadata = newest_root(self._tuf)
            metadata.signed.version += 1
        try:
            change(metadata.signed)
        except ValueError as error:
            raise InputError(str(error)) from error
        keys = metadata.signed.roles[role]
        keys.threshold = threshold if threshold is not None else keys.threshold
        if not 1 <= keys.threshold <= len(keys.keyids):
            raise InputError(
                f"{role} would have {len(keys.keyids)} keys, and {keys.threshold} would have to sign",
                hint="--threshold N sets how many must sign",
            )
        metadata.signed.expires = expiry(self._clock(), ROOT_LIFETIME)
        metadata.signatures.clear()
        replace_file(self.candidate, metadata.to_bytes())
        return self.finish()

    def _settle(self, metadata: Metadata[Root], current: Root) -> Progress:
        version, count = metadata.signed.version, len(metadata.signatures)
        replace_file(self.candidate, metadata.to_bytes())
        missing = max(_missing(metadata, current), _missing(metadata, metadata.signed))
        if missing:
            return Progress(version, self.candidate, count, missing)
        verify(Root.type, metadata, current)
        path = self._tuf / f"{version}.root.json"
        replace_file(path, metadata.to_bytes())
        self.candidate.unlink()
        return Progress(version, path, count, 0)


def _missing(metadata: Metadata[Root], by: Root) -> int:
    result = by.get_verification_result(Root.type, metadata.signed_bytes, metadata.signatures)
    return max(result.threshold - len(result.signed), 0)


def _known(role: str) -> str:
    if role not in ROLES:
        raise InputError(f"expected a role of {', '.join(ROLES)}, got {role[:40]!r}")
    return role


def _keyid(root: Root, role: str, prefix: str) -> str:
    found = [keyid for keyid in root.roles[_known(role)].keyids if keyid.startswith(prefix)]
    if len(found) != 1 or len(prefix) < 6:
        raise NotFoundError(f"{role} has no single key {prefix[:70]!r}", hint="isthmus keys show lists the key ids")
    return found[0]


def _delegations(roles: dict[str, DelegatedRole], keys: dict[str, Key]) -> Delegations:
    used = {keyid for role in roles.values() for keyid in role.keyids}
    return Delegations({keyid: key for keyid, key in keys.items() if keyid in used}, roles)
