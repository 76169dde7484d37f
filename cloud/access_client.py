"""An admin's side of the access service: one method for each thing to say about who may do what."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from cloud.client import CloudClient
from cloud.fleet_rows import moment
from isthmus.v1 import access_pb2, access_pb2_grpc


class AccessClient:
    """Calls on an open connection."""

    def __init__(self, client: CloudClient) -> None:
        self._client, self._access = client, client.stub(access_pb2_grpc.AccessServiceStub)

    def grant(self, principal: str, role: str, models: Sequence[str] = ()) -> dict[str, Any]:
        """Give a principal a role; return the grant."""
        request = access_pb2.GrantRoleRequest(principal=principal, role=role, models=models)
        return _grant_row(self._client.call(f"grant {role} to {principal}", self._access.GrantRole, request).grant)

    def revoke(self, principal: str, role: str = "") -> int:
        """Take a role, or all roles, from a principal; return how many."""
        request = access_pb2.RevokeRoleRequest(principal=principal, role=role)
        return int(self._client.call(f"revoke roles of {principal}", self._access.RevokeRole, request).revoked)

    def grants(self) -> list[dict[str, Any]]:
        """Return what was granted."""
        answer = self._client.call("list roles", self._access.ListRoles, access_pb2.ListRolesRequest())
        return [_grant_row(grant) for grant in answer.grants]

    def create_key(self, name: str, role: str, models: Sequence[str], ttl_s: int) -> tuple[str, dict[str, Any]]:
        """Make an API key; return it and what is known of it."""
        request = access_pb2.CreateApiKeyRequest(name=name, role=role, models=models, ttl_s=ttl_s)
        answer = self._client.call(f"make API key {name}", self._access.CreateApiKey, request)
        return answer.key, {**_key_row(answer.info), "role": role, "models": list(models) or ["*"]}

    def rotate_key(self, name: str, ttl_s: int, overlap_s: int) -> tuple[str, dict[str, Any]]:
        """Make the next key of a name; return it and what is known of both."""
        request = access_pb2.RotateApiKeyRequest(name=name, ttl_s=ttl_s, overlap_s=overlap_s)
        answer = self._client.call(f"rotate API key {name}", self._access.RotateApiKey, request)
        old = {"old_prefix": answer.old.prefix, "old_expires": moment(answer.old.expires_at)}
        return answer.key, _key_row(answer.info) | old

    def revoke_key(self, name: str, prefix: str = "") -> int:
        """Take API keys back; return how many."""
        request = access_pb2.RevokeApiKeyRequest(name=name, prefix=prefix)
        return int(self._client.call(f"revoke API key {name}", self._access.RevokeApiKey, request).revoked)

    def keys(self) -> list[dict[str, Any]]:
        """Return the API keys, without what would open a door."""
        answer = self._client.call("list API keys", self._access.ListApiKeys, access_pb2.ListApiKeysRequest())
        return [_key_row(key) for key in answer.keys]


def _grant_row(grant: Any) -> dict[str, Any]:
    return {
        "principal": grant.principal,
        "role": grant.role,
        "tenant": grant.tenant,
        "models": list(grant.models),
        "granted": moment(grant.created_at),
        "by": grant.created_by,
    }


def _key_row(key: Any) -> dict[str, Any]:
    return {
        "name": key.name,
        "prefix": key.prefix,
        "tenant": key.tenant,
        "created": moment(key.created_at),
        "by": key.created_by,
        "expires": moment(key.expires_at),
        "last_used": moment(key.last_used_at) if key.HasField("last_used_at") else None,
    }
