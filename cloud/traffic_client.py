"""The operator's side of the traffic service: one function for each thing to do, and rows for tables."""

from __future__ import annotations

from typing import Any, Final

from cloud.client import CloudClient
from cloud.fleet_rows import moment
from cloud.traffic import AB, CANARY, describe
from isthmus.v1 import traffic_pb2, traffic_pb2_grpc

_LOAD_S: Final = 600.0  # a version may have to be loaded first


class TrafficClient:
    """Asks a cloud's traffic service over a connection that is there."""

    def __init__(self, client: CloudClient) -> None:
        self._client = client
        self._stub = client.stub(traffic_pb2_grpc.TrafficServiceStub)

    def set(self, request: Any) -> dict[str, Any]:
        """Change a model's policy; return it."""
        answer = self._client.call(f"set traffic of {request.model}", self._stub.SetTraffic, request, _LOAD_S)
        return policy_record(answer.policy)

    def roll_back(self, model: str) -> dict[str, Any]:
        """End split and shadow of a model; return the policy, with the version that answers."""
        request = traffic_pb2.RollbackTrafficRequest(model=model)
        answer = self._client.call(f"roll back traffic of {model}", self._stub.RollbackTraffic, request)
        return policy_record(answer.policy) | {"released": answer.released}

    def reports(self, model: str = "") -> list[dict[str, Any]]:
        """Return a record for each model that has a policy."""
        request = traffic_pb2.ListTrafficRequest(model=model)
        answer = self._client.call("list traffic", self._stub.ListTraffic, request)
        return [_report_record(report) for report in answer.reports]

    def replicas(self) -> list[dict[str, Any]]:
        """Return a row for each Triton of the cloud."""
        answer = self._client.call("list Tritons", self._stub.ListReplicas, traffic_pb2.ListReplicasRequest())
        return [_replica_row(replica) for replica in answer.replicas]

    def drain(self, name: str, wait_s: int) -> dict[str, Any]:
        """Send a Triton nothing more; return its row once it is idle, or time is up."""
        request = traffic_pb2.DrainReplicaRequest(name=name, wait_s=wait_s)
        answer = self._client.call(f"drain {name}", self._stub.DrainReplica, request, wait_s + 30.0)
        return _replica_row(answer.replica)

    def resume(self, name: str) -> dict[str, Any]:
        """Let a drained Triton serve again; return its row."""
        request = traffic_pb2.ResumeReplicaRequest(name=name)
        return _replica_row(self._client.call(f"resume {name}", self._stub.ResumeReplica, request).replica)


def policy_record(policy: Any) -> dict[str, Any]:
    """Return a TrafficPolicy as plain values."""
    sticky = policy.split.assignment == traffic_pb2.ASSIGNMENT_STICKY
    return {
        "model": policy.model,
        "policy": describe(policy),
        "kind": (AB if sticky else CANARY) if policy.split.shares else None,
        "shares": {str(share.version): share.share for share in policy.split.shares},
        "by": (policy.split.key_parameter or "subject") if sticky else None,
        "shadow": {
            "version": policy.shadow.version,
            "share": policy.shadow.share,
            "most_at_once": policy.shadow.most_at_once,
        }
        if policy.shadow.version
        else None,
        "cache_s": policy.cache_s,
        "changed_at": moment(policy.changed_at),
        "changed_by": policy.changed_by,
    }


def _report_record(report: Any) -> dict[str, Any]:
    total = sum(row.answered + row.failed for row in report.versions)
    return policy_record(report.policy) | {
        "released": report.released,
        "versions": [
            {
                "version": row.version,
                "assignment": row.assignment,
                "answered": row.answered,
                "failed": row.failed,
                "share": round((row.answered + row.failed) / total, 4),
            }
            for row in report.versions
        ],
        "shadow_outcomes": {
            name: getattr(report.shadow, name) for name in ("agreed", "disagreed", "failed", "dropped")
        },
        "cache_hits": report.cache_hits,
        "cache_misses": report.cache_misses,
    }


def _replica_row(replica: Any) -> dict[str, Any]:
    counted = ("name", "state", "under_way", "requests", "retries", "ejections")
    return {name: getattr(replica, name) for name in counted} | {"models": list(replica.models)}
