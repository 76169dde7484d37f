"""Keeps the policies by which requests are spread: in the database, and in memory for the gateway.

A change goes to the database first and reaches memory by reading it back, as in cloud.conductor: this process, its
successor and a cloud beside it follow one record. Rules:
1. A version must be published, not withdrawn, and loaded, before a policy names it.
2. A policy that comes from another cloud counts here once its versions are loaded here.
3. A roll back needs nothing to be loaded and waits for nothing.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any, NamedTuple

import structlog
from sqlalchemy import select
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session

from cloud import database as db
from cloud.catalog import Catalog, unknown_model
from cloud.heavy import HeavyId
from cloud.records import check_version
from cloud.replicas import Replica, Replicas
from cloud.traffic import (
    NAMED,
    NO_POLICY,
    RELEASED,
    Policy,
    changed,
    describe,
    key_of,
    policy_from,
    rolled_back,
    sticky_point,
)
from isthmus.errors import ConflictError, IsthmusError
from isthmus.oip_head import RequestHead
from isthmus.v1 import traffic_pb2

log = structlog.get_logger(__name__)


class Route(NamedTuple):
    """Which version answers a request, and why."""

    version: int
    heavy: HeavyId
    assignment: str  # "" where the model has no split
    policy: Policy


@dataclass(frozen=True, slots=True)
class Serving:
    """What publishing does for a policy; `check` may block."""

    check: Callable[[str, int], None]  # raises when the version was withdrawn
    load: Callable[[str], Coroutine[Any, Any, None]]  # what the model needs now


@dataclass(frozen=True, slots=True)
class _Row:
    message: Any  # TrafficPolicy
    revision: int  # of the database's row
    policy: Policy


class TrafficDesk:
    """See the module; lives in one event loop.

    Args:
        database: The record.
        catalog: Knows which version is released.
        replicas: The Tritons, which this drains.
        poll_s: How often changes by other clouds are looked for.
        draw: Returns a random number in [0, 1).
    """

    def __init__(
        self,
        database: db.Database,
        catalog: Catalog,
        replicas: Replicas,
        *,
        poll_s: float = 1.0,
        clock: Callable[[], float] = time.time,
        draw: Callable[[], float] = random.random,
    ) -> None:
        self._database, self._catalog, self._replicas = database, catalog, replicas
        self._poll_s, self._clock, self._draw = poll_s, clock, draw
        self._rows: dict[str, _Row] = {}
        self._coming: dict[str, frozenset[int]] = {}  # versions of policies that do not count here yet
        self._seen = -1
        self._lock = asyncio.Lock()
        self._serving: Serving | None = None

    def serve_with(self, serving: Serving) -> None:
        """Say who loads versions; before `follow` and `change`."""
        self._serving = serving

    # -- routing --------------------------------------------------------------------------------------------------

    def route(self, head: RequestHead, subject: str) -> Route:
        """Return which version answers a request.

        Raises:
            NotFoundError: There is no such model or version.
            InputError: The parameters of the request cannot be decoded.
        """
        version, heavy = self._catalog.resolve(head.model_name, head.model_version)
        row = self._rows.get(head.model_name)
        if row is None:
            return Route(version, heavy, "", NO_POLICY)
        policy = row.policy
        if head.model_version:
            return Route(version, heavy, NAMED, policy)
        if not policy.shares:
            return Route(version, heavy, RELEASED, policy)
        chosen, assignment = policy.assign(self._point(policy, head, subject))
        if chosen is not None:
            other = self._catalog.heavy(head.model_name, chosen)
            if self._replicas.serves(other):
                return Route(chosen, other, assignment, policy)
        return Route(version, heavy, RELEASED, policy)

    def _point(self, policy: Policy, head: RequestHead, subject: str) -> float:
        if not policy.sticky:
            return self._draw()
        parameters = head.parameters() if policy.key_parameter else {}
        return sticky_point(head.model_name, key_of(policy, subject, parameters))

    def versions(self, model: str) -> frozenset[int]:
        """Return the versions that must stay loaded for a model's policy."""
        row = self._rows.get(model)
        now = frozenset[int]() if row is None else row.policy.versions
        return now | self._coming.get(model, frozenset())

    def policies(self) -> dict[str, Any]:
        """Return the TrafficPolicy of each model that has one, by its name."""
        return {model: row.message for model, row in sorted(self._rows.items())}

    # -- changing -------------------------------------------------------------------------------------------------

    async def change(self, request: Any, by: str) -> Any:
        """Do what a SetTrafficRequest asks for; return the TrafficPolicy that counts then.

        Raises:
            InputError: It is no policy.
            NotFoundError: There is no such model or version.
            ConflictError: No version is released, or one was withdrawn.
            UnavailableError: A version cannot be loaded now.
        """
        async with self._lock:
            row = self._rows.get(request.model)
            wanted = policy_from(changed(row.message if row is not None else traffic_pb2.TrafficPolicy(), request))
            await asyncio.to_thread(self._check, request.model, wanted)
            await self._load(request.model, wanted)
            return await self._write(request.model, by, lambda old: changed(old, request))

    async def roll_back(self, model: str, by: str) -> Any:
        """End split and shadow of a model; return the TrafficPolicy that counts then.

        Raises:
            NotFoundError: There is no such model.
        """
        row = self._rows.get(model)
        if row is not None:  # at once, whatever the database does
            message = rolled_back(row.message)
            self._rows[model] = _Row(message, row.revision, policy_from(message))
        return await self._write(model, by, rolled_back)

    def _check(self, model: str, policy: Policy) -> None:
        with self._database.read() as session:
            for version in policy.versions or (self._catalog.released(model) or 0,):
                check_version(session, model, version)
        if self._catalog.released(model) is None:
            raise ConflictError(f"model {model!r} has no released version", hint="isthmus model release MODEL@VERSION")
        for version in policy.versions:
            self._helper.check(model, version)

    async def _load(self, model: str, policy: Policy) -> None:
        self._coming[model] = policy.versions
        try:
            await self._helper.load(model)
        finally:
            del self._coming[model]
        for version in policy.versions:
            if not self._replicas.serves(self._catalog.heavy(model, version)):
                raise ConflictError(
                    f"the heavy model of {model}@{version} is not loaded",
                    hint="the cloud's log says why",
                    reason="heavy-not-loaded",
                )

    @property
    def _helper(self) -> Serving:
        assert self._serving is not None  # noqa: S101 - bootstrap has set it
        return self._serving

    async def _write(self, model: str, by: str, edit: Callable[[Any], Any]) -> Any:
        def work() -> tuple[Any, int]:
            with self._database.write() as session:
                check_model(session, model)
                row = session.get(db.Traffic, model)
                old = traffic_pb2.TrafficPolicy() if row is None else traffic_pb2.TrafficPolicy.FromString(row.policy)
                new = edit(old)
                now = self._clock()
                new.model, new.changed_by = model, by
                new.changed_at.FromMilliseconds(int(now * 1000))
                revision = db.next_revision(session)
                session.merge(db.Traffic(model=model, policy=new.SerializeToString(), revision=revision))
                session.add(db.Event(at=now, kind="traffic", model=model, reason=by, detail=describe(new)))
                return new, revision

        message, revision = await asyncio.to_thread(work)
        self._rows[model] = _Row(message, revision, policy_from(message))
        log.info("traffic changed", model=model, by=by, policy=describe(message))
        return message

    async def drain(self, name: str, wait_s: float) -> Replica:
        """Drain a replica; an external Triton in all clouds that use it.

        Raises:
            NotFoundError: There is none of that name.
            ConflictError: No other replica serves.
        """
        replica = await self._replicas.drain(name, 0)
        await self._keep_drain(replica)
        await replica.until_idle(wait_s)
        return replica

    async def resume(self, name: str) -> Replica:
        """Let a drained replica serve again.

        Raises:
            NotFoundError: There is none of that name.
        """
        replica = self._replicas.resume(name)
        await self._keep_drain(replica)
        return replica

    async def _keep_drain(self, replica: Replica) -> None:
        if replica.server is not None:  # a child of this process is nobody else's
            return

        def work() -> None:
            with self._database.write() as session:
                revision = db.next_revision(session)
                session.merge(db.Drain(replica=replica.name, drained=replica.drained, revision=revision))

        await asyncio.to_thread(work)

    # -- following ------------------------------------------------------------------------------------------------

    def read(self) -> None:
        """Take over what the database says, for the start: `versions` must be right before models are loaded."""
        _, rows, drains = self._read()
        self._rows = {row.message.model: row for row in rows}
        self._apply_drains(drains)

    async def follow(self) -> None:
        """Take over what other clouds change, for ever."""
        while True:
            await asyncio.sleep(self._poll_s)
            try:
                if await asyncio.to_thread(self._database.revision) != self._seen:
                    await self._take_over()
            except SQLAlchemyError as error:
                log.exception("the database does not answer", kind=type(error).__name__)

    async def _take_over(self) -> None:
        async with self._lock:
            revision, rows, drains = await asyncio.to_thread(self._read)
            self._apply_drains(drains)
            complete = True
            for row in rows:
                model = row.message.model
                if self._is_old(row):
                    continue
                try:
                    if row.policy.versions:
                        await self._load(model, row.policy)
                except IsthmusError as error:
                    log.warning("a policy cannot be followed yet", model=model, reason=error.reason)
                    complete = False
                    continue
                if not self._is_old(row):  # somebody here was faster
                    self._rows[model] = row
            if complete:
                self._seen = revision

    def _is_old(self, row: _Row) -> bool:
        known = self._rows.get(row.message.model)
        return known is not None and known.revision >= row.revision

    def _read(self) -> tuple[int, list[_Row], dict[str, bool]]:
        with self._database.read() as session:
            revision = session.scalars(select(db.Ledger.revision)).one()
            rows = []
            for row in session.scalars(select(db.Traffic)):
                message = traffic_pb2.TrafficPolicy.FromString(row.policy)
                rows.append(_Row(message, row.revision, policy_from(message)))
            drains = {row.replica: row.drained for row in session.scalars(select(db.Drain))}
        return revision, rows, drains

    def _apply_drains(self, drains: dict[str, bool]) -> None:
        for replica in self._replicas:
            if replica.server is None:
                replica.drained = drains.get(replica.name, False)


def check_model(session: Session, model: str) -> None:
    """Check that there is a model.

    Raises:
        NotFoundError: There is none.
    """
    if session.get(db.Model, model) is None:
        raise unknown_model(model)
