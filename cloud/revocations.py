"""Follows what was revoked, here or at another replica, and ends it here: within `poll_s`, and one look at the record.

Revocations are kept in memory, so a call costs a look-up and no query. While the database is away, what was known of it
last holds, and no device gets a token, which needs the database.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Final

import structlog
from sqlalchemy import func, select
from sqlalchemy.exc import SQLAlchemyError

from cloud import database as db
from cloud.identity import Revocation, read_revoked
from security.binding import Guard, Revoked

POLL_S: Final = 1.0

log = structlog.get_logger(__name__)


class Revocations:
    """See the module; lives in one event loop.

    Args:
        database: The record.
        guard: Refuses what is revoked.
        poll_s: How often other replicas' revocations are looked for.
    """

    def __init__(self, database: db.Database, guard: Guard, *, poll_s: float = POLL_S) -> None:
        self._database, self._guard, self._poll_s = database, guard, poll_s
        self._seen = -1
        self.of_devices: Mapping[str, Revocation] = {}

    async def refresh(self) -> None:
        """Take in what was revoked until now."""
        news = await asyncio.to_thread(self._load)
        if news is not None and news[0] > self._seen:
            self._seen, revoked, self.of_devices = news
            self._guard.replace(revoked)

    def _load(self) -> tuple[int, Revoked, Mapping[str, Revocation]] | None:
        with self._database.read() as session:
            newest = session.scalar(select(func.max(db.Revocation.revision))) or 0
            return None if newest == self._seen else (newest, *read_revoked(session))

    async def run(self) -> None:
        """Follow until cancelled; a database that is away for a while is asked again."""
        while True:
            await asyncio.sleep(self._poll_s)
            try:
                await self.refresh()
            except SQLAlchemyError as error:
                log.exception("the database does not answer", kind=type(error).__name__)
