"""Schema 3: what was revoked, and the digest of each device's key."""

from __future__ import annotations

import hashlib

import sqlalchemy as sa
from alembic import op
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_public_key

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    """Add the table of revocations; the keys of the devices that are there get their digests."""
    op.add_column("devices", sa.Column("key_sha256", sa.String, nullable=False, server_default=""))
    op.create_index("ix_devices_key_sha256", "devices", ["key_sha256"])
    op.create_table(
        "revocations",
        sa.Column("kind", sa.String, primary_key=True),
        sa.Column("value", sa.String, primary_key=True),
        sa.Column("device_id", sa.String, nullable=False, index=True),
        sa.Column("reason", sa.String, nullable=False),
        sa.Column("revoked_at", sa.Double, nullable=False),
        sa.Column("revoked_by", sa.String, nullable=False),
        sa.Column("lifted_at", sa.Double),
        sa.Column("revision", sa.BigInteger, nullable=False, index=True),
    )
    devices = sa.table("devices", sa.column("id"), sa.column("public_key_pem"), sa.column("key_sha256"))
    connection = op.get_bind()
    for device_id, pem in connection.execute(sa.select(devices.c.id, devices.c.public_key_pem)).all():
        try:
            spki = load_pem_public_key(pem).public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
        except ValueError:  # damaged: the device cannot prove who it is, before and after
            continue
        digest = hashlib.sha256(spki).hexdigest()
        connection.execute(sa.update(devices).where(devices.c.id == device_id).values(key_sha256=digest))
    op.execute("UPDATE schema SET version = 3")
