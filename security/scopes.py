"""Who may call what: the scopes of each role, and the scope that each method asks for.

The table is complete on purpose: a method that is not in it is refused, and a test compares it with the descriptors of
all services. It knows method names as strings, so it imports no generated code.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

INFER: Final = "infer"
REGISTRY_READ: Final = "registry:read"
REGISTRY_PUBLISH: Final = "registry:publish"
FLEET_ADMIN: Final = "fleet:admin"
DEVICE: Final = "device"
AUDIT_READ: Final = "audit:read"
USAGE_READ: Final = "usage:read"
TRAFFIC_ADMIN: Final = "traffic:admin"
ACCESS_ADMIN: Final = "access:admin"

# Not scopes: what a method may ask for instead of one.
PUBLIC: Final = "public"  # no token; the request carries its own proof, or there is nothing to protect
AUTHENTICATED: Final = "authenticated"  # any valid token

# Not a scope either: what a token holds instead of scopes when its subject may do what it was granted, and no more
# (security.roles). Such a token is worth as much as the grants are at the time of the call.
GRANTED: Final = "granted"

SCOPES: Final = frozenset(
    {
        INFER,
        REGISTRY_READ,
        REGISTRY_PUBLISH,
        FLEET_ADMIN,
        DEVICE,
        AUDIT_READ,
        USAGE_READ,
        TRAFFIC_ADMIN,
        ACCESS_ADMIN,
    }
)

SCOPES_OF_ROLE: Final[Mapping[str, frozenset[str]]] = MappingProxyType(
    {
        "device": frozenset({INFER, REGISTRY_READ, DEVICE}),
        "client": frozenset({INFER}),
        "operator": frozenset({INFER, REGISTRY_READ, REGISTRY_PUBLISH, FLEET_ADMIN, USAGE_READ, TRAFFIC_ADMIN}),
        "auditor": frozenset({AUDIT_READ, USAGE_READ, REGISTRY_READ}),
        "admin": SCOPES,
    }
)

_METHODS: Final[Mapping[str, Mapping[str, str]]] = {
    "isthmus.v1.FleetService": {
        "Invite": FLEET_ADMIN,
        "Enrol": PUBLIC,
        "IssueToken": PUBLIC,
        "RenewCertificate": PUBLIC,
        "RevokeDevice": ACCESS_ADMIN,
        "Watch": DEVICE,
        "Report": DEVICE,
        "ListDevices": FLEET_ADMIN,
        "GetDevice": FLEET_ADMIN,
        "SetLabels": FLEET_ADMIN,
        "Pin": FLEET_ADMIN,
        "Unpin": FLEET_ADMIN,
        "RetryDevice": FLEET_ADMIN,
        "WhoAmI": AUTHENTICATED,
    },
    "isthmus.v1.RolloutService": {
        "StartRollout": FLEET_ADMIN,
        "PauseRollout": FLEET_ADMIN,
        "ResumeRollout": FLEET_ADMIN,
        "AbortRollout": FLEET_ADMIN,
        "GetRollout": FLEET_ADMIN,
        "ListRollouts": FLEET_ADMIN,
    },
    "isthmus.v1.TrafficService": {
        "SetTraffic": TRAFFIC_ADMIN,
        "RollbackTraffic": TRAFFIC_ADMIN,
        "ListTraffic": TRAFFIC_ADMIN,
        "ListReplicas": TRAFFIC_ADMIN,
        "DrainReplica": TRAFFIC_ADMIN,
        "ResumeReplica": TRAFFIC_ADMIN,
    },
    "isthmus.v1.RegistryService": {
        "FetchMetadata": REGISTRY_READ,
        "FetchBlob": REGISTRY_READ,
        "FetchDelta": REGISTRY_READ,
        "FindMissing": REGISTRY_PUBLISH,
        "UploadBlob": REGISTRY_PUBLISH,
        "Publish": REGISTRY_PUBLISH,
        "Release": REGISTRY_PUBLISH,
        "SubmitMetadata": REGISTRY_PUBLISH,
        "ListVersions": REGISTRY_READ,
    },
    "isthmus.v1.AccessService": {
        "GrantRole": ACCESS_ADMIN,
        "RevokeRole": ACCESS_ADMIN,
        "ListRoles": ACCESS_ADMIN,
        "CreateApiKey": ACCESS_ADMIN,
        "RotateApiKey": ACCESS_ADMIN,
        "RevokeApiKey": ACCESS_ADMIN,
        "ListApiKeys": ACCESS_ADMIN,
    },
    "isthmus.v1.UsageService": {
        "GetUsage": USAGE_READ,
        "GetCompute": ACCESS_ADMIN,
        "SetQuota": ACCESS_ADMIN,
        "ListQuotas": USAGE_READ,
        "ClearQuota": ACCESS_ADMIN,
    },
    "isthmus.v1.AuditService": {
        "SearchRecords": AUDIT_READ,
        "ExportRecords": AUDIT_READ,
        "GetHeads": AUDIT_READ,
    },
    # Public keys, and what the caller is called here: whoever may send anything may seal it.
    "isthmus.v1.SealingService": {"GetSealingKeys": AUTHENTICATED},
    "isthmus.v1.AgentService": {
        "GetStatus": INFER,
        # The caller's own queues only: the agent tells them apart by the token's subject.
        "WatchDeferred": INFER,
        "AcknowledgeDeferred": INFER,
        "ListDeferred": INFER,
        "PurgeDeferred": INFER,
        # Names a file of the agent's machine.
        "ImportVersion": FLEET_ADMIN,
    },
    "inference.GRPCInferenceService": {
        "ServerLive": AUTHENTICATED,
        "ServerReady": AUTHENTICATED,
        "ServerMetadata": INFER,
        "ModelReady": INFER,
        "ModelMetadata": INFER,
        "ModelConfig": INFER,
        "ModelStatistics": INFER,
        "ModelInfer": INFER,
        "ModelStreamInfer": INFER,
        "RepositoryIndex": INFER,
        # What would change the server's state is for operators, implemented or not.
        "RepositoryModelLoad": FLEET_ADMIN,
        "RepositoryModelUnload": FLEET_ADMIN,
        "SystemSharedMemoryStatus": FLEET_ADMIN,
        "SystemSharedMemoryRegister": FLEET_ADMIN,
        "SystemSharedMemoryUnregister": FLEET_ADMIN,
        "CudaSharedMemoryStatus": FLEET_ADMIN,
        "CudaSharedMemoryRegister": FLEET_ADMIN,
        "CudaSharedMemoryUnregister": FLEET_ADMIN,
        "TraceSetting": FLEET_ADMIN,
        "LogSettings": FLEET_ADMIN,
    },
    "grpc.health.v1.Health": {"Check": PUBLIC, "Watch": PUBLIC, "List": PUBLIC},
    "grpc.reflection.v1.ServerReflection": {"ServerReflectionInfo": AUTHENTICATED},
    "grpc.reflection.v1alpha.ServerReflection": {"ServerReflectionInfo": AUTHENTICATED},
}

# Methods whose requests are a stream and whose answer is one message.
UPLOADS: Final = frozenset({"/isthmus.v1.RegistryService/UploadBlob"})

# Methods whose streams have no end of their own. (Devices' Watch ends in order, with their token.)
ENDLESS: Final = frozenset(
    {"/inference.GRPCInferenceService/ModelStreamInfer", "/isthmus.v1.AgentService/WatchDeferred"}
)

# Full method path, as it travels, to what the method asks for.
METHOD_SCOPES: Final[Mapping[str, str]] = MappingProxyType(
    {f"/{service}/{method}": scope for service, methods in _METHODS.items() for method, scope in methods.items()}
)
