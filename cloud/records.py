"""What transactions do to the fleet's tables, and what they check: each function works within the caller's session."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from cloud import database as db
from cloud import rollout as rules
from cloud.catalog import unknown_model
from isthmus.errors import ConflictError, InputError, NotFoundError
from isthmus.v1 import fleet_pb2, traffic_pb2
from security.custom import Terms


@dataclass(frozen=True, slots=True)
class Ask:
    """A rollout as an operator asks for it."""

    model: str
    version: int
    stages: tuple[rules.Stage, ...]
    gates: rules.Gates
    selector: Mapping[str, str]
    by: str


def keep_report(session: Session, device_id: str, report: Any, now: float, revision: int) -> None:
    """Keep a device's report when it is the newest, what is new in it as an event, and a failure."""
    row = session.get(db.Report, (device_id, report.model))
    if row is not None and report.number and report.number <= row.number:
        return  # sent again, or overtaken
    if row is None or _news(row) != _news(report):
        session.add(
            db.Event(
                at=now, kind=_state_name(report.state), device_id=device_id, rollout=report.rollout,
                model=report.model, version=report.version, reason=report.reason, detail=report.detail,
            )
        )  # fmt: skip
    same = row is not None and row.serving_version == report.serving_version
    session.merge(
        db.Report(
            device_id=device_id,
            model=report.model,
            version=report.version,
            state=report.state,
            serving_version=report.serving_version,
            reason=report.reason,
            detail=report.detail,
            bytes_fetched=report.bytes_fetched,
            variant=report.variant,
            reported_at=now,
            rollout=report.rollout,
            attempt=report.attempt,
            number=report.number,
            step=report.step,
            evidence=report.evidence.SerializeToString(deterministic=True),
            serving_since=row.serving_since if row is not None and same else now,
            revision=revision,
        )
    )
    entry = on_device(session, device_id, report.model)
    if not entry.watched:
        entry.watched, entry.revision = True, revision
    _note_failure(entry, report, revision)


def supersede(session: Session, model: str, revision: int) -> None:
    """End the say of all completed rollouts of a model: a release takes their place.

    Raises:
        ConflictError: A rollout of the model is open.
    """
    check_no_rollout(session, model)
    for row in session.scalars(select(db.Rollout).where(db.Rollout.model == model)):
        if row.state == rules.State.COMPLETED:
            row.state, row.revision = rules.State.SUPERSEDED, revision


def check_no_rollout(session: Session, model: str) -> None:
    """Check that no rollout of a model is open.

    Raises:
        ConflictError: One is.
    """
    for row in session.scalars(select(db.Rollout).where(db.Rollout.model == model)):
        if rules.State(row.state).is_open:
            raise ConflictError(
                f"rollout {row.id} of {model}@{row.version} is not over",
                hint=f"isthmus rollout abort {row.id} ends it; or let it come to its end",
                reason="rollout-active",
            )


def check_ask(session: Session, ask: Ask) -> tuple[rules.Plan, int]:
    """Return the plan that an operator asks for, and the version that is released.

    Raises:
        InputError: The version is not newer than the released one.
        NotFoundError: There is no such version.
        ConflictError: An open rollout of the model is for some of the same devices.
    """
    check_version(session, ask.model, ask.version)
    released = session.get_one(db.Model, ask.model).released or 0
    if ask.version <= released:
        raise InputError(
            f"{ask.model}@{released} is released: a rollout goes to a newer version, not to {ask.version}",
            hint="isthmus rollout abort goes back within a rollout; isthmus model release moves all devices at once",
            reason="not-newer",
        )
    rows = session.scalars(select(db.Rollout).where(db.Rollout.model == ask.model)).all()
    for row in rows:
        if rules.disjoint(json.loads(row.selector), ask.selector):
            continue
        if row.state == rules.State.COMPLETED and row.version >= ask.version:
            raise InputError(
                f"rollout {row.id} put version {row.version} on some of the same devices: {ask.version} is not newer",
                reason="not-newer",
            )
        if rules.State(row.state).is_open:
            raise ConflictError(
                f"rollout {row.id} of {row.model}@{row.version} is for some of the same devices",
                hint=f"isthmus rollout status {row.id} shows it; abort it or wait until it is over",
                reason="rollout-active",
            )
    earlier = [row for row in rows if row.version == ask.version]
    plan = rules.Plan(
        id=f"{ask.model}-{ask.version}-{len(earlier) + 1}",
        model=ask.model,
        version=ask.version,
        stages=ask.stages,
        gates=ask.gates,
        selector=dict(ask.selector),
        attempt=len(earlier),  # devices on which an earlier rollout of the version failed try it again
    )
    return plan, released


