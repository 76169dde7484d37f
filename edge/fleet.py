"""The device's side of the fleet service: which version each model should be at, and what became of it.

Both loops run until cancelled and outlast any outage: they try again with growing pauses, and at once when the
connection comes back.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, Final

import grpc
import structlog
from pydantic import ValidationError

from edge.backoff import Backoff
from edge.outbox import Outbox
from edge.outcome import Outcome
from edge.state import Became, Order
from edge.trial import Evidence, Terms
from isthmus.v1 import fleet_pb2, fleet_pb2_grpc

REPORT_TIMEOUT_S: Final = 10.0
_REFUSALS: Final = frozenset({grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND})

_STATES: Final = {
    Became.ACTIVE: fleet_pb2.UPDATE_STATE_ACTIVE,
    Became.REFUSED: fleet_pb2.UPDATE_STATE_REFUSED,
    Became.UPDATING: fleet_pb2.UPDATE_STATE_UPDATING,
    Became.SOAKING: fleet_pb2.UPDATE_STATE_SOAKING,
    Became.ROLLED_BACK: fleet_pb2.UPDATE_STATE_ROLLED_BACK,
}

log = structlog.get_logger(__name__)


class Desired:
    """What each model should be at, as last heard; version 0 while unknown."""

    def __init__(self, models: tuple[str, ...]) -> None:
        self._orders = dict.fromkeys(models, Order())
        self._changed = {model: asyncio.Event() for model in models}

    def version(self, model: str) -> int:
        """Return the version."""
        return self._orders[model].version

    def order(self, model: str) -> Order:
        """Return the version with how it has to prove itself."""
        return self._orders[model]

    def set(self, model: str, order: Order) -> None:
        """Note what was heard; models that do not run here are ignored."""
        if model in self._orders and self._orders[model] != order:
            self._orders[model] = order
            self._changed[model].set()

    async def change(self, model: str) -> None:
        """Wait until something was heard since the last call."""
        await self._changed[model].wait()
        self._changed[model].clear()


class FleetLink:
    """Watches and reports.

    Args:
        channel: To the cloud.
        token: Returns the access token, waiting for the first one.
        models: The models that this device runs.
        desired: Hears the versions.
        facts: What this device is, for whoever chooses versions for it.
        outbox: Keeps reports until they are sent.
        unauthenticated: Called when the cloud does not accept the token.
    """

    def __init__(
        self,
        channel: grpc.aio.Channel,
        token: Callable[[], Awaitable[str]],
        models: tuple[str, ...],
        desired: Desired,
        *,
        facts: fleet_pb2.DeviceFacts | None = None,
        outbox: Outbox | None = None,
        unauthenticated: Callable[[], None] = lambda: None,
    ) -> None:
        self._stub = fleet_pb2_grpc.FleetServiceStub(channel)
        self._token = token
        self._models = models
        self._desired = desired
        self._unauthenticated = unauthenticated
        self._outbox = Outbox() if outbox is None else outbox
        self._facts = facts or fleet_pb2.DeviceFacts()
        self._to_report = asyncio.Event()
        self._watch_backoff = Backoff()
        self._report_backoff = Backoff()

    def connected(self) -> None:
        """Try again at once: the connection has come up."""
        self._watch_backoff.wake()
        self._report_backoff.wake()

    def report(self, outcome: Outcome) -> None:
        """Send this as soon as the cloud can be reached; a newer report of the version replaces it until then."""
        report = fleet_pb2.ReportRequest(
            model=outcome.model,
            version=outcome.to_version,
            state=_STATES[outcome.became],
            serving_version=outcome.serving_version,
            reason=outcome.reason,
            detail=outcome.detail[:1000],
            bytes_fetched=outcome.bytes_fetched,
            variant=outcome.variant,
            rollout=outcome.order.rollout,
            attempt=outcome.order.attempt,
            step=outcome.step.value,
        )
        if outcome.evidence is not None:
            report.evidence.CopyFrom(_told(outcome.evidence))
        self._outbox.put(report)
        self._to_report.set()

    async def watch(self) -> None:
        """Follow the desired versions."""
        request = fleet_pb2.WatchRequest(models=self._models, facts=self._facts)
        while True:
            try:
                stream = self._stub.Watch(request, metadata=await self._metadata())
                async for message in stream:
                    self._watch_backoff.reset()
                    self._hear(message)
            except grpc.aio.AioRpcError as error:
                self._note(error, "watch")
            await self._watch_backoff.pause()

    def _hear(self, message: fleet_pb2.WatchResponse) -> None:
        try:
            terms = _terms(message.trial) if message.HasField("trial") else None
        except ValidationError as error:  # a cloud that asks for what cannot be gets the device's own terms
            log.warning("trial not understood", model=message.model[:64], error=str(error)[:200])
            terms = None
        order = Order(version=message.version, rollout=message.rollout[:128], attempt=message.attempt, terms=terms)
        self._desired.set(message.model, order)

    async def send_reports(self) -> None:
        """Send what is to be reported, what an earlier run of the agent left first."""
        if self._outbox.waiting():
            self._to_report.set()
        while True:
            await self._to_report.wait()
            self._to_report.clear()
            await self._keep()
            for report in self._outbox.waiting():
                if not await self._send(report):
                    self._to_report.set()
                    await self._report_backoff.pause()
                    break
                self._report_backoff.reset()
                self._outbox.sent(report)
            await self._keep()

    async def _keep(self) -> None:
        data = self._outbox.prepare_write()
        if data is not None:
            await asyncio.to_thread(self._outbox.write, data)

    async def _send(self, report: fleet_pb2.ReportRequest) -> bool:
        """Return whether the cloud has decided about this report: taken, or refused for good."""
        try:
            await self._stub.Report(report, metadata=await self._metadata(), timeout=REPORT_TIMEOUT_S)
        except grpc.aio.AioRpcError as error:
            self._note(error, "report")
            return error.code() in _REFUSALS  # again and again it would only hold up those of other models
        return True

    def _note(self, error: grpc.aio.AioRpcError, what: str) -> None:
        if error.code() is grpc.StatusCode.UNAUTHENTICATED:
            self._unauthenticated()
        log.info("call ended", call=what, code=error.code().name, detail=(error.details() or "")[:200])

    async def _metadata(self) -> Any:
        return (("authorization", f"Bearer {await self._token()}"),)


def _terms(trial: fleet_pb2.Trial) -> Terms:
    return Terms(**{field.name: getattr(trial, field.name) for field in trial.DESCRIPTOR.fields})


def _told(evidence: Evidence) -> fleet_pb2.Evidence:
    now, before = evidence.now, evidence.before
    return fleet_pb2.Evidence(
        requests=now.requests,
        errors=now.errors,
        escalated=now.escalated,
        audited=now.audited,
        disagreed=now.disagreed,
        latency_p50_ms=now.quantile_ms(0.5),
        latency_p99_ms=now.quantile_ms(0.99),
        seconds=now.seconds,
        before_requests=before.requests,
        before_errors=before.errors,
        before_escalated=before.escalated,
        before_latency_p50_ms=before.quantile_ms(0.5),
    )
