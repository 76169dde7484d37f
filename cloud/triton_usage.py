"""Compute time, as Triton itself counts it: for each heavy model, by the hour.

Triton tells sums since a model was loaded, and no times of single requests. They are looked at every few seconds; what
they have grown by since the last look is added to the hour. How far they were is kept in the database, in the same
transaction and by the Triton that told them, so that clouds that share a Triton count it once, and a cloud that starts
again goes on where the last one was. Sums that are smaller have begun anew, when Triton has inferred since; otherwise
another cloud has looked later and written sooner. What a Triton computed between the last look and its own end, or the
end of a model in it, is not in these figures; `cloud.metering` has counted its requests all the same.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Final

import structlog
from sqlalchemy import func, select
from sqlalchemy.exc import SQLAlchemyError

from cloud import database as db
from cloud.usage_rows import add_rows
from isthmus.errors import UnavailableError

_HOUR: Final = 3600
_KEYS: Final = ("hour", "model", "version")

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Sums:
    """What Triton has done for one heavy version."""

    answered: int = 0
    failed: int = 0  # those that were given up while they waited among them
    inferences: int = 0  # rows
    executions: int = 0  # fewer than inferences where Triton batches
    queue_ns: int = 0
    compute_ns: int = 0  # of inputs, inference and outputs
    last_ms: int = 0  # Triton's time of the last inference

    @classmethod
    def of(cls, model: Any) -> Sums:
        """Return those of a ModelStatistics message."""
        told = model.inference_stats
        return cls(
            answered=told.success.count,
            failed=told.fail.count,
            inferences=model.inference_count,
            executions=model.execution_count,
            queue_ns=told.queue.ns,
            compute_ns=told.compute_input.ns + told.compute_infer.ns + told.compute_output.ns,
            last_ms=model.last_inference,
        )

    def since(self, before: Sums) -> Sums | None:
        """Return what was added to `before`; all, when Triton has begun anew; None when these are the older ones."""
        grown = [getattr(self, name) - getattr(before, name) for name in _SUMS]
        if min(grown) >= 0:
            return Sums(*grown)
        return self if self.last_ms > before.last_ms else None


_MARK: Final = tuple(item.name for item in fields(Sums))
_SUMS: Final = _MARK[:-1]


class TritonUsage:
    """Follows the statistics of Tritons.

    Args:
        database: Where sums are kept.
        tritons: Returns what each Triton tells now (ModelStatistics), by a name that no other Triton has or will have.
        every_s: How often it is asked.
        clock: Unix seconds.
    """

    def __init__(
        self,
        database: db.Database,
        tritons: Callable[[], Awaitable[Mapping[str, list[Any]]]],
        *,
        every_s: float = 10.0,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._database, self._tritons = database, tritons
        self._every_s, self._clock = every_s, clock
        self._seen: dict[tuple[str, str], Sums] = {}  # what need not be looked up, as it has not changed

    async def run(self) -> None:
        """Look again and again, for ever."""
        while True:
            await asyncio.sleep(self._every_s)
            try:
                await self.look()
            except (SQLAlchemyError, UnavailableError) as error:  # they are sums: the next look makes up for it
                log.info("compute time not read", error=type(error).__name__)

    async def look(self) -> None:
        """Add what the Tritons have done since the last look.

        Raises:
            UnavailableError: They do not answer.
            SQLAlchemyError: The database does not.
        """
        told = await self._tritons()
        found = {
            (source, model.name): Sums.of(model)
            for source, models in told.items()
            for model in models
            if "@" in model.name
        }
        changed = {key: sums for key, sums in found.items() if self._seen.get(key) != sums}
        if changed:
            await asyncio.shield(asyncio.to_thread(self._add, changed))
            self._seen = found

    def _add(self, changed: Mapping[tuple[str, str], Sums]) -> None:
        hour = int(self._clock()) // _HOUR * _HOUR
        with self._database.write() as session:
            for (source, name), sums in sorted(changed.items()):
                mark = session.get(db.TritonMark, (source, name))
                before = Sums() if mark is None else Sums(*(getattr(mark, field) for field in _MARK))
                grown = sums.since(before)
                if grown is None:
                    continue
                session.merge(db.TritonMark(source=source, name=name, **asdict(sums)))
                model, _, version = name.rpartition("@")
                row: dict[str, Any] = {"hour": hour, "model": model, "version": int(version)}
                row |= {field: getattr(grown, field) for field in _SUMS}
                add_rows(session, db.TritonUsage, _KEYS, _SUMS, [row])

    def read(self, since: int | None, until: int | None) -> list[tuple[str, int, Sums]]:
        """Return the sums of each heavy model and version over the hours that begin in a time."""
        table = db.TritonUsage
        sums = [func.sum(getattr(table, name)) for name in _SUMS]
        statement = select(table.model, table.version, *sums).group_by(table.model, table.version)
        if since is not None:
            statement = statement.where(table.hour >= since)
        if until is not None:
            statement = statement.where(table.hour < until)
        with self._database.read() as session:
            rows = session.execute(statement.order_by(table.model, table.version)).all()
        return [(row[0], row[1], Sums(*(int(value) for value in row[2:]))) for row in rows]
