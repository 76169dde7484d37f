"""The fleet in memory: devices, what they reported, what is released and rolled out, and so what each is told.

The database is the record. `load` reads what changed since a revision (in a thread), `apply` puts it here (in the event
loop) and says whom it concerns; a start is a load of everything. A write of this process and one of another replica
come in by the same way, so all replicas tell a device the same. Nothing here asks the database for one device.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import structlog
from sqlalchemy import select
from sqlalchemy.orm import Session

from cloud import database as db
from cloud import rollout as rules
from isthmus.bundle import Variant
from isthmus.errors import IsthmusError, NotFoundError
from isthmus.v1 import fleet_pb2
from security.tenancy import DEFAULT_TENANT
from security.tokens import Claims

ONLINE_S: Final = 90.0  # after it was last heard, a device without a stream here counts as online

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Told:
    """What a device is told about a model, and why; version 0 is nothing."""

    version: int
    why: str
    rollout: str = ""
    attempt: int = 0
    soak_s: int = 0
    gates: rules.Gates | None = None


@dataclass(slots=True)
class OnDevice:
    """A model on a device."""

    watched: bool = False
    pin: int | None = None
    attempt: int = 0
    failure: rules.Failure | None = None
    report: db.Report | None = None
    heard: rules.Heard | None = None


@dataclass(slots=True)
class Device:
    """A device."""

    id: str
    enrolled_at: float
    last_seen_at: float
    key_sha256: str = ""
    tenant: str = DEFAULT_TENANT
    facts_bytes: bytes = b""
    facts: Any = None
    labels: dict[str, str] = field(default_factory=dict)
    models: dict[str, OnDevice] = field(default_factory=dict)
    streams: int = 0  # that are open in this process


@dataclass(frozen=True, slots=True)
class Layer:
    """A rollout that says, or may yet say, what devices run."""

    plan: rules.Plan
    progress: rules.Progress
    row: db.Rollout


@dataclass(slots=True)
class Changes:
    """Rows that changed since a revision."""

    revision: int = 0
    models: list[db.Model] = field(default_factory=list)
    devices: list[db.Device] = field(default_factory=list)
    labels: list[db.DeviceLabel] = field(default_factory=list)
    device_models: list[db.DeviceModel] = field(default_factory=list)
    reports: list[db.Report] = field(default_factory=list)
    rollouts: list[Layer] = field(default_factory=list)
    variants: dict[tuple[str, int], tuple[Variant, ...]] = field(default_factory=dict)


class Roster:
    """See the module.

    Args:
        database: The record.
        variants: Returns the variants of a published version; may block.
        clock: Returns Unix seconds.
    """

    def __init__(
        self,
        database: db.Database,
        variants: Callable[[str, int], tuple[Variant, ...]],
        clock: Callable[[], float],
    ) -> None:
        self._database, self.read_variants, self._clock = database, variants, clock
        self.revision = -1
        self.devices: dict[str, Device] = {}
        self.released: dict[str, int | None] = {}
        self.tenants: dict[str, str] = {}  # by model
        self.rollouts: dict[str, Layer] = {}
        self._layers: dict[str, list[Layer]] = {}  # by model, newest first, those that tell devices something
        self._variants: dict[tuple[str, int], tuple[Variant, ...]] = {}

    # -- following the database ---------------------------------------------------------------------------------

    def load(self, since: int) -> Changes:
        """Read what changed after revision `since`; blocks."""
        changes = Changes()
        with self._database.read() as session:
            changes.revision = session.scalars(select(db.Ledger.revision)).one()
            if changes.revision <= since:
                return changes
            changes.models = [*session.scalars(select(db.Model).where(db.Model.revision > since))]
            changes.devices = [*session.scalars(select(db.Device).where(db.Device.revision > since))]
            if changes.devices:
                changed = {device.id for device in changes.devices}
                rows = session.scalars(select(db.DeviceLabel))
                changes.labels = [row for row in rows if row.device_id in changed]
            changes.device_models = [*session.scalars(select(db.DeviceModel).where(db.DeviceModel.revision > since))]
            changes.reports = [*session.scalars(select(db.Report).where(db.Report.revision > since))]
            rollouts = session.scalars(
                select(db.Rollout).where(db.Rollout.revision > since).order_by(db.Rollout.created_at, db.Rollout.id)
            )
            changes.rollouts = [read_layer(session, row) for row in rollouts]
        self._load_variants(changes)
        return changes

    def _load_variants(self, changes: Changes) -> None:
        wanted = {(row.name, row.released) for row in changes.models if row.released is not None}
        wanted |= {(layer.plan.model, layer.plan.version) for layer in changes.rollouts}
        wanted |= {(row.model, row.pin) for row in changes.device_models if row.pin is not None}
        for model, version in wanted - set(self._variants):
            try:
                changes.variants[model, version] = self.read_variants(model, version)
            except IsthmusError as error:  # the device, which reads the manifest itself, decides
                log.warning("variants are not known", model=model, version=version, reason=error.reason)

    def note_variants(self, model: str, version: int, variants: tuple[Variant, ...]) -> None:
        """Take in the variants of a version that no device is told yet."""
        self._variants[model, version] = variants

    def apply(self, changes: Changes) -> set[tuple[str, str]]:
        """Take changes in; return the (device, model) pairs that may be told other things, ("", model) for all."""
        concerned: set[tuple[str, str]] = set()
        self._variants |= changes.variants
        for model in changes.models:
            if self.released.get(model.name, 0) != model.released:
                concerned.add(("", model.name))
            self.released[model.name], self.tenants[model.name] = model.released, model.tenant
        self._apply_devices(changes, concerned)
        for report in changes.reports:
            if (device := self.devices.get(report.device_id)) is not None:
                entry = device.models.setdefault(report.model, OnDevice())
                entry.report, entry.heard = report, _heard(report)
                concerned.add((device.id, report.model))  # a paused rollout goes by what was reported
                device.last_seen_at = max(device.last_seen_at, report.reported_at)
        for layer in changes.rollouts:
            self.rollouts[layer.plan.id] = layer
            concerned.add(("", layer.plan.model))
        for model_name in {layer.plan.model for layer in changes.rollouts}:
            telling = [
                layer for layer in self.rollouts.values()
                if layer.plan.model == model_name
                and layer.progress.state in (rules.State.ACTIVE, rules.State.PAUSED, rules.State.COMPLETED)
            ]  # fmt: skip
            self._layers[model_name] = sorted(
                telling, key=lambda layer: (layer.row.created_at, layer.plan.id), reverse=True
            )
        self.revision = max(self.revision, changes.revision)
        return concerned

    def _apply_devices(self, changes: Changes, concerned: set[tuple[str, str]]) -> None:
        labels: dict[str, dict[str, str]] = {}
        for label in changes.labels:
            labels.setdefault(label.device_id, {})[label.key] = label.value
        for row in changes.devices:
            device = self.devices.setdefault(row.id, Device(row.id, row.enrolled_at, row.last_seen_at))
            device.tenant = row.tenant
            device.enrolled_at, device.last_seen_at = row.enrolled_at, max(device.last_seen_at, row.last_seen_at)
            device.key_sha256 = row.key_sha256
            new_labels = labels.get(row.id, {})
            if device.facts_bytes != row.facts or device.labels != new_labels:
                device.facts_bytes, device.labels = row.facts, new_labels
                device.facts = fleet_pb2.DeviceFacts.FromString(row.facts) if row.facts else None
                concerned.update((row.id, model) for model in device.models)
        for entry in changes.device_models:
            if entry.device_id in self.devices:
                device = self.devices[entry.device_id]
                known = device.models.setdefault(entry.model, OnDevice())
                known.watched, known.pin, known.attempt = entry.watched, entry.pin, entry.attempt
                known.failure = (
                    rules.Failure(entry.failed_rollout, entry.failed_attempt, entry.failed_reason)
                    if entry.failed_rollout
                    else None
                )
                concerned.add((entry.device_id, entry.model))

    # -- what follows from it -----------------------------------------------------------------------------------

    def device(self, device_id: str, tenant: str | None = None) -> Device:
        """Return a device, of this tenant where one is given.

        Raises:
            NotFoundError: There is none of this name; of another tenant's, the same is said.
        """
        device = self.devices.get(device_id)
        if device is None or tenant not in (None, device.tenant):
            raise unknown_device(device_id)
        return device

    def may_see(self, claims: Claims, model: str) -> bool:
        """Return whether there is such a model for a caller: one of its tenant, and one that it may use."""
        return self.tenants.get(model) == claims.tenant and claims.may_use(model)

    def _is_for(self, device: Device, model: str) -> bool:
        """Return whether a model may run on a device: both belong to one tenant, or nobody has published it yet."""
        return self.tenants.get(model, device.tenant) == device.tenant

    def is_online(self, device: Device) -> bool:
        """Return whether a device watches here, or was heard of lately by any replica.

        Enrolment does not count: the device's agent may be started much later, or on a site that never has a network.
        """
        connected = device.last_seen_at > device.enrolled_at
        return device.streams > 0 or (connected and self._clock() - device.last_seen_at < ONLINE_S)

    def misfit(self, device: Device, model: str, version: int) -> str:
        """Return why no variant of a version runs on a device, or nothing: it fits, or one of the two is not known."""
        variants = self._variants.get((model, version))
        if variants is None or device.facts is None:
            return ""
        return misfit(variants, device.facts)

    def told(self, device: Device, model: str) -> Told:
        """Return what a device is told: its pin, else the newest rollout that wants it, else what is released."""
        if not self._is_for(device, model):
            return Told(0, "not-released")
        entry = device.models.get(model, OnDevice())
        if entry.pin is not None:
            return self._fitting(device, model, Told(entry.pin, "pin", attempt=entry.attempt))
        misfits = False
        for layer in self._layers.get(model, ()):
            plan = layer.plan
            if rules.matches(plan.selector, device.labels) and rules.tells(
                plan, layer.progress, device.id, entry.heard
            ):
                if not self.misfit(device, model, plan.version):
                    soak_s = rules.stage_of(plan, layer.progress, device.id).soak_s
                    return Told(plan.version, "rollout", plan.id, plan.attempt + entry.attempt, soak_s, plan.gates)
                misfits = True
        released = self.released.get(model)
        if released is None:
            return Told(0, "no-fitting-variant" if misfits else "not-released")
        return self._fitting(device, model, Told(released, "release", attempt=entry.attempt))

    def _fitting(self, device: Device, model: str, told: Told) -> Told:
        return Told(0, "no-fitting-variant") if self.misfit(device, model, told.version) else told

    def candidates(self, plan: rules.Plan) -> list[rules.Candidate]:
        """Return the devices that a rollout is for."""
        return [
            rules.Candidate(device.id, self.is_online(device), entry.heard, plan.attempt + entry.attempt, entry.failure)
            for device, entry in self._running(plan.model)
            if not self.left_out(device, plan)[0]
        ]

    def _running(self, model: str) -> Iterable[tuple[Device, OnDevice]]:
        for device in self.devices.values():
            entry = device.models.get(model)
            if entry is not None and entry.watched and self._is_for(device, model):
                yield device, entry

    def left_out(self, device: Device, plan: rules.Plan) -> tuple[str, str]:
        """Return reason and detail when a rollout is not for a device that runs the model, else nothing."""
        if not rules.matches(plan.selector, device.labels):
            return "label", f"its labels are {_labels(device.labels)}"
        if (pin := device.models[plan.model].pin) is not None:
            return "pinned", f"an operator pinned it to version {pin}"
        if why := self.misfit(device, plan.model, plan.version):
            return "no-fitting-variant", why
        return "", ""

    def all_left_out(self, plan: rules.Plan) -> list[tuple[str, str, str]]:
        """Return (device, reason, detail) of the devices that run the model and that a rollout leaves out."""
        rows = [(device.id, *self.left_out(device, plan)) for device, _ in self._running(plan.model)]
        return sorted(row for row in rows if row[1])

    def open_rollouts(self, model: str | None = None) -> list[Layer]:
        """Return the rollouts that are active or paused."""
        return [
            layer for layer in self.rollouts.values()
            if layer.progress.state.is_open and model in (None, layer.plan.model)
        ]  # fmt: skip

    def serving(self, device_id: str, model: str) -> int:
        """Return the version that a device said it serves; 0: none that is known."""
        entry = self.device(device_id).models.get(model)
        return 0 if entry is None or entry.heard is None else entry.heard.serving_version

    def versions_told(self, model: str) -> set[int]:
        """Return the versions of a model that rollouts and pins tell devices."""
        pins = {entry.pin for device in self.devices.values() if (entry := device.models.get(model)) is not None}
        return {layer.plan.version for layer in self._layers.get(model, ())} | {pin for pin in pins if pin is not None}

    def versions_in_use(self, model: str) -> dict[int, int]:
        """Return how many devices serve each version of a model."""
        counted: dict[int, int] = {}
        for _, entry in self._running(model):
            if entry.heard is not None and entry.heard.serving_version:
                counted[entry.heard.serving_version] = counted.get(entry.heard.serving_version, 0) + 1
        return counted


def unknown_device(device_id: str) -> NotFoundError:
    """Return the error for a device that does not exist, or that the caller must not know of: they look the same."""
    return NotFoundError(
        f"there is no device {device_id[:80]!r}", hint="isthmus device list shows them", reason="unknown-device"
    )


def misfit(variants: Iterable[Variant], facts: Any) -> str:
    """Return why none of the variants runs on a device with these facts, or nothing."""
    reasons = set()
    for variant in variants:
        if facts.runtimes and variant.runtime not in facts.runtimes:
            reasons.add(f"{variant.id}: runtime {variant.runtime} is not installed")
        elif facts.platform and variant.platform not in ("any", facts.platform):
            reasons.add(f"{variant.id}: it is for {variant.platform}, the device is {facts.platform}")
        elif variant.inference_precision == "bf16" and not facts.bfloat16:
            reasons.add(f"{variant.id}: the processor does not compute in bfloat16")
        else:
            return ""
    return "; ".join(sorted(reasons))[:400]


def read_layer(session: Session, row: db.Rollout) -> Layer:
    """Return a rollout as the decisions see it."""
    stages = session.scalars(
        select(db.RolloutStage).where(db.RolloutStage.rollout == row.id).order_by(db.RolloutStage.place)
    ).all()
    plan = rules.Plan(
        id=row.id,
        model=row.model,
        version=row.version,
        stages=tuple(rules.Stage(stage.share, stage.count, stage.soak_s) for stage in stages),
        gates=rules.Gates(**json.loads(row.gates)),
        selector=json.loads(row.selector),
        attempt=row.attempt,
    )
    begun = [stage for stage in stages if stage.threshold is not None]
    progress = rules.Progress(
        state=rules.State(row.state),
        stage=row.stage,
        thresholds=tuple(stage.threshold or 0 for stage in begun),
        started=tuple(stage.started_at or 0.0 for stage in begun),
    )
    return Layer(plan, progress, row)


def _heard(report: db.Report) -> rules.Heard:
    seen = fleet_pb2.Evidence.FromString(report.evidence)
    evidence = rules.Evidence(
        requests=seen.requests, errors=seen.errors, audited=seen.audited, disagreed=seen.disagreed,
        seconds=seen.seconds,
    )  # fmt: skip
    return rules.Heard(
        version=report.version,
        state=rules.DeviceState(report.state),
        serving_version=report.serving_version,
        reason=report.reason,
        rollout=report.rollout,
        attempt=report.attempt,
        serving_since=report.serving_since,
        evidence=evidence,
    )


def _labels(labels: Mapping[str, str]) -> str:
    return ", ".join(f"{key}={value}" for key, value in sorted(labels.items())) or "none"
