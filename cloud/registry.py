"""The registry's door: signed metadata, blobs and deltas out to devices; bundles in from operators.

Nothing is decided here: cloud.publish decides, cloud.blobs stores. What a device fetches needs no trust in this
process, because signed metadata vouches for every byte of it.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import AbstractContextManager, asynccontextmanager
from functools import partial
from typing import Any, Final, TypeVar

from sqlalchemy import select

from cloud import database as db
from cloud.blobs import CHUNK, Blobs, Deltas
from cloud.catalog import Catalog, unknown_model
from cloud.long_work import LongWork
from cloud.ownership import BlobOwners
from cloud.publish import Publisher
from cloud.recorder import Recorder
from isthmus.errors import InputError, NotFoundError
from isthmus.v1 import registry_pb2, registry_pb2_grpc
from security.custom import Terms
from security.interceptors import current_claims
from security.metadata import Targets, manifest_path
from security.tenants import TenantRepositories

MAX_BLOB_BYTES: Final = 16 << 30
MAX_SUBMITTED: Final = 64  # metadata files in one SubmitMetadata
MAX_ASKED: Final = 20_000  # digests in one FindMissing
_END: Final = object()
_T = TypeVar("_T")


class RegistryService(registry_pb2_grpc.RegistryServiceServicer):
    """Signed metadata, content-addressed blobs, and deltas between them.

    `changed` hears of what operators change, `recorder` of what they withdraw.
    """

    def __init__(
        self,
        database: db.Database,
        blobs: Blobs,
        deltas: Deltas,
        repositories: TenantRepositories,
        catalog: Catalog,
        publisher: Publisher,
        owners: BlobOwners,
        *,
        changed: Callable[[], Awaitable[None]],
        recorder: Recorder | None = None,
    ) -> None:
        self._recorder = recorder or Recorder()
        self._database, self._blobs, self._deltas = database, blobs, deltas
        self._repositories, self._catalog, self._publisher = repositories, catalog, publisher
        self._owners, self._long_work = owners, LongWork()
        self._changed = changed

    async def FetchMetadata(self, request: Any, context: Any) -> AsyncIterator[Any]:  # noqa: N802
        """Stream one metadata file of the caller's tenant.

        Raises:
            NotFoundError: There is none of this name.
        """
        del context
        tenant = current_claims().tenant
        data = await asyncio.to_thread(lambda: self._repositories.of(tenant).metadata(request.name))
        for start in range(0, len(data), CHUNK):
            yield registry_pb2.FetchMetadataResponse(data=data[start : start + CHUNK])

    async def FetchBlob(self, request: Any, context: Any) -> AsyncIterator[Any]:  # noqa: N802
        """Stream one blob from an offset on.

        Raises:
            InputError: The digest or offset is not valid.
            NotFoundError: There is no such blob for this caller.
        """
        del context
        await self._check_may_fetch(request.sha256, f"there is no {request.sha256}")
        async for data in _chunks(self._blobs.read(request.sha256, request.offset)):
            yield registry_pb2.FetchBlobResponse(data=data)

    async def FetchDelta(self, request: Any, context: Any) -> AsyncIterator[Any]:  # noqa: N802
        """Stream one delta from an offset on.

        Raises:
            InputError: A digest or the offset is not valid.
            NotFoundError: There is no such delta for this caller.
        """
        del context
        for digest in (request.from_sha256, request.to_sha256):
            await self._check_may_fetch(digest, f"there is no {request.from_sha256}-{request.to_sha256}")
        async for data in _chunks(self._deltas.read(request.from_sha256, request.to_sha256, request.offset)):
            yield registry_pb2.FetchDeltaResponse(data=data)

    async def _check_may_fetch(self, sha256: str, message: str) -> None:
        """Check that a blob may be handed out to the caller; what is refused looks like what is not stored."""
        claims = current_claims()
        may_see = partial(self._catalog.may_see, claims)
        if not await asyncio.to_thread(self._owners.may_fetch, sha256, may_see):
            raise NotFoundError(message)

    async def FindMissing(self, request: Any, context: Any) -> Any:  # noqa: N802
        """Tell which blobs the caller's tenant has to send, stored or not: what it does not have, or is damaged.

        Sending a damaged one again mends the disk.

        Raises:
            InputError: Too many digests, or one that is none.
        """
        del context
        if len(request.sha256) > MAX_ASKED:
            raise InputError(f"sha256: expected at most {MAX_ASKED} digests, got {len(request.sha256)}")
        asked = tuple(dict.fromkeys(request.sha256))
        owned = await asyncio.to_thread(self._owners.owned, current_claims().tenant, asked)
        missing = [  # one by one: each is a file to read, and callers take turns
            digest
            for digest in asked
            if digest not in owned or not await self._long_work.run(partial(self._blobs.intact, digest))
        ]
        return registry_pb2.FindMissingResponse(sha256=missing)

    async def UploadBlob(self, request_iterator: Any, context: Any) -> Any:  # noqa: N802
        """Store one blob.

        Raises:
            InputError: The stream does not begin with a digest and an acceptable length.
            DigestMismatchError: The bytes are not those that were announced.
        """
        del context
        first = await anext(aiter(request_iterator), None)
        if first is None or not first.sha256:
            raise InputError("expected a first message with the blob's sha256 and length")
        if first.length > MAX_BLOB_BYTES:
            raise InputError(f"length: expected at most {MAX_BLOB_BYTES} bytes, got {first.length}")
        async with _in_thread(self._blobs.upload(first.sha256, first.length)) as upload:
            await asyncio.to_thread(upload.write, first.data)
            async for message in request_iterator:
                if not message.data:  # or an upload could be kept open for ever, without a byte
                    raise InputError("expected data in every message after the first, got none")
                await asyncio.to_thread(upload.write, message.data)
        await asyncio.to_thread(self._owners.note_upload, current_claims().tenant, first.sha256)
        return registry_pb2.UploadBlobResponse()

    async def Publish(self, request: Any, context: Any) -> Any:  # noqa: N802
        """Take in a bundle version.

        Raises:
            IsthmusError: As Publisher.publish.
        """
        del context
        claims = current_claims()
        if not claims.may_use(request.model):
            raise unknown_model(request.model)
        heavy_version, deltas = await self._publisher.publish(
            request.model,
            request.version,
            request.manifest_json,
            request.targets_json,
            release=request.release,
            role=request.role or Targets.type,
            tenant=claims.tenant,
        )
        await self._changed()
        prepared = [
            registry_pb2.PreparedDelta(
                path=row.path, from_version=row.from_version, delta_bytes=row.delta_bytes, full_bytes=row.full_bytes
            )
            for row in deltas
        ]
        return registry_pb2.PublishResponse(heavy_version=heavy_version, deltas=prepared)

    async def Release(self, request: Any, context: Any) -> Any:  # noqa: N802
        """Set the version that devices should run.

        Raises:
            NotFoundError: There is no such version for this caller.
            UnavailableError: Its heavy model cannot be loaded now.
        """
        del context
        self._catalog.check_may_see(current_claims(), request.model)
        await self._publisher.release(request.model, request.version)
        await self._changed()
        return registry_pb2.ReleaseResponse()

    async def SubmitMetadata(self, request: Any, context: Any) -> Any:  # noqa: N802
        """Take in signed metadata that makes no new version known.

        Raises:
            InputError: No file, too many, or one twice.
            IsthmusError: As Publisher.submit.
        """
        del context
        files = {file.name: file.data for file in request.files}
        if not 0 < len(files) == len(request.files) <= MAX_SUBMITTED:
            raise InputError(f"files: expected 1 to {MAX_SUBMITTED} files, each once, got {len(request.files)}")
        claims = current_claims()
        before = await asyncio.to_thread(self._publisher.terms, claims.tenant)
        await self._publisher.submit(files, claims.tenant)
        for path, terms in (await asyncio.to_thread(self._publisher.terms, claims.tenant)).items():
            if terms.withdrawn and not before.get(path, Terms()).withdrawn:
                model, version, _ = path.rsplit("/", 2)
                self._recorder.withdrawn(model, int(version), terms.withdrawn, claims)
        await self._changed()
        return registry_pb2.SubmitMetadataResponse()

    async def ListVersions(self, request: Any, context: Any) -> Any:  # noqa: N802
        """List the versions that the caller may use."""
        del request, context
        claims = current_claims()
        released = {
            model: self._catalog.released(model)
            for model in self._catalog.models
            if self._catalog.may_see(claims, model)
        }
        versions = await asyncio.to_thread(self._list_versions, released, claims.tenant)
        return registry_pb2.ListVersionsResponse(versions=versions)

    def _list_versions(self, released: Mapping[str, int | None], tenant: str) -> list[Any]:
        with self._database.read() as session:
            rows = session.scalars(select(db.Version).order_by(db.Version.model, db.Version.version)).all()
        terms = self._publisher.terms(tenant) if released else {}
        return [
            self._describe(row, released[row.model], terms.get(manifest_path(row.model, row.version), Terms()))
            for row in rows
            if row.model in released
        ]

    def _describe(self, row: db.Version, released: int | None, terms: Terms) -> Any:
        manifest = self._publisher.manifest(row.model, row.version)
        return registry_pb2.ModelVersion(
            model=row.model,
            version=row.version,
            heavy_version=row.heavy_version,
            released=released == row.version,
            bytes=sum(entry.length for entry in manifest.files.values()),
            variants=[variant.id for variant in manifest.variants],
            withdrawn=terms.withdrawn,
            rollback_floor=terms.rollback_floor,
        )


@asynccontextmanager
async def _in_thread(blocking: AbstractContextManager[_T]) -> AsyncIterator[_T]:
    """Enter and leave a context manager outside of the event loop: an upload ends with a flush to the disk."""
    value = await asyncio.to_thread(blocking.__enter__)
    try:
        yield value
    except BaseException as error:
        if not await asyncio.to_thread(blocking.__exit__, type(error), error, error.__traceback__):
            raise
    else:
        await asyncio.to_thread(blocking.__exit__, None, None, None)


async def _chunks(source: Iterator[bytes]) -> AsyncIterator[bytes]:
    while (chunk := await asyncio.to_thread(next, source, _END)) is not _END:
        assert isinstance(chunk, bytes)  # noqa: S101 - tells mypy that it is not _END
        yield chunk
