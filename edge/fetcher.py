"""Fetches metadata, blobs and deltas from the registry, in chunks, within limits, from where it stopped.

Nothing here is trusted: lengths are limited while bytes come in, and whoever asked checks digests afterwards.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import grpc

from edge.backoff import Backoff
from isthmus.errors import DigestMismatchError, InputError, IsthmusError, NotFoundError, UnavailableError
from isthmus.status import from_rpc
from isthmus.v1 import registry_pb2, registry_pb2_grpc
from security.trust import SignedTarget, TrustedManifests

METADATA_BYTES: Final = 8 << 20  # no metadata file or manifest is larger
TARGETS: Final = "targets/"  # prefix of names that stand for a signed target, by its SHA-256
_STALL_S: Final = 30.0  # a stream that brings nothing for this long is broken off
_SLOW_S: Final = 300.0  # metadata is a few kilobytes: one file of it that takes this long is being held back
_ATTEMPTS: Final = 5


class _RequestRefusedError(UnavailableError):
    """The registry calls the request wrong: its idea of a file is another than ours."""


class Pace:
    """Keeps bytes below a rate: whoever has moved some waits until the rate allows for them.

    Args:
        bytes_per_s: The rate.
        clock: Monotonic seconds.
        pause: Waits for so many seconds.
    """

    def __init__(
        self,
        bytes_per_s: int,
        *,
        clock: Callable[[], float] = time.monotonic,
        pause: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._bytes_per_s = bytes_per_s
        self._clock = clock
        self._pause = pause
        self._free_at = clock()

    async def spend(self, count: int) -> None:
        """Wait for so many bytes' turn; time that nobody used is not saved up."""
        now = self._clock()
        self._free_at = max(self._free_at, now) + count / self._bytes_per_s
        await self._pause(self._free_at - now)


