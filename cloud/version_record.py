"""The record of versions: what is published, where its heavy model is served, what is released. Blocks."""

from __future__ import annotations

from collections.abc import Callable

from sqlalchemy import func, select

from cloud import database as db
from cloud.heavy import HeavyId
from cloud.ownership import record_blobs
from cloud.records import check_no_rollout, end_share, supersede
from isthmus.bundle import Manifest
from isthmus.errors import ConflictError


class VersionRecord:
    """Reads and writes versions.

    Args:
        database: Where they are kept.
        clock: Returns Unix seconds.
    """

    def __init__(self, database: db.Database, clock: Callable[[], float]) -> None:
        self._database, self._clock = database, clock

    def check_newest(self, model: str, version: int) -> None:
        """Check that a version is newer than all that there are.

        Raises:
            ConflictError: It is not.
        """
        with self._database.read() as session:
            newest = session.scalar(select(func.max(db.Version.version)).where(db.Version.model == model))
        if newest is not None and version <= newest:
            raise ConflictError(
                f"version {version} of {model!r} cannot be published: {newest} is there; compile it as {newest + 1}",
                reason="already-published",
            )

    def heavy_id(self, manifest: Manifest) -> HeavyId:
        """Return where the heavy model is served: with an earlier version whose heavy folder is the same, or anew."""
        same = select(db.Version.heavy_version).where(
            db.Version.model == manifest.name, db.Version.heavy_digest == manifest.heavy.digest
        )
        with self._database.read() as session:
            found = session.scalar(same.limit(1))
        return HeavyId(manifest.name, manifest.version if found is None else found)

    def record(self, manifest: Manifest, manifest_sha256: str, heavy: HeavyId, tenant: str) -> None:
        """Make a version known."""
        with self._database.write() as session:
            if session.get(db.Model, manifest.name) is None:
                session.add(db.Model(name=manifest.name, tenant=tenant))
                session.flush()
            session.get_one(db.Model, manifest.name).revision = db.next_revision(session)
            session.add(
                db.Version(
                    model=manifest.name,
                    version=manifest.version,
                    manifest_sha256=manifest_sha256,
                    heavy_digest=manifest.heavy.digest,
                    heavy_version=heavy.version,
                    published_at=self._clock(),
                )
            )
            record_blobs(session, manifest, manifest_sha256)

    def record_release(self, model: str, version: int) -> None:
        """Make a version the one that devices run.

        Raises:
            ConflictError: A rollout of the model is open.
        """
        with self._database.write() as session:
            revision = db.next_revision(session)
            supersede(session, model, revision)
            end_share(session, model, version, revision)
            row = session.get_one(db.Model, model)
            row.released, row.revision = version, revision

    def check_release(self, model: str) -> None:
        """Refuse early what record_release would refuse after the work.

        Raises:
            ConflictError: A rollout of the model is open.
        """
        with self._database.read() as session:
            check_no_rollout(session, model)
