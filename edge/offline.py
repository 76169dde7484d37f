"""Installs a version that was carried here, by the same checks as one from the network.

A stick (isthmus.stick) takes the registry's place: it gives metadata, blobs and deltas by name and is trusted no more
than the registry is. What differs is time: the cloud's timestamp lives for a day, a stick travels for weeks. Unless
whoever imports it vouches for its age (`accept_stale`), an expired timestamp is refused as `freeze`.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from pathlib import Path

from isthmus.errors import DigestMismatchError, IsthmusError, UnavailableError
from isthmus.stick import Stick, blob_name, delta_name, metadata_name
from security.trust import SignedTarget, TrustedManifests

_TARGETS = "targets/"


class StickFetcher:
    """A stick as `edge.assembly.Fetcher` sees the registry.

    Args:
        stick: What was carried here.
    """

    def __init__(self, stick: Stick) -> None:
        self._stick = stick

    async def blob(self, sha256: str, path: Path, *, length: int) -> int:
        """Copy a blob to `path`, after the bytes that are there already; return the bytes that moved.

        Raises:
            NotFoundError: The stick does not have it.
            UnavailableError: The stick cannot be read.
            DigestMismatchError: More than `length` bytes came.
        """
        return await asyncio.to_thread(self._copy, blob_name(sha256), path, length)

    async def delta(self, from_sha256: str, to_sha256: str, path: Path, *, limit: int) -> int:
        """Copy the delta between two blobs to `path`; as `blob`, with at most `limit` bytes.

        Raises:
            NotFoundError: The stick does not have it.
            UnavailableError: The stick cannot be read.
            DigestMismatchError: More than `limit` bytes came.
        """
        return await asyncio.to_thread(self._copy, delta_name(from_sha256, to_sha256), path, limit)

    def _copy(self, name: str, path: Path, limit: int) -> int:
        with path.open("ab") as file:
            start = file.tell()
            for chunk in _readable(self._stick.read(name, start)):
                if file.tell() + len(chunk) > limit:
                    raise DigestMismatchError(f"{name}: expected at most {limit} bytes, more came", reason="too-long")
                file.write(chunk)
            return file.tell() - start


class StickManifests:
    """Verified manifests of a stick; what a device has seen before, from wherever, binds it here as well.

    Args:
        metadata_dir: Where verified metadata is kept, the same as for the registry's.
        root: The root metadata that this device was given when it was enrolled.
        stick: What was carried here.
        accept_stale: Whether an expired timestamp is good enough.
    """

    def __init__(self, metadata_dir: Path, root: bytes, stick: Stick, *, accept_stale: bool = False) -> None:
        def fetch(name: str) -> Iterator[bytes]:
            is_target = name.startswith(_TARGETS)
            return _readable(stick.read(blob_name(name.removeprefix(_TARGETS)) if is_target else metadata_name(name)))

        self._trusted = TrustedManifests(metadata_dir, root, fetch, accept_stale=accept_stale)
        self._one_at_a_time = threading.Lock()

    def target(self, model: str, version: int) -> SignedTarget:
        """Return the manifest that the operator signed, and its terms; blocks. Errors are those of security.trust."""
        with self._one_at_a_time:
            return self._trusted.target(model, version)


def _readable(chunks: Iterator[bytes]) -> Iterator[bytes]:
    """Yield the chunks; a stick that was pulled out, or that rots, is no verdict on what is on it."""
    try:
        yield from chunks
    except IsthmusError:
        raise
    except (OSError, EOFError, ValueError) as error:
        raise UnavailableError(f"the stick cannot be read: {error}", reason="disk") from error
