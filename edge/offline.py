"""Installs a version that was carried here, by the same checks as one from the network.

A stick (isthmus.stick) takes the registry's place: it gives metadata, blobs and deltas by name and is trusted no more
than the registry is. What differs is time: the cloud's timestamp lives for a day, a stick travels for weeks. Unless
whoever imports it vouches for its age (`accept_stale`), an expired timestamp is refused as `freeze`.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine, Iterator
from pathlib import Path
from typing import Any, Final

from edge.fetcher import RegistryFetcher, SignedManifests
from edge.fleet import Desired
from edge.model import ServedModels
from edge.outcome import Outcome
from edge.state import Became, Order
from isthmus.errors import ConflictError, DigestMismatchError, IsthmusError, NotFoundError, UnavailableError
from isthmus.stick import Stick, blob_name, delta_name, metadata_name
from security.trust import SignedTarget, TrustedManifests

_TARGETS: Final = "targets/"
_STALL_S: Final = 5.0  # a registry that brings nothing for so long does not make up for what a stick lacks


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


class Imports:
    """Lets a running agent install what was carried to it: while a stick is plugged in, it comes before the registry.

    It stands between an updater and its registry. Metadata of a model that is being imported comes from the stick, and
    so do files that it has: their digests are signed, wherever they come from. What it lacks may come from the
    registry, if that answers: whoever stands there with a stick is told within seconds that it does not.

    Args:
        metadata_dir: Where verified metadata is kept.
        root: The root metadata that this device was given when it was enrolled.
        manifests: The registry's.
        fetcher: The registry.
        desired: Hears which version to install.
        models: What serves.
    """

    def __init__(
        self,
        metadata_dir: Path,
        root: bytes,
        manifests: SignedManifests,
        fetcher: RegistryFetcher,
        desired: Desired,
        models: ServedModels,
    ) -> None:
        self._metadata_dir, self._root = metadata_dir, root
        self._manifests, self._fetcher = manifests, fetcher
        self._desired, self._models = desired, models
        self._plugged: dict[str, tuple[Stick, StickManifests]] = {}
        self._waiting: dict[str, asyncio.Future[Outcome]] = {}

    def target(self, model: str, version: int) -> SignedTarget:
        """Return what was signed for a version; blocks."""
        plugged = self._plugged.get(model)
        return (self._manifests if plugged is None else plugged[1]).target(model, version)

    async def blob(self, sha256: str, path: Path, *, length: int) -> int:
        """Bring a blob, from a stick or the registry."""
        stick = self._with(blob_name(sha256))
        if stick is not None:
            return await StickFetcher(stick).blob(sha256, path, length=length)
        return await self._from_registry(self._fetcher.blob(sha256, path, length=length), path)

    async def delta(self, from_sha256: str, to_sha256: str, path: Path, *, limit: int) -> int:
        """Bring a delta, from a stick or the registry; a stick that has the whole file needs no network for a delta."""
        stick = self._with(delta_name(from_sha256, to_sha256)) or self._with(blob_name(to_sha256))
        if stick is not None:
            return await StickFetcher(stick).delta(from_sha256, to_sha256, path, limit=limit)
        return await self._from_registry(self._fetcher.delta(from_sha256, to_sha256, path, limit=limit), path)

    async def _from_registry(self, work: Coroutine[Any, Any, int], path: Path) -> int:
        """Let the registry bring a file; while somebody waits for an import, only as long as it brings something."""
        if not self._plugged:
            return await work
        task, size = asyncio.ensure_future(work), -1
        try:
            while not task.done():
                before, size = size, await asyncio.to_thread(_size, path)
                if size == before:
                    raise UnavailableError(
                        f"the stick lacks {path.name.removesuffix('.part').partition('.delta-')[0]}, "
                        f"and the registry brings nothing of it",
                        reason="stick-incomplete",
                    )
                await asyncio.wait((task,), timeout=_STALL_S)
            return task.result()
        finally:
            task.cancel()
            await asyncio.wait((task,))

    async def install(self, path: Path, *, accept_stale: bool) -> Outcome:
        """Have the agent install a stick's version; return what became of it.

        Raises:
            NotFoundError: The model is not one of this agent's.
            ConflictError: Another stick of this model is being read.
            ConfigError: The stick cannot be read.
            BundleError: It is no stick.
        """
        with await asyncio.to_thread(Stick, path) as stick:
            model, version = stick.index.model, stick.index.version
            if model not in dict(self._models):
                raise NotFoundError(f"this agent does not run {model[:80]!r}", reason="unknown-model")
            if model in self._plugged:
                raise ConflictError(f"another import of {model} is running")
            if self._models.version(model) == version:
                return Outcome(model, version, version)
            manifests = StickManifests(self._metadata_dir, self._root, stick, accept_stale=accept_stale)
            self._plugged[model] = (stick, manifests)
            self._waiting[model] = asyncio.get_running_loop().create_future()
            try:
                before = self._desired.order(model)
                # Whoever carries a version here tells the device to try it, even if it failed before.
                order = Order(version=version, attempt=before.attempt + 1)
                self._desired.set(model, order)
                outcome = await self._waiting[model]
                if outcome.became is Became.UPDATING and self._desired.order(model) == order:
                    self._desired.set(model, before)  # it came to nothing: nobody wants that version any more
                return outcome
            finally:
                del self._plugged[model], self._waiting[model]

    def hear(self, outcome: Outcome) -> None:
        """Note what became of an update."""
        waiting = self._waiting.get(outcome.model)
        under_way = outcome.became is Became.UPDATING and not outcome.reason
        if waiting is None or waiting.done() or under_way:
            return
        if outcome.to_version == self._plugged[outcome.model][0].index.version:
            waiting.set_result(outcome)

    def postponed(self, model: str, order: Order, error: UnavailableError) -> None:
        """Note that an update cannot go on now: whoever carried the version here is told so, and may come again."""
        self.hear(
            Outcome(
                model,
                self._models.version(model),
                order.version,
                became=Became.UPDATING,
                reason=error.reason,
                detail=error.message,
            )
        )

    def _with(self, name: str) -> Stick | None:
        return next((stick for stick, _ in self._plugged.values() if stick.has(name)), None)


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _readable(chunks: Iterator[bytes]) -> Iterator[bytes]:
    """Yield the chunks; a stick that was pulled out, or that rots, is no verdict on what is on it."""
    try:
        yield from chunks
    except IsthmusError:
        raise
    except (OSError, EOFError, ValueError) as error:
        raise UnavailableError(f"the stick cannot be read: {error}", reason="disk") from error