class RegistryFetcher:
    """The registry as a device sees it.

    Args:
        channel: To the cloud.
        token: Returns the access token, waiting for the first one.
        stall_s: Longest wait for the next chunk.
        slow_s: Longest time for a whole metadata file, however steadily it trickles.
        pace: Slows files down; metadata is small.
    """

    def __init__(
        self,
        channel: grpc.aio.Channel,
        token: Callable[[], Any],
        *,
        stall_s: float = _STALL_S,
        slow_s: float = _SLOW_S,
        pace: Pace | None = None,
    ) -> None:
        self._stub = registry_pb2_grpc.RegistryServiceStub(channel)
        self._token = token
        self._stall_s, self._slow_s = stall_s, slow_s
        self._pace = pace

    async def metadata(self, name: str) -> bytes:
        """Return a metadata file, or the target for a name "targets/<sha256>".

        Raises:
            NotFoundError: The registry has none of that name.
            UnavailableError: The registry cannot be reached, or takes too long (`too-slow`).
            DigestMismatchError: It is larger than any such file may be.
        """
        try:
            async with asyncio.timeout(self._slow_s):
                return await self._whole(name)
        except TimeoutError as error:
            raise UnavailableError(f"{name}: not there after {self._slow_s:g} s", reason="too-slow") from error

    async def _whole(self, name: str) -> bytes:
        if name.startswith(TARGETS):
            stream = await self._blob(name.removeprefix(TARGETS), 0)
        else:
            request = registry_pb2.FetchMetadataRequest(name=name)
            stream = self._stub.FetchMetadata(request, metadata=await self._metadata())
        return b"".join([chunk async for chunk in self._chunks(stream, METADATA_BYTES, name)])

    async def blob(self, sha256: str, path: Path, *, length: int) -> int:
        """Fetch a blob to `path`, after the bytes that are there already; return the bytes that moved.

        Raises:
            NotFoundError: The registry does not have it.
            UnavailableError: The registry cannot be reached, or broke off several times in a row.
            DigestMismatchError: More than `length` bytes came.
        """
        return await self._to_file(lambda offset: self._blob(sha256, offset), path, length, f"blob {sha256[:12]}")

    async def delta(self, from_sha256: str, to_sha256: str, path: Path, *, limit: int) -> int:
        """Fetch the delta between two blobs to `path`; as `blob`, with at most `limit` bytes.

        Raises:
            NotFoundError: There is none worth its bytes.
            UnavailableError: The registry cannot be reached, or broke off several times in a row.
            DigestMismatchError: More than `limit` bytes came.
        """

        async def start(offset: int) -> Any:
            request = registry_pb2.FetchDeltaRequest(from_sha256=from_sha256, to_sha256=to_sha256, offset=offset)
            return self._stub.FetchDelta(request, metadata=await self._metadata())

        return await self._to_file(start, path, limit, f"delta to {to_sha256[:12]}")

    async def _blob(self, sha256: str, offset: int) -> Any:
        request = registry_pb2.FetchBlobRequest(sha256=sha256, offset=offset)
        return self._stub.FetchBlob(request, metadata=await self._metadata())

    async def _metadata(self) -> tuple[tuple[str, str], ...]:
        return (("authorization", f"Bearer {await self._token()}"),)

    async def _to_file(self, start: Callable[[int], Any], path: Path, limit: int, what: str) -> int:
        backoff = Backoff(longest_s=5.0)
        moved = failures = 0
        while True:
            before = moved
            try:
                with path.open("ab") as file:
                    offset = file.tell()
                    async for chunk in self._chunks(await start(offset), limit - offset, what):
                        await asyncio.to_thread(file.write, chunk)
                        moved += len(chunk)
                        if self._pace is not None:
                            await self._pace.spend(len(chunk))
            except UnavailableError as error:
                if isinstance(error, _RequestRefusedError) and offset > 0:
                    await asyncio.to_thread(
                        path.unlink
                    )  # the registry's file is shorter now than the one that this is a part of
                failures = 1 if moved > before else failures + 1  # progress earns new attempts
                if failures >= _ATTEMPTS:
                    raise
                await backoff.pause()
            else:
                return moved

    async def _chunks(self, stream: Any, limit: int, what: str) -> AsyncIterator[bytes]:
        left = limit
        try:
            while True:
                async with asyncio.timeout(self._stall_s):
                    message = await stream.read()
                if message is grpc.aio.EOF:
                    return
                left -= len(message.data)
                if left < 0:
                    raise DigestMismatchError(f"{what}: expected at most {limit} bytes, more came", reason="too-long")
                yield message.data
        except grpc.aio.AioRpcError as error:
            raise _translated(error, what) from error
        except TimeoutError as error:
            raise UnavailableError(f"{what}: nothing came for {self._stall_s:g} s") from error
        finally:
            stream.cancel()


class SignedManifests:
    """Verified manifests, with the registry behind them; for any thread but the event loop's.

    Args:
        metadata_dir: Where verified metadata is kept.
        root: The root metadata that this device was given when it was enrolled.
        fetcher: The registry.
        loop: The event loop that the fetcher's channel belongs to.
        clock: The time, for what has expired.
    """

    def __init__(
        self,
        metadata_dir: Path,
        root: bytes,
        fetcher: RegistryFetcher,
        loop: asyncio.AbstractEventLoop,
        *,
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        def fetch(name: str) -> Iterator[bytes]:
            yield asyncio.run_coroutine_threadsafe(fetcher.metadata(name), loop).result()

        self._trusted = TrustedManifests(metadata_dir, root, fetch, clock=clock)
        self._one_at_a_time = threading.Lock()

    def target(self, model: str, version: int) -> SignedTarget:
        """Return the manifest that the operator signed, and its terms; blocks. Errors are those of security.trust."""
        with self._one_at_a_time:
            return self._trusted.target(model, version)


def _translated(error: grpc.aio.AioRpcError, what: str) -> IsthmusError:
    translated = from_rpc(error, what)
    # Whatever refuses a device for now (a token being renewed, a quota) is not a verdict on the bundle.
    if isinstance(translated, NotFoundError):
        return translated
    if isinstance(translated, InputError):
        return _RequestRefusedError(translated.message, reason=translated.reason)
    return UnavailableError(translated.message, reason=translated.reason)
