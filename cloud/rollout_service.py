"""The door for rollouts: what operators ask for, and how things stand. `cloud.conductor` decides."""

from __future__ import annotations

import asyncio
from functools import partial
from typing import Any, Final

from cloud import rollout as rules
from cloud.conductor import Conductor
from cloud.fleet import check_may_see
from cloud.fleet_messages import check_labels, event_message, timestamp
from cloud.records import Ask
from cloud.roster import Layer
from isthmus.v1 import fleet_pb2, fleet_pb2_grpc
from security.interceptors import current_claims

_MAX_LEFT_OUT: Final = 500
_MAX_REASON: Final = 500
_EVENTS: Final = 100


class RolloutService(fleet_pb2_grpc.RolloutServiceServicer):
    """Staged activation of versions."""

    def __init__(self, conductor: Conductor) -> None:
        self._conductor = conductor

    async def StartRollout(self, request: Any, context: Any) -> Any:  # noqa: N802
        """Start a rollout, or tell what it would do.

        Raises:
            InputError: Stages, limits or labels cannot be, or the rollout would be for no device.
            NotFoundError: There is no such version.
            ConflictError: An open rollout of the model is for some of the same devices.
        """
        del context
        if not self._conductor.roster.may_see(current_claims(), request.model):
            await self._conductor.refresh()  # it may have been published a moment ago, at another replica
        check_may_see(self._conductor.roster, request.model)
        ask = Ask(
            model=request.model,
            version=min(request.version, 2**53),
            stages=tuple(rules.Stage(stage.share, stage.count, stage.soak_s) for stage in request.stages),
            gates=_gates(request.gates) if request.HasField("gates") else rules.Gates(),
            selector=check_labels(request.selector),
            by=current_claims().subject,
        )
        if request.dry_run:
            preview, layer = await self._conductor.preview(ask), None
        else:
            preview, layer = await self._conductor.start(ask)
        message = self._rollout(layer) if layer is not None else _planned(preview.plan, preview.from_version)
        for stage, size in zip(message.stages, preview.sizes, strict=True):
            stage.devices = size
        return fleet_pb2.StartRolloutResponse(
            rollout=message,
            matching=preview.matching,
            left_out=[
                fleet_pb2.LeftOut(device_id=device, reason=reason, detail=detail)
                for device, reason, detail in preview.left_out[:_MAX_LEFT_OUT]
            ],
            warnings=preview.warnings,
        )

    async def PauseRollout(self, request: Any, context: Any) -> Any:  # noqa: N802
        """Tell no further device.

        Raises:
            NotFoundError: There is no such rollout.
            ConflictError: It is over.
        """
        del context
        return fleet_pb2.PauseRolloutResponse(rollout=await self._change(request.id, rules.State.PAUSED))

    async def ResumeRollout(self, request: Any, context: Any) -> Any:  # noqa: N802
        """Go on.

        Raises:
            NotFoundError: There is no such rollout.
            ConflictError: It is over.
        """
        del context
        return fleet_pb2.ResumeRolloutResponse(rollout=await self._change(request.id, rules.State.ACTIVE))

    async def AbortRollout(self, request: Any, context: Any) -> Any:  # noqa: N802
        """Send every device back.

        Raises:
            NotFoundError: There is no such rollout.
            ConflictError: It is over.
        """
        del context
        reason = "".join(c if c.isprintable() else " " for c in request.reason[:_MAX_REASON])
        return fleet_pb2.AbortRolloutResponse(rollout=await self._change(request.id, rules.State.ABORTED, reason))

    async def _change(self, name: str, state: rules.State, reason: str = "") -> Any:
        layer = await self._find(name)
        return self._rollout(await self._conductor.change(layer.plan.id, state, reason, current_claims().subject))

    async def _find(self, name: str) -> Layer:
        await self._conductor.refresh()
        return self._conductor.find(name, partial(self._conductor.roster.may_see, current_claims()))

    async def GetRollout(self, request: Any, context: Any) -> Any:  # noqa: N802
        """Tell how a rollout stands.

        Raises:
            NotFoundError: There is none.
        """
        del context
        layer = await self._find(request.id)
        events = await self._conductor.events(rollout=layer.plan.id, limit=_EVENTS)
        message = self._rollout(layer)
        takers = await self._conductor.takers(layer.plan.id)
        message.tally.taken = len(takers)
        message.tally.returned = sum(
            self._conductor.roster.serving(device, layer.plan.model) != layer.plan.version for device in takers
        )
        return fleet_pb2.GetRolloutResponse(rollout=message, events=map(event_message, events))

    async def ListRollouts(self, request: Any, context: Any) -> Any:  # noqa: N802
        """List rollouts, newest first."""
        del context
        await self._conductor.refresh()
        claims = current_claims()
        layers = [
            layer
            for layer in self._conductor.roster.rollouts.values()
            if request.model in ("", layer.plan.model) and self._conductor.roster.may_see(claims, layer.plan.model)
        ]
        layers.sort(key=lambda layer: layer.row.created_at, reverse=True)
        messages = []
        for layer in layers:
            messages.append(self._rollout(layer))
            await asyncio.sleep(0)  # each counts thousands of devices
        return fleet_pb2.ListRolloutsResponse(rollouts=messages)

    def _rollout(self, layer: Layer) -> Any:
        roster, row = self._conductor.roster, layer.row
        decision = self._conductor.decide(layer)
        message = _planned(layer.plan, row.from_version)
        message.id, message.state, message.stage = layer.plan.id, layer.progress.state.value, layer.progress.stage
        message.created_by, message.revision = row.created_by, row.revision
        message.created_at.CopyFrom(timestamp(row.created_at))
        runs = layer.progress.state is rules.State.ACTIVE
        message.reason, message.detail = (decision.reason, decision.detail) if runs else (row.reason, row.detail)
        candidates = roster.candidates(layer.plan)
        places = [rules.position(layer.plan.id, device.id) for device in candidates]
        for place, stage in enumerate(message.stages):
            if place < len(layer.progress.thresholds):
                threshold = layer.progress.thresholds[place]
                stage.devices = sum(position < threshold for position in places)
                stage.started_at.CopyFrom(timestamp(layer.progress.started[place]))
            else:
                stage.devices = rules.size_of(layer.plan.stages[place], len(places))
        _fill_tally(message.tally, decision.tally)
        return message


