"""The operator's side of the cloud's services: calls over TLS with a token, one method for each thing to do.

Used by the command line and by tests; knows nothing of how the cloud keeps what it is given. The calls of each service
are in a module of its own.
"""

from __future__ import annotations

from typing import Any

from cloud.audit_client import AuditCalls
from cloud.client_calls import Address
from cloud.registry_client import Progress
from cloud.stick_client import StickCalls
from cloud.usage_client import UsageCalls
from isthmus.oip import service_pb2, service_pb2_grpc
from isthmus.v1 import fleet_pb2

__all__ = ["Address", "CloudClient", "Progress"]


class CloudClient(StickCalls, UsageCalls, AuditCalls):
    """A connection to a cloud with the calls of all its services; use it as a context manager."""

    def __init__(self, address: Address, *, timeout_s: float = 30.0) -> None:
        super().__init__(address, timeout_s=timeout_s)
        self._inference: Any = self.stub(service_pb2_grpc.GRPCInferenceServiceStub)

    def status(self) -> dict[str, Any]:
        """Return what the cloud runs: Triton's version and each loaded heavy model with its counters."""
        about = self._call("ask for status", self._inference.ServerMetadata, service_pb2.ServerMetadataRequest())
        request = service_pb2.ModelStatisticsRequest()
        statistics = self._call("read statistics", self._inference.ModelStatistics, request)
        who = self._call("ask who we are", self._fleet.WhoAmI, fleet_pb2.WhoAmIRequest())
        triton = next((name.removeprefix("triton:") for name in about.extensions if name.startswith("triton:")), "")
        return {
            "cloud": self._cloud,
            "version": about.version,
            "triton_version": triton,
            "tls_version": who.tls_version,
            "tls_group": who.tls_group,
            "subject": who.subject,
            "tenant": who.tenant,
            "models": [_statistics_row(model) for model in statistics.model_stats],
        }


def _statistics_row(model: Any) -> dict[str, Any]:
    success = model.inference_stats.success
    return {
        "model": model.name,
        "heavy_version": int(model.version),
        "inferences": model.inference_count,
        "executions": model.execution_count,
        "mean_ms": round(success.ns / success.count / 1e6, 3) if success.count else None,
    }
