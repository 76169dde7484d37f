"""What a cloud finishes when it starts: publishes that were cut short, and what releases before it did not record."""

from __future__ import annotations

import structlog
from sqlalchemy import select

from cloud.blobs import Blobs
from cloud.bundle_files import check_blobs, check_identity
from cloud.database import Database, Version
from cloud.ownership import BlobOwners
from cloud.version_record import VersionRecord
from isthmus.bundle import parse_manifest
from isthmus.errors import IsthmusError
from security.metadata import manifest_path
from security.tenancy import check_new_name
from security.tenants import TenantRepositories

log = structlog.get_logger(__name__)


def finish_publishes(
    database: Database, versions: VersionRecord, repositories: TenantRepositories, blobs: Blobs, owners: BlobOwners
) -> None:
    """Tell the database of versions whose publish was cut short after the commit, oldest first."""
    with database.read() as session:
        known = {manifest_path(row.model, row.version) for row in session.scalars(select(Version))}
    tenants = repositories.names()
    missing = [
        (target, tenant)
        for tenant in tenants
        for path, target in repositories.of(tenant).listed().items()
        if path not in known
    ]
    for target, tenant in sorted(missing, key=lambda found: int(found[0].path.split("/")[1])):
        try:
            sha256 = target.hashes["sha256"]
            manifest = parse_manifest(blobs.read_all(sha256))
            # What a tenant has signed for says nothing about what is not its own.
            check_new_name(tenant, manifest.name, tenants)
            check_identity(manifest, *_named(target.path))
            check_blobs(blobs, owners, manifest, tenant)
            versions.check_newest(manifest.name, manifest.version)
            versions.record(manifest, sha256, versions.heavy_id(manifest), tenant)
        except IsthmusError as error:
            log.warning("a committed version is not whole", path=target.path, reason=error.reason)
        else:
            log.info("publish that was cut short is finished", model=manifest.name, version=manifest.version)


def record_owners(owners: BlobOwners, blobs: Blobs) -> None:
    """Record whose the blobs of versions are that a release before tenants published."""
    found = []
    for model, version, digest in owners.unrecorded():
        try:
            found.append((parse_manifest(blobs.read_all(digest)), digest))
        except IsthmusError as error:  # its files can be had again once it is mended and the cloud started anew
            log.warning("a version's files are not handed out", model=model, version=version, reason=error.reason)
    if found:
        owners.record_all(found)


def _named(target_path: str) -> tuple[str, int]:
    """Return the model and version that a target path names."""
    model, version, _ = target_path.split("/")
    return model, int(version)
