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

from edge.backoff import Backoff
from edge.updater import Outcome
from isthmus.v1 import fleet_pb2, fleet_pb2_grpc

REPORT_TIMEOUT_S: Final = 10.0
AUDIT_ALARM: Final = "audit-alarm"  # the reason of such a report
_REFUSALS: Final = frozenset({grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND})

log = structlog.get_logger(__name__)


class Desired:
    """The version that each model should be at, as last heard; 0 while unknown."""

    def __init__(self, models: tuple[str, ...]) -> None:
        self._versions = dict.fromkeys(models, 0)
        self._changed = {model: asyncio.Event() for model in models}

    def version(self, model: str) -> int:
        """Return the version."""
        return self._versions[model]

    def set(self, model: str, version: int) -> None:
        """Note what was heard; models that do not run here are ignored."""
        if model in self._versions and self._versions[model] != version:
            self._versions[model] = version
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
        unauthenticated: Called when the cloud does not accept the token.
    """

    def __init__(
        self,
        channel: grpc.aio.Channel,
        token: Callable[[], Awaitable[str]],
        models: tuple[str, ...],
        desired: Desired,
        *,
        unauthenticated: Callable[[], None] = lambda: None,
    ) -> None:
        self._stub = fleet_pb2_grpc.FleetServiceStub(channel)
        self._token = token
        self._models = models
        self._desired = desired
        self._unauthenticated = unauthenticated
        self._reports: dict[str, fleet_pb2.ReportRequest] = {}
        self._to_report = asyncio.Event()
        self._watch_backoff = Backoff()
        self._report_backoff = Backoff()

    def connected(self) -> None:
        """Try again at once: the connection has come up."""
        self._watch_backoff.wake()
        self._report_backoff.wake()

    def report(self, outcome: Outcome) -> None:
        """Send this as soon as the cloud can be reached; a newer report of the model replaces it until then."""
        state = fleet_pb2.UPDATE_STATE_ACTIVE if outcome.active else fleet_pb2.UPDATE_STATE_REFUSED
        self._reports[outcome.model] = fleet_pb2.ReportRequest(
            model=outcome.model,
            version=outcome.to_version,
            state=state,
            serving_version=outcome.serving_version,
            reason=outcome.reason,
            detail=outcome.detail[:1000],
            bytes_fetched=outcome.bytes_fetched,
            variant=outcome.variant,
        )
        self._to_report.set()

    def report_alarm(self, model: str, version: int, variant: str, detail: str) -> None:
        """Send, as soon as the cloud can be reached, that the serving version's answers have gone wrong."""
        self._reports[model] = fleet_pb2.ReportRequest(
            model=model,
            version=version,
            state=fleet_pb2.UPDATE_STATE_ACTIVE,
            serving_version=version,
            reason=AUDIT_ALARM,
            detail=detail[:1000],
            variant=variant,
        )
        self._to_report.set()

    async def watch(self) -> None:
        """Follow the desired versions."""
        request = fleet_pb2.WatchRequest(models=self._models)
        while True:
            try:
                stream = self._stub.Watch(request, metadata=await self._metadata())
                async for message in stream:
                    self._watch_backoff.reset()
                    self._desired.set(message.model, message.version)
            except grpc.aio.AioRpcError as error:
                self._note(error, "watch")
            await self._watch_backoff.pause()

    async def send_reports(self) -> None:
        """Send what is to be reported."""
        while True:
            await self._to_report.wait()
            self._to_report.clear()
            for model, report in list(self._reports.items()):
                if not await self._send(report):
                    self._to_report.set()
                    await self._report_backoff.pause()
                    break
                self._report_backoff.reset()
                if self._reports[model] is report:
                    del self._reports[model]

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
