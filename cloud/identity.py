"""Who the devices are, on the record: invitations, keys, used assertions, revocations. Blocks; knows no messages.

Rules:
1. An invitation is used in one statement that the database lets one caller through, whichever replica it asked.
2. An assertion is used by inserting its `jti` under a primary key: the second one fails, after a restart and at
   another replica as well.
3. A device keeps its key for as long as it is enrolled: a certificate is renewed for that key only. Another key is
   another enrolment, and ends what the key before could do.
4. A revoked device comes back by a new enrolment, with another key. A revoked key never does.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final

import structlog
from cryptography import x509
from sqlalchemy import CursorResult, delete, or_, select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from cloud import database as db
from cloud.roster import unknown_device
from isthmus.digests import sha256_bytes
from isthmus.errors import IdentityError, InputError, NotFoundError
from security.binding import Peer, Revoked, key_digest
from security.enrolment import IssuingCa, public_key_of
from security.tenancy import DEFAULT_TENANT
from security.tokens import Assertion, read_assertion_subject, verify_assertion

DEVICE: Final = "device"
KEY: Final = "key"
_KEEP_ASSERTIONS_S: Final = 300  # beyond their expiry: more than any leeway
_SHA256: Final = re.compile(r"[0-9a-f]{64}")

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Revocation:
    """That a device may do nothing any more, and the key that it had."""

    device_id: str
    key_sha256: str
    revoked_at: float
    reason: str = ""


class Identities:
    """See the module.

    Args:
        database: The record.
        authority: Signs device certificates.
        audience: Whom assertions must be for.
        clock: Returns Unix seconds.
    """

    def __init__(
        self, database: db.Database, authority: IssuingCa, audience: str, clock: Callable[[], float] = time.time
    ) -> None:
        self._database, self._authority, self._audience, self._clock = database, authority, audience, clock

    def invite(self, code: str, device_id: str, tenant: str, expires_at: float) -> None:
        """Keep an invitation, by the digest of its code."""
        with self._database.write() as session:
            session.execute(delete(db.Invite).where(db.Invite.expires_at < self._clock()))
            session.add(db.Invite(code_sha256=_hash(code), device_id=device_id, tenant=tenant, expires_at=expires_at))

    def enrol(self, code: str, csr_pem: bytes) -> tuple[str, str, bytes]:
        """Exchange a code for a certificate; return the device, its tenant, and the chain.

        Raises:
            IdentityError: The code is wrong, used or expired, or the key was revoked.
            InputError: The request is not acceptable; the code stays valid.
        """
        now = self._clock()
        with self._database.write() as session:
            device_id, tenant = _take_invite(session, code, now)
            # A refused request raises here and undoes the line above: the code is not spent on a typing error.
            chain = self._authority.sign(csr_pem, device_id, datetime.fromtimestamp(now, UTC))
            digest = key_digest(x509.load_pem_x509_certificate(chain))
            if session.get(db.Revocation, (KEY, digest)) is not None:
                raise IdentityError(
                    "the key was revoked",
                    reason="revoked",
                    hint="enrol with a new key: another --home, or an empty one",
                )
            revision = db.next_revision(session)
            before = session.get(db.Device, device_id)
            if before is not None and before.key_sha256 != digest:
                _revoke(
                    session, KEY, before.key_sha256, Revocation(device_id, "", now, "replaced"), "enrolment", revision
                )
            _lift(session, device_id, now, revision)
            session.merge(
                db.Device(
                    id=device_id, public_key_pem=public_key_of(csr_pem), key_sha256=digest,
                    enrolled_at=now, last_seen_at=now, revision=revision, tenant=tenant,
                )
            )  # fmt: skip
            # It may begin anew with its reports, too: a device whose disk was replaced counts from 1.
            session.execute(update(db.Report).where(db.Report.device_id == device_id).values(number=0))
        return device_id, tenant, chain

    def accept(self, assertion: str, peer: Peer | None) -> tuple[str, str]:
        """Return which device an assertion is of, and its tenant; never take it again.

        Args:
            assertion: As it came.
            peer: The certificate of the connection that it came by, which must be the device's own.

        Raises:
            IdentityError: It is not one of a device that may call, or was used before.
        """
        now = self._clock()
        device_id = read_assertion_subject(assertion)
        with self._database.read() as session:
            device = session.get(db.Device, device_id)
            revoked = device is not None and _is_revoked(session, device)
        if device is None:
            raise IdentityError("the assertion is not one of an enrolled device", reason="unknown-device")
        moment = datetime.fromtimestamp(now, UTC)
        verified = verify_assertion(assertion, device.public_key_pem, self._audience, moment)
        if revoked:  # told only to who holds the key
            raise IdentityError("the device was revoked", reason="revoked", hint="isthmus device invite DEVICE")
        if peer is not None and (peer.device_id, peer.key_sha256) != (device_id, device.key_sha256):
            raise IdentityError("the certificate is not the device's", reason="certificate-mismatch")
        self._spend(device_id, verified, now)
        return device_id, device.tenant

    def _spend(self, device_id: str, assertion: Assertion, now: float) -> None:
        spent = db.Assertion(device_id=device_id, jti=assertion.jti, expires_at=assertion.expires_at.timestamp())
        try:
            with self._database.write() as session:
                session.execute(delete(db.Assertion).where(db.Assertion.expires_at < now - _KEEP_ASSERTIONS_S))
                session.add(spent)
                session.execute(update(db.Device).where(db.Device.id == device_id).values(last_seen_at=now))
        except IntegrityError as error:
            log.warning("assertion used twice", device=device_id)
            raise IdentityError("the assertion was used before", reason="replayed-assertion") from error

    def renew(self, device_id: str, csr_pem: bytes) -> bytes:
        """Return a new certificate chain for a device's own key.

        Raises:
            IdentityError: The request is for another key.
            InputError: It is not acceptable.
        """
        chain = self._authority.sign(csr_pem, device_id, datetime.fromtimestamp(self._clock(), UTC))
        with self._database.read() as session:
            device = session.get_one(db.Device, device_id)
        if key_digest(x509.load_pem_x509_certificate(chain)) != device.key_sha256:
            raise IdentityError(
                "a certificate is renewed for the key that the device is enrolled with",
                reason="wrong-key",
                hint="for a new key: isthmus device invite DEVICE, isthmus edge enrol",
            )
        return chain

    def revoke(self, device_id: str, key_sha256: str, reason: str, by: str, tenant: str) -> Revocation:
        """Refuse a device and its key, or one key, from now on.

        Args:
            device_id: The device; "" when only the key is known.
            key_sha256: One key; "" for the one that the device is enrolled with.
            reason: For the record.
            by: Who says so.
            tenant: Whose device it must be. A key that no device of the tenant has is for the cloud's own tenant only,
                and not when it is another tenant's.

        Raises:
            InputError: Neither is given, or the key's digest is none.
            NotFoundError: There is no such device or key.
        """
        if not device_id and not key_sha256:
            raise InputError("expected a device, a key, or both")
        if key_sha256 and not _SHA256.fullmatch(key_sha256):
            raise InputError(
                "expected the key's SHA-256 as 64 hexadecimal digits", hint="isthmus device show DEVICE prints it"
            )
        now = self._clock()
        with self._database.write() as session:
            chosen = db.Device.id == device_id if device_id else db.Device.key_sha256 == key_sha256
            device = session.scalars(select(db.Device).where(chosen)).first()
            if device is not None and device.tenant != tenant:
                device = None
            if device is None and device_id:
                raise unknown_device(device_id)
            _check_key_of(session, key_sha256, tenant)
            name = device_id or (device.id if device is not None else "")
            current = device.key_sha256 if device is not None else ""
            done = Revocation(name, key_sha256 or current, now, reason)
            revision = db.next_revision(session)
            _revoke(session, KEY, done.key_sha256, done, by, revision)
            if device is not None and done.key_sha256 == current:
                _revoke(session, DEVICE, name, done, by, revision)
            if device is not None:
                device.revision = revision
            session.add(db.Event(at=now, kind="revoked", device_id=name, reason=reason, detail=f"by {by}"))
        return done


def read_revoked(session: Session) -> tuple[Revoked, dict[str, Revocation]]:
    """Return what is refused now, and when and why each device was."""
    rows = session.scalars(select(db.Revocation).where(db.Revocation.lifted_at.is_(None))).all()
    keys = frozenset(row.value for row in rows if row.kind == KEY)
    devices = {row.value: Revocation(row.value, "", row.revoked_at, row.reason) for row in rows if row.kind == DEVICE}
    return Revoked(frozenset(devices), keys), devices


def _revoke(session: Session, kind: str, value: str, why: Revocation, by: str, revision: int) -> None:
    session.merge(
        db.Revocation(
            kind=kind, value=value, device_id=why.device_id, reason=why.reason,
            revoked_at=why.revoked_at, revoked_by=by, lifted_at=None, revision=revision,
        )
    )  # fmt: skip


def _lift(session: Session, device_id: str, now: float, revision: int) -> None:
    of_device = (db.Revocation.kind == DEVICE, db.Revocation.value == device_id, db.Revocation.lifted_at.is_(None))
    session.execute(update(db.Revocation).where(*of_device).values(lifted_at=now, revision=revision))


def _is_revoked(session: Session, device: db.Device) -> bool:
    of_device = (db.Revocation.kind == DEVICE) & (db.Revocation.value == device.id)
    of_key = (db.Revocation.kind == KEY) & (db.Revocation.value == device.key_sha256)
    found = select(db.Revocation).where(or_(of_device, of_key), db.Revocation.lifted_at.is_(None))
    return session.scalars(found).first() is not None


def _check_key_of(session: Session, key_sha256: str, tenant: str) -> None:
    """Check that a key may be revoked by a tenant: what is another tenant's looks like what nobody has."""
    if not key_sha256:
        return
    owners = set(session.scalars(select(db.Device.tenant).where(db.Device.key_sha256 == key_sha256)))
    if owners - {tenant} or (not owners and tenant != DEFAULT_TENANT):
        raise NotFoundError("there is no device with this key", reason="unknown-device")


def _take_invite(session: Session, code: str, now: float) -> tuple[str, str]:
    """Mark an invitation as used and return its device and tenant; the database lets one caller through."""
    is_open = (db.Invite.code_sha256 == _hash(code), db.Invite.used_at.is_(None), db.Invite.expires_at > now)
    result = session.execute(update(db.Invite).where(*is_open).values(used_at=now))
    invite = session.get(db.Invite, _hash(code))
    known = session.get(db.Device, invite.device_id) if invite is not None else None
    if (
        not isinstance(result, CursorResult)
        or result.rowcount != 1
        or invite is None
        or (known is not None and known.tenant != invite.tenant)  # two tenants were quick with one name
    ):
        raise IdentityError(
            "the enrolment code is wrong, used or expired",
            hint="ask the operator for a new one: isthmus device invite DEVICE",
            reason="wrong-code",
        )
    return invite.device_id, invite.tenant


def _hash(code: str) -> str:
    return sha256_bytes(code.encode())
