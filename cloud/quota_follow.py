"""Keeps a gateway's quotas as the database has them: its own changes at once, others' within a second."""

from __future__ import annotations

import asyncio

import structlog
from sqlalchemy.exc import SQLAlchemyError

from cloud.quotas import QuotaBook
from cloud.usage_rows import QuotaTable

log = structlog.get_logger(__name__)


class QuotaFollower:
    """Reads rows into a book.

    Args:
        table: The rows.
        book: What the gateway decides by.
        poll_s: How often the rows are looked at.
    """

    def __init__(self, table: QuotaTable, book: QuotaBook, *, poll_s: float = 1.0) -> None:
        self._table, self._book, self._poll_s = table, book, poll_s

    async def refresh(self) -> None:
        """Read the rows now.

        Raises:
            SQLAlchemyError: The database does not answer.
        """
        self._book.replace(await asyncio.to_thread(self._table.read))

    async def run(self) -> None:
        """Read them again and again, for ever; without the database, what was read last goes on to count."""
        while True:
            await asyncio.sleep(self._poll_s)
            try:
                await self.refresh()
            except SQLAlchemyError as error:
                log.warning("quotas not read", error=type(error).__name__)
