"""What a cloud does beside answering: work that runs until it stops, and a word in the log when it ends before."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from typing import Any, Final

import structlog

from isthmus.errors import IsthmusError
from security.audit.budget import SUMMARY_S, Budget
from security.audit.writer import AuditLog
from security.enrolment import IssuingCa
from security.tenants import TenantRepositories
from security.tokens import TokenIssuer, TokenVerifier

_REFRESH_AGAIN_S: Final = 60.0
_REFRESH_S: Final = 3600.0  # how often signed metadata is looked at for renewal; it lives for a day at least
_FOLLOW_S: Final = 1.0  # how often the files of keys are looked at

log = structlog.get_logger(__name__)


@asynccontextmanager
async def background(work: Coroutine[Any, Any, None], *, name: str) -> AsyncIterator[None]:
    """Run work while the block does."""
    task = asyncio.create_task(work, name=name)
    task.add_done_callback(_complain)
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def _complain(task: asyncio.Task[Any]) -> None:
    """Say so when work that never ends has ended."""
    if not task.cancelled() and (error := task.exception()) is not None:
        log.critical("background work died; restart the cloud", work=task.get_name(), exc_info=error)


async def keep_fresh(repositories: TenantRepositories) -> None:
    """Re-sign the metadata that is about to expire, now and every hour."""
    while True:
        try:
            await asyncio.to_thread(repositories.refresh_if_due, datetime.now(UTC))
        except (IsthmusError, OSError) as error:  # a disk may be full for a while
            log.exception("signed metadata not renewed", reason=getattr(error, "reason", "disk"))
            await asyncio.sleep(_REFRESH_AGAIN_S)
        else:
            await asyncio.sleep(_REFRESH_S)


async def follow_keys(issuer: TokenIssuer, verifier: TokenVerifier, authority: IssuingCa) -> None:
    """Take up token keys and an issuing authority that were rotated, and let go keys whose time is over."""
    published = issuer.jwks
    while True:
        await asyncio.sleep(_FOLLOW_S)
        authority.refresh()
        issuer.refresh()
        if (jwks := issuer.jwks) != published:  # in one step with the line above: nothing is signed that is not known
            verifier.use_keys(jwks)
            published = jwks


async def sum_up(trail: AuditLog, refusals: Budget) -> None:
    """Record the counts of refusals that were not recorded one by one."""
    try:
        while True:
            await asyncio.sleep(SUMMARY_S)
            for event in refusals.summary():
                trail.note(event)
    finally:
        for event in refusals.summary(at_once=True):
            trail.note(event)
