"""Calls about the audit log: one method for each thing to ask."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import grpc

from cloud.client_calls import LONG_S, Address, CloudCalls
from isthmus.v1 import audit_pb2, audit_pb2_grpc


class AuditCalls(CloudCalls):
    """The audit service."""

    def __init__(self, address: Address, *, timeout_s: float = 30.0) -> None:
        super().__init__(address, timeout_s=timeout_s)
        self._audit: Any = self.stub(audit_pb2_grpc.AuditServiceStub)

    def search_records(self, fields: Mapping[str, Any]) -> Iterator[bytes]:
        """Yield the records of the audit log that match the fields of a SearchRecordsRequest, as JSON."""
        request = audit_pb2.SearchRecordsRequest(**fields)
        try:
            for answer in self._audit.SearchRecords(request, timeout=LONG_S):
                yield answer.record_json
        except grpc.RpcError as error:
            raise self._explained(error, "cannot search the audit log") from error

    def export_records(self, times: Mapping[str, Any]) -> Iterator[bytes]:
        """Yield lines of the audit log."""
        try:
            for answer in self._audit.ExportRecords(audit_pb2.ExportRecordsRequest(**times), timeout=LONG_S):
                yield answer.lines
        except grpc.RpcError as error:
            raise self._explained(error, "cannot export the audit log") from error

    def audit_heads(self) -> list[bytes]:
        """Return the signed heads of the audit log's chains."""
        return list(self._call("ask for the heads", self._audit.GetHeads, audit_pb2.GetHeadsRequest()).head_json)
