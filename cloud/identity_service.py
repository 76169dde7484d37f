"""Who devices are: invited by an operator, enrolled once, given short-lived tokens, revoked.

This is the door; `cloud.identity` keeps and decides.

Rules:
1. Wrong, used and expired codes get the same answer. (`cloud.identity` has the rules for codes, keys and assertions.)
2. A token is bound to the certificate of the connection on which it was asked for.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Callable, Collection
from datetime import UTC, datetime, timedelta
from typing import Any, Final

import structlog

from cloud import database as db
from cloud.conductor import Conductor
from cloud.fleet_messages import printable, timestamp
from cloud.identity import Identities
from cloud.revocations import Revocations
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

log = structlog.get_logger(__name__)


class IdentityService(fleet_pb2_grpc.FleetServiceServicer):
    """Who devices are: the half of the fleet service at the door.

    Args:
        database: Where invitations and devices are kept.
        conductor: Knows the devices.
        issuer: Mints access tokens.
        authority: Signs device certificates.
        revocations: Follows what was revoked.
        device_address: HOST:PORT that devices are told to call, where certificates are asked for.
        unbound_tokens: Whether a device without a certificate gets a token, too.
        token_ttl_s: Life of the access tokens.
        tenants: Returns the names of the cloud's tenants.
        clock: Returns Unix seconds.
    """

    def __init__(
        self,
        database: db.Database,
        conductor: Conductor,
        issuer: TokenIssuer,
        authority: IssuingCa,
        *,
        revocations: Revocations | None = None,
        device_address: str = "",
        unbound_tokens: bool = False,
        token_ttl_s: int = 900,
        tenants: Callable[[], Collection[str]] = tuple,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._conductor, self._issuer = conductor, issuer
        self._identities = Identities(database, authority, issuer.audience, clock)
        self._revocations = revocations or Revocations(database, Guard())
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
            printable(request.reason),
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

    async def WhoAmI(self, request: Any, context: Any) -> Any:  # noqa: N802
        """Tell the caller how it is seen."""
        del request
        claims, (version, group) = current_claims(), negotiated(context)
        return fleet_pb2.WhoAmIResponse(
            subject=claims.subject, scopes=sorted(claims.scopes), tls_version=version, tls_group=group,
            tenant=claims.tenant,
        )  # fmt: skip
