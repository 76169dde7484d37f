"""Devices: invited by an operator, enrolled once, given short-lived tokens, told what to run, heard what they run.

Rules:
1. An invitation code works once; two callers with the same code at the same time get one identity and one refusal.
2. Wrong, used and expired codes get the same answer; an assertion works once.
3. A device speaks for itself only: its name comes from its token, never from the message.
4. A Watch ends when its token does; the device comes back with a new one.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime, timedelta
from typing import Any, Final

import structlog
from google.protobuf.timestamp_pb2 import Timestamp
from sqlalchemy import CursorResult, delete, select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from cloud import database as db
from cloud.catalog import Catalog
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
_STATES: Final = frozenset({fleet_pb2.UPDATE_STATE_ACTIVE, fleet_pb2.UPDATE_STATE_REFUSED})

log = structlog.get_logger(__name__)


class FleetService(fleet_pb2_grpc.FleetServiceServicer):
    """Identity, desired state and reported state of devices.

    Args:
        database: Where invitations, devices and reports are kept.
        catalog: Which versions are released.
        issuer: Mints access tokens.
        authority: Signs device certificates.
        token_ttl_s: Life of the access tokens.
        clock: Returns Unix seconds.
    """

    def __init__(
        self,
        database: db.Database,
        catalog: Catalog,
        issuer: TokenIssuer,
        authority: IssuingCa,
        *,
        token_ttl_s: int = 900,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._database, self._catalog = database, catalog
        self._issuer, self._authority = issuer, authority
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
        return fleet_pb2.InviteResponse(code=code, expires_at=_timestamp(expires_at))

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
            session.merge(db.Device(id=device_id, public_key_pem=key, enrolled_at=now, last_seen_at=now))
        return device_id, chain

    async def IssueToken(self, request: Any, context: Any) -> Any:  # noqa: N802
        """Exchange a signed assertion for an access token.

        Raises:
            IdentityError: The assertion is not one of a known device, or was used before.
        """
        del context
        device_id = await asyncio.to_thread(self._accept_assertion, request.assertion)
        token, expires_at = self._issuer.mint(device_id, "device", ttl=timedelta(seconds=self._token_ttl_s))
        return fleet_pb2.IssueTokenResponse(access_token=token, expires_at=_timestamp(expires_at.timestamp()))

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
        """
        del context
        if len(request.models) > MAX_WATCHED:
            raise InputError(f"models: expected at most {MAX_WATCHED}, got {len(request.models)}")
        claims = current_claims()
        models = [model for model in request.models if claims.may_use(model)]
        await asyncio.to_thread(self._seen, claims.subject)
        until = claims.expires_at.timestamp()
        async with contextlib.aclosing(self._catalog.watch(models)) as changes:
            while (left_s := until - self._clock()) > 0:
                try:
                    model, version = await asyncio.wait_for(anext(changes), left_s)
                except (TimeoutError, StopAsyncIteration):
                    return
                yield fleet_pb2.WatchResponse(model=model, version=version)

    def _seen(self, device_id: str) -> None:
        with self._database.write() as session:
            session.execute(update(db.Device).where(db.Device.id == device_id).values(last_seen_at=self._clock()))

    async def Report(self, request: Any, context: Any) -> Any:  # noqa: N802
        """Keep a device's report.

        Raises:
            InputError: The report has no known state, numbers that cannot be ours, or a model that there is not.
            IdentityError: The device is not enrolled here.
        """
        del context
        if request.state not in _STATES or not request.model:
            raise InputError("expected a report with a model and a state")
        if max(request.version, request.serving_version, request.bytes_fetched) > _MAX_NUMBER:
            raise InputError(f"expected versions and bytes of at most {_MAX_NUMBER}")
        claims = current_claims()
        if not claims.may_use(request.model) or self._catalog.released(request.model) is None:
            raise InputError(f"there is no model {request.model[:80]!r} to report on")
        device_id = claims.subject
        await asyncio.to_thread(self._keep_report, device_id, request)
        state = fleet_pb2.UpdateState.Name(request.state)
        log.info("device reports", device=device_id, model=request.model, version=request.version, state=state)
        return fleet_pb2.ReportResponse()

    def _keep_report(self, device_id: str, report: Any) -> None:
        now = self._clock()
        with self._database.write() as session:
            device = session.get(db.Device, device_id)
            if device is None:
                raise IdentityError("the device is not enrolled here", reason="unknown-device")
            device.last_seen_at = now
            session.merge(
                db.Report(
                    device_id=device_id,
                    model=report.model,
                    version=report.version,
                    state=report.state,
                    serving_version=report.serving_version,
                    reason=_printable(report.reason),
                    detail=_printable(report.detail),
                    bytes_fetched=report.bytes_fetched,
                    variant=_printable(report.variant),
                    reported_at=now,
                )
            )

    async def ListDevices(self, request: Any, context: Any) -> Any:  # noqa: N802
        """List the devices with their last reports."""
        del request, context
        return fleet_pb2.ListDevicesResponse(devices=await asyncio.to_thread(self._list_devices))

    def _list_devices(self) -> list[Any]:
        with self._database.read() as session:
            reports: dict[str, list[Any]] = {}
            for row in session.scalars(select(db.Report).order_by(db.Report.model)):
                reports.setdefault(row.device_id, []).append(_report_message(row))
            return [
                fleet_pb2.Device(
                    device_id=device.id,
                    enrolled_at=_timestamp(device.enrolled_at),
                    last_seen_at=_timestamp(device.last_seen_at),
                    reports=reports.get(device.id, []),
                )
                for device in session.scalars(select(db.Device).order_by(db.Device.id))
            ]

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
    )


def _timestamp(seconds: float) -> Timestamp:
    stamp = Timestamp()
    stamp.FromMilliseconds(round(seconds * 1000))
    return stamp
