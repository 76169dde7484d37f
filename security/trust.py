"""The device's side of signed updates: which manifest is the one that the operator published.

`tuf.ngclient` does the work: it follows the chain from the root that came with enrolment to the targets metadata, and
refuses what is unsigned, expired, older than what was seen before, or longer than announced. What it has seen stays in
`metadata_dir`, so that a rollback is noticed after a restart, too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

from tuf.api import exceptions as tuf_errors
from tuf.ngclient.config import UpdaterConfig
from tuf.ngclient.fetcher import FetcherInterface
from tuf.ngclient.updater import Updater

from isthmus.errors import ConfigError, DigestMismatchError, IsthmusError, NotFoundError, TrustError, UnavailableError
from security.metadata import manifest_path

MAX_MANIFEST_BYTES: Final = 4 << 20
_METADATA_URL: Final = "isthmus:///metadata/"
_TARGETS_URL: Final = "isthmus:///targets/"

# Most specific first; what is not here is malformed metadata.
_REASONS: Final[tuple[tuple[type[Exception], str], ...]] = (
    (tuf_errors.ExpiredMetadataError, "expired-metadata"),
    (tuf_errors.UnsignedMetadataError, "unsigned"),
    (tuf_errors.BadVersionNumberError, "rollback"),
    (tuf_errors.DownloadLengthMismatchError, "too-long"),
    (tuf_errors.RepositoryError, "malformed-metadata"),
)


@dataclass(frozen=True, slots=True)
class SignedTarget:
    """A manifest, and what the operator signed about it."""

    manifest: bytes
    rollback_floor: int = 0  # devices that ran this version may be told to go back to this one at least; 0: never
    withdrawn: str = ""  # why it must not be installed


class TrustedManifests:
    """Manifests that the operator signed; blocking, and for one thread at a time.

    Args:
        metadata_dir: Where verified metadata and manifests are kept.
        root: The root metadata that this device was given when it was enrolled.
        fetch: Yields the bytes of a metadata file by its name, or of a target for "targets/<sha256>".
    """

    def __init__(self, metadata_dir: Path, root: bytes, fetch: Callable[[str], Iterator[bytes]]) -> None:
        self._metadata = metadata_dir / "metadata"
        self._targets = metadata_dir / "targets"
        self._root = root
        self._fetcher = _Fetcher(fetch)

    def manifest(self, model: str, version: int) -> bytes:
        """Return the verified manifest of a bundle version; errors are those of `target`."""
        return self.target(model, version).manifest

    def target(self, model: str, version: int) -> SignedTarget:
        """Return what was signed about a bundle version, after looking for newer metadata.

        Raises:
            TrustError: The metadata is expired, unsigned, rolled back or malformed, or names no such version; `reason`
                says which.
            DigestMismatchError: The manifest is not the one that was signed for.
            UnavailableError: The registry cannot be reached, or lacks a file that it should have.
            InputError: The model's name or version is unusable.
        """
        path = manifest_path(model, version)
        try:
            return self._verified(path)
        except tuf_errors.LengthOrHashMismatchError as error:
            raise DigestMismatchError(f"{path}: the bytes are not those that were signed for") from error
        except tuf_errors.DownloadHTTPError as error:
            raise UnavailableError(f"{path}: the registry lacks a file", reason="metadata-missing") from error
        except (tuf_errors.RepositoryError, tuf_errors.DownloadLengthMismatchError) as error:
            reason = next(reason for kind, reason in _REASONS if isinstance(error, kind))
            raise TrustError(f"{path}: the signed metadata is not acceptable: {error}", reason=reason) from error
        except tuf_errors.DownloadError as error:
            raise UnavailableError(f"{path}: the download failed: {error}") from error
        except OSError as error:
            raise ConfigError(f"cannot keep metadata in {self._metadata}: {error.strerror}") from error

    def _verified(self, path: str) -> SignedTarget:
        self._metadata.mkdir(parents=True, exist_ok=True)
        self._targets.mkdir(parents=True, exist_ok=True)
        updater = Updater(  # an Updater refreshes once, so each look takes a new one
            str(self._metadata),
            _METADATA_URL,
            target_dir=str(self._targets),
            target_base_url=_TARGETS_URL,
            fetcher=self._fetcher,
            config=UpdaterConfig(app_user_agent="isthmus"),
            bootstrap=self._root,
        )
        updater.refresh()
        info = updater.get_targetinfo(path)
        if info is None:
            raise TrustError(f"{path} is not among the signed manifests", reason="not-published")
        if info.length > MAX_MANIFEST_BYTES or set(info.hashes) != {"sha256"}:
            raise TrustError(f"{path}: expected a SHA-256 and at most {MAX_MANIFEST_BYTES} bytes")
        kept = updater.find_cached_target(info) or updater.download_target(info)
        terms = info.custom or {}
        floor, withdrawn = terms.get("rollback_floor", 0), terms.get("withdrawn", "")
        if type(floor) is not int or not isinstance(withdrawn, str):
            raise TrustError(f"{path}: expected an integer rollback_floor and a text withdrawn")
        return SignedTarget(Path(kept).read_bytes(), floor, withdrawn)


class _Fetcher(FetcherInterface):
    """Answers tuf.ngclient's URLs from a fetch function; our own errors pass through it as they are."""

    def __init__(self, fetch: Callable[[str], Iterator[bytes]]) -> None:
        self._fetch_name = fetch

    def _fetch(self, url: str) -> Iterator[bytes]:
        try:
            yield from self._fetch_name(_name_of(url))
        except NotFoundError as error:
            raise tuf_errors.DownloadHTTPError(f"there is no {url}", 404) from error
        except IsthmusError:
            raise
        except OSError as error:
            raise UnavailableError(f"cannot fetch {url}: {error}") from error


def _name_of(url: str) -> str:
    folder, _, name = urlsplit(url).path.rpartition("/")
    if folder.startswith("/targets"):
        return f"targets/{name.split('.')[0]}"  # consistent snapshots: <sha256>.manifest.json
    return name