def settle(session: Session, plan: rules.Plan, revision: int) -> None:
    """Let a completed rollout take the place of those that it covers, and of the release when it was for everybody."""
    for row in session.scalars(select(db.Rollout).where(db.Rollout.model == plan.model, db.Rollout.id != plan.id)):
        covered = plan.selector.items() <= json.loads(row.selector).items()
        if row.state == rules.State.COMPLETED and covered:
            row.state, row.revision = rules.State.SUPERSEDED, revision
    if not plan.selector:
        model = session.get_one(db.Model, plan.model)
        model.released, model.revision = plan.version, revision
        end_share(session, plan.model, plan.version, revision)


def _note_failure(entry: db.DeviceModel, report: Any, revision: int) -> None:
    """Remember that a rollout's version failed here, until it serves after all."""
    if not report.rollout:
        return
    failed = report.state in (rules.DeviceState.REFUSED, rules.DeviceState.ROLLED_BACK)
    if failed:
        reason = report.reason or _state_name(report.state).replace("_", "-")
        entry.failed_rollout, entry.failed_attempt, entry.failed_reason = report.rollout, report.attempt, reason
    elif entry.failed_rollout == report.rollout and report.serving_version == report.version:
        entry.failed_rollout, entry.failed_attempt, entry.failed_reason = "", 0, ""
    else:
        return
    entry.revision = revision


def check_version(session: Session, model: str, version: int) -> None:
    """Check that a version is published.

    Raises:
        NotFoundError: It is not.
    """
    if session.get(db.Model, model) is None:
        raise unknown_model(model)
    if session.get(db.Version, (model, version)) is None:
        known = session.scalars(select(db.Version.version).where(db.Version.model == model)).all()
        raise NotFoundError(
            f"model {model!r} has no version {version}; it has {', '.join(map(str, sorted(known)[-5:]))}",
            reason="unknown-version",
        )


def end_share(session: Session, model: str, released: int, revision: int) -> None:
    """End the share of a version in a model's traffic: it is released, and so gets what others do not."""
    row = session.get(db.Traffic, model)
    if row is None:
        return
    policy = traffic_pb2.TrafficPolicy.FromString(row.policy)
    others = [share for share in policy.split.shares if share.version != released]
    if len(others) == len(policy.split.shares) and policy.shadow.version != released:
        return
    del policy.split.shares[:]
    policy.split.shares.extend(others)
    if policy.shadow.version == released:
        policy.ClearField("shadow")
    row.policy, row.revision = policy.SerializeToString(), revision


def on_device(session: Session, device_id: str, model: str) -> db.DeviceModel:
    """Return the row of a model on a device, made when it is not there."""
    entry = session.get(db.DeviceModel, (device_id, model))
    if entry is None:
        entry = db.DeviceModel(
            device_id=device_id, model=model, watched=False, attempt=0, revision=0,
            failed_rollout="", failed_attempt=0, failed_reason="",
        )  # fmt: skip
        session.add(entry)
    return entry


def warnings(plan: rules.Plan, from_version: int, terms: Terms) -> list[str]:
    """Return what an operator should know before a rollout starts."""
    if not from_version:
        return ["no version was released before: devices that take this one have none to go back to"]
    if not 0 < terms.rollback_floor <= from_version:
        return [
            f"devices that take {plan.model}@{plan.version} cannot be sent back to {from_version}: its signed metadata "
            f"permit no way back{f' below {terms.rollback_floor}' if terms.rollback_floor else ''}"
        ]
    return []


def rollout_event(plan: rules.Plan, now: float, kind: str, reason: str, detail: str) -> db.Event:
    """Return an event in a rollout's history."""
    return db.Event(
        at=now, kind=kind, rollout=plan.id, model=plan.model, version=plan.version, reason=reason, detail=detail
    )


def _news(report: Any) -> tuple[Any, ...]:
    return (
        report.version, int(report.state), report.serving_version, report.reason, report.rollout, report.attempt,
    )  # fmt: skip


def _state_name(state: int) -> str:
    return fleet_pb2.UpdateState.Name(fleet_pb2.UpdateState.ValueType(state)).removeprefix("UPDATE_STATE_").lower()
