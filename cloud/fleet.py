"""Devices: invited by an operator, enrolled once, given short-lived tokens, told what to run, heard what they run.

This is the door; `cloud.identity` and `cloud.conductor` keep and decide.

Rules:
1. Wrong, used and expired codes get the same answer. (`cloud.identity` has the rules for codes, keys and assertions.)
2. A device speaks for itself only: its name comes from its token, never from the message.
3. A token is bound to the certificate of the connection on which it was asked for.
4. A Watch ends when its token does; the device comes back with a new one.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import secrets
import time
from collections.abc import AsyncIterator, Callable, Collection, Mapping
from datetime import UTC, datetime, timedelta
from typing import Any, Final

import structlog
from google.protobuf.timestamp_pb2 import Timestamp

from cloud import database as db
from cloud.admission import Admission
from cloud.catalog import unknown_model
from cloud.conductor import Conductor
from cloud.identity import Identities
from cloud.recorder import Recorder
from cloud.revocations import Revocations
from cloud.rollout import matches
from cloud.roster import Device, Roster, Told
from isthmus.errors import IdentityError, InputError
from isthmus.status import ADDRESS_KEY, TIME_KEY
from isthmus.v1 import fleet_pb2, fleet_pb2_grpc
from security.binding import Guard, peer_of
from security.durations import format_duration
from security.enrolment import IssuingCa, check_device_id
from security.interceptors import check_all_models, current_claims
from security.tenancy import DEFAULT_TENANT, check_new_name
from security.tls import negotiated
from security.tokens import TokenIssuer

DEFAULT_INVITE_S: Final = 3600
MAX_INVITE_S: Final = 30 * 86400
MAX_WATCHED: Final = 64  # models of one device
_MAX_TEXT: Final = 500  # characters of a reason or detail that are kept
_MAX_NUMBER: Final = 2**53  # as in a manifest; a database holds no more than 2**63 - 1
_MAX_FACTS: Final = 4096  # bytes
_MAX_NAME: Final = 64  # characters of a model's name
_MAX_LABELS: Final = 64
_LABEL: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,63}")
_EVENTS: Final = 100  # of a device's history that are told

log = structlog.get_logger(__name__)


class FleetService(fleet_pb2_grpc.FleetServiceServicer):
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
        self._conductor, self._issuer, self._admission = conductor, issuer, admission
        self._identities = Identities(database, authority, issuer.audience, clock)
        self._revocations, self._recorder = revocations or Revocations(database, Guard()), recorder or Recorder()
        self._device_address, self._unbound_tokens = device_address, unbound_tokens
        self._token_ttl_s, self._tenants, self._clock = token_ttl_s, tenants, clock

    async def Invite(self, request: Any, context: Any) -> Any:  # noqa: N802
        """Make a one-time code; the device will belong to the caller's tenant.

        Raises:
            InputError: The name or the time to live is not valid.
            PermissionDeniedError: The caller may use some models only; the device could use all of the tenant's.
        """
        del context
        device_id, claims = check_device_id(request.device_id), check_all_models("inviting a device")
        await self._check_name(device_id, claims.tenant)
        ttl_s = request.ttl_s or DEFAULT_INVITE_S
        if ttl_s > MAX_INVITE_S:
            most, asked = (format_duration(timedelta(seconds=seconds)) for seconds in (MAX_INVITE_S, ttl_s))
            raise InputError(f"expected a time to live of at most {most}, got {asked}")
        code, expires_at = secrets.token_urlsafe(24), self._clock() + ttl_s
        await asyncio.to_thread(self._identities.invite, code, device_id, claims.tenant, expires_at)
        log.info("device invited", device=device_id, tenant=claims.tenant, by=claims.subject)
        return fleet_pb2.InviteResponse(code=code, expires_at=timestamp(expires_at))

    async def _check_name(self, device_id: str, tenant: str) -> None:
        await self._conductor.refresh()
        device = self._conductor.roster.devices.get(device_id)
        if device is None or tenant != DEFAULT_TENANT:
            check_new_name(tenant, device_id, self._tenants())
        if device is not None and device.tenant != tenant:
            raise InputError(f"no device can be called {device_id!r}", reason="name-of-another")

    async def Enrol(self, request: Any, context: Any) -> Any:  # noqa: N802
        """Exchange a code for an identity.

        Raises:
            IdentityError: The code is wrong, used or expired.
            InputError: The certificate request is not acceptable; the code stays valid.
        """
        del context
        device_id, tenant, chain = await asyncio.to_thread(self._identities.enrol, request.code, request.csr_pem)
        await self._revocations.refresh()
        await self._conductor.refresh()
        log.info("device enrolled", device=device_id, tenant=tenant)
        return fleet_pb2.EnrolResponse(
            device_id=device_id,
            certificate_chain_pem=chain,
            jwks_json=self._issuer.jwks,
            token_issuer=self._issuer.issuer,
            token_audience=self._issuer.audience,
            device_address=self._device_address,
            tenant=tenant,
        )

    async def IssueToken(self, request: Any, context: Any) -> Any:  # noqa: N802
        """Exchange a signed assertion for an access token, bound to the certificate of the connection.

        Raises:
            IdentityError: The assertion is not one of a known device, or was used before, or the connection has no
                certificate, or another device's.
        """
        await self._orient(context)
        peer = peer_of(context)
        if peer is None and not self._unbound_tokens:
            raise IdentityError(
                "a token is bound to the device's certificate and this connection has none",
                reason="certificate-required",
                hint="call the cloud's device_listen address with the certificate; agents of this release do",
            )
        left_s = self._token_ttl_s if peer is None else min(self._token_ttl_s, int(peer.expires_at - self._clock()))
        if left_s <= 0:
            raise IdentityError(
                "the certificate of the connection has expired", reason="expired-certificate", hint="connect anew"
            )
        device_id, tenant = await asyncio.to_thread(self._identities.accept, request.assertion, peer)
        token, expires_at = self._issuer.mint(
            device_id,
            "device",
            ttl=timedelta(seconds=left_s),  # a connection may outlast its certificate, a token does not
            now=datetime.fromtimestamp(self._clock(), UTC),
            tenant=tenant,
            thumbprint=peer.thumbprint if peer is not None else "",
        )
        return fleet_pb2.IssueTokenResponse(
            access_token=token,
            expires_at=timestamp(expires_at.timestamp()),
            jwks_json=self._issuer.jwks,
        )

    async def RenewCertificate(self, request: Any, context: Any) -> Any:  # noqa: N802
        """Exchange an assertion and a signing request for a new certificate.

        Raises:
            IdentityError: The assertion is not one of a known device, or was used before; the key is another one.
            InputError: The certificate request is not acceptable.
        """
        await self._orient(context)
        device_id, _ = await asyncio.to_thread(self._identities.accept, request.assertion, peer_of(context))
        chain = await asyncio.to_thread(self._identities.renew, device_id, request.csr_pem)
        log.info("device certificate renewed", device=device_id)
        return fleet_pb2.RenewCertificateResponse(certificate_chain_pem=chain)

    async def RevokeDevice(self, request: Any, context: Any) -> Any:  # noqa: N802
        """Refuse a device or a key from now on.

        Raises:
            InputError: Neither is given, or the key's digest is none.
            NotFoundError: There is no such device.
            PermissionDeniedError: The caller may use some models only, and the device is for others, too.
        """
        del context
        claims = check_all_models("revoking a device")
        by = claims.subject
        done = await asyncio.to_thread(
            self._identities.revoke,
            request.device_id,
            request.key_sha256,
            _printable(request.reason),
            by,
            claims.tenant,
        )
        await self._revocations.refresh()
        await self._conductor.refresh()
        log.warning("device revoked", device=done.device_id, key_sha256=done.key_sha256, by=by)
        return fleet_pb2.RevokeDeviceResponse(
            device_id=done.device_id, key_sha256=done.key_sha256, revoked_at=timestamp(done.revoked_at)
        )

    async def _orient(self, context: Any) -> None:
        """Tell a device what it needs when it will be refused: the time here, and the address that it should call."""
        metadata = ((TIME_KEY, str(round(self._clock() * 1000))), (ADDRESS_KEY, self._device_address))
        await context.send_initial_metadata(metadata)

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
                yield _watch_message(model, told)

    async def Report(self, request: Any, context: Any) -> Any:  # noqa: N802
        """Keep a device's report.

        Raises:
            IdentityError: The device is not enrolled here.
            InputError: The report says nothing, or something that cannot be.
        """
        claims = current_claims()
        if not self._conductor.roster.may_see(claims, request.model):
            raise InputError(f"there is no model {request.model[:80]!r} to report on")
        report = _checked_report(request)
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
        if len({*device.labels, *labels} - set(request.remove)) > _MAX_LABELS:
            raise InputError(f"expected at most {_MAX_LABELS} labels of a device")
        await self._conductor.set_labels(device.id, labels, list(request.remove)[:_MAX_LABELS], claims.subject)
        return fleet_pb2.SetLabelsResponse(labels=self._conductor.roster.device(device.id).labels)

    async def Pin(self, request: Any, context: Any) -> Any:  # noqa: N802
        """Hold a device at one version.

        Raises:
            NotFoundError: There is no such device or version.
        """
        del context
        self._check_pair(request)
        version = min(request.version, _MAX_NUMBER)  # no version is larger
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
                _report_message(entry.report)
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

    async def WhoAmI(self, request: Any, context: Any) -> Any:  # noqa: N802
        """Tell the caller how it is seen."""
        del request
        claims, (version, group) = current_claims(), negotiated(context)
        return fleet_pb2.WhoAmIResponse(
            subject=claims.subject, scopes=sorted(claims.scopes), tls_version=version, tls_group=group,
            tenant=claims.tenant,
        )  # fmt: skip


def _printable(text: str) -> str:
    """Return a device's text as an operator's terminal may show it: no control characters, not endless."""
    return "".join(character if character.isprintable() else " " for character in text[:_MAX_TEXT])


def _checked_report(request: Any) -> Any:
    """Return a report as it may be kept.

    Raises:
        InputError: It says nothing, or something that cannot be.
    """
    if not request.model or request.state not in fleet_pb2.UpdateState.values() or not request.state:
        raise InputError("expected a report with a model and a state")
    seen = request.evidence
    counts = (
        request.version, request.serving_version, request.bytes_fetched, request.number, request.attempt,
        seen.requests, seen.escalated, seen.audited, seen.before_requests, seen.before_escalated,
    )  # fmt: skip
    if max(counts) > _MAX_NUMBER:
        raise InputError(f"expected versions, counts and bytes of at most {_MAX_NUMBER}")
    if seen.errors > seen.requests or seen.disagreed > seen.audited or seen.before_errors > seen.before_requests:
        raise InputError("evidence: expected no more errors than requests, and no more differences than audits")
    figures = (seen.latency_p50_ms, seen.latency_p99_ms, seen.seconds, seen.before_latency_p50_ms)
    if not all(0.0 <= figure <= _MAX_NUMBER for figure in figures):
        raise InputError("evidence: expected times that are numbers and not negative")
    report = fleet_pb2.ReportRequest()
    report.CopyFrom(request)
    for name in ("reason", "detail", "variant", "rollout", "step"):
        setattr(report, name, _printable(getattr(request, name)))
    return report


def check_may_see(roster: Roster, model: str) -> None:
    """Check that there is such a model for the caller.

    Raises:
        NotFoundError: There is none; of one that is hidden, exactly the same is said.
    """
    if not roster.may_see(current_claims(), model):
        raise unknown_model(model)


def check_labels(labels: Mapping[str, str]) -> dict[str, str]:
    """Return labels, or a selector, as they may be kept.

    Raises:
        InputError: A name or a value is not one, or there are too many.
    """
    if len(labels) > _MAX_LABELS:
        raise InputError(f"expected at most {_MAX_LABELS} labels, got {len(labels)}")
    for key, value in labels.items():
        if not _LABEL.fullmatch(key) or not _LABEL.fullmatch(value):
            raise InputError(
                f"expected a label such as group=line-3, got {f'{key}={value}'[:80]!r}",
                hint="letters, digits, dot, dash, underscore and slash; 64 characters at most",
            )
    return dict(labels)


def _watch_message(model: str, told: Told) -> Any:
    message = fleet_pb2.WatchResponse(model=model, version=told.version, rollout=told.rollout, attempt=told.attempt)
    if told.gates is not None:
        message.trial.soak_s = told.soak_s
        message.trial.max_error_rate = told.gates.max_error_rate
        message.trial.max_latency_ratio = told.gates.max_latency_ratio
        message.trial.min_agreement = told.gates.min_agreement
    return message


def event_message(event: db.Event) -> Any:
    """Return an event as it travels."""
    return fleet_pb2.FleetEvent(
        at=timestamp(event.at), kind=event.kind, device_id=event.device_id, rollout=event.rollout,
        model=event.model, version=event.version, reason=event.reason, detail=event.detail,
    )  # fmt: skip


def _report_message(row: db.Report) -> Any:
    return fleet_pb2.ReportRequest(
        model=row.model,
        version=row.version,
        state=fleet_pb2.UpdateState.ValueType(row.state),
        serving_version=row.serving_version,
        reason=row.reason,
        detail=row.detail,
        bytes_fetched=row.bytes_fetched,
        variant=row.variant,
        rollout=row.rollout,
        attempt=row.attempt,
        number=row.number,
        step=row.step,
        evidence=fleet_pb2.Evidence.FromString(row.evidence) if row.evidence else None,
    )


def timestamp(seconds: float) -> Timestamp:
    """Return Unix seconds as they travel."""
    stamp = Timestamp()
    stamp.FromMilliseconds(round(seconds * 1000))
    return stamp
