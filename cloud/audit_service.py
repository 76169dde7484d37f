"""The door for auditors: search, export and heads of this replica's audit log, each caller's own tenant only.

Records that are nobody's (refused strangers, what the log says of itself) are shown to auditors of the default tenant,
who run the cloud. Verifying needs the whole log, so it is done where the log is.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Iterator
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, Final

from cloud.long_work import LongWork
from isthmus.errors import InputError
from isthmus.v1 import audit_pb2, audit_pb2_grpc
from security.audit.reading import Query, search
from security.audit.records import canonical
from security.interceptors import current_claims
from security.tenancy import DEFAULT_TENANT
from security.tokens import Claims

_LIMIT: Final = 100
_MAX_LIMIT: Final = 10_000
_CHUNK: Final = 256  # records of one message
_MAX_TEXT: Final = 300


class AuditService(audit_pb2_grpc.AuditServiceServicer):
    """See the module.

    Args:
        folder: The log.
    """

    def __init__(self, folder: Path) -> None:
        self._folder, self._long_work = folder, LongWork()

    async def SearchRecords(self, request: Any, context: Any) -> AsyncIterator[Any]:  # noqa: N802
        """Stream the newest matching records.

        Raises:
            InputError: The limit is too large, or a text too long.
        """
        del context
        limit = request.limit or _LIMIT
        if limit > _MAX_LIMIT:
            raise InputError(f"limit: expected at most {_MAX_LIMIT}, got {limit}")
        texts = {
            name: getattr(request, name)
            for name in ("action", "subject", "decision", "reason", "model", "device", "rollout", "request_id")
        }
        if any(len(text) > _MAX_TEXT for text in texts.values()):
            raise InputError(f"expected texts of at most {_MAX_TEXT} characters")
        since, until = _times(request)
        query = Query(**texts, version=request.version, since=since, until=until)
        claims = current_claims()
        newest = await self._long_work.run(lambda: deque(_visible(self._folder, query, claims), maxlen=limit))
        for record in newest:
            yield audit_pb2.SearchRecordsResponse(record_json=canonical(record))

    async def ExportRecords(self, request: Any, context: Any) -> AsyncIterator[Any]:  # noqa: N802
        """Stream the records of a time."""
        del context
        since, until = _times(request)
        records = _visible(self._folder, Query(since=since, until=until), current_claims())
        while lines := await self._long_work.run(partial(_take, records)):
            yield audit_pb2.ExportRecordsResponse(lines=lines)

    async def GetHeads(self, request: Any, context: Any) -> Any:  # noqa: N802
        """Return the heads of all chains."""
        del request, context
        heads = await asyncio.to_thread(lambda: [path.read_bytes() for path in sorted(self._folder.glob("*.head"))])
        return audit_pb2.GetHeadsResponse(head_json=heads)


def _visible(folder: Path, query: Query, claims: Claims) -> Iterator[dict[str, Any]]:
    """Yield the records of the caller's tenant about nothing but models that it may use."""
    tenants = {claims.tenant, ""} if claims.tenant == DEFAULT_TENANT else {claims.tenant}
    for record in search(folder, query):
        model = record.get("model", "")
        if record.get("tenant", "") in tenants and (not model or claims.may_use(model)):
            yield record


def _take(records: Iterator[dict[str, Any]]) -> bytes:
    lines = []
    for record in records:
        lines.append(canonical(record) + b"\n")
        if len(lines) == _CHUNK:
            break
    return b"".join(lines)


def _times(request: Any) -> tuple[datetime | None, datetime | None]:
    since = request.since.ToDatetime(UTC) if request.HasField("since") else None
    return since, request.until.ToDatetime(UTC) if request.HasField("until") else None
