"""Roles that were granted: who may do what with which models of which tenant, as one snapshot in memory.

A grant names a principal, which is one of

    subject:NAME          the subject of a token of this cloud that was minted with --role granted
    apikey:NAME           an API key of the tenant
    oidc:ISSUER:SUBJECT   a caller with a token of an external issuer
    group:ISSUER:GROUP    everybody whom an external issuer says to be in a group

Rules: no grant, no access. Grants add up, and each scope comes with the models of the grants that hold it, so that
"operator of a" and "client of b" never make an operator of b. The cloud replaces the snapshot when its record changes;
whatever was worked out from an older one is forgotten then.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Final

from isthmus.errors import InputError, PermissionDeniedError
from security.apikeys import ApiKey
from security.scopes import SCOPES_OF_ROLE
from security.tokens import Claims

_KINDS: Final = {"subject": 1, "apikey": 1, "oidc": 2, "group": 2}  # parts after the kind
_MAX_PRINCIPAL: Final = 300


@dataclass(frozen=True, slots=True)
class Grant:
    """One role of one principal in one tenant, for some models (`*` for all of the tenant's)."""

    tenant: str
    principal: str
    role: str
    models: frozenset[str]


@dataclass(slots=True)
class AccessBook:
    """The grants and API keys that hold now; for one event loop.

    `generation` grows with every change. `used` collects when each key was last used, by its prefix, until somebody
    takes that away to keep it. `heard_by` are called after every change.
    """

    generation: int = 0
    used: dict[str, float] = field(default_factory=dict)
    heard_by: list[Callable[[], None]] = field(default_factory=list)
    _grants: dict[str, dict[str, list[Grant]]] = field(default_factory=dict)  # by principal, then by tenant
    _keys: dict[bytes, ApiKey] = field(default_factory=dict)

    def replace(self, grants: Iterable[Grant], keys: Iterable[ApiKey]) -> None:
        """Take a new snapshot."""
        found: dict[str, dict[str, list[Grant]]] = {}
        for grant in grants:
            found.setdefault(grant.principal, {}).setdefault(grant.tenant, []).append(grant)
        self._grants, self._keys = found, {key.digest: key for key in keys}
        self.generation += 1
        for hear in self.heard_by:
            hear()

    def key(self, digest: bytes) -> ApiKey | None:
        """Return the API key with this digest."""
        return self._keys.get(digest)

    def tenants_of(self, principals: Iterable[str]) -> set[str]:
        """Return the tenants in which any of the principals was granted something."""
        return {tenant for principal in principals for tenant in self._grants.get(principal, ())}

    def grants_of(self, principals: Iterable[str], tenant: str) -> list[Grant]:
        """Return what the principals were granted in a tenant."""
        return [grant for name in principals for grant in self._grants.get(name, {}).get(tenant, ())]


def claims_of(
    grants: Iterable[Grant],
    subject: str,
    tenant: str,
    expires_at: datetime,
    *,
    token_id: str = "",
    thumbprint: str = "",
) -> Claims:
    """Return the claims that grants add up to.

    Raises:
        PermissionDeniedError: There is no grant.
    """
    models: dict[str, frozenset[str]] = {}
    for grant in grants:
        for scope in SCOPES_OF_ROLE.get(grant.role, ()):
            models[scope] = models.get(scope, frozenset()) | grant.models
    if not models:
        raise PermissionDeniedError(
            "nothing has been granted to this caller",
            reason="no-grant",
            hint="an admin grants a role: isthmus role grant PRINCIPAL ROLE",
        )
    return Claims(
        subject=subject,
        scopes=frozenset(models),
        models=frozenset[str]().union(*models.values()),
        expires_at=expires_at,
        tenant=tenant,
        token_id=token_id,
        thumbprint=thumbprint,
        models_by_scope=models,
    )


def limited(claims: Claims, models: frozenset[str]) -> Claims:
    """Return claims that allow, of what they allow, only these models."""
    if "*" in models or claims.models_by_scope is None:
        return claims
    by_scope: Mapping[str, frozenset[str]] = {
        scope: models if "*" in granted else granted & models for scope, granted in claims.models_by_scope.items()
    }
    return replace(claims, models=frozenset[str]().union(*by_scope.values()), models_by_scope=by_scope)


def check_principal(text: str) -> str:
    """Return a principal's name.

    Raises:
        InputError: It is none.
    """
    kind, *parts = text.split(":", 2)
    wanted = _KINDS.get(kind, 0)
    if wanted == 1 and len(parts) == 2:  # a subject or a key may have a colon in its name
        parts = [":".join(parts)]
    if (
        len(parts) != wanted
        or not wanted
        or not all(parts)
        or len(text) > _MAX_PRINCIPAL
        or not text.isprintable()
        or not all(part == part.strip() for part in parts)
    ):
        raise InputError(
            f"expected subject:NAME, apikey:NAME, oidc:ISSUER:SUBJECT or group:ISSUER:GROUP, got {text[:80]!r}",
            reason="bad-principal",
        )
    return text
