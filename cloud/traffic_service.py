"""The door for traffic: what operators ask for, and how things stand. `cloud.traffic_desk` decides."""

from __future__ import annotations

from typing import Any, Final

from cloud.catalog import Catalog
from cloud.counters import ANSWERED, GatewayCounters
from cloud.replicas import Replica, Replicas
from cloud.traffic_desk import TrafficDesk
from isthmus.errors import PermissionDeniedError
from isthmus.v1 import traffic_pb2, traffic_pb2_grpc
from security.interceptors import check_all_models, current_claims
from security.tenancy import DEFAULT_TENANT

_MOST_WAIT_S: Final = 600


class TrafficService(traffic_pb2_grpc.TrafficServiceServicer):
    """Weighted versions and replicas."""

    def __init__(self, desk: TrafficDesk, catalog: Catalog, replicas: Replicas, counters: GatewayCounters) -> None:
        self._desk, self._catalog, self._replicas, self._counters = desk, catalog, replicas, counters

    async def SetTraffic(self, request: Any, context: Any) -> Any:  # noqa: N802
        """Change a model's policy.

        Raises:
            InputError: It is no policy.
            NotFoundError: There is no such model or version.
            ConflictError: No version is released, or one was withdrawn or cannot be loaded.
        """
        del context
        self._catalog.check_may_see(current_claims(), request.model)
        return traffic_pb2.SetTrafficResponse(policy=await self._desk.change(request, current_claims().subject))

    async def RollbackTraffic(self, request: Any, context: Any) -> Any:  # noqa: N802
        """End split and shadow of a model at once.

        Raises:
            NotFoundError: There is no such model.
        """
        del context
        self._catalog.check_may_see(current_claims(), request.model)
        policy = await self._desk.roll_back(request.model, current_claims().subject)
        released = self._catalog.released(request.model) or 0
        return traffic_pb2.RollbackTrafficResponse(policy=policy, released=released)

    async def ListTraffic(self, request: Any, context: Any) -> Any:  # noqa: N802
        """Tell policies and counters.

        Raises:
            NotFoundError: There is no such model.
        """
        del context
        if request.model:
            self._catalog.check_may_see(current_claims(), request.model)
        claims, policies = current_claims(), self._desk.policies()
        models = [model for model in policies if request.model in ("", model) and self._catalog.may_see(claims, model)]
        return traffic_pb2.ListTrafficResponse(reports=[self._report(model, policies[model]) for model in models])

    def _report(self, model: str, policy: Any) -> Any:
        counted = self._counters.of(model)
        rows: dict[tuple[int, str], Any] = {}
        for (version, assignment, outcome), count in sorted(counted.outcomes.items()):
            row = rows.setdefault(
                (version, assignment), traffic_pb2.VersionCount(version=version, assignment=assignment or "released")
            )
            if outcome == ANSWERED:
                row.answered += count
            else:
                row.failed += count
        shadow = counted.shadow
        return traffic_pb2.TrafficReport(
            policy=policy,
            released=self._catalog.released(model) or 0,
            versions=rows.values(),
            shadow=traffic_pb2.ShadowCount(
                agreed=shadow.agreed, disagreed=shadow.disagreed, failed=shadow.failed, dropped=shadow.dropped
            ),
            cache_hits=counted.cache_hits,
            cache_misses=counted.cache_misses,
        )

    async def ListReplicas(self, request: Any, context: Any) -> Any:  # noqa: N802
        """Tell the Tritons of this cloud.

        Raises:
            PermissionDeniedError: The caller is one tenant's only.
        """
        del request, context
        _check_whole_cloud()
        return traffic_pb2.ListReplicasResponse(replicas=[self._replica(replica) for replica in self._replicas])

    async def DrainReplica(self, request: Any, context: Any) -> Any:  # noqa: N802
        """Send a Triton no new requests, and wait for those that it has.

        Raises:
            NotFoundError: There is none of that name.
            ConflictError: No other one serves.
            PermissionDeniedError: The caller is one tenant's only.
        """
        del context
        _check_whole_cloud()
        wait_s = min(request.wait_s, _MOST_WAIT_S)
        return traffic_pb2.DrainReplicaResponse(replica=self._replica(await self._desk.drain(request.name, wait_s)))

    async def ResumeReplica(self, request: Any, context: Any) -> Any:  # noqa: N802
        """Let a drained Triton serve again.

        Raises:
            NotFoundError: There is none of that name.
            PermissionDeniedError: The caller is one tenant's only.
        """
        del context
        _check_whole_cloud()
        return traffic_pb2.ResumeReplicaResponse(replica=self._replica(await self._desk.resume(request.name)))

    def _replica(self, replica: Replica) -> Any:
        """Return a Triton with the caller's models on it."""
        claims = current_claims()
        return traffic_pb2.Replica(
            name=replica.name,
            state=replica.state,
            under_way=replica.under_way,
            requests=replica.requests,
            retries=replica.retries,
            ejections=replica.ejections,
            models=[
                heavy.name
                for heavy in replica.pool.loaded
                if replica.pool.serves(heavy) and self._catalog.may_see(claims, heavy.model)
            ],
        )


def _check_whole_cloud() -> None:
    """Check that the caller may act on what all tenants share.

    Raises:
        PermissionDeniedError: It may not: it is of another tenant, or for some models only.
    """
    if check_all_models("Tritons serve all models").tenant != DEFAULT_TENANT:
        raise PermissionDeniedError(
            "Tritons serve all tenants: the default tenant looks after them", reason="wrong-tenant"
        )
