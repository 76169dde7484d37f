"""Devices: invited by an operator, enrolled once, given short-lived tokens, told what to run, heard what they run.

This is the door; `cloud.conductor` keeps and decides.

Rules:
1. An invitation code works once; two callers with the same code at the same time get one identity and one refusal.
2. Wrong, used and expired codes get the same answer; an assertion works once.
3. A device speaks for itself only: its name comes from its token, never from the message.
4. A Watch ends when its token does; the device comes back with a new one.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import secrets
import time
from collections.abc import AsyncIterator, Callable, Mapping
from datetime import UTC, datetime, timedelta
from typing import Any, Final

import structlog
from google.protobuf.timestamp_pb2 import Timestamp
from sqlalchemy import CursorResult, delete, select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from cloud import database as db
from cloud.admission import Admission
from cloud.catalog import unknown_model
from cloud.conductor import Conductor
from cloud.rollout import matches
from cloud.roster import Device, Told
from isthmus.digests import sha256_bytes
from isthmus.errors import IdentityError, InputError
from isthmus.v1 import fleet_pb2, fleet_pb2_grpc
from security.enrolment import IssuingCa, check_device_id, public_key_of
from security.interceptors import current_claims
from security.tls import negotiated
from security.tokens import TokenIssuer, read_assertion_subject, verify_assertion

DEFAULT_INVITE_S: Final = 3600
MAX_INVITE_S: Final = 30 * 86400
MAX_WATCHED: Final = 64  # models of one device
_KEEP_ASSERTIONS_S: Final = 300  # beyond their expiry: more than any leeway
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
        token_ttl_s: Life of the access tokens.
        clock: Returns Unix seconds.
    """

    def __init__(
        self,
        database: db.Database,
        conductor: Conductor,
        issuer: TokenIssuer,
        authority: IssuingCa,
        *,
        admission: Admission,
        token_ttl_s: int = 900,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._database, self._conductor = database, conductor
        self._issuer, self._authority, self._admission = issuer, authority, admission
        self._token_ttl_s, self._clock = token_ttl_s, clock

    async def Invite(self, request: Any, context: Any) -> Any:  # noqa: N802
        """Make a one-time code.

        Raises:
            InputError: The name or the time to live is not valid.
        """
        del context
        device_id = check_device_id(request.device_id)
        ttl_s = request.ttl_s or DEFAULT_INVITE_S
        if ttl_s > MAX_INVITE_S:
            raise InputError(f"ttl_s: expected at most {MAX_INVITE_S} seconds, got {ttl_s}")
        code, expires_at = secrets.token_urlsafe(24), self._clock() + ttl_s
        await asyncio.to_thread(self._add_invite, code, device_id, expires_at)
        log.info("device invited", device=device_id, by=current_claims().subject)
        return fleet_pb2.InviteResponse(code=code, expires_at=timestamp(expires_at))

    def _add_invite(self, code: str, device_id: str, expires_at: float) -> None:
        with self._database.write() as session:
            session.execute(delete(db.Invite).where(db.Invite.expires_at < self._clock()))
            session.add(db.Invite(code_sha256=_hash(code), device_id=device_id, expires_at=expires_at))

    async def Enrol(self, request: Any, context: Any) -> Any:  # noqa: N802
        """Exchange a code for an identity.

        Raises:
            IdentityError: The code is wrong, used or expired.
            InputError: The certificate request is not acceptable; the code stays valid.
        """
        del context
        device_id, chain = await asyncio.to_thread(self._enrol, request.code, request.csr_pem)
        await self._conductor.refresh()
        log.info("device enrolled", device=device_id)
        return fleet_pb2.EnrolResponse(
            device_id=device_id,
            certificate_chain_pem=chain,
            jwks_json=self._issuer.jwks,
            token_issuer=self._issuer.issuer,
            token_audience=self._issuer.audience,
        )

    def _enrol(self, code: str, csr_pem: bytes) -> tuple[str, bytes]:
        now = self._clock()
        with self._database.write() as session:
            device_id = _take_invite(session, code, now)
            # A refused request raises here and undoes the line above: the code is not spent on a typing error.
            chain = self._authority.sign(csr_pem, device_id, datetime.fromtimestamp(now, UTC))
            key = public_key_of(csr_pem)
            revision = db.next_revision(session)
            session.merge(
                db.Device(id=device_id, public_key_pem=key, enrolled_at=now, last_seen_at=now, revision=revision)
            )
            # It may begin anew with its reports, too: a device whose disk was replaced counts from 1.
            session.execute(update(db.Report).where(db.Report.device_id == device_id).values(number=0))
        return device_id, chain

    async def IssueToken(self, request: Any, context: Any) -> Any:  # noqa: N802
        """Exchange a signed assertion for an access token.

        Raises:
            IdentityError: The assertion is not one of a known device, or was used before.
        """
        del context
        device_id = await asyncio.to_thread(self._accept_assertion, request.assertion)
        token, expires_at = self._issuer.mint(device_id, "device", ttl=timedelta(seconds=self._token_ttl_s))
        return fleet_pb2.IssueTokenResponse(access_token=token, expires_at=timestamp(expires_at.timestamp()))

    def _accept_assertion(self, assertion: str) -> str:
        now = self._clock()
        device_id = read_assertion_subject(assertion)
        with self._database.read() as session:
            device = session.get(db.Device, device_id)
        if device is None:
            raise IdentityError("the assertion is not one of an enrolled device", reason="unknown-device")
        moment = datetime.fromtimestamp(now, UTC)
        verified = verify_assertion(assertion, device.public_key_pem, self._issuer.audience, moment)
        spent = db.Assertion(device_id=device_id, jti=verified.jti, expires_at=verified.expires_at.timestamp())
        try:
            with self._database.write() as session:
                session.execute(delete(db.Assertion).where(db.Assertion.expires_at < now - _KEEP_ASSERTIONS_S))
                session.add(spent)
                session.execute(update(db.Device).where(db.Device.id == device_id).values(last_seen_at=now))
        except IntegrityError as error:
            log.warning("assertion used twice", device=device_id)
            raise IdentityError("the assertion was used before", reason="replayed-assertion") from error
        return device_id

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
        watching = contextlib.aclosing(self._conductor.watch(claims.subject, models, facts))
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
        del context
        claims = current_claims()
        if not claims.may_use(request.model) or request.model not in self._conductor.roster.released:
            raise InputError(f"there is no model {request.model[:80]!r} to report on")
        report = _checked_report(request)
        await self._conductor.report(claims.subject, report)
        state = fleet_pb2.UpdateState.Name(report.state)
        log.info("device reports", device=claims.subject, model=report.model, version=report.version, state=state)
        return fleet_pb2.ReportResponse()

    async def ListDevices(self, request: Any, context: Any) -> Any:  # noqa: N802
        """List the devices with their last reports."""
        del context
        await self._conductor.refresh()
        roster, selector = self._conductor.roster, dict(request.selector)
        devices = [device for name, device in sorted(roster.devices.items()) if matches(selector, device.labels)]
        return fleet_pb2.ListDevicesResponse(devices=[self._device_message(device) for device in devices])

    async def GetDevice(self, request: Any, context: Any) -> Any:  # noqa: N802
        """Tell what is known of one device.

        Raises:
            NotFoundError: There is none of this name.
        """
        del context
        await self._conductor.refresh()
        device = self._conductor.roster.device(request.device_id)
        events = await self._conductor.events(device_id=device.id, limit=_EVENTS)
        return fleet_pb2.GetDeviceResponse(device=self._device_message(device), events=map(event_message, events))

    async def SetLabels(self, request: Any, context: Any) -> Any:  # noqa: N802
        """Set and remove labels of a device.

        Raises:
            InputError: A label is none, or there are too many.
            NotFoundError: There is no such device.
        """
        del context
        labels = check_labels(request.set)
        device = self._conductor.roster.device(request.device_id)
        if len({*device.labels, *labels} - set(request.remove)) > _MAX_LABELS:
            raise InputError(f"expected at most {_MAX_LABELS} labels of a device")
        await self._conductor.set_labels(
            device.id, labels, list(request.remove)[:_MAX_LABELS], current_claims().subject
        )
        return fleet_pb2.SetLabelsResponse(labels=self._conductor.roster.device(device.id).labels)

    async def Pin(self, request: Any, context: Any) -> Any:  # noqa: N802
        """Hold a device at one version.

        Raises:
            NotFoundError: There is no such device or version.
        """
        del context
        check_may_use(request.model)
        version = min(request.version, _MAX_NUMBER)  # no version is larger
        await self._conductor.pin(request.device_id, request.model, version, current_claims().subject)
        return fleet_pb2.PinResponse()

    async def Unpin(self, request: Any, context: Any) -> Any:  # noqa: N802
        """Let a device follow releases and rollouts.

        Raises:
            NotFoundError: There is no such device.
        """
        del context
        check_may_use(request.model)
        await self._conductor.pin(request.device_id, request.model, None, current_claims().subject)
        return fleet_pb2.UnpinResponse()

    async def RetryDevice(self, request: Any, context: Any) -> Any:  # noqa: N802
        """Ask a device to try again what failed on it.

        Raises:
            NotFoundError: There is no such device, or it does not run the model.
        """
        del context
        check_may_use(request.model)
        attempt = await self._conductor.retry(request.device_id, request.model, current_claims().subject)
        return fleet_pb2.RetryDeviceResponse(attempt=attempt)

    def _device_message(self, device: Device) -> Any:
        roster = self._conductor.roster
        return fleet_pb2.Device(
            device_id=device.id,
            enrolled_at=timestamp(device.enrolled_at),
            last_seen_at=timestamp(device.last_seen_at),
            reports=[_report_message(e.report) for _, e in sorted(device.models.items()) if e.report is not None],
            facts=device.facts,
            labels=device.labels,
            online=roster.is_online(device),
            desired=[
                fleet_pb2.Desired(
                    model=model, version=told.version, why=told.why, rollout=told.rollout, attempt=told.attempt
                )
                for model in sorted(device.models)
                for told in (roster.told(device, model),)
            ],
        )

    async def WhoAmI(self, request: Any, context: Any) -> Any:  # noqa: N802
        """Tell the caller how it is seen."""
        del request
        claims, (version, group) = current_claims(), negotiated(context)
        return fleet_pb2.WhoAmIResponse(
            subject=claims.subject, scopes=sorted(claims.scopes), tls_version=version, tls_group=group
        )


def _take_invite(session: Session, code: str, now: float) -> str:
    """Mark an invitation as used and return its device; the database lets one caller through."""
    is_open = (db.Invite.code_sha256 == _hash(code), db.Invite.used_at.is_(None), db.Invite.expires_at > now)
    result = session.execute(update(db.Invite).where(*is_open).values(used_at=now))
    if not isinstance(result, CursorResult) or result.rowcount != 1:
        raise IdentityError(
            "the enrolment code is wrong, used or expired",
            hint="ask the operator for a new one: isthmus device invite DEVICE",
            reason="wrong-code",
        )
    return session.scalars(select(db.Invite.device_id).where(db.Invite.code_sha256 == _hash(code))).one()


def _printable(text: str) -> str:
    """Return a device's text as an operator's terminal may show it: no control characters, not endless."""
    return "".join(character if character.isprintable() else " " for character in text[:_MAX_TEXT])


def _hash(code: str) -> str:
    return sha256_bytes(code.encode())


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


def check_may_use(model: str) -> None:
    """Check that the caller's token is good for a model.

    Raises:
        NotFoundError: It is not; that looks as if there were no such model.
    """
    if not current_claims().may_use(model):
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
