"""Devices: told what to run, heard what they run; listed, labelled, pinned by operators.

This is the door, with that of `cloud.identity_service`; `cloud.conductor` keeps and decides.

Rules:
1. A device speaks for itself only: its name comes from its token, never from the message.
2. A Watch ends when its token does; the device comes back with a new one.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Collection
from typing import Any, Final

import structlog

from cloud import database as db
from cloud.admission import Admission
from cloud.catalog import unknown_model
from cloud.conductor import Conductor
from cloud.fleet_messages import (
    MAX_LABELS,
    MAX_NUMBER,
    check_labels,
    checked_report,
    event_message,
    report_message,
    timestamp,
    watch_message,
)
from cloud.identity_service import IdentityService
from cloud.recorder import Recorder
from cloud.revocations import Revocations
from cloud.rollout import matches
from cloud.roster import Device, Roster
from isthmus.errors import InputError
from isthmus.v1 import fleet_pb2
from security.enrolment import IssuingCa
from security.interceptors import check_all_models, current_claims
from security.tokens import TokenIssuer

MAX_WATCHED: Final = 64  # models of one device
_MAX_FACTS: Final = 4096  # bytes
_MAX_NAME: Final = 64  # characters of a model's name
_EVENTS: Final = 100  # of a device's history that are told

log = structlog.get_logger(__name__)


class FleetService(IdentityService):
    """Identity, desired state and reported state of devices.

    Args:
        database: Where invitations, devices and reports are kept.
        conductor: Knows and decides what devices run.
        issuer: Mints access tokens.
        authority: Signs device certificates.
        admission: Limits how many streams a device has open.
        revocations: Follows what was revoked.
        device_address: HOST:PORT that devices are told to call, where certificates are asked for.
        unbound_tokens: Whether a device without a certificate gets a token, too.
        token_ttl_s: Life of the access tokens.
        tenants: Returns the names of the cloud's tenants.
        clock: Returns Unix seconds.
        recorder: Hears of versions that failed on devices.
    """

    def __init__(
        self,
        database: db.Database,
        conductor: Conductor,
        issuer: TokenIssuer,
        authority: IssuingCa,
        *,
        admission: Admission,
        revocations: Revocations | None = None,
        device_address: str = "",
        unbound_tokens: bool = False,
        token_ttl_s: int = 900,
        tenants: Callable[[], Collection[str]] = tuple,
        clock: Callable[[], float] = time.time,
        recorder: Recorder | None = None,
    ) -> None:
        super().__init__(
            database, conductor, issuer, authority, revocations=revocations, device_address=device_address,
            unbound_tokens=unbound_tokens, token_ttl_s=token_ttl_s, tenants=tenants, clock=clock,
        )  # fmt: skip
        self._admission, self._recorder = admission, recorder or Recorder()

    async def Watch(self, request: Any, context: Any) -> AsyncIterator[Any]:  # noqa: N802
        """Stream the version that each model should be at: now, and on every change.

        Raises:
            InputError: Too many models.
            QuotaError: The device has as many open streams as it may.
        """
        del context
        if len(request.models) > MAX_WATCHED:
            raise InputError(f"models: expected at most {MAX_WATCHED}, got {len(request.models)}")
        if request.facts.ByteSize() > _MAX_FACTS:
            raise InputError(f"facts: expected at most {_MAX_FACTS} bytes, got {request.facts.ByteSize()}")
        claims = current_claims()
        models = sorted({m for m in request.models if claims.may_use(m) and len(m) <= _MAX_NAME and m.isprintable()})
        until = claims.expires_at.timestamp()
        facts = request.facts.SerializeToString(deterministic=True)
        watching = contextlib.aclosing(self._conductor.watch(claims.subject, models, facts, claims.tenant))
        async with self._admission.stream(claims), watching as changes:
            while (left_s := until - self._clock()) > 0:
                try:
                    model, told = await asyncio.wait_for(anext(changes), left_s)
                except (TimeoutError, StopAsyncIteration):
                    return
                yield watch_message(model, told)

    async def Report(self, request: Any, context: Any) -> Any:  # noqa: N802
        """Keep a device's report.

        Raises:
            IdentityError: The device is not enrolled here.
            InputError: The report says nothing, or something that cannot be.
        """
        claims = current_claims()
        if not self._conductor.roster.may_see(claims, request.model):
            raise InputError(f"there is no model {request.model[:80]!r} to report on")
        report = checked_report(request)
        await self._conductor.report(claims.subject, report, claims.tenant)
        self._recorder.device_reports(report, context)
        state = fleet_pb2.UpdateState.Name(report.state)
        log.info("device reports", device=claims.subject, model=report.model, version=report.version, state=state)
        return fleet_pb2.ReportResponse()

    async def ListDevices(self, request: Any, context: Any) -> Any:  # noqa: N802
        """List the devices with their last reports."""
        del context
        await self._conductor.refresh()
        roster, selector, tenant = self._conductor.roster, dict(request.selector), current_claims().tenant
        devices = [
            device
            for _, device in sorted(roster.devices.items())
            if device.tenant == tenant and matches(selector, device.labels)
        ]
        return fleet_pb2.ListDevicesResponse(devices=[self._device_message(device) for device in devices])

    async def GetDevice(self, request: Any, context: Any) -> Any:  # noqa: N802
        """Tell what is known of one device.

        Raises:
            NotFoundError: There is none of this name.
        """
        del context
        await self._conductor.refresh()
        claims = current_claims()
        device = self._conductor.roster.device(request.device_id, claims.tenant)
        events = await self._conductor.events(device_id=device.id, limit=_EVENTS)
        events = [event for event in events if not event.model or claims.may_use(event.model)]
        return fleet_pb2.GetDeviceResponse(device=self._device_message(device), events=map(event_message, events))

    async def SetLabels(self, request: Any, context: Any) -> Any:  # noqa: N802
        """Set and remove labels of a device.

        Raises:
            InputError: A label is none, or there are too many.
            NotFoundError: There is no such device.
            PermissionDeniedError: The caller may use some models only; rollouts of all models choose by labels.
        """
        del context
        claims, labels = check_all_models("labelling a device"), check_labels(request.set)
        device = self._conductor.roster.device(request.device_id, claims.tenant)
        if len({*device.labels, *labels} - set(request.remove)) > MAX_LABELS:
            raise InputError(f"expected at most {MAX_LABELS} labels of a device")
        await self._conductor.set_labels(device.id, labels, list(request.remove)[:MAX_LABELS], claims.subject)
        return fleet_pb2.SetLabelsResponse(labels=self._conductor.roster.device(device.id).labels)

    async def Pin(self, request: Any, context: Any) -> Any:  # noqa: N802
        """Hold a device at one version.

        Raises:
            NotFoundError: There is no such device or version.
        """
        del context
        self._check_pair(request)
        version = min(request.version, MAX_NUMBER)  # no version is larger
        await self._conductor.pin(request.device_id, request.model, version, current_claims().subject)
        return fleet_pb2.PinResponse()

    async def Unpin(self, request: Any, context: Any) -> Any:  # noqa: N802
        """Let a device follow releases and rollouts.

        Raises:
            NotFoundError: There is no such device.
        """
        del context
        self._check_pair(request)
        await self._conductor.pin(request.device_id, request.model, None, current_claims().subject)
        return fleet_pb2.UnpinResponse()

    async def RetryDevice(self, request: Any, context: Any) -> Any:  # noqa: N802
        """Ask a device to try again what failed on it.

        Raises:
            NotFoundError: There is no such device, or it does not run the model.
        """
        del context
        self._check_pair(request)
        attempt = await self._conductor.retry(request.device_id, request.model, current_claims().subject)
        return fleet_pb2.RetryDeviceResponse(attempt=attempt)

    def _check_pair(self, request: Any) -> None:
        """Check that device and model are there for the caller.

        Raises:
            NotFoundError: One is not.
        """
        self._conductor.roster.device(request.device_id, current_claims().tenant)
        check_may_see(self._conductor.roster, request.model)

    def _device_message(self, device: Device) -> Any:
        """Return a device as the caller may see it: with the models that it may use."""
        roster, claims = self._conductor.roster, current_claims()
        revoked = self._revocations.of_devices.get(device.id)
        return fleet_pb2.Device(
            device_id=device.id,
            enrolled_at=timestamp(device.enrolled_at),
            last_seen_at=timestamp(device.last_seen_at),
            reports=[
                report_message(entry.report)
                for model, entry in sorted(device.models.items())
                if entry.report is not None and claims.may_use(model)
            ],
            facts=device.facts,
            labels=device.labels,
            online=revoked is None and roster.is_online(device),
            desired=[
                fleet_pb2.Desired(
                    model=model, version=told.version, why=told.why, rollout=told.rollout, attempt=told.attempt
                )
                for model in sorted(device.models)
                if claims.may_use(model)
                for told in (roster.told(device, model),)
            ],
            key_sha256=device.key_sha256,
            revoked_at=timestamp(revoked.revoked_at) if revoked is not None else None,
            revoked_reason=revoked.reason if revoked is not None else "",
        )


def check_may_see(roster: Roster, model: str) -> None:
    """Check that there is such a model for the caller.

    Raises:
        NotFoundError: There is none; of one that is hidden, exactly the same is said.
    """
    if not roster.may_see(current_claims(), model):
        raise unknown_model(model)
