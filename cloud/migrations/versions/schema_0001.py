"""Schema 1: models, versions, devices, invitations, reports and used assertions."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None


def upgrade() -> None:
    """Make the tables of the first release."""
    op.create_table(
        "schema", sa.Column("id", sa.Integer, primary_key=True), sa.Column("version", sa.Integer, nullable=False)
    )
    op.create_table("models", sa.Column("name", sa.String, primary_key=True), sa.Column("released", sa.BigInteger))
    op.create_table(
        "versions",
        sa.Column("model", sa.String, sa.ForeignKey("models.name"), primary_key=True),
        sa.Column("version", sa.BigInteger, primary_key=True, autoincrement=False),
        sa.Column("manifest_sha256", sa.String, nullable=False),
        sa.Column("heavy_digest", sa.String, nullable=False),
        sa.Column("heavy_version", sa.BigInteger, nullable=False),
        sa.Column("published_at", sa.Double, nullable=False),
    )
    op.create_table(
        "devices",
        sa.Column("id", sa.String, primary_key=True),
        sa.Column("public_key_pem", sa.LargeBinary, nullable=False),
        sa.Column("enrolled_at", sa.Double, nullable=False),
        sa.Column("last_seen_at", sa.Double, nullable=False),
    )
    op.create_table(
        "invites",
        sa.Column("code_sha256", sa.String, primary_key=True),
        sa.Column("device_id", sa.String, nullable=False),
        sa.Column("expires_at", sa.Double, nullable=False),
        sa.Column("used_at", sa.Double),
    )
    op.create_table(
        "reports",
        sa.Column("device_id", sa.String, sa.ForeignKey("devices.id"), primary_key=True),
        sa.Column("model", sa.String, primary_key=True),
        sa.Column("version", sa.BigInteger, nullable=False),
        sa.Column("state", sa.Integer, nullable=False),
        sa.Column("serving_version", sa.BigInteger, nullable=False),
        sa.Column("reason", sa.String, nullable=False),
        sa.Column("detail", sa.String, nullable=False),
        sa.Column("bytes_fetched", sa.BigInteger, nullable=False),
        sa.Column("variant", sa.String, nullable=False),
        sa.Column("reported_at", sa.Double, nullable=False),
    )
    op.create_table(
        "assertions",
        sa.Column("device_id", sa.String, sa.ForeignKey("devices.id"), primary_key=True),
        sa.Column("jti", sa.String, primary_key=True),
        sa.Column("expires_at", sa.Double, nullable=False),
    )
    op.execute("INSERT INTO schema (id, version) VALUES (1, 1)")
