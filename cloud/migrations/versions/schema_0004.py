"""Schema 4: tenants, granted roles, API keys, and whose each blob is."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    """Add tenants and access. What is there already belongs to the default tenant."""
    for table in ("models", "devices", "invites"):
        op.add_column(table, sa.Column("tenant", sa.String, nullable=False, server_default="default"))
    op.create_table(
        "role_grants",
        sa.Column("tenant", sa.String, primary_key=True),
        sa.Column("principal", sa.String, primary_key=True),
        sa.Column("role", sa.String, primary_key=True),
        sa.Column("models", sa.String, nullable=False),
        sa.Column("created_at", sa.Double, nullable=False),
        sa.Column("created_by", sa.String, nullable=False),
    )
    op.create_table(
        "api_keys",
        sa.Column("prefix", sa.String, primary_key=True),
        sa.Column("digest", sa.LargeBinary, nullable=False, unique=True),
        sa.Column("tenant", sa.String, nullable=False),
        sa.Column("name", sa.String, nullable=False),
        sa.Column("created_at", sa.Double, nullable=False),
        sa.Column("created_by", sa.String, nullable=False),
        sa.Column("expires_at", sa.Double, nullable=False),
        sa.Column("last_used_at", sa.Double),
    )
    op.create_table(
        "access_state",
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("number", sa.BigInteger, nullable=False),
    )
    op.create_table(
        "model_blobs",
        sa.Column("sha256", sa.String, primary_key=True),
        sa.Column("model", sa.String, sa.ForeignKey("models.name"), primary_key=True),
    )
    op.create_table(
        "uploaded_blobs",
        sa.Column("sha256", sa.String, primary_key=True),
        sa.Column("tenant", sa.String, primary_key=True),
    )
    op.execute("INSERT INTO access_state (id, number) VALUES (1, 1)")
    op.execute("UPDATE schema SET version = 4")
