"""The door for roles and API keys: what admins ask for. `cloud.access_store` keeps it.

Everything here is about the caller's tenant and no other one. A key leaves in the one answer that makes it; it is
never logged and cannot be asked for again.
"""

from __future__ import annotations

import json
import re
from datetime import timedelta
from typing import Any, Final

import structlog

from cloud.access_store import AccessStore, Keep
from cloud.access_tables import ApiKeyRow, RoleGrant
from cloud.fleet_messages import timestamp
from isthmus.errors import InputError
from isthmus.v1 import access_pb2, access_pb2_grpc
from security.durations import format_duration
from security.interceptors import check_all_models
from security.roles import check_principal
from security.tokens import ALL_MODELS, check_role

DEFAULT_KEY_S: Final = 90 * 86400
MAX_KEY_S: Final = 366 * 86400
MAX_OVERLAP_S: Final = 30 * 86400
_MAX_MODELS: Final = 64
_KEY_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_MODEL: Final = re.compile(r"\*|[A-Za-z0-9][A-Za-z0-9._-]{0,63}")

log = structlog.get_logger(__name__)


class AccessService(access_pb2_grpc.AccessServiceServicer):
    """Granted roles and API keys of the caller's tenant."""

    def __init__(self, store: AccessStore) -> None:
        self._store = store

    async def GrantRole(self, request: Any, context: Any) -> Any:  # noqa: N802
        """Give a principal a role.

        Raises:
            InputError: Principal, role or a model's name is none.
            NotFoundError: The principal is an API key that is not there.
        """
        del context
        principal, keep = check_principal(request.principal), _keep()
        check_role(request.role)
        row = await self._store.grant(keep, principal, request.role, _models(request.models))
        log.info("role granted", tenant=keep.tenant, principal=principal, role=row.role, models=row.models, by=keep.by)
        return access_pb2.GrantRoleResponse(grant=_grant_message(row))

    async def RevokeRole(self, request: Any, context: Any) -> Any:  # noqa: N802
        """Take a role from a principal.

        Raises:
            NotFoundError: It was not granted.
        """
        del context
        principal, keep = check_principal(request.principal), _keep()
        count = await self._store.revoke(keep.tenant, principal, request.role)
        log.info("role revoked", tenant=keep.tenant, principal=principal, role=request.role or "all", by=keep.by)
        return access_pb2.RevokeRoleResponse(revoked=count)

    async def ListRoles(self, request: Any, context: Any) -> Any:  # noqa: N802
        """List what was granted."""
        del request, context
        rows = await self._store.grants(_keep().tenant)
        return access_pb2.ListRolesResponse(grants=map(_grant_message, rows))

    async def CreateApiKey(self, request: Any, context: Any) -> Any:  # noqa: N802
        """Make an API key.

        Raises:
            InputError: The name, role, models or time to live cannot be.
            ConflictError: There is a key of this name.
        """
        del context
        keep = _keep()
        check_role(request.role)
        key, row = await self._store.create_key(
            keep, _key_name(request.name), request.role, _models(request.models), _ttl(request.ttl_s)
        )
        log.info("API key made", tenant=keep.tenant, name=row.name, prefix=row.prefix, role=request.role, by=keep.by)
        return access_pb2.CreateApiKeyResponse(key=key, info=_key_message(row))

    async def RotateApiKey(self, request: Any, context: Any) -> Any:  # noqa: N802
        """Make the next key of a name; the one before goes on for the overlap.

        Raises:
            InputError: A time cannot be.
            NotFoundError: There is no such key.
            ConflictError: Two keys of the name are valid already.
        """
        del context
        if request.overlap_s > MAX_OVERLAP_S:
            raise InputError(f"expected an overlap of at most {_time(MAX_OVERLAP_S)}, got {_time(request.overlap_s)}")
        keep = _keep()
        key, row, old = await self._store.rotate_key(
            keep, _key_name(request.name), _ttl(request.ttl_s), request.overlap_s
        )
        log.info("API key rotated", tenant=keep.tenant, name=row.name, prefix=row.prefix, old=old.prefix, by=keep.by)
        return access_pb2.RotateApiKeyResponse(key=key, info=_key_message(row), old=_key_message(old))

    async def RevokeApiKey(self, request: Any, context: Any) -> Any:  # noqa: N802
        """Take API keys back.

        Raises:
            NotFoundError: There is no such key.
        """
        del context
        keep = _keep()
        count = await self._store.revoke_key(keep.tenant, _key_name(request.name), request.prefix)
        log.info("API key revoked", tenant=keep.tenant, name=request.name, keys=count, by=keep.by)
        return access_pb2.RevokeApiKeyResponse(revoked=count)

    async def ListApiKeys(self, request: Any, context: Any) -> Any:  # noqa: N802
        """List the API keys."""
        del request, context
        rows = await self._store.keys(_keep().tenant)
        return access_pb2.ListApiKeysResponse(keys=map(_key_message, rows))


def _keep() -> Keep:
    """Return whose access is changed and by whom.

    Raises:
        PermissionDeniedError: The caller may use some models only: it could give itself, or others, the rest.
    """
    claims = check_all_models("saying who may do what")
    return Keep(claims.tenant, claims.subject)


def _models(names: Any) -> list[str]:
    models = list(names) or [ALL_MODELS]
    if len(models) > _MAX_MODELS or not all(_MODEL.fullmatch(name) for name in models):
        raise InputError(f"models: expected at most {_MAX_MODELS} exact names, or * for all")
    return models


def _key_name(name: str) -> str:
    if not _KEY_NAME.fullmatch(name):
        raise InputError(
            f"expected an API key's name of letters, digits, dot, dash and underscore, got {name[:80]!r}"
        )  # fmt: skip
    return name


def _ttl(seconds: int) -> int:
    if seconds > MAX_KEY_S:
        raise InputError(f"expected a time to live of at most {_time(MAX_KEY_S)}, got {_time(seconds)}")
    return seconds or DEFAULT_KEY_S


def _time(seconds: int) -> str:
    return format_duration(timedelta(seconds=seconds))


def _grant_message(row: RoleGrant) -> Any:
    return access_pb2.RoleGrant(
        principal=row.principal, role=row.role, tenant=row.tenant, models=json.loads(row.models),
        created_at=timestamp(row.created_at), created_by=row.created_by,
    )  # fmt: skip


def _key_message(row: ApiKeyRow) -> Any:
    return access_pb2.ApiKey(
        prefix=row.prefix, name=row.name, tenant=row.tenant, created_at=timestamp(row.created_at),
        created_by=row.created_by, expires_at=timestamp(row.expires_at),
        last_used_at=None if row.last_used_at is None else timestamp(row.last_used_at),
    )  # fmt: skip
