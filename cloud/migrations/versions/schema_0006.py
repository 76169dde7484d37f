"""Schema 6: how requests are spread over versions, and which Tritons are drained."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"


def upgrade() -> None:
    """Add the two tables; a model without a row is answered by its released version."""
    op.create_table(
        "traffic",
        sa.Column("model", sa.String, sa.ForeignKey("models.name"), primary_key=True),
        sa.Column("policy", sa.LargeBinary, nullable=False),
        sa.Column("revision", sa.BigInteger, nullable=False),
    )
    op.create_index("ix_traffic_revision", "traffic", ["revision"])
    op.create_table(
        "drains",
        sa.Column("replica", sa.String, primary_key=True),
        sa.Column("drained", sa.Boolean, nullable=False),
        sa.Column("revision", sa.BigInteger, nullable=False),
    )
    op.execute("UPDATE schema SET version = 6")
