"""Schema 5: quotas, and usage by the hour."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"


def upgrade() -> None:
    """Add the tables; nothing that is there changes."""
    op.create_table(
        "quotas",
        sa.Column("tenant", sa.String, primary_key=True),
        sa.Column("device", sa.String, primary_key=True),
        sa.Column("model", sa.String, primary_key=True),
        sa.Column("rate", sa.String, nullable=False),
        sa.Column("burst", sa.BigInteger),
        sa.Column("bytes_rate", sa.String, nullable=False),
        sa.Column("bytes_burst", sa.BigInteger),
        sa.Column("concurrency", sa.BigInteger),
        sa.Column("set_at", sa.Double, nullable=False),
        sa.Column("set_by", sa.String, nullable=False),
    )
    counts = (
        "answered",
        "cached",
        "refused",
        "limited",
        "failed",
        "cancelled",
        "bytes_in",
        "bytes_out",
        "calls",
        "call_us",
    )
    op.create_table(
        "usage",
        sa.Column("hour", sa.BigInteger, primary_key=True, autoincrement=False),
        sa.Column("tenant", sa.String, primary_key=True),
        sa.Column("device", sa.String, primary_key=True),
        sa.Column("model", sa.String, primary_key=True),
        sa.Column("version", sa.BigInteger, primary_key=True, autoincrement=False),
        *(sa.Column(name, sa.BigInteger, nullable=False) for name in counts),
    )
    op.create_table(
        "usage_runs",
        sa.Column("run", sa.String, primary_key=True),
        sa.Column("segment", sa.BigInteger, nullable=False),
    )
    sums = ("answered", "failed", "inferences", "executions", "queue_ns", "compute_ns")
    op.create_table(
        "triton_usage",
        sa.Column("hour", sa.BigInteger, primary_key=True, autoincrement=False),
        sa.Column("model", sa.String, primary_key=True),
        sa.Column("version", sa.BigInteger, primary_key=True, autoincrement=False),
        *(sa.Column(name, sa.BigInteger, nullable=False) for name in sums),
    )
    op.create_table(
        "triton_marks",
        sa.Column("source", sa.String, primary_key=True),
        sa.Column("name", sa.String, primary_key=True),
        *(sa.Column(name, sa.BigInteger, nullable=False) for name in (*sums, "last_ms")),
    )
    op.execute("UPDATE schema SET version = 5")
