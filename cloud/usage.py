"""The door for quotas and usage: what operators ask and set. `cloud.admission` decides and `cloud.metering` counts."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Collection
from contextlib import suppress
from dataclasses import asdict
from difflib import get_close_matches
from typing import Any, Final

import structlog
from google.protobuf.timestamp_pb2 import Timestamp
from sqlalchemy.exc import SQLAlchemyError

from cloud.catalog import Catalog
from cloud.journal import Counts
from cloud.metering import Meter
from cloud.quota_follow import QuotaFollower
from cloud.quotas import EACH, Limits, Scope, parse_rate
from cloud.triton_usage import Sums, TritonUsage
from cloud.usage_rows import GROUPS, Question, QuotaTable, UsageTable
from isthmus.errors import InputError, NotFoundError, PermissionDeniedError, UnavailableError
from isthmus.v1 import usage_pb2, usage_pb2_grpc
from security.interceptors import current_claims
from security.tokens import ALL_MODELS, Claims

_ROWS: Final = 500  # of one message
_MAX_NAME: Final = 128

log = structlog.get_logger(__name__)


class UsageService(usage_pb2_grpc.UsageServiceServicer):
    """Usage and quotas.

    Args:
        usage: The counts.
        quotas: The quotas that are set.
        meter: Counts that are not in the database yet.
        compute: What Triton did.
        follower: Makes a change of quotas count.
        catalog: The models that there are.
        tenants: Returns the tenants that there are.
        clock: Unix seconds.
    """

    def __init__(
        self,
        usage: UsageTable,
        quotas: QuotaTable,
        meter: Meter,
        compute: TritonUsage,
        follower: QuotaFollower,
        catalog: Catalog,
        *,
        tenants: Callable[[], Collection[str]],
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._usage, self._quotas, self._meter, self._follower = usage, quotas, meter, follower
        self._compute, self._catalog, self._tenants, self._clock = compute, catalog, tenants, clock

    async def GetUsage(self, request: Any, context: Any) -> AsyncIterator[Any]:  # noqa: N802
        """Stream usage, this gateway's up to this moment.

        Raises:
            InputError: It cannot be grouped like this.
            PermissionDeniedError: It is another tenant's.
        """
        del context
        since, until = _times(request)
        question = Question(
            tenant=_visible(request.tenant),
            device=request.device,
            model=request.model,
            since=since,
            until=until,
            by=_groups(request.by),
            models=_allowed_models(),
        )
        with suppress(SQLAlchemyError, OSError):  # what is there can be read
            await self._meter.flush()
        rows = await asyncio.to_thread(self._usage.read, question)
        for start in range(0, len(rows), _ROWS):
            some = rows[start : start + _ROWS]
            yield usage_pb2.GetUsageResponse(rows=[_row(question.by, group, counts) for group, counts in some])

    async def GetCompute(self, request: Any, context: Any) -> Any:  # noqa: N802
        """Return what Triton computed, up to this moment where it answers.

        Raises:
            PermissionDeniedError: The caller is no admin of the cloud.
        """
        del context
        _check_cloud_admin()
        with suppress(SQLAlchemyError, UnavailableError):
            await self._compute.look()
        rows = await asyncio.to_thread(self._compute.read, *_times(request))
        return usage_pb2.GetComputeResponse(rows=[_compute_row(*row) for row in rows])

    async def SetQuota(self, request: Any, context: Any) -> Any:  # noqa: N802
        """Set a quota, here at once and on other gateways within a second or so.

        Raises:
            InputError: It cannot be.
            NotFoundError: There is no such tenant.
            PermissionDeniedError: The caller is no admin of the cloud.
        """
        del context
        by = _check_cloud_admin().subject
        scope, limits = _scope(request), _limits(request.limits)
        await asyncio.to_thread(self._check_tenant, scope.tenant)
        await asyncio.to_thread(self._quotas.put, scope, limits, at=self._clock(), by=by)
        await self._follower.refresh()
        log.info("quota set", scope=str(scope), by=by)
        return usage_pb2.SetQuotaResponse(warnings=self._warnings(scope))

    def _check_tenant(self, tenant: str) -> None:
        names = self._tenants()
        if tenant != EACH and tenant not in names:
            close = get_close_matches(tenant, names, n=1)
            raise NotFoundError(
                f"there is no tenant {tenant!r}",
                hint=f"did you mean {close[0]}?" if close else "isthmus tenant list --home DIR/cloud shows them",
                reason="unknown-tenant",
            )

    def _warnings(self, scope: Scope) -> list[str]:
        """Return what may not be meant: a quota may be there before the model that it is for is published."""
        if scope.model in ("", EACH):
            return []
        tenant = self._catalog.tenant(scope.model)
        if tenant is not None and scope.tenant in (EACH, tenant):
            return []
        models = [name for name in self._catalog.models if scope.tenant in (EACH, self._catalog.tenant(name))]
        close = get_close_matches(scope.model, models, n=1)
        of = "" if scope.tenant == EACH else f" of tenant {scope.tenant}"
        return [f"no model{of} is called {scope.model!r} yet" + (f"; did you mean {close[0]}?" if close else "")]

    async def ListQuotas(self, request: Any, context: Any) -> Any:  # noqa: N802
        """Return the quotas that are set.

        Raises:
            PermissionDeniedError: They are another tenant's.
        """
        del context
        tenant = _visible(request.tenant)
        rows = await asyncio.to_thread(self._quotas.read)
        return usage_pb2.ListQuotasResponse(
            quotas=[
                usage_pb2.Quota(scope=_scope_message(scope), limits=_limits_message(limits))
                for scope, limits in sorted(rows.items(), key=lambda row: (row[0].tenant, row[0].device, row[0].model))
                if tenant in ("", scope.tenant) and (scope.model in ("", "*") or current_claims().may_use(scope.model))
            ]
        )

    async def ClearQuota(self, request: Any, context: Any) -> Any:  # noqa: N802
        """Remove a quota.

        Raises:
            NotFoundError: There is none.
            PermissionDeniedError: The caller is no admin of the cloud.
        """
        del context
        by = _check_cloud_admin().subject
        scope = _scope(request)
        if not await asyncio.to_thread(self._quotas.remove, scope):
            raise NotFoundError(f"no quota is set for {scope}", hint="isthmus quota show lists them")
        await self._follower.refresh()
        log.info("quota cleared", scope=str(scope), by=by)
        return usage_pb2.ClearQuotaResponse()


def _visible(tenant: str) -> str:
    """Return the tenant whose rows the caller gets; "" is all, for admins of the cloud only."""
    claims = current_claims()
    if claims.is_cloud_admin:
        return tenant
    if tenant not in ("", claims.tenant):
        raise PermissionDeniedError(
            "other tenants' usage and quotas are for admins of the cloud",
            hint=f"leave --tenant out to see those of {claims.tenant}",
            reason="other-tenant",
        )
    return claims.tenant


def _check_cloud_admin() -> Claims:
    """Return the claims of an admin of the cloud: a tenant's own must not lift what the tenant was given."""
    claims = current_claims()
    if not claims.is_cloud_admin:
        raise PermissionDeniedError(
            "this is for admins of the default tenant, who run the cloud",
            hint="ask whoever runs it; isthmus quota show and isthmus usage show what is the tenant's",
            reason="wrong-tenant",
        )
    return claims


