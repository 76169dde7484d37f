"""The record of granted roles and API keys, and the snapshot of it that every request is judged by.

Every change bumps one number; each cloud looks at that number every `poll_s` and takes a new snapshot when it moved.
So a grant, a revocation or a new key holds at once where it was made, and within about a second on every other cloud
of the same database. While the database does not answer, the last snapshot holds: a database that is away for a minute
must not lock everybody out, and who could reach the database to revoke something could not do so then either.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Final, TypeVar

import structlog
from sqlalchemy import CursorResult, delete, select, update
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session

from cloud import database as db
from cloud.access_tables import AccessState, ApiKeyRow, RoleGrant
from isthmus.errors import ConflictError, NotFoundError
from security.apikeys import ApiKey, key_digest, new_api_key
from security.roles import AccessBook, Grant

POLL_S: Final = 1.0
KEEP_USED_S: Final = 30.0  # how often the last use of keys is written down
FORGET_S: Final = 30 * 86400.0  # how long an expired key stays in lists
_T = TypeVar("_T")

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Keep:
    """Who changes what, and when: what every change is written with."""

    tenant: str
    by: str


class AccessStore:
    """See the module; lives in one event loop.

    Args:
        database: The record.
        book: The snapshot.
        clock: Returns Unix seconds.
        poll_s: How often other clouds' changes are looked for.
    """

    def __init__(
        self,
        database: db.Database,
        book: AccessBook,
        *,
        clock: Callable[[], float] = time.time,
        poll_s: float = POLL_S,
    ) -> None:
        self._database, self._book, self._clock, self._poll_s = database, book, clock, poll_s
        self._number = -1

    # -- following ----------------------------------------------------------------------------------------------

    async def refresh(self) -> None:
        """Take in what changed in the record."""
        found = await asyncio.to_thread(self._read, self._number)
        if found is not None and found[0] > self._number:  # two looks may come back in the other order
            self._number = found[0]
            self._book.replace(found[1], found[2])

    def _read(self, since: int) -> tuple[int, list[Grant], list[ApiKey]] | None:
        with self._database.read() as session:
            number = session.scalars(select(AccessState.number)).one()
            if number == since:
                return None
            grants = [
                Grant(row.tenant, row.principal, row.role, frozenset(json.loads(row.models)))
                for row in session.scalars(select(RoleGrant))
            ]
            keys = [
                ApiKey(row.prefix, row.digest, row.tenant, row.name, row.expires_at)
                for row in session.scalars(select(ApiKeyRow))
            ]
        return number, grants, keys

    async def run(self) -> None:
        """Follow other clouds, and keep when keys were used, until cancelled."""
        kept_at = self._clock()
        while True:
            try:
                await self.refresh()
                if self._clock() - kept_at >= KEEP_USED_S:
                    kept_at = self._clock()
                    await self.keep_used()
            except SQLAlchemyError as error:
                log.exception("grants and keys are not followed", kind=type(error).__name__)
            await asyncio.sleep(self._poll_s)

    async def keep_used(self) -> None:
        """Write down when keys were last used."""
        used, self._book.used = self._book.used, {}
        if used:
            await asyncio.to_thread(self._keep_used, used)

    def _keep_used(self, used: dict[str, float]) -> None:
        with self._database.write() as session:
            for prefix, at in used.items():
                session.execute(update(ApiKeyRow).where(ApiKeyRow.prefix == prefix).values(last_used_at=at))

    # -- grants -------------------------------------------------------------------------------------------------

    async def grant(self, keep: Keep, principal: str, role: str, models: Iterable[str]) -> RoleGrant:
        """Give a principal a role for some models; in place of what that role was for until now."""

        def change(session: Session) -> RoleGrant:
            if principal.startswith("apikey:"):
                _check_key(session, keep.tenant, principal.removeprefix("apikey:"))
            return session.merge(self._grant_row(keep, principal, role, models))

        return await self._change(change)

    def _grant_row(self, keep: Keep, principal: str, role: str, models: Iterable[str]) -> RoleGrant:
        return RoleGrant(
            tenant=keep.tenant, principal=principal, role=role, models=json.dumps(sorted(set(models))),
            created_at=self._clock(), created_by=keep.by,
        )  # fmt: skip

    async def revoke(self, tenant: str, principal: str, role: str) -> int:
        """Take a role, or with "" all roles, from a principal; return how many.

        Raises:
            NotFoundError: It has none such.
        """

        def change(session: Session) -> int:
            chosen = delete(RoleGrant).where(RoleGrant.tenant == tenant, RoleGrant.principal == principal)
            count = _deleted(session.execute(chosen.where(RoleGrant.role == role) if role else chosen))
            if not count:
                raise NotFoundError(
                    f"{principal} has no such role here", hint="isthmus role list shows what was granted",
                    reason="unknown-grant",
                )  # fmt: skip
            return count

        return await self._change(change)

    async def grants(self, tenant: str) -> list[RoleGrant]:
        """Return what was granted in a tenant."""
        statement = (
            select(RoleGrant).where(RoleGrant.tenant == tenant).order_by(RoleGrant.principal, RoleGrant.role)
        )  # fmt: skip
        return await asyncio.to_thread(self._all, statement)

    # -- API keys -----------------------------------------------------------------------------------------------

    async def create_key(
        self, keep: Keep, name: str, role: str, models: Iterable[str], ttl_s: float
    ) -> tuple[str, ApiKeyRow]:
        """Make a key with a role; return it and what is known of it.

        Raises:
            ConflictError: The tenant has a key of this name.
        """

        def change(session: Session) -> tuple[str, ApiKeyRow]:
            self._forget_expired(session)
            if _rows_of(session, keep.tenant, name):
                raise ConflictError(
                    f"there is an API key {name!r} already", reason="key-exists",
                    hint=f"isthmus apikey rotate {name} makes another one for the same client",
                )  # fmt: skip
            session.execute(delete(RoleGrant).where(*_grants_of_key(keep.tenant, name)))
            session.add(self._grant_row(keep, f"apikey:{name}", role, models))
            return self._new_key(session, keep, name, ttl_s)

        return await self._change(change)

    def _new_key(self, session: Session, keep: Keep, name: str, ttl_s: float) -> tuple[str, ApiKeyRow]:
        key, prefix = new_api_key()
        now = self._clock()
        row = ApiKeyRow(
            prefix=prefix, digest=key_digest(key), tenant=keep.tenant, name=name,
            created_at=now, created_by=keep.by, expires_at=now + ttl_s, last_used_at=None,
        )  # fmt: skip
        session.add(row)
        return key, row

    async def rotate_key(
        self, keep: Keep, name: str, ttl_s: float, overlap_s: float
    ) -> tuple[str, ApiKeyRow, ApiKeyRow]:
        """Make the next key of a name and let the newest one end soon; return key, row, and the old one's row.

        Raises:
            NotFoundError: There is no key of this name.
            ConflictError: Two keys are valid already.
        """

        def change(session: Session) -> tuple[str, ApiKeyRow, ApiKeyRow]:
            now = self._clock()
            self._forget_expired(session)
            rows = _check_key(session, keep.tenant, name)
            valid = [row for row in rows if row.expires_at > now]
            if len(valid) > 1:
                raise ConflictError(
                    f"two API keys {name!r} are valid already", reason="key-exists",
                    hint=f"isthmus apikey revoke {name} --prefix {min(valid, key=_made).prefix} ends the older one",
                )  # fmt: skip
            old = max(rows, key=_made)
            old.expires_at = min(old.expires_at, now + overlap_s)
            return *self._new_key(session, keep, name, ttl_s), old

        return await self._change(change)

    async def revoke_key(self, tenant: str, name: str, prefix: str) -> int:
        """Take back the key with this prefix, or with "" all of the name and what was granted to it; return how many.

        Raises:
            NotFoundError: There is none such.
        """

        def change(session: Session) -> int:
            rows = [row for row in _check_key(session, tenant, name) if prefix in ("", row.prefix)]
            if not rows:
                raise unknown_key(name)
            for row in rows:
                session.delete(row)
            session.flush()
            if not _rows_of(session, tenant, name):
                session.execute(delete(RoleGrant).where(*_grants_of_key(tenant, name)))
            return len(rows)

        return await self._change(change)

    async def keys(self, tenant: str) -> list[ApiKeyRow]:
        """Return the keys of a tenant; a last use of a moment ago included."""
        await self.keep_used()
        statement = select(ApiKeyRow).where(ApiKeyRow.tenant == tenant).order_by(ApiKeyRow.name, ApiKeyRow.created_at)
        return await asyncio.to_thread(self._all, statement)

    def _forget_expired(self, session: Session) -> None:
        session.execute(delete(ApiKeyRow).where(ApiKeyRow.expires_at < self._clock() - FORGET_S))

    # -- reading and writing ------------------------------------------------------------------------------------

    def _all(self, statement: Any) -> list[Any]:
        with self._database.read() as session:
            return [*session.scalars(statement)]

    async def _change(self, work: Callable[[Session], _T]) -> _T:
        """Do one change to its end, whoever asked for it, and let it hold here at once."""

        def run() -> _T:
            with self._database.write() as session:
                result = work(session)
                session.execute(update(AccessState).values(number=AccessState.number + 1))
                return result

        result = await asyncio.shield(asyncio.ensure_future(asyncio.to_thread(run)))
        await self.refresh()
        return result


def unknown_key(name: str) -> NotFoundError:
    """Return the error for a key that a tenant does not have."""
    return NotFoundError(
        f"there is no API key {name[:80]!r}", hint="isthmus apikey list shows them", reason="unknown-api-key"
    )


def _rows_of(session: Session, tenant: str, name: str) -> list[ApiKeyRow]:
    return [*session.scalars(select(ApiKeyRow).where(ApiKeyRow.tenant == tenant, ApiKeyRow.name == name))]


def _check_key(session: Session, tenant: str, name: str) -> list[ApiKeyRow]:
    if not (rows := _rows_of(session, tenant, name)):
        raise unknown_key(name)
    return rows


def _grants_of_key(tenant: str, name: str) -> tuple[Any, ...]:
    return RoleGrant.tenant == tenant, RoleGrant.principal == f"apikey:{name}"


def _made(row: ApiKeyRow) -> float:
    return row.created_at


def _deleted(result: Any) -> int:
    return result.rowcount if isinstance(result, CursorResult) else 0
