"""The record of the fleet, followed and written.

Rules:
1. Every change goes to the database first and reaches the roster by reading it back, so this process, its successor
   after a crash and a replica beside it follow one record.
2. A report is on the disk before the device hears that it was taken; reports that wait together share a commit.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Collection, Coroutine
from dataclasses import dataclass, field
from typing import Any, TypeVar

import structlog
from sqlalchemy.orm import Session

from cloud import database as db
from cloud.roster import Roster
from security.custom import Terms

_T = TypeVar("_T")

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Releases:
    """What the registry knows and does for the fleet; `terms` may block."""

    terms: Callable[[str, int], Terms]
    prepare: Callable[[str, int], Awaitable[None]]  # before a rollout: heavy model and deltas
    follow: Callable[[Collection[str]], Coroutine[Any, Any, None]]  # models whose versions or release changed


@dataclass(slots=True, eq=False)
class Watcher:
    """A device that is to hear of changes."""

    device: str
    models: frozenset[str]
    changed: asyncio.Event = field(default_factory=asyncio.Event)


class FleetRecord:
    """See the module; lives in one event loop.

    Args:
        database: The record.
        roster: Follows the record, and is empty.
        releases: The registry's side.
        clock: Returns Unix seconds.
    """

    def __init__(
        self, database: db.Database, roster: Roster, releases: Releases, clock: Callable[[], float] = time.time
    ) -> None:
        self._database, self._releases, self._clock = database, releases, clock
        self.roster = roster
        self._refreshing, self._writing = asyncio.Lock(), asyncio.Lock()
        self._watchers: dict[str, set[Watcher]] = {}
        self._pending: list[tuple[Callable[[Session, int], None], asyncio.Future[None]]] = []
        self._next_refresh: asyncio.Task[None] | None = None  # that has not begun to read
        self._following: set[asyncio.Task[None]] = set()
        self._closed = False

    async def refresh(self) -> None:
        """Take in what changed in the database until now, and tell the watchers; callers that wait share one look."""
        if self._next_refresh is None:
            self._next_refresh = asyncio.create_task(self._refresh())
        await asyncio.shield(self._next_refresh)

    async def _refresh(self) -> None:
        async with self._refreshing:
            self._next_refresh = None  # who comes from here on may know of something that this look misses
            changes = await asyncio.to_thread(self.roster.load, self.roster.revision)
            started = self.roster.revision >= 0
            concerned = self.roster.apply(changes)
        self._notify(concerned)
        if started and changes.models:  # not waited for: it may load heavy models, or be what called this
            task = asyncio.create_task(self._releases.follow({row.name for row in changes.models}))
            self._following.add(task)
            task.add_done_callback(self._followed)

    def _followed(self, task: asyncio.Task[None]) -> None:
        self._following.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("releases were not followed", exc_info=error)

    def _notify(self, concerned: set[tuple[str, str]]) -> None:
        everywhere = {model for device, model in concerned if not device}
        for watchers in self._watchers.values():
            for watcher in watchers:
                if everywhere & watcher.models:
                    watcher.changed.set()
        for device, _ in concerned:
            for watcher in self._watchers.get(device, ()):
                watcher.changed.set()

    def close(self) -> None:
        """Send all watchers home: the process is about to stop."""
        self._closed = True
        for watchers in self._watchers.values():
            for watcher in watchers:
                watcher.changed.set()

    async def _together(self, work: Callable[[Session, int], None]) -> None:
        """Write something that thousands of devices do at once: whatever waits together shares a transaction."""
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._pending.append((work, done))
        async with self._writing:
            if not done.done():  # nobody took it along while we waited for our turn
                await asyncio.shield(self._write_pending())
        await done

    async def _write_pending(self) -> None:
        batch, self._pending = self._pending, []

        def write(session: Session) -> None:
            revision = db.next_revision(session)
            for work, _ in batch:
                work(session, revision)

        try:
            await self._write(write)
        except Exception as error:
            for _, done in batch:
                if not done.done():
                    done.set_exception(error)
        else:
            for _, done in batch:
                if not done.done():
                    done.set_result(None)

    async def _write(self, work: Callable[[Session], _T]) -> _T:
        """Run one transaction to its end, whoever asked for it, and take in what it changed."""

        def run() -> _T:
            with self._database.write() as session:
                return work(session)

        result = await asyncio.shield(asyncio.ensure_future(asyncio.to_thread(run)))
        await self.refresh()
        return result