def _times(request: Any) -> tuple[int | None, int | None]:
    since, until = (getattr(request, name) if request.HasField(name) else None for name in ("since", "until"))
    return since.seconds if since else None, until.seconds if until else None


def _allowed_models() -> frozenset[str] | None:
    models = current_claims().models
    return None if ALL_MODELS in models else models


def _groups(by: Any) -> tuple[str, ...]:
    wanted = tuple(dict.fromkeys(by))
    unknown = [name for name in wanted if name not in GROUPS]
    if unknown:
        raise InputError(
            f"by: expected some of {', '.join(GROUPS)}, got {unknown[0][:40]!r}", hint="for example tenant,model"
        )
    return wanted


def _row(by: tuple[str, ...], group: tuple[Any, ...], counts: Counts) -> Any:
    named = dict(zip(by, group, strict=True))
    if "hour" in named:
        named["hour"] = Timestamp(seconds=named["hour"])
    told = {name: getattr(counts, name) for name in Counts.__dataclass_fields__}
    return usage_pb2.UsageRow(**named, **told)


def _compute_row(model: str, version: int, sums: Sums) -> Any:
    told = asdict(sums)
    del told["last_ms"]
    return usage_pb2.ComputeRow(model=model, heavy_version=version, **told)


def _scope(message: Any) -> Scope:
    for name in ("tenant", "device", "model"):
        value = getattr(message, name)
        if len(value) > _MAX_NAME or not value.isprintable():
            raise InputError(f"{name}: expected at most {_MAX_NAME} printable characters, got {value[:40]!r}")
    if not message.tenant:
        raise InputError("tenant: expected a tenant's name, or * for each")
    return Scope(message.tenant, message.device, message.model)


def _limits(message: Any) -> Limits:
    return Limits(
        rate=parse_rate(message.rate) if message.rate else None,
        burst=message.burst if message.HasField("burst") else None,
        bytes_rate=parse_rate(message.bytes_rate, sizes=True) if message.bytes_rate else None,
        bytes_burst=message.bytes_burst if message.HasField("bytes_burst") else None,
        concurrency=message.concurrency if message.HasField("concurrency") else None,
    )


def _scope_message(scope: Scope) -> Any:
    return usage_pb2.QuotaScope(tenant=scope.tenant, device=scope.device, model=scope.model)


def _limits_message(limits: Limits) -> Any:
    return usage_pb2.QuotaLimits(
        rate=limits.rate.text if limits.rate else "",
        burst=limits.burst,
        bytes_rate=limits.bytes_rate.text if limits.bytes_rate else "",
        bytes_burst=limits.bytes_burst,
        concurrency=limits.concurrency,
    )
