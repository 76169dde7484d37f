"""Calls about usage and quotas: one method for each thing to do."""

from __future__ import annotations

from typing import Any

import grpc

from cloud.client_calls import Address, CloudCalls
from isthmus.v1 import usage_pb2, usage_pb2_grpc


class UsageCalls(CloudCalls):
    """The usage service."""

    def __init__(self, address: Address, *, timeout_s: float = 30.0) -> None:
        super().__init__(address, timeout_s=timeout_s)
        self._usage: Any = self.stub(usage_pb2_grpc.UsageServiceStub)

    def usage(self, request: Any) -> list[Any]:
        """Return the rows of a GetUsageRequest."""
        try:
            return [row for part in self._usage.GetUsage(request, timeout=self._timeout_s) for row in part.rows]
        except grpc.RpcError as error:
            raise self._explained(error, "cannot read usage") from error

    def compute(self, request: Any) -> list[Any]:
        """Return the rows of a GetComputeRequest."""
        return list(self._call("read Triton's usage", self._usage.GetCompute, request).rows)

    def set_quota(self, quota: Any) -> list[str]:
        """Set a quota; return what may not have been meant."""
        scope = quota.scope
        request = usage_pb2.SetQuotaRequest(
            tenant=scope.tenant, device=scope.device, model=scope.model, limits=quota.limits
        )
        return list(self._call("set the quota", self._usage.SetQuota, request).warnings)

    def quotas(self, tenant: str = "") -> list[Any]:
        """Return the quotas that are set, of one tenant or all that may be seen."""
        request = usage_pb2.ListQuotasRequest(tenant=tenant)
        return list(self._call("list quotas", self._usage.ListQuotas, request).quotas)

    def clear_quota(self, scope: Any) -> None:
        """Remove a quota."""
        request = usage_pb2.ClearQuotaRequest(tenant=scope.tenant, device=scope.device, model=scope.model)
        self._call("clear the quota", self._usage.ClearQuota, request)
