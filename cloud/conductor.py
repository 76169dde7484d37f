"""Drives the fleet: keeps the roster up to date, writes what devices and operators say, and moves rollouts on.

Every change goes to the database first and reaches the roster by reading it back, so this process, its successor
after a crash and a replica beside it follow one record. Rules:
1. A rollout is changed only by who still sees its newest revision (compare and set under the database's write lock);
   of two replicas that decide at once, one finds that the other was faster and looks again.
2. A report is on the disk before the device hears that it was taken; reports that wait together share a commit.
3. Replicas find each other's changes by asking for one row every `poll_s`; watchers hear of them at once then.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Collection, Coroutine, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Final, TypeVar

import structlog
from sqlalchemy import delete, select, update
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session

from cloud import database as db
from cloud import rollout as rules
from cloud.recorder import Recorder
from cloud.records import (
    Ask,
    check_ask,
    check_version,
    keep_report,
    on_device,
    rollout_event,
    settle,
    warnings,
)
from cloud.roster import Device, Layer, Roster, Told
from isthmus.bundle import Variant
from isthmus.errors import ConflictError, IdentityError, InputError, IsthmusError, NotFoundError
from security.custom import Terms
from security.tenancy import DEFAULT_TENANT

POLL_S: Final = 1.0
SEEN_S: Final = 30.0  # how often connected devices are noted as seen; well below what counts as online
HOUSEKEEPING_S: Final = 3600.0
KEEP_EVENTS_S: Final = 90 * 86400.0
_CHUNK: Final = 500  # devices in one statement
_T = TypeVar("_T")

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Releases:
    """What the registry knows and does for the fleet; `terms` may block."""

    terms: Callable[[str, int], Terms]
    prepare: Callable[[str, int], Awaitable[None]]  # before a rollout: heavy model and deltas
    follow: Callable[[Collection[str]], Coroutine[Any, Any, None]]  # models whose versions or release changed


@dataclass(frozen=True, slots=True)
class Preview:
    """What a rollout would do."""

    plan: rules.Plan
    from_version: int
    sizes: tuple[int, ...]
    matching: int
    left_out: list[tuple[str, str, str]]
    warnings: list[str]


@dataclass(slots=True, eq=False)
class _Watcher:
    device: str
    models: frozenset[str]
    changed: asyncio.Event = field(default_factory=asyncio.Event)


class Conductor:
    """See the module; lives in one event loop.

    Args:
        database: The record.
        roster: Follows the record, and is empty.
        releases: The registry's side.
        clock: Returns Unix seconds.
        poll_s: How often rollouts are decided on and other replicas' changes are looked for.
        recorder: Hears of what rollouts do by themselves.
    """

    def __init__(
        self,
        database: db.Database,
        roster: Roster,
        releases: Releases,
        *,
        clock: Callable[[], float] = time.time,
        poll_s: float = POLL_S,
        recorder: Recorder | None = None,
    ) -> None:
        self._recorder = recorder or Recorder()
        self._database, self._releases, self._clock, self._poll_s = database, releases, clock, poll_s
        self.roster = roster
        self._refreshing, self._writing = asyncio.Lock(), asyncio.Lock()
        self._watchers: dict[str, set[_Watcher]] = {}
        self._pending: list[tuple[Callable[[Session, int], None], asyncio.Future[None]]] = []
        self._next_refresh: asyncio.Task[None] | None = None  # that has not begun to read
        self._following: set[asyncio.Task[None]] = set()
        self._closed = False

    # -- following ----------------------------------------------------------------------------------------------

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

    async def run(self) -> None:
        """Follow and decide until cancelled; a database that is away for a while is asked again."""
        seen_at = cleaned_at = self._clock()
        while True:
            try:
                if await asyncio.to_thread(self._database.revision) != self.roster.revision:
                    await self.refresh()
                await self.decide_all()
                if self._clock() - seen_at >= SEEN_S:
                    seen_at = self._clock()
                    await self._write(self._note_seen)
                if self._clock() - cleaned_at >= HOUSEKEEPING_S:
                    cleaned_at = self._clock()
                    await self._write(self._forget_old_events)
            except SQLAlchemyError as error:
                log.exception("the database does not answer", kind=type(error).__name__)
            await asyncio.sleep(self._poll_s)

    def close(self) -> None:
        """Send all watchers home: the process is about to stop."""
        self._closed = True
        for watchers in self._watchers.values():
            for watcher in watchers:
                watcher.changed.set()

    # -- devices ------------------------------------------------------------------------------------------------

    async def watch(
        self, device_id: str, models: Collection[str], facts: bytes, tenant: str = DEFAULT_TENANT
    ) -> AsyncGenerator[tuple[str, Told], None]:
        """Yield what the device is told about each model: now, and whenever it changes.

        Raises:
            IdentityError: A device of this name belongs to another tenant.
        """
        if await self._knows(device_id):
            self._check_tenant(device_id, tenant)
        await self._note_watch(device_id, models, facts)
        watcher = _Watcher(device_id, frozenset(models))
        self._watchers.setdefault(device_id, set()).add(watcher)
        device = self._any_device(device_id, tenant)
        device.streams += 1
        told: dict[str, Told] = {}
        try:
            while not self._closed:
                watcher.changed.clear()
                for model in models:
                    news = self.roster.told(self._any_device(device_id, tenant), model)
                    if news.version and told.get(model) != news:
                        told[model] = news
                        yield model, news
                await watcher.changed.wait()
        finally:
            device.streams -= 1
            device.last_seen_at = self._clock()
            self._watchers[device_id].discard(watcher)
            if not self._watchers[device_id]:
                del self._watchers[device_id]

    async def _knows(self, device_id: str) -> bool:
        """Return whether a device is enrolled, perhaps a moment ago and at another replica."""
        if device_id not in self.roster.devices:
            await self.refresh()
        return device_id in self.roster.devices

    def _any_device(self, device_id: str, tenant: str) -> Device:
        """Return the device, or what stands for one whose enrolment this record does not have."""
        return self.roster.devices.get(device_id) or Device(device_id, 0.0, 0.0, tenant=tenant)

    def _check_tenant(self, device_id: str, tenant: str) -> None:
        if self.roster.devices[device_id].tenant != tenant:
            raise IdentityError("the device is not enrolled here", reason="unknown-device")

    async def _note_watch(self, device_id: str, models: Collection[str], facts: bytes) -> None:
        if not await self._knows(device_id):
            return
        device = self.roster.devices[device_id]
        device.last_seen_at = self._clock()
        watched = {model for model, entry in device.models.items() if entry.watched}
        if device.facts_bytes == facts and watched == set(models):
            return

        def note(session: Session, revision: int) -> None:
            row = session.get_one(db.Device, device_id)
            row.facts, row.last_seen_at, row.revision = facts, self._clock(), revision
            for model in set(models) | watched:
                entry = on_device(session, device_id, model)
                entry.watched, entry.revision = model in models, revision

        await self._together(note)

    async def report(self, device_id: str, report: Any, tenant: str = DEFAULT_TENANT) -> None:
        """Keep a device's report; it is durable when this returns. One that is older than what is known is dropped.

        Raises:
            IdentityError: The device is not enrolled here.
        """
        if not await self._knows(device_id):
            raise IdentityError("the device is not enrolled here", reason="unknown-device")
        self._check_tenant(device_id, tenant)
        await self._together(lambda session, revision: keep_report(session, device_id, report, self._clock(), revision))

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

    def _note_seen(self, session: Session) -> None:
        connected = [device.id for device in self.roster.devices.values() if device.streams]
        if not connected:
            return
        values = {"last_seen_at": self._clock(), "revision": db.next_revision(session)}
        for start in range(0, len(connected), _CHUNK):
            part = connected[start : start + _CHUNK]
            session.execute(update(db.Device).where(db.Device.id.in_(part)).values(values))

    def _forget_old_events(self, session: Session) -> None:
        session.execute(delete(db.Event).where(db.Event.at < self._clock() - KEEP_EVENTS_S))

    async def set_labels(self, device_id: str, labels: Mapping[str, str], remove: Collection[str], by: str) -> None:
        """Set and remove labels of a device.

        Raises:
            NotFoundError: There is no such device.
        """
        self.roster.device(device_id)

        def change(session: Session) -> None:
            session.get_one(db.Device, device_id).revision = db.next_revision(session)
            session.execute(
                delete(db.DeviceLabel).where(
                    db.DeviceLabel.device_id == device_id, db.DeviceLabel.key.in_([*remove, *labels])
                )
            )
            session.add_all(db.DeviceLabel(device_id=device_id, key=key, value=labels[key]) for key in labels)
            text = ", ".join(
                [*(f"{key}={value}" for key, value in sorted(labels.items())), *(f"-{key}" for key in remove)]
            )
            session.add(db.Event(at=self._clock(), kind="labelled", device_id=device_id, detail=f"{text} by {by}"))

        await self._write(change)

    async def pin(self, device_id: str, model: str, version: int | None, by: str) -> None:
        """Hold a device at a version of a model, or let it go (None).

        Raises:
            NotFoundError: There is no such device, or no such version.
        """
        self.roster.device(device_id)

        def change(session: Session) -> None:
            if version is not None:
                check_version(session, model, version)
            entry = on_device(session, device_id, model)
            entry.pin, entry.revision = version, db.next_revision(session)
            kind = "unpinned" if version is None else "pinned"
            session.add(
                db.Event(
                    at=self._clock(),
                    kind=kind,
                    device_id=device_id,
                    model=model,
                    version=version or 0,
                    detail=f"by {by}",
                )
            )

        await self._write(change)

    async def retry(self, device_id: str, model: str, by: str) -> int:
        """Ask a device to try again what failed on it; return the number of the attempt.

        Raises:
            NotFoundError: There is no such device, or it does not run the model.
        """
        if model not in self.roster.device(device_id).models:
            raise NotFoundError(f"device {device_id} does not run a model {model[:80]!r}", reason="unknown-model")

        def change(session: Session) -> int:
            entry = on_device(session, device_id, model)
            entry.attempt, entry.revision = entry.attempt + 1, db.next_revision(session)
            session.add(db.Event(at=self._clock(), kind="retry", device_id=device_id, model=model, detail=f"by {by}"))
            return entry.attempt

        return await self._write(change)

    async def events(self, *, device_id: str = "", rollout: str = "", limit: int = 100) -> list[db.Event]:
        """Return the newest events of a device or a rollout, newest first."""
        chosen = db.Event.device_id == device_id if device_id else db.Event.rollout == rollout

        def read() -> list[db.Event]:
            with self._database.read() as session:
                return [*session.scalars(select(db.Event).where(chosen).order_by(db.Event.id.desc()).limit(limit))]

        return await asyncio.to_thread(read)

    async def takers(self, rollout: str) -> set[str]:
        """Return the devices on which a rollout's version has served."""
        served = select(db.Event.device_id).where(
            db.Event.rollout == rollout, db.Event.kind.in_(("active", "soaking", "rolled_back"))
        )

        def read() -> set[str]:
            with self._database.read() as session:
                return set(session.scalars(served.distinct()))

        return await asyncio.to_thread(read)

    # -- rollouts -----------------------------------------------------------------------------------------------

    async def preview(self, ask: Ask) -> Preview:
        """Return what a rollout would do.

        Raises:
            InputError: Stages, limits or the version cannot be.
            NotFoundError: There is no such version.
            ConflictError: An open rollout of the model is for some of the same devices.
        """
        rules.check_plan(ask.stages, ask.gates)
        await self.refresh()

        def check() -> tuple[rules.Plan, int, Terms, tuple[Variant, ...]]:
            with self._database.read() as session:
                plan, from_version = check_ask(session, ask)
            terms = self._releases.terms(ask.model, ask.version)
            return plan, from_version, terms, self.roster.read_variants(ask.model, ask.version)

        plan, from_version, terms, variants = await asyncio.to_thread(check)
        if terms.withdrawn:
            raise InputError(
                f"{ask.model}@{ask.version} was withdrawn: {terms.withdrawn}",
                hint="publish a new version",
                reason="withdrawn",
            )
        self.roster.note_variants(ask.model, ask.version, variants)
        candidates = self.roster.candidates(plan)
        sizes = tuple(rules.size_of(stage, len(candidates)) for stage in plan.stages)
        notes = warnings(plan, from_version, terms)
        return Preview(plan, from_version, sizes, len(candidates), self.roster.all_left_out(plan), notes)

    async def start(self, ask: Ask) -> tuple[Preview, Layer]:
        """Start a rollout.

        Raises:
            InputError: As preview, or there is no device that it would be for.
            NotFoundError, ConflictError: As preview.
            UnavailableError: The heavy model cannot be loaded now.
        """
        preview = await self.preview(ask)
        if not preview.matching:
            raise InputError(
                f"no device is there that {ask.model}@{ask.version} could be rolled out to",
                hint="--dry-run lists the devices that are left out, and why",
                reason="no-devices",
            )
        await self._releases.prepare(ask.model, ask.version)
        now = self._clock()
        progress = rules.begin(preview.plan, self.roster.candidates(preview.plan), now)

        def begin(session: Session) -> None:
            plan, from_version = check_ask(session, ask)
            if plan != preview.plan:
                raise ConflictError("another rollout of the version was started at the same time", hint="look first")
            session.add(
                db.Rollout(
                    id=plan.id, model=plan.model, version=plan.version, from_version=from_version, attempt=plan.attempt,
                    selector=json.dumps(plan.selector, sort_keys=True), gates=json.dumps(asdict(plan.gates)),
                    state=progress.state, stage=0, reason="stage-runs", detail="", created_at=now, created_by=ask.by,
                    revision=db.next_revision(session),
                )
            )  # fmt: skip
            session.flush()
            for place, stage in enumerate(plan.stages):
                session.add(
                    db.RolloutStage(
                        rollout=plan.id, place=place, share=stage.share, count=stage.count, soak_s=stage.soak_s,
                        threshold=progress.threshold if place == 0 else None, started_at=now if place == 0 else None,
                    )
                )  # fmt: skip
            session.add(rollout_event(plan, now, "started", "", f"by {ask.by}"))

        await self._write(begin)
        log.info("rollout started", rollout=preview.plan.id, devices=preview.matching, by=ask.by)
        return preview, self.roster.rollouts[preview.plan.id]

    def find(self, name: str, may_see: Callable[[str], bool] = lambda _model: True) -> Layer:
        """Return the rollout of this id, or the model's newest one, an open one first.

        Args:
            name: The id or model.
            may_see: Returns whether the caller may use a model; rollouts of others are not there.

        Raises:
            NotFoundError: There is none.
        """
        layer = self.roster.rollouts.get(name)
        if layer is not None and may_see(layer.plan.model):
            return layer
        of_model = [
            layer for layer in self.roster.rollouts.values() if layer.plan.model == name and may_see(layer.plan.model)
        ]
        if not of_model:
            raise unknown_rollout(name)
        return max(of_model, key=lambda layer: (layer.progress.state.is_open, layer.row.created_at))

    async def change(self, name: str, state: rules.State, reason: str, by: str) -> Layer:
        """Pause, resume or abort a rollout for an operator.

        Raises:
            NotFoundError: There is none.
            ConflictError: It is over, or somebody changed it at the same time.
        """
        await self.refresh()
        layer = self.find(name)
        if not layer.progress.state.is_open:
            raise ConflictError(
                f"rollout {layer.plan.id} is {layer.progress.state.name.lower()} already", reason="rollout-over"
            )
        progress = rules.Progress(state, layer.progress.stage, layer.progress.thresholds, layer.progress.started)
        if layer.progress.state is rules.State.PAUSED and state is rules.State.ACTIVE:
            # the stage gets its whole time again: what stood still must not run out at once
            started = (*layer.progress.started[:-1], self._clock())
            progress = rules.Progress(state, layer.progress.stage, layer.progress.thresholds, started)
        kind = {rules.State.ACTIVE: "resumed", rules.State.PAUSED: "paused", rules.State.ABORTED: "aborted"}[state]
        if not await self._store(layer, progress, kind, reason or "operator", f"by {by}"):
            raise ConflictError(f"rollout {layer.plan.id} was changed at the same time", hint="look, and try again")
        log.info("rollout changed", rollout=layer.plan.id, change=kind, reason=reason, by=by)
        return self.roster.rollouts[layer.plan.id]

    async def follow(self) -> None:
        """Take in what changed, in the database or in signed metadata, and decide on it at once."""
        await self.refresh()
        await self.decide_all()

    async def decide_all(self) -> None:
        """Take the next step of every open rollout."""
        for layer in self.roster.open_rollouts():
            terms = await asyncio.to_thread(self._terms, layer.plan)
            decision = self.decide(layer, terms.withdrawn)
            if decision.action is rules.Action.WAIT:
                continue
            progress = rules.advance(layer.progress, decision, self._clock())
            kind = {
                rules.Action.PROMOTE: "promoted", rules.Action.COMPLETE: "completed",
                rules.Action.PAUSE: "paused", rules.Action.ABORT: "aborted",
            }[decision.action]  # fmt: skip
            if await self._store(layer, progress, kind, decision.reason, decision.detail):
                tenant = self.roster.tenants.get(layer.plan.model, "")
                self._recorder.rollout_moves(layer.plan, tenant, kind, decision.reason, decision.detail)
                log.info(
                    "rollout changed",
                    rollout=layer.plan.id,
                    change=kind,
                    reason=decision.reason,
                    detail=decision.detail,
                )

    def decide(self, layer: Layer, withdrawn: str = "") -> rules.Decision:
        """Return what is to be done with a rollout now."""
        return rules.decide(layer.plan, layer.progress, self.roster.candidates(layer.plan), self._clock(), withdrawn)

    def _terms(self, plan: rules.Plan) -> Terms:
        try:
            return self._releases.terms(plan.model, plan.version)
        except (IsthmusError, OSError) as error:  # gates must not stand still because a disk does
            log.warning("terms are not known", rollout=plan.id, error=str(error))
            return Terms()

    async def _store(self, layer: Layer, progress: rules.Progress, kind: str, reason: str, detail: str) -> bool:
        """Write a rollout's new progress; return False when it is not the one any more that was decided on."""

        def write(session: Session) -> bool:
            row = session.get_one(db.Rollout, layer.plan.id)
            if row.revision != layer.row.revision:
                return False
            revision, now = db.next_revision(session), self._clock()
            row.state, row.stage, row.revision = progress.state, progress.stage, revision
            row.reason, row.detail = reason, detail
            for place, (threshold, started) in enumerate(zip(progress.thresholds, progress.started, strict=True)):
                stage = session.get_one(db.RolloutStage, (row.id, place))
                stage.threshold, stage.started_at = threshold, started
            session.add(rollout_event(layer.plan, now, kind, reason, f"stage {progress.stage + 1}: {detail}"))
            if progress.state is rules.State.COMPLETED:
                settle(session, layer.plan, revision)
            return True

        return await self._write(write)

    # -- writing ------------------------------------------------------------------------------------------------

    async def _write(self, work: Callable[[Session], _T]) -> _T:
        """Run one transaction to its end, whoever asked for it, and take in what it changed."""

        def run() -> _T:
            with self._database.write() as session:
                return work(session)

        result = await asyncio.shield(asyncio.ensure_future(asyncio.to_thread(run)))
        await self.refresh()
        return result


def unknown_rollout(name: str) -> NotFoundError:
    """Return the error for a rollout that does not exist, or that the caller must not know of."""
    return NotFoundError(
        f"there is no rollout {name[:80]!r}", hint="isthmus rollout list shows them", reason="unknown-rollout"
    )
