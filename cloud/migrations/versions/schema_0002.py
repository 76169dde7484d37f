"""Schema 2: rollouts, labels, pins, history, and a revision on whatever watchers are told of."""

from __future__ import annotations

from typing import Any, Final

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"

_REVISION: Final = ("revision", sa.BigInteger, "0")


def upgrade() -> None:
    """Add what rollouts need. What was reported before is kept; every device that reported on a model runs it."""
    _add("models", _REVISION)
    _add("devices", ("facts", sa.LargeBinary, ""), _REVISION)
    _add(
        "reports", ("rollout", sa.String, ""), ("attempt", sa.Integer, "0"), ("number", sa.BigInteger, "0"),
        ("step", sa.String, ""), ("evidence", sa.LargeBinary, ""), ("serving_since", sa.Double, "0"), _REVISION,
    )  # fmt: skip
    op.create_table(
        "ledger", sa.Column("id", sa.Integer, primary_key=True), sa.Column("revision", sa.BigInteger, nullable=False)
    )
    _create_devices()
    _create_rollouts()
    for table in ("devices", "reports", "device_models", "rollouts"):
        op.create_index(f"ix_{table}_revision", table, ["revision"])
    op.execute(
        "INSERT INTO device_models "
        "(device_id, model, watched, attempt, failed_rollout, failed_attempt, failed_reason, revision) "
        "SELECT device_id, model, TRUE, 0, '', 0, '', 0 FROM reports"
    )
    op.execute("UPDATE reports SET serving_since = reported_at")
    op.execute("INSERT INTO ledger (id, revision) VALUES (1, 1)")
    op.execute("UPDATE schema SET version = 2")


def _add(table: str, *columns: tuple[str, type[sa.types.TypeEngine[Any]], str]) -> None:
    """Add columns with what they hold in the rows that are there."""
    is_sqlite = op.get_bind().dialect.name == "sqlite"
    for name, kind, default in columns:
        # SQLite keeps '' as text, whatever the column's type, and the driver would not give it back as bytes.
        value = sa.text("X''") if is_sqlite and kind is sa.LargeBinary else default
        op.add_column(table, sa.Column(name, kind(), nullable=False, server_default=value))


def _create_devices() -> None:
    op.create_table(
        "device_models",
        sa.Column("device_id", sa.String, sa.ForeignKey("devices.id"), primary_key=True),
        sa.Column("model", sa.String, primary_key=True),
        sa.Column("watched", sa.Boolean, nullable=False),
        sa.Column("pin", sa.BigInteger),
        sa.Column("attempt", sa.Integer, nullable=False),
        sa.Column("failed_rollout", sa.String, nullable=False),
        sa.Column("failed_attempt", sa.Integer, nullable=False),
        sa.Column("failed_reason", sa.String, nullable=False),
        sa.Column("revision", sa.BigInteger, nullable=False),
    )
    op.create_table(
        "device_labels",
        sa.Column("device_id", sa.String, sa.ForeignKey("devices.id"), primary_key=True),
        sa.Column("key", sa.String, primary_key=True),
        sa.Column("value", sa.String, nullable=False),
    )
    op.create_table(
        "events",
        sa.Column("id", sa.BigInteger().with_variant(sa.Integer, "sqlite"), primary_key=True),
        sa.Column("at", sa.Double, nullable=False, index=True),
        sa.Column("kind", sa.String, nullable=False),
        sa.Column("device_id", sa.String, nullable=False, index=True),
        sa.Column("rollout", sa.String, nullable=False, index=True),
        sa.Column("model", sa.String, nullable=False),
        sa.Column("version", sa.BigInteger, nullable=False),
        sa.Column("reason", sa.String, nullable=False),
        sa.Column("detail", sa.String, nullable=False),
    )


def _create_rollouts() -> None:
    op.create_table(
        "rollouts",
        sa.Column("id", sa.String, primary_key=True),
        sa.Column("model", sa.String, sa.ForeignKey("models.name"), nullable=False),
        sa.Column("version", sa.BigInteger, nullable=False),
        sa.Column("from_version", sa.BigInteger, nullable=False),
        sa.Column("attempt", sa.Integer, nullable=False),
        sa.Column("selector", sa.String, nullable=False),
        sa.Column("gates", sa.String, nullable=False),
        sa.Column("state", sa.Integer, nullable=False),
        sa.Column("stage", sa.Integer, nullable=False),
        sa.Column("reason", sa.String, nullable=False),
        sa.Column("detail", sa.String, nullable=False),
        sa.Column("created_at", sa.Double, nullable=False),
        sa.Column("created_by", sa.String, nullable=False),
        sa.Column("revision", sa.BigInteger, nullable=False),
    )
    op.create_table(
        "rollout_stages",
        sa.Column("rollout", sa.String, sa.ForeignKey("rollouts.id"), primary_key=True),
        sa.Column("place", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("share", sa.Double, nullable=False),
        sa.Column("count", sa.Integer, nullable=False),
        sa.Column("soak_s", sa.Integer, nullable=False),
        sa.Column("threshold", sa.BigInteger),
        sa.Column("started_at", sa.Double),
    )
