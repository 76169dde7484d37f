"""Whose each stored blob is. Blobs are named by their content, so without this a digest would open every door.

1. A tenant has a blob when it has sent all its bytes here, or when a published version of one of its models holds it.
   Only what a tenant has can be in what it publishes; what it does not have is missing, stored or not.
2. A blob is handed out to those who may use a model that holds it, and to nobody else.
The answers do not depend on what is on the disk, so they tell nothing about other tenants' files.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable

from sqlalchemy import delete, select
from sqlalchemy.orm import Session

from cloud import database as db
from cloud.access_tables import ModelBlob, UploadedBlob
from isthmus.bundle import Manifest
from isthmus.digests import check_sha256

_CHUNK = 500  # digests in one statement


class BlobOwners:
    """The record of whose blobs are whose; all methods block."""

    def __init__(self, database: db.Database) -> None:
        self._database = database

    def note_upload(self, tenant: str, sha256: str) -> None:
        """Note that a tenant has sent a blob's bytes."""
        with self._database.write() as session:
            session.merge(UploadedBlob(tenant=tenant, sha256=sha256))

    def owned(self, tenant: str, digests: Collection[str]) -> set[str]:
        """Return which of these blobs a tenant has.

        Raises:
            InputError: One is no digest.
        """
        asked = sorted({check_sha256(digest) for digest in digests})
        found: set[str] = set()
        with self._database.read() as session:
            for start in range(0, len(asked), _CHUNK):
                part = asked[start : start + _CHUNK]
                sent = select(UploadedBlob.sha256).where(UploadedBlob.tenant == tenant, UploadedBlob.sha256.in_(part))
                found |= set(session.scalars(sent))
                published = (
                    select(ModelBlob.sha256)
                    .join(db.Model, db.Model.name == ModelBlob.model)
                    .where(db.Model.tenant == tenant, ModelBlob.sha256.in_(part))
                )
                found |= set(session.scalars(published))
        return found

    def may_fetch(self, sha256: str, may_see: Callable[[str], bool]) -> bool:
        """Return whether a caller may use one of the models that hold a blob.

        Args:
            sha256: The blob.
            may_see: Returns whether the caller may use a model.

        Raises:
            InputError: It is no digest.
        """
        with self._database.read() as session:
            holders = session.scalars(select(ModelBlob.model).where(ModelBlob.sha256 == check_sha256(sha256))).all()
        return any(may_see(model) for model in holders)

    def unrecorded(self) -> list[tuple[str, int, str]]:
        """Return (model, version, manifest) of the versions whose blobs an earlier release did not record."""
        known = select(ModelBlob.model).where(
            ModelBlob.model == db.Version.model, ModelBlob.sha256 == db.Version.manifest_sha256
        )
        with self._database.read() as session:
            rows = session.scalars(select(db.Version).where(~known.exists())).all()
        return [(row.model, row.version, row.manifest_sha256) for row in rows]

    def record_all(self, versions: Iterable[tuple[Manifest, str]]) -> None:
        """Record the blobs of versions, each with its manifest's digest."""
        with self._database.write() as session:
            for manifest, manifest_sha256 in versions:
                record_blobs(session, manifest, manifest_sha256)


def record_blobs(session: Session, manifest: Manifest, manifest_sha256: str) -> None:
    """Record that a version's blobs belong to its model, whose row is there; they need no other owner then."""
    digests = sorted({manifest_sha256, *(entry.sha256 for entry in manifest.files.values())})
    tenant = session.get_one(db.Model, manifest.name).tenant
    for start in range(0, len(digests), _CHUNK):
        part = digests[start : start + _CHUNK]
        known = set(
            session.scalars(
                select(ModelBlob.sha256).where(ModelBlob.model == manifest.name, ModelBlob.sha256.in_(part))
            )
        )
        session.add_all(ModelBlob(sha256=digest, model=manifest.name) for digest in part if digest not in known)
        session.execute(delete(UploadedBlob).where(UploadedBlob.tenant == tenant, UploadedBlob.sha256.in_(part)))