def _planned(plan: rules.Plan, from_version: int) -> Any:
    gates = plan.gates
    return fleet_pb2.Rollout(
        model=plan.model,
        version=plan.version,
        from_version=from_version,
        stages=[fleet_pb2.RolloutStage(share=s.share, count=s.count, soak_s=s.soak_s) for s in plan.stages],
        selector=plan.selector,
        gates=fleet_pb2.RolloutGates(
            max_failure_rate=gates.max_failure_rate, max_failures=gates.max_failures, confidence=gates.confidence,
            max_error_rate=gates.max_error_rate, min_agreement=gates.min_agreement,
            max_latency_ratio=gates.max_latency_ratio, min_samples=gates.min_samples, done_share=gates.done_share,
            stage_limit_s=gates.stage_limit_s,
        ),
        attempt=plan.attempt,
    )  # fmt: skip


def _gates(message: Any) -> rules.Gates:
    return rules.Gates(
        max_failure_rate=message.max_failure_rate, max_failures=message.max_failures, confidence=message.confidence,
        max_error_rate=message.max_error_rate, min_agreement=message.min_agreement,
        max_latency_ratio=message.max_latency_ratio, min_samples=message.min_samples, done_share=message.done_share,
        stage_limit_s=message.stage_limit_s,
    )  # fmt: skip


def _fill_tally(message: Any, tally: rules.Tally) -> None:
    message.cohort, message.online, message.offline = tally.cohort, tally.online, tally.offline
    message.waiting = tally.of(rules.Outcome.WAITING)
    message.updating = tally.of(rules.Outcome.UPDATING)
    message.soaking = tally.of(rules.Outcome.SOAKING)
    message.done = tally.of(rules.Outcome.DONE)
    message.failed = tally.of(rules.Outcome.FAILED)
    for reason, number in tally.reasons.items():
        message.reasons[reason] = number
