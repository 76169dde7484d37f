"""The device's side of signed updates: which manifest is the one that the operator published, and on which terms.

`tuf.ngclient` does the work: it follows the chain from the root that came with enrolment to the targets metadata, and
refuses what is unsigned, expired, older than what was seen before, or longer than announced. What it has seen stays in
`metadata_dir`, so that a rollback is noticed after a restart, too. What is added here: each attack gets its own reason
code, so that an operator can tell a stolen key from a clock that is wrong (`_reason`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final
from urllib.parse import unquote, urlsplit

from tuf.api import exceptions as tuf_errors
from tuf.ngclient.config import UpdaterConfig
from tuf.ngclient.fetcher import FetcherInterface
from tuf.ngclient.updater import Updater

from isthmus.errors import ConfigError, DigestMismatchError, IsthmusError, NotFoundError, TrustError, UnavailableError
from security.custom import terms_of
from security.metadata import MAX_METADATA_BYTES, Metadata, Root, Snapshot, Targets, Timestamp, manifest_path, parse

MAX_MANIFEST_BYTES: Final = 4 << 20
_SECOND: Final = timedelta(seconds=1)
_METADATA_URL: Final = "isthmus:///metadata/"
_TARGETS_URL: Final = "isthmus:///targets/"


@dataclass(frozen=True, slots=True)
class SignedTarget:
    """A bundle version as the operator signed it.

    Args:
        manifest: The manifest's bytes.
        rollback_floor: The oldest version to which a device that ran this one may go back; 0: it never goes back.
        withdrawn: Why no device may install it; empty: it may.
    """

    manifest: bytes
    rollback_floor: int
    withdrawn: str


def _wall_clock() -> datetime:
    return datetime.now(UTC)


class TrustedManifests:
    """Manifests that the operator signed; blocking, and for one thread at a time.

    Args:
        metadata_dir: Where verified metadata and manifests are kept.
        root: The root metadata that this device was given when it was enrolled.
        fetch: Yields the bytes of a metadata file by its name, or of a target for "targets/<sha256>".
        clock: The time, for what has expired.
        accept_stale: Whether timestamp and snapshot may have expired, for metadata that was carried here. Whoever says
            so vouches for its age: nothing older than what was seen before is taken, and root and targets must not have
            expired.
    """

    def __init__(
        self,
        metadata_dir: Path,
        root: bytes,
        fetch: Callable[[str], Iterator[bytes]],
        *,
        clock: Callable[[], datetime] = _wall_clock,
        accept_stale: bool = False,
    ) -> None:
        self._accept_stale = accept_stale
        self._metadata = metadata_dir / "metadata"
        self._targets = metadata_dir / "targets"
        self._root = root
        self._fetch = fetch
        self._clock = clock

    def manifest(self, model: str, version: int) -> bytes:
        """Return the verified manifest of a version that may be installed, after looking for newer metadata.

        Raises:
            TrustError: As `target`; or the operator has withdrawn the version (`withdrawn`).
            DigestMismatchError: As `target`.
            UnavailableError: As `target`.
            InputError: As `target`.
        """
        signed = self.target(model, version)
        if signed.withdrawn:
            raise TrustError(f"{model} {version} was withdrawn: {signed.withdrawn}", reason="withdrawn")
        return signed.manifest

    def target(self, model: str, version: int) -> SignedTarget:
        """Return what the operator signed for a version, withdrawn or not, after looking for newer metadata.

        Raises:
            TrustError: The metadata is expired, unsigned, rolled back or malformed, or names no such version; `reason`
                says which.
            DigestMismatchError: The manifest is not the one that was signed for.
            UnavailableError: The registry cannot be reached, or lacks a file that it should have.
            InputError: The model's name or version is unusable.
        """
        path = manifest_path(model, version)
        fetcher = _Fetcher(self._fetch)
        try:
            self._metadata.mkdir(parents=True, exist_ok=True)
            self._targets.mkdir(parents=True, exist_ok=True)
            now = self._clock()
            updater = self._updater(fetcher, self._stale_time(now) if self._accept_stale else now)
            try:
                return _verified(updater, path, now)
            except (tuf_errors.RepositoryError, tuf_errors.DownloadLengthMismatchError) as error:
                reason = _reason(error, updater.trusted, fetcher, self._metadata)
                if reason == "digest-mismatch":
                    raise DigestMismatchError(f"{path}: the bytes are not those that were signed for") from error
                raise TrustError(f"{path}: the signed metadata is not acceptable: {error}", reason=reason) from error
        except tuf_errors.RepositoryError as error:  # the root that came with enrolment, or that is kept here
            raise TrustError(f"the device's root metadata is not one: {error}", reason="malformed-metadata") from error
        except tuf_errors.DownloadHTTPError as error:
            raise UnavailableError(f"{path}: there is no {fetcher.last_name}", reason="metadata-missing") from error
        except tuf_errors.DownloadError as error:
            raise UnavailableError(f"{path}: the download failed: {error}") from error
        except OSError as error:
            raise ConfigError(f"cannot keep metadata in {self._metadata}: {error.strerror}") from error

    def _stale_time(self, now: datetime) -> datetime:
        """Return the last moment at which timestamp and snapshot, as they are served, had not expired.

        Nothing is verified here: a forged file can only choose a time, and what is refused at every time stays refused.
        """
        timestamp = parse(self._small("timestamp.json"), Timestamp).signed
        snapshot = parse(self._small(f"{timestamp.snapshot_meta.version}.snapshot.json"), Snapshot).signed
        return min(now, timestamp.expires - _SECOND, snapshot.expires - _SECOND)

    def _small(self, name: str) -> bytes:
        data = b""
        try:
            for chunk in self._fetch(name):
                data += chunk
                if len(data) > MAX_METADATA_BYTES:
                    raise TrustError(f"{name}: expected at most {MAX_METADATA_BYTES} bytes", reason="too-long")
        except NotFoundError as error:
            raise UnavailableError(f"there is no {name}", reason="metadata-missing") from error
        return data

    def _updater(self, fetcher: _Fetcher, now: datetime) -> _Updater:
        return _Updater(  # it refreshes once, so each look takes a new one
            str(self._metadata),
            _METADATA_URL,
            target_dir=str(self._targets),
            target_base_url=_TARGETS_URL,
            fetcher=fetcher,
            config=UpdaterConfig(app_user_agent="isthmus"),
            bootstrap=self._root,
            now=now,
        )


class _Updater(Updater):
    """tuf.ngclient's updater, which reads the wall clock when it is made, with a clock that is given instead."""

    def __init__(self, *args: Any, now: datetime, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.trusted = self._trusted_set
        self.trusted.reference_time = now  # expiry is checked against this, and only from refresh() on

    def check_operators(self, now: datetime) -> None:
        """Check that nothing that operators signed has expired, where the cloud's files are let off."""
        if any(isinstance(signed, Root | Targets) and signed.is_expired(now) for signed in self.trusted):
            raise tuf_errors.ExpiredMetadataError("root or targets metadata is expired")


def _verified(updater: _Updater, path: str, now: datetime) -> SignedTarget:
    updater.refresh()
    info = updater.get_targetinfo(path)
    updater.check_operators(now)
    if info is None:
        raise TrustError(f"{path} is not among the signed manifests", reason="not-published")
    if info.length > MAX_MANIFEST_BYTES or set(info.hashes) != {"sha256"}:
        raise TrustError(f"{path}: expected a SHA-256 and at most {MAX_MANIFEST_BYTES} bytes")
    terms = terms_of(info)
    kept = updater.find_cached_target(info) or updater.download_target(info)
    return SignedTarget(Path(kept).read_bytes(), terms.rollback_floor, terms.withdrawn)


class _Fetcher(FetcherInterface):
    """Answers tuf.ngclient's URLs from a fetch function; our own errors pass through it as they are.

    It keeps what it fetched last: that is what an error is about.
    """

    def __init__(self, fetch: Callable[[str], Iterator[bytes]]) -> None:
        self._fetch_name = fetch
        self.last_name = ""
        self.last_bytes = b""

    def _fetch(self, url: str) -> Iterator[bytes]:
        self.last_name = _name_of(url)
        self.last_bytes = b""
        try:
            for chunk in self._fetch_name(self.last_name):
                self.last_bytes += chunk  # tuf.ngclient limits how much it takes
                yield chunk
        except NotFoundError as error:
            raise tuf_errors.DownloadHTTPError(f"there is no {url}", 404) from error
        except IsthmusError:
            raise
        except OSError as error:
            raise UnavailableError(f"cannot fetch {url}: {error}") from error

    @property
    def role(self) -> str:
        """Return the role of the metadata file that came last; empty: it was a target."""
        return (
            ""
            if self.last_name.startswith("targets/")
            else self.last_name.removesuffix(".json").lstrip("0123456789").lstrip(".")
        )


def _name_of(url: str) -> str:
    folder, _, name = urlsplit(url).path.rpartition("/")
    if folder.startswith("/targets"):
        return f"targets/{name.split('.')[0]}"  # consistent snapshots: <sha256>.manifest.json
    return unquote(name)


def _reason(error: Exception, trusted: Any, fetcher: _Fetcher, metadata_dir: Path) -> str:
    """Return the reason code of what tuf.ngclient refused. It tells more than the error's type: what came last."""
    if isinstance(error, tuf_errors.DownloadLengthMismatchError):
        return "too-long"
    if isinstance(error, tuf_errors.ExpiredMetadataError):
        return _reason_expired(trusted)
    if isinstance(error, tuf_errors.UnsignedMetadataError):
        return _reason_unsigned(fetcher, trusted, metadata_dir)
    if isinstance(error, tuf_errors.BadVersionNumberError):
        return "mix-and-match" if _is_other_version(fetcher, trusted) else "rollback"
    if isinstance(error, tuf_errors.LengthOrHashMismatchError):
        # A file that its own role did sign, but not the one that belongs here: parts of two states of the repository.
        return "mix-and-match" if fetcher.role and _signers(fetcher, trusted)[0] else "digest-mismatch"
    if "not part of snapshot" in str(error):
        return "not-published"  # a publisher who was appointed, and has published nothing yet
    if "missing info" in str(error):
        return "rollback"  # a snapshot that has forgotten a role
    return "malformed-metadata"


def _reason_expired(trusted: Any) -> str:
    """Return "freeze" when what the cloud signs has expired: somebody holds back what is new, or it is down."""
    if trusted.root.is_expired(trusted.reference_time):
        return "expired-metadata"
    frozen = any(role in trusted and trusted[role].is_expired(trusted.reference_time) for role in _CLOUDS_ROLES)
    return "freeze" if frozen else "expired-metadata"


_CLOUDS_ROLES: Final = (Timestamp.type, Snapshot.type)


def _reason_unsigned(fetcher: _Fetcher, trusted: Any, metadata_dir: Path) -> str:
    good, keyids = _signers(fetcher, trusted)
    if good:
        return "wrong-threshold"
    role = trusted.root.roles.get(fetcher.role)
    former = set() if role is None else _former_keys(fetcher.role, metadata_dir) - set(role.keyids)
    return "revoked-key" if keyids & former else "unsigned"


def _signers(fetcher: _Fetcher, trusted: Any) -> tuple[set[str], set[str]]:
    """Return the keys of the role whose signatures under what came last are good, and all keys that it names."""
    try:
        metadata = Metadata[Any].from_bytes(fetcher.last_bytes)
        delegator = next(
            (signed for signed in trusted if isinstance(signed, Root | Targets) and _delegates(signed, fetcher.role)),
            trusted.root,
        )
        result = delegator.get_verification_result(fetcher.role, metadata.signed_bytes, metadata.signatures)
    except (tuf_errors.RepositoryError, ValueError):
        return set(), set()
    return set(result.signed), set(metadata.signatures)


def _delegates(signed: Root | Targets, role: str) -> bool:
    try:
        signed.get_delegated_role(role)
    except ValueError:
        return False
    return True


def _former_keys(role: str, metadata_dir: Path) -> set[str]:
    """Return the keys that any root which this device has followed named for a role."""
    keys: set[str] = set()
    for path in (metadata_dir / "root_history").glob("*.root.json"):
        try:
            root = parse(path.read_bytes(), Root).signed
        except TrustError:
            continue  # rotten: tuf.ngclient fetches it again
        keys |= set(root.roles[role].keyids) if role in root.roles else set()
    return keys


def _is_other_version(fetcher: _Fetcher, trusted: Any) -> bool:
    """Return whether snapshot or targets metadata came in another version than the one above it announces."""
    try:
        version = Metadata[Any].from_bytes(fetcher.last_bytes).signed.version
    except tuf_errors.RepositoryError:
        return False
    if fetcher.role == Snapshot.type:
        return bool(version != trusted.timestamp.snapshot_meta.version)
    if fetcher.role in {Root.type, Timestamp.type} or Snapshot.type not in trusted:
        return False
    announced = trusted.snapshot.meta.get(f"{fetcher.role}.json")
    return announced is not None and bool(version != announced.version)
