"""Moves rollouts on, and keeps what runs beside that going: previews, starts, decisions, housekeeping.

Rules, with those of `cloud.fleet_record`:
1. A rollout is changed only by who still sees its newest revision (compare and set under the database's write lock);
   of two replicas that decide at once, one finds that the other was faster and looks again.
2. Replicas find each other's changes by asking for one row every `poll_s`; watchers hear of them at once then.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Final

import structlog
from sqlalchemy import select
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session

from cloud import database as db
from cloud import rollout as rules
from cloud.device_desk import DeviceDesk
from cloud.fleet_record import Releases
from cloud.recorder import Recorder
from cloud.records import Ask, check_ask, rollout_event, settle, warnings
from cloud.roster import Layer, Roster
from isthmus.bundle import Variant
from isthmus.errors import ConflictError, InputError, IsthmusError, NotFoundError
from security.custom import Terms

__all__ = ["Conductor", "Preview", "Releases", "unknown_rollout"]

POLL_S: Final = 1.0
SEEN_S: Final = 30.0  # how often connected devices are noted as seen; well below what counts as online
HOUSEKEEPING_S: Final = 3600.0

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Preview:
    """What a rollout would do."""

    plan: rules.Plan
    from_version: int
    sizes: tuple[int, ...]
    matching: int
    left_out: list[tuple[str, str, str]]
    warnings: list[str]


class Conductor(DeviceDesk):
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
        super().__init__(database, roster, releases, clock)
        self._recorder, self._poll_s = recorder or Recorder(), poll_s

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

    async def takers(self, rollout: str) -> set[str]:
        """Return the devices on which a rollout's version has served."""
        served = select(db.Event.device_id).where(
            db.Event.rollout == rollout, db.Event.kind.in_(("active", "soaking", "rolled_back"))
        )

        def read() -> set[str]:
            with self._database.read() as session:
                return set(session.scalars(served.distinct()))

        return await asyncio.to_thread(read)

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


def unknown_rollout(name: str) -> NotFoundError:
    """Return the error for a rollout that does not exist, or that the caller must not know of."""
    return NotFoundError(
        f"there is no rollout {name[:80]!r}", hint="isthmus rollout list shows them", reason="unknown-rollout"
    )
