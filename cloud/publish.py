"""Publishing and releasing: how a bundle version becomes one that devices run.

A publish is done in this order, so that a crash or a refusal at any point leaves nothing half visible; what is there
already is found and kept when the operator tries again:

(1) the manifest is the one that was asked for, its model accepts the version, and the calibration record belongs to
    it;
(2) the signed metadata vouches for exactly this manifest;
(3) all blobs are stored with the right lengths;
(4) deltas from the last versions, and from those that devices run, are prepared, and each is applied once to see that
    it gives the right bytes;
(5) Triton has loaded the heavy model and answered the golden inputs in the declared form;
(6) the signed metadata is committed: from here on devices can verify the version;
(7) the database is told: from here on it exists. A release, and retiring what nobody needs any more, come after.

A cloud that is killed between (6) and (7) tells the database when it starts again: everything was checked by then.

One publish or release runs at a time.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Collection, Coroutine, Mapping
from typing import Any, Protocol

import structlog
from sqlalchemy import select

from cloud import database as db
from cloud.blobs import Blobs, Deltas
from cloud.bundle_files import check_blobs, check_identity, check_vouched, golden_inputs, materialise
from cloud.catalog import Catalog, unknown_model
from cloud.deltas import PreparedDelta, prepare_deltas
from cloud.heavy import HeavyId
from cloud.ownership import BlobOwners
from cloud.replicas import Replicas
from cloud.restoration import finish_publishes, record_owners
from cloud.version_record import VersionRecord
from isthmus.bundle import Manifest, Variant, parse_manifest
from isthmus.digests import sha256_bytes
from isthmus.errors import BundleError, ConflictError, InputError, NotFoundError, TrustError
from security.custom import Terms
from security.metadata import Targets, manifest_path
from security.tenancy import DEFAULT_TENANT, check_new_name
from security.tenants import TenantRepositories

log = structlog.get_logger(__name__)


class Fleet(Protocol):
    """What publishing asks of the fleet."""

    def versions_in_use(self, model: str) -> Mapping[int, int]:
        """Return how many devices run each version of a model."""

    def versions_told(self, model: str) -> Collection[int]:
        """Return the versions of a model that devices are told beside the released one."""


class Publisher:
    """Takes bundle versions in and decides which one devices run.

    Args:
        database: The record of versions.
        blobs: The bundles' files.
        deltas: Gets the prepared deltas.
        repositories: The signed metadata of each tenant.
        owners: Knows whose each blob is.
        catalog: Follows the database.
        pool: Loads heavy models.
        heavy_versions: How many of a model's newest versions stay loaded beside the released one.
        delta_bases: From how many earlier versions deltas are prepared, whether devices run them or not.
        used_bases: From how many of the versions that devices run, those on most devices first.
        fleet: Knows which versions devices run and are told.
        traffic: Returns the versions of a model that requests are spread over.
        clock: Returns Unix seconds.
    """

    def __init__(
        self,
        database: db.Database,
        blobs: Blobs,
        deltas: Deltas,
        repositories: TenantRepositories,
        owners: BlobOwners,
        catalog: Catalog,
        pool: Replicas,
        fleet: Fleet,
        *,
        heavy_versions: int = 3,
        delta_bases: int = 3,
        used_bases: int = 8,
        traffic: Callable[[str], Collection[int]] = lambda _model: (),
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._database, self._blobs, self._deltas = database, blobs, deltas
        self._versions = VersionRecord(database, clock)
        self._repositories, self._owners = repositories, owners
        self._catalog, self._pool = catalog, pool
        self._heavy_versions = heavy_versions
        self._delta_bases, self._used_bases, self._fleet = delta_bases, used_bases, fleet
        self._traffic = traffic
        self._lock = asyncio.Lock()

    async def restore(self) -> None:
        """Fill the catalog from the database and load every heavy version that is wanted.

        A heavy model that does not load any more is logged: the others must serve. So is a version that was committed
        and cannot be told to the database.
        """
        await asyncio.to_thread(
            finish_publishes, self._database, self._versions, self._repositories, self._blobs, self._owners
        )
        await asyncio.to_thread(record_owners, self._owners, self._blobs)
        with self._database.read() as session:
            models = session.scalars(select(db.Model.name)).all()
        for model in models:
            self._read_versions(model)
            await self._load_wanted(model)
        await self._pool.sweep()

    def _read_versions(self, model: str) -> None:
        with self._database.read() as session:
            versions = session.scalars(select(db.Version).where(db.Version.model == model)).all()
            of_model = session.get_one(db.Model, model)
        for row in versions:
            self._catalog.publish(row.model, row.version, HeavyId(row.model, row.heavy_version), of_model.tenant)
        if of_model.released is not None:
            self._catalog.release(model, of_model.released)

    async def _load_wanted(self, model: str) -> None:
        for heavy in sorted(self._wanted(model)):
            try:
                manifest = await asyncio.to_thread(self.manifest, heavy.model, heavy.version)
                await self._load_heavy(heavy, manifest)
            except (BundleError, TrustError, NotFoundError) as error:
                log.exception("heavy model cannot be served", heavy=heavy.name, reason=error.reason)

    def _wanted(self, model: str) -> set[HeavyId]:
        also = {*self._fleet.versions_told(model), *self._traffic(model)}
        return self._catalog.wanted(model, self._heavy_versions, also)

    async def publish(
        self,
        model: str,
        version: int,
        manifest_json: bytes,
        targets_json: bytes,
        *,
        release: bool,
        role: str = Targets.type,
        tenant: str = DEFAULT_TENANT,
    ) -> tuple[int, list[PreparedDelta]]:
        """Take in one bundle version; return its heavy version and the deltas that were prepared.

        Args:
            model: The bundle's model.
            version: Its version.
            manifest_json: Its manifest.
            targets_json: The next metadata of the role that vouches for it.
            release: Whether devices should move to it at once.
            role: "targets", or a publisher's.
            tenant: Whose it is.

        Raises:
            InputError: The model cannot have this name.
            BundleError: The bundle is inconsistent or its heavy model does not work.
            ConflictError: The version exists, or a newer one does.
            NotFoundError: Blobs are missing.
            TrustError: The signed metadata does not vouch for the manifest.
            UnavailableError: Triton is down.
        """
        async with self._lock:
            self._check_name(model, tenant)
            manifest = await asyncio.to_thread(
                self._check, model, version, manifest_json, targets_json, role, tenant
            )  # (1), (2), (3)
            if release:
                await asyncio.to_thread(self._versions.check_release, model)
            deltas = await self._prepare_deltas(manifest)  # (4)
            heavy = await asyncio.to_thread(self._versions.heavy_id, manifest)
            fresh = heavy not in self._pool.loaded
            try:
                await self._load_heavy(heavy, manifest)  # (5)
                await self._pool.try_out(heavy, manifest, await asyncio.to_thread(golden_inputs, self._blobs, manifest))
                await asyncio.to_thread(self._blobs.store, manifest_json)
                await _uninterrupted(
                    self._commit(manifest, manifest_json, targets_json, role, heavy, tenant)
                )  # (6), (7)
            except BaseException:
                # A second attempt may bring another heavy model under the same version; but a caller who left while
                # the commit went on to its end has published it.
                if fresh and version not in self._catalog.versions(model):
                    await self._pool.retire(heavy)
                raise
            if release:
                await _uninterrupted(self._release(model, version))
            await self._retire_unwanted(model)
            return heavy.version, deltas

    async def release(self, model: str, version: int) -> None:
        """Make a published version, newer or older, the one that devices run.

        Raises:
            NotFoundError: There is no such version.
            UnavailableError: Its heavy model cannot be loaded now.
            ConflictError: The operator has withdrawn it.
        """
        async with self._lock:
            known = self._catalog.versions(model)
            if not known:
                raise unknown_model(model)
            if version not in known:
                raise NotFoundError(
                    f"model {model!r} has no version {version}; it has {', '.join(map(str, known[-5:]))}",
                    reason="unknown-version",
                )
            await asyncio.to_thread(self._versions.check_release, model)
            await asyncio.to_thread(self.check_not_withdrawn, model, version)
            heavy = self._catalog.heavy(model, version)
            await self._load_heavy(heavy, await asyncio.to_thread(self.manifest, model, heavy.version))
            await _uninterrupted(self._release(model, version))
            await self._retire_unwanted(model)

    async def prepare(self, model: str, version: int) -> None:
        """Make ready what a rollout of a version needs: its heavy model, and deltas from what devices run now.

        Raises:
            NotFoundError: There is no such version.
            UnavailableError: Its heavy model cannot be loaded now.
        """
        async with self._lock:
            heavy = self._catalog.heavy(model, version)
            await self._load_heavy(heavy, await asyncio.to_thread(self.manifest, model, heavy.version))
            await self._prepare_deltas(await asyncio.to_thread(self.manifest, model, version))

    async def _prepare_deltas(self, manifest: Manifest) -> list[PreparedDelta]:
        known = [version for version in self._catalog.versions(manifest.name) if version < manifest.version]
        used = {
            version: count for version, count in self._fleet.versions_in_use(manifest.name).items() if version in known
        }
        most_used = sorted(used, key=lambda version: (-used[version], -version))[: self._used_bases]
        bases = sorted({*(known[-self._delta_bases :] if self._delta_bases else ()), *most_used})
        old = [await asyncio.to_thread(self.manifest, manifest.name, base) for base in bases]
        return await prepare_deltas(self._blobs, self._deltas, manifest, old)

    async def follow(self, models: Collection[str]) -> None:
        """Take over what the database says of these models: a rollout or another replica released or published."""
        async with self._lock:
            for model in models:
                await asyncio.to_thread(self._read_versions, model)
                await self._load_wanted(model)

    async def submit(self, files: Mapping[str, bytes], tenant: str = DEFAULT_TENANT) -> None:
        """Take in signed metadata that makes no new version known: roots, withdrawals, delegations.

        Raises:
            TrustError: A file is not acceptable, or names a version that was not published.
            ConflictError: A file does not follow the current one.
            ConfigError: A new root names snapshot or timestamp keys that are not here.
        """
        async with self._lock:
            repository = await asyncio.to_thread(self._repositories.of, tenant)
            await _uninterrupted(asyncio.to_thread(repository.commit_all, files, known_only=True))
        log.info("signed metadata taken in", files=sorted(files), tenant=tenant)

    def terms(self, tenant: str) -> dict[str, Terms]:
        """Return what a tenant's operators say about every version, by its manifest's path."""
        return self._repositories.of(tenant).terms()

    def terms_of(self, model: str, version: int) -> Terms:
        """Return what the operators say about one version; nothing where they do not list it."""
        return self.terms(self._catalog.tenant(model) or DEFAULT_TENANT).get(manifest_path(model, version), Terms())

    def check_not_withdrawn(self, model: str, version: int) -> None:
        """Check that no operator has withdrawn a version.

        Raises:
            ConflictError: One has.
        """
        terms = self.terms_of(model, version)
        if terms.withdrawn:
            raise ConflictError(
                f"{model}@{version} was withdrawn: {terms.withdrawn}",
                reason="withdrawn",
                hint="isthmus model list shows the versions that can be released",
            )

    def variants(self, model: str, version: int) -> tuple[Variant, ...]:
        """Return the variants of a published version.

        Raises:
            NotFoundError: There is none.
        """
        return self.manifest(model, version).variants

    def manifest(self, model: str, version: int) -> Manifest:
        """Return the manifest of a published version.

        Raises:
            NotFoundError: There is none.
        """
        with self._database.read() as session:
            row = session.get(db.Version, (model, version))
        if row is None:
            raise NotFoundError(f"model {model!r} has no version {version}", reason="unknown-version")
        return parse_manifest(self._blobs.read_all(row.manifest_sha256))

    def _check_name(self, model: str, tenant: str) -> None:
        owner = self._catalog.tenant(model)
        if owner is None or tenant != DEFAULT_TENANT:
            check_new_name(tenant, model, self._repositories.names())
        if owner not in (None, tenant):
            raise InputError(f"no model can be called {model[:80]!r}", reason="name-of-another")

    def _check(
        self, model: str, version: int, manifest_json: bytes, targets_json: bytes, role: str, tenant: str
    ) -> Manifest:
        """Return the manifest when it may be published; blocks, for signatures and thousands of blobs take a while."""
        manifest = parse_manifest(manifest_json)  # (1)
        check_identity(manifest, model, version)
        self._versions.check_newest(model, version)
        self._repositories.of(tenant).accept_targets(targets_json, role)  # (2)
        check_vouched(targets_json, manifest, manifest_json)
        check_blobs(self._blobs, self._owners, manifest, tenant)  # (3)
        return manifest

    async def _commit(
        self, manifest: Manifest, manifest_json: bytes, targets_json: bytes, role: str, heavy: HeavyId, tenant: str
    ) -> None:
        await asyncio.to_thread(self._repositories.of(tenant).commit, targets_json, role)
        await asyncio.to_thread(self._versions.record, manifest, sha256_bytes(manifest_json), heavy, tenant)
        self._catalog.publish(manifest.name, manifest.version, heavy, tenant)
        log.info("version published", model=manifest.name, version=manifest.version, heavy=heavy.name, tenant=tenant)

    async def _release(self, model: str, version: int) -> None:
        await asyncio.to_thread(self._versions.record_release, model, version)
        self._catalog.release(model, version)
        log.info("version released", model=model, version=version)

    async def _retire_unwanted(self, model: str) -> None:
        wanted = self._wanted(model)
        for heavy in self._pool.loaded:
            if heavy.model == model and heavy not in wanted:
                await self._pool.retire(heavy)
        await self._pool.sweep()

    async def _load_heavy(self, heavy: HeavyId, manifest: Manifest) -> None:
        if heavy not in self._pool.loaded:
            await asyncio.to_thread(materialise, self._blobs, self._pool.folder(heavy), manifest)
            await self._pool.load(heavy)


async def _uninterrupted(work: Coroutine[Any, Any, None]) -> None:
    """Do the work to its end even when the caller has gone: memory must agree with the disk afterwards."""
    task = asyncio.create_task(work)
    try:
        await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait((task,))
        raise
