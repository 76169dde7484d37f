"""Who calls: a token of this cloud, an API key, or a token of an external issuer; and what that caller may do.

A bearer credential is looked at in this order, and by one rule only:

1. What begins with `isk_` is an API key; its digest is looked up.
2. A token whose issuer is one of the external ones that are configured is verified with that issuer's keys.
3. Everything else must be a token of this cloud.

API keys, external tokens and tokens that were minted with `--role granted` are worth what has been granted
(security.roles); the other tokens of this cloud say themselves what they are good for, and grants do not add to that.

A caller acts in its own tenant. An admin of the default tenant, which the cloud itself is, may name another one.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Final

from isthmus.errors import IdentityError, NotFoundError, PermissionDeniedError
from security.apikeys import SCHEME, key_digest
from security.jws import EXPIRY_LEEWAY_S
from security.roles import AccessBook, claims_of, limited
from security.scopes import GRANTED
from security.tenancy import DEFAULT_TENANT
from security.tokens import Claims, TokenVerifier

if TYPE_CHECKING:  # a device has no use for what speaks to issuers
    from security.oidc import OidcIssuer, OidcIssuers

_REMEMBERED: Final = 4096
_ONLY_GRANTED: Final = frozenset({GRANTED})


@dataclass(frozen=True, slots=True)
class _Known:
    claims: Claims
    until: float


class Authenticator:
    """Tells who calls; for one event loop.

    Args:
        tokens: Verifies the tokens of this cloud.
        book: Grants and API keys; without one there are none.
        issuers: External issuers; without them there are none.
        tenants: Returns the tenants that there are; without it an admin of the cloud may name any.
        clock: Returns Unix seconds.
    """

    def __init__(
        self,
        tokens: TokenVerifier,
        *,
        book: AccessBook | None = None,
        issuers: OidcIssuers | None = None,
        tenants: Callable[[], Collection[str]] | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._tokens, self._book, self._issuers = tokens, book or AccessBook(), issuers
        self._tenants, self._clock = tenants, clock
        self._ours: set[str] = set()
        self._known: OrderedDict[tuple[str | bytes, str], _Known] = OrderedDict()
        self.on_change(self._known.clear)

    def now(self) -> float:
        """Return the time by which callers are judged, in Unix seconds."""
        return self._clock()

    def on_change(self, hear: Callable[[], None]) -> None:
        """Call `hear` whenever a caller may have lost, or got, what it had not before: grants and keys changed."""
        self._book.heard_by.append(hear)
        self._tokens.heard_by.append(hear)
        for issuer in self._issuers.all if self._issuers is not None else ():
            issuer.keys.heard_by.append(hear)

    def verify(self, credential: str, tenant: str = "", *, at_s: float | None = None) -> Claims:
        """Return the claims of a caller.

        Args:
            credential: The token or key.
            tenant: The tenant that the caller wants to act in; "" for its own.
            at_s: When the credential has to be within its time, for a call that began then; now when None. What was
                revoked since is refused whatever the time.

        Raises:
            IdentityError: The credential is not a valid one.
            PermissionDeniedError: Nothing was granted to the caller, or it may not act in this tenant.
            NotFoundError: An admin of the cloud named a tenant that does not exist.
        """
        if credential.startswith(SCHEME):
            return self._api_key(credential, tenant, at_s)
        if credential not in self._ours:
            known = self._remembered((credential, tenant))
            if known is not None:
                return known
            if self._issuers is not None and (issuer := self._issuers.of(credential)) is not None:
                return self._external(credential, tenant, issuer, at_s)
        claims = self._tokens.verify(credential, at_s)  # which remembers, too, and knows what has been revoked
        self._note_ours(credential)
        if claims.scopes == _ONLY_GRANTED:
            return self._granted_token(credential, claims, tenant)
        if tenant and tenant != claims.tenant:
            return self._acting_in(claims, tenant)
        return claims

    def _api_key(self, credential: str, tenant: str, at_s: float | None) -> Claims:
        digest, now = key_digest(credential), self._clock() if at_s is None else at_s
        key = self._book.key(digest)
        if key is None or now >= key.expires_at:
            raise IdentityError("the API key is unknown, expired or revoked", reason="unknown-api-key")
        if at_s is None:
            self._book.used[key.prefix] = now
        known = self._remembered((digest, tenant))
        if known is not None:
            return known
        grants = self._book.grants_of((f"apikey:{key.name}",), key.tenant)
        until = datetime.fromtimestamp(key.expires_at, UTC)
        claims = claims_of(grants, f"apikey:{key.name}", key.tenant, until, token_id=key.prefix)
        if tenant and tenant != key.tenant:
            claims = self._acting_in(claims, tenant)
        return self._remember((digest, tenant), claims, key.expires_at)

    def _note_ours(self, credential: str) -> None:
        """Remember that a valid token is no external one: its text, which says so, does not change."""
        if len(self._ours) >= _REMEMBERED:
            self._ours.clear()
        self._ours.add(credential)

    def _granted_token(self, credential: str, claims: Claims, tenant: str) -> Claims:
        """Return what a token of this cloud is worth by grants."""
        known = self._remembered((credential, tenant))
        if known is not None:
            return known
        grants = self._book.grants_of((f"subject:{claims.subject}",), claims.tenant)
        worth = claims_of(
            grants, claims.subject, claims.tenant, claims.expires_at,
            token_id=claims.token_id, thumbprint=claims.thumbprint,
        )  # fmt: skip
        worth = limited(worth, claims.models)
        if tenant and tenant != claims.tenant:
            worth = self._acting_in(worth, tenant)
        return self._remember((credential, tenant), worth, claims.expires_at.timestamp() + EXPIRY_LEEWAY_S)

    def _external(self, credential: str, tenant: str, issuer: OidcIssuer, at_s: float | None) -> Claims:
        identity = issuer.verify(credential, self._clock() if at_s is None else at_s)
        tenants = self._book.tenants_of(identity.principals)
        if tenant in tenants:
            chosen = tenant
        elif len(tenants) <= 1 or DEFAULT_TENANT in tenants:
            chosen = next(iter(tenants)) if len(tenants) == 1 else DEFAULT_TENANT
        else:
            raise PermissionDeniedError(
                "this caller was granted roles in several tenants", reason="which-tenant", hint="name one with --tenant"
            )
        until = datetime.fromtimestamp(identity.expires_at, UTC)
        grants = self._book.grants_of(identity.principals, chosen)
        claims = claims_of(grants, identity.principals[0], chosen, until, token_id=identity.token_id)
        if tenant and tenant != chosen:
            claims = self._acting_in(claims, tenant)
        return self._remember((credential, tenant), claims, identity.expires_at + EXPIRY_LEEWAY_S)

    def _remembered(self, name: tuple[str | bytes, str]) -> Claims | None:
        known = self._known.get(name)
        if known is None:
            return None
        if self._clock() >= known.until:
            del self._known[name]
            return None
        return known.claims

    def _remember(self, name: tuple[str | bytes, str], claims: Claims, until: float) -> Claims:
        self._known[name] = _Known(claims, until)
        if len(self._known) > _REMEMBERED:
            self._known.popitem(last=False)
        return claims

    def _acting_in(self, claims: Claims, tenant: str) -> Claims:
        """Return the claims of an admin of the cloud who acts in another tenant.

        Raises:
            PermissionDeniedError: The caller is no such admin; it is not told whether there is the tenant.
            NotFoundError: There is no such tenant: what is made there would be nobody's.
        """
        if not claims.is_cloud_admin:
            raise PermissionDeniedError(
                "only an admin of the default tenant may act in another tenant", reason="wrong-tenant"
            )
        if self._tenants is not None and tenant not in self._tenants():
            raise NotFoundError(
                f"there is no tenant {tenant!r}",
                hint="isthmus tenant list --home DIR/cloud shows them",
                reason="unknown-tenant",
            )
        # Somebody of the tenant may have the same name: whatever is counted or recorded there must not be theirs.
        return replace(claims, tenant=tenant, subject=f"cloud:{claims.subject}")
