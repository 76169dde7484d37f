"""The Open Inference Protocol for devices and clients: who may ask for what, and on to Triton.

Rules:
1. A request's tensors are never decoded or encoded again: its head is read (isthmus.oip_head), the bytes that came go
   on with a few appended that name the heavy model (isthmus.oip.override_fields), and a few bytes appended to the
   answer name the version back.
2. A model that the caller may not use looks exactly like one that does not exist.
3. A request lives no longer than its caller waits; with Triton down it fails in milliseconds.
4. Which version answers a request that names none is the traffic desk's decision (cloud.traffic_desk).
Methods that are not here are UNIMPLEMENTED: what changes Triton's state is the registry's business alone.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Final

import grpc
import structlog

from cloud.admission import Admission
from cloud.catalog import Catalog
from cloud.counters import ANSWERED, GatewayCounters
from cloud.heavy import HeavyId
from cloud.metering import Call, Meter
from cloud.recorder import Recorder
from cloud.replicas import Replicas
from cloud.request_names import check_names
from cloud.response_cache import ResponseCache, cache_key
from cloud.shadow import Shadows
from cloud.traffic import Shadow
from cloud.traffic_desk import Route, TrafficDesk
from cloud.triton import FAILED
from cloud.unsealer import Unsealer
from isthmus import __version__
from isthmus.errors import InputError, IsthmusError, NotFoundError, QuotaError
from isthmus.oip import SERVICE, service_pb2, set_parameter
from isthmus.oip_head import RequestHead, read_head
from isthmus.sealed import SEALED
from security.interceptors import current_claims
from security.tokens import Claims

SERVER_NAME: Final = "isthmus-gateway"
_REQUEST_ID: Final = "x-request-id"
_MAX_ID: Final = 128
_LONGEST_S: Final = 3600.0
_TIMEOUT: Final = "timeout"
_EMPTY_ID: Final = b"\x1a\x00"  # the field id without a value: the serializer would leave it out
_Context = Any  # grpc.aio.ServicerContext, whose type arguments the generic handlers leave open

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Inference:
    """What answers inference requests, beside the Tritons."""

    desk: TrafficDesk
    shadows: Shadows
    cache: ResponseCache
    counters: GatewayCounters
    admission: Admission
    meter: Meter


class Gateway:
    """Answers the Open Inference Protocol from the Tritons.

    Args:
        catalog: Which versions exist and where they are served.
        replicas: The Tritons with the heavy models.
        inference: What chooses versions, compares, keeps and counts answers.
        default_deadline_s: For requests that come without a deadline.
        recorder: Hears of answered requests.
        unsealer: Opens sealed inputs; None refuses them.
    """

    def __init__(
        self,
        catalog: Catalog,
        replicas: Replicas,
        inference: Inference,
        *,
        default_deadline_s: float = 30.0,
        recorder: Recorder | None = None,
        unsealer: Unsealer | None = None,
    ) -> None:
        self._catalog, self._replicas = catalog, replicas
        self._desk, self._shadows = inference.desk, inference.shadows
        self._cache, self._counters = inference.cache, inference.counters
        self._admission, self._meter = inference.admission, inference.meter
        self._recorder, self._unsealer = recorder or Recorder(), unsealer
        self._default_deadline_s = default_deadline_s

    def handler(self) -> grpc.GenericRpcHandler:
        """Return the service for a server; ModelInfer gets and gives raw bytes."""
        methods: dict[str, Callable[[Any, _Context], Awaitable[Any]]] = {
            "ServerLive": self.server_live,
            "ServerReady": self.server_ready,
            "ServerMetadata": self.server_metadata,
            "ModelReady": self.model_ready,
            "ModelMetadata": self.model_metadata,
            "ModelStatistics": self.model_statistics,
        }
        handlers: dict[str, Any] = {
            name: grpc.unary_unary_rpc_method_handler(
                behaviour, getattr(service_pb2, f"{name}Request").FromString, _serialize
            )
            for name, behaviour in methods.items()
        }
        handlers["ModelInfer"] = grpc.unary_unary_rpc_method_handler(self.model_infer)
        return grpc.method_handlers_generic_handler(SERVICE, handlers)

    async def model_infer(self, raw: bytes, context: _Context) -> bytes:
        """Answer one inference request, and count it, whatever becomes of it.

        Raises:
            QuotaError: The caller, its tenant or the model has had its share for now.
            InputError: The request is not a ModelInferRequest, or Triton refuses its tensors.
            NotFoundError: There is no such model or version for this caller.
            UnavailableError: The heavy model cannot answer now.
        """
        claims = current_claims()
        with self._meter.call(claims, len(raw)) as call:
            head = read_head(raw)
            self._catalog.check_may_see(claims, head.model_name)
            route = self._desk.route(head, claims.subject)
            call.resolved(head.model_name, route.version)
            return await self._counted(raw, head, route, call, context)

    async def _counted(self, raw: bytes, head: RequestHead, route: Route, call: Call, context: _Context) -> bytes:
        """Answer, and count what became of it by version and assignment."""
        started, claims = time.perf_counter(), call.claims
        counters = self._counters.of(head.model_name)
        outcome = "internal"
        try:
            async with self._admission.admit(claims, head.model_name, len(raw)):
                answer = await self._answer(raw, head, route, call, context)
            outcome = ANSWERED
        except IsthmusError as error:
            outcome = error.reason
            # A caller beyond its quota must not fill the log, too; it is counted.
            level = "debug" if isinstance(error, QuotaError) else "info"
            getattr(log, level)(
                "inference failed", request_id=_request_id(head.id, context), subject=claims.subject,
                heavy=route.heavy.name, reason=error.reason, bytes=len(raw),
            )  # fmt: skip
            raise
        except asyncio.CancelledError:
            outcome = "cancelled"
            raise
        finally:
            counters.outcomes[route.version, route.assignment, outcome] += 1
        counters.latency.note(time.perf_counter() - started)
        if self._recorder.draws():
            sealed = SEALED in head.parameters()
            self._recorder.answered(head.model_name, route.version, head.id, sealed=sealed, context=context)
        return answer

    async def _answer(self, raw: bytes, head: RequestHead, route: Route, call: Call, context: _Context) -> bytes:
        """Return what was answered before, or what a Triton answers; the names and versions are the caller's."""
        counters, policy, tenant = self._counters.of(head.model_name), route.policy, call.claims.tenant
        suffix = _suffix(head.model_name, route.version, route.assignment)
        parameters = head.parameters()
        sealed = SEALED in parameters
        key = cache_key(tenant, route.heavy, head) if policy.cache_s and not sealed else None
        if key is not None:
            kept = await self._cache.get(tenant, key)
            if kept is not None:
                counters.cache_hits += 1
                whole = b"".join((kept, suffix, _cached(head.id)))
                call.cached(len(whole))
                return whole
            counters.cache_misses += 1
        timeout_s = self._time_left(parameters.get(_TIMEOUT), context)
        # Opened here and nowhere before: what is cached, logged or kept on the way is the envelope.
        plain = self._opened(raw, call.claims) if sealed else raw
        call.sent()
        try:
            answer = await self._replicas.infer(route.heavy, plain, timeout_s=timeout_s)
        except IsthmusError as error:
            if error.reason == FAILED:  # or was it the request, and Triton could not say so?
                check_names(service_pb2.ModelInferRequest.FromString(plain))
            raise
        call.answered(len(answer) + len(suffix))
        if key is not None:
            await self._cache.put(tenant, key, answer, policy.cache_s)
        if policy.shadow is not None:
            self._copy(policy.shadow, head.model_name, route, plain, answer)
        return answer + suffix

    def _opened(self, raw: bytes, claims: Claims) -> bytes:
        if self._unsealer is None:
            raise InputError(f"{SEALED}: sealed inputs are not opened here", reason="sealed-unknown-key")
        return self._unsealer.open(service_pb2.ModelInferRequest.FromString(raw), claims)

    def _copy(self, shadow: Shadow, model: str, route: Route, raw: bytes, answer: bytes) -> None:
        heavy = self._catalog.heavy(model, shadow.version)
        if heavy != route.heavy:
            self._shadows.offer(shadow, heavy, raw, answer, self._counters.of(model).shadow)

    def _resolve(self, claims: Claims, model: str, version: str) -> tuple[int, HeavyId]:
        self._catalog.check_may_see(claims, model)
        return self._catalog.resolve(model, version)

    def _time_left(self, asked: str | bool | float | None, context: _Context) -> float:
        """Return the least of the call's deadline and the request parameter `timeout`, which is in microseconds."""
        left = context.time_remaining()
        left_s = self._default_deadline_s if left is None else min(float(left), _LONGEST_S)
        return left_s if isinstance(asked, str) or not asked or asked < 0 else min(left_s, asked / 1e6)

    async def server_live(self, _request: Any, _context: _Context) -> Any:
        """Say that the gateway runs."""
        return service_pb2.ServerLiveResponse(live=True)

    async def server_ready(self, _request: Any, _context: _Context) -> Any:
        """Say whether a Triton answers and has its models."""
        return service_pb2.ServerReadyResponse(ready=self._replicas.is_up)

    async def server_metadata(self, _request: Any, _context: _Context) -> Any:
        """Name the gateway and the Triton behind it.

        Raises:
            UnavailableError: Triton does not answer.
        """
        extensions = ["model_configuration", "statistics", f"triton:{await self._replicas.server_version()}"]
        return service_pb2.ServerMetadataResponse(name=SERVER_NAME, version=__version__, extensions=extensions)

    async def model_ready(self, request: Any, _context: _Context) -> Any:
        """Say whether the heavy half of a model version answers; an unknown one is not ready."""
        try:
            _, heavy = self._resolve(current_claims(), request.name, request.version)
        except NotFoundError:
            return service_pb2.ModelReadyResponse(ready=False)
        return service_pb2.ModelReadyResponse(ready=await self._replicas.is_ready(heavy))

    async def model_metadata(self, request: Any, _context: _Context) -> Any:
        """Describe a model's inputs and outputs, under the name and versions that callers know.

        Raises:
            NotFoundError: There is no such model or version for this caller.
            UnavailableError: Triton does not answer.
        """
        _, heavy = self._resolve(current_claims(), request.name, request.version)
        answer = await self._replicas.metadata(heavy)
        answer.name = request.name
        answer.versions[:] = [str(version) for version in self._catalog.versions(request.name)]
        return answer

    async def model_statistics(self, request: Any, _context: _Context) -> Any:
        """Return Triton's counters of the loaded heavy versions that the caller may use.

        Raises:
            NotFoundError: The model that was asked for does not exist for this caller.
            UnavailableError: Triton does not answer.
        """
        claims = current_claims()
        if request.name:
            self._catalog.check_may_see(claims, request.name)
        known = {heavy.name: heavy for heavy in self._replicas.loaded}
        answer = service_pb2.ModelStatisticsResponse()
        for statistics in await self._replicas.statistics():
            heavy = known.get(statistics.name)
            if heavy is None or not self._catalog.may_see(claims, heavy.model) or request.name not in ("", heavy.model):
                continue
            statistics.name, statistics.version = heavy.model, str(heavy.version)
            if request.version in ("", statistics.version):
                answer.model_stats.append(statistics)
        return answer


def _serialize(message: Any) -> bytes:
    return bytes(message.SerializeToString())


@lru_cache(maxsize=256)
def _suffix(model: str, version: int, assignment: str) -> bytes:
    """Return the bytes that, appended to an answer, set its model name, version and parameters."""
    extra = service_pb2.ModelInferResponse(model_name=model, model_version=str(version))
    set_parameter(extra, "isthmus.cloud_version", version)
    if assignment:
        set_parameter(extra, "isthmus.assignment", assignment)
    return _serialize(extra)


def _cached(request_id: str) -> bytes:
    """Return the bytes that make a kept answer one to another request: its id, which may be empty, and a mark."""
    extra = service_pb2.ModelInferResponse(id=request_id)
    set_parameter(extra, "isthmus.cached", value=True)
    return _serialize(extra) if request_id else _EMPTY_ID + _serialize(extra)


def _request_id(given: str, context: _Context) -> str:
    if given:
        return given[:_MAX_ID]
    metadata = context.invocation_metadata() or ()
    return next((str(value)[:_MAX_ID] for key, value in metadata if key == _REQUEST_ID), uuid.uuid4().hex)
