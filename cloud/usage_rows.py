"""Usage and quotas in the database: added up by the hour, read by operators.

Counts of all gateways add up in the same rows: a row is added to, never set. The last segment of each gateway's run
that was taken is remembered in the same transaction, so that none is taken twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass, fields
from typing import Any, Final

from sqlalchemy import Select, delete, func, select
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.orm import Session

from cloud import database as db
from cloud.journal import Counts, Segment, Usage
from cloud.quotas import Limits, Scope, parse_rate

GROUPS: Final = ("tenant", "device", "model", "version", "hour")
_COUNTS: Final = tuple(item.name for item in fields(Counts))
_AT_ONCE: Final = 500  # rows of one statement


@dataclass(frozen=True, slots=True)
class Question:
    """Which usage is asked for; what is empty or None does not matter."""

    tenant: str = ""
    device: str = ""
    model: str = ""
    since: int | None = None  # Unix seconds: hours that begin at or after it
    until: int | None = None  # hours that begin before it
    by: tuple[str, ...] = ("tenant", "model")
    models: frozenset[str] | None = None  # of no others, where a caller may not use all


class UsageTable:
    """Usage in a database."""

    def __init__(self, database: db.Database) -> None:
        self._database = database

    def add(self, segment: Segment, usage: Usage) -> None:
        """Add the counts of a segment, unless they have been added before."""
        with self._database.write() as session:
            run = session.get(db.UsageRun, segment.run)
            if run is None:
                run = db.UsageRun(run=segment.run, segment=0)
                session.add(run)
            if run.segment >= segment.number:
                return
            run.segment = segment.number
            rows = [
                dict(zip(_KEYS, key, strict=True)) | dict(zip(_COUNTS, astuple(counts), strict=True))
                for key, counts in usage.items()
            ]
            for start in range(0, len(rows), _AT_ONCE):
                add_rows(session, db.Usage, _KEYS, _COUNTS, rows[start : start + _AT_ONCE])

    def forget(self, before: int) -> None:
        """Remove what was asked, and computed, in hours that began before a time."""
        with self._database.write() as session:
            session.execute(delete(db.Usage).where(db.Usage.hour < before))
            session.execute(delete(db.TritonUsage).where(db.TritonUsage.hour < before))

    def read(self, question: Question) -> list[tuple[tuple[Any, ...], Counts]]:
        """Return the groups that were asked for, each with its counts, in order."""
        columns: list[Any] = [getattr(db.Usage, name) for name in question.by]
        sums = [func.coalesce(func.sum(getattr(db.Usage, name)), 0) for name in _COUNTS]
        statement: Select[Any] = select(*columns, *sums).group_by(*columns).order_by(*columns)
        for name in ("tenant", "device", "model"):
            if value := getattr(question, name):
                statement = statement.where(getattr(db.Usage, name) == value)
        if question.models is not None:
            statement = statement.where(db.Usage.model.in_(question.models))
        if question.since is not None:
            statement = statement.where(db.Usage.hour >= question.since)
        if question.until is not None:
            statement = statement.where(db.Usage.hour < question.until)
        with self._database.read() as session:
            rows = session.execute(statement).all()
        place = len(columns)
        return [(tuple(row[:place]), Counts(*(int(value) for value in row[place:]))) for row in rows]


_KEYS: Final = ("hour", "tenant", "device", "model", "version")


def add_rows(
    session: Session, table: type[db.Base], keys: Sequence[str], sums: Sequence[str], rows: list[dict[str, Any]]
) -> None:
    """Insert rows, or add to those that are there."""
    insert: Any = {"sqlite": sqlite.insert, "postgresql": postgresql.insert}[session.get_bind().dialect.name]
    statement = insert(table).values(rows)
    added = {name: getattr(table, name) + getattr(statement.excluded, name) for name in sums}
    session.execute(statement.on_conflict_do_update(index_elements=list(keys), set_=added))


class QuotaTable:
    """The quotas that operators set."""

    def __init__(self, database: db.Database) -> None:
        self._database = database

    def read(self) -> dict[Scope, Limits]:
        """Return all rows."""
        with self._database.read() as session:
            rows = session.scalars(select(db.Quota)).all()
        return {Scope(row.tenant, row.device, row.model): _limits(row) for row in rows}

    def put(self, scope: Scope, limits: Limits, *, at: float, by: str) -> None:
        """Set a row."""
        row = db.Quota(
            tenant=scope.tenant,
            device=scope.device,
            model=scope.model,
            rate=limits.rate.text if limits.rate else "",
            burst=limits.burst,
            bytes_rate=limits.bytes_rate.text if limits.bytes_rate else "",
            bytes_burst=limits.bytes_burst,
            concurrency=limits.concurrency,
            set_at=at,
            set_by=by,
        )
        with self._database.write() as session:
            session.merge(row)

    def remove(self, scope: Scope) -> bool:
        """Remove a row; return whether there was one."""
        rows = delete(db.Quota).where(
            db.Quota.tenant == scope.tenant, db.Quota.device == scope.device, db.Quota.model == scope.model
        )
        with self._database.write() as session:
            result: Any = session.execute(rows)
            return bool(result.rowcount)


def _limits(row: db.Quota) -> Limits:
    return Limits(
        rate=parse_rate(row.rate) if row.rate else None,
        burst=row.burst,
        bytes_rate=parse_rate(row.bytes_rate, sizes=True) if row.bytes_rate else None,
        bytes_burst=row.bytes_burst,
        concurrency=row.concurrency,
    )
