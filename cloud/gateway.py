"""The Open Inference Protocol for devices and clients: who may ask for what, and on to Triton.

Rules:
1. A request's tensors are never decoded or encoded again: the bytes that came go on, with a few bytes appended that
   name the heavy model (isthmus.oip.override_fields); a few bytes appended to the answer name the version back.
2. A model that the caller may not use looks exactly like one that does not exist.
3. A request lives no longer than its caller waits; with Triton down it fails in milliseconds.
Methods that are not here are UNIMPLEMENTED: what changes Triton's state is the registry's business alone.
"""

from __future__ import annotations

import uuid
from collections.abc import Awaitable, Callable
from typing import Any, Final

import grpc
import structlog
from google.protobuf.message import DecodeError

from cloud.catalog import Catalog, unknown_model
from cloud.heavy import HeavyId, HeavyPool
from cloud.request_names import check_names
from cloud.triton import TritonClient
from isthmus import __version__
from isthmus.errors import InputError, IsthmusError, NotFoundError
from isthmus.oip import SERVICE, service_pb2, set_parameter
from security.interceptors import current_claims
from security.tokens import Claims

SERVER_NAME: Final = "isthmus-gateway"
_REQUEST_ID: Final = "x-request-id"
_MAX_ID: Final = 128
_Context = Any  # grpc.aio.ServicerContext, whose type arguments the generic handlers leave open

log = structlog.get_logger(__name__)


class Gateway:
    """Answers the Open Inference Protocol from one Triton.

    Args:
        catalog: Which versions exist and where they are served.
        pool: The loaded heavy models.
        client: Triton, for what is asked of the server as a whole.
        default_deadline_s: For requests that come without a deadline.
    """

    def __init__(
        self, catalog: Catalog, pool: HeavyPool, client: TritonClient, *, default_deadline_s: float = 30.0
    ) -> None:
        self._catalog, self._pool, self._client = catalog, pool, client
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
        """Answer one inference request.

        Raises:
            InputError: The request is not a ModelInferRequest, or Triton refuses its tensors.
            NotFoundError: There is no such model or version for this caller.
            UnavailableError: The heavy model cannot answer now.
        """
        try:
            request = service_pb2.ModelInferRequest.FromString(raw)
        except DecodeError as error:
            raise InputError("the message is not a ModelInferRequest") from error
        check_names(request)
        request_id = _request_id(request.id, context)
        claims = current_claims()
        version, heavy = self._resolve(claims, request.model_name, request.model_version)
        try:
            answer = await self._pool.infer(heavy, raw, timeout_s=self._time_left(context))
        except IsthmusError as error:
            log.info(
                "inference failed", request_id=request_id, subject=claims.subject, heavy=heavy.name,
                reason=error.reason, bytes=len(raw),
            )  # fmt: skip
            raise
        log.debug("inference", request_id=request_id, subject=claims.subject, heavy=heavy.name, bytes=len(raw))
        return answer + _suffix(request.model_name, version)

    def _resolve(self, claims: Claims, model: str, version: str) -> tuple[int, HeavyId]:
        if not claims.may_use(model):
            raise unknown_model(model)
        return self._catalog.resolve(model, version)

    def _time_left(self, context: _Context) -> float:
        left = context.time_remaining()
        return self._default_deadline_s if left is None else min(float(left), 3600.0)

    async def server_live(self, _request: Any, _context: _Context) -> Any:
        """Say that the gateway runs."""
        return service_pb2.ServerLiveResponse(live=True)

    async def server_ready(self, _request: Any, _context: _Context) -> Any:
        """Say whether Triton answers and has its models."""
        return service_pb2.ServerReadyResponse(ready=await self._pool.is_up())

    async def server_metadata(self, _request: Any, _context: _Context) -> Any:
        """Name the gateway and the Triton behind it.

        Raises:
            UnavailableError: Triton does not answer.
        """
        extensions = ["model_configuration", "statistics", f"triton:{await self._client.server_version()}"]
        return service_pb2.ServerMetadataResponse(name=SERVER_NAME, version=__version__, extensions=extensions)

    async def model_ready(self, request: Any, _context: _Context) -> Any:
        """Say whether the heavy half of a model version answers; an unknown one is not ready."""
        try:
            _, heavy = self._resolve(current_claims(), request.name, request.version)
        except NotFoundError:
            return service_pb2.ModelReadyResponse(ready=False)
        return service_pb2.ModelReadyResponse(ready=await self._pool.is_ready(heavy))

    async def model_metadata(self, request: Any, _context: _Context) -> Any:
        """Describe a model's inputs and outputs, under the name and versions that callers know.

        Raises:
            NotFoundError: There is no such model or version for this caller.
            UnavailableError: Triton does not answer.
        """
        _, heavy = self._resolve(current_claims(), request.name, request.version)
        answer = await self._pool.metadata(heavy)
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
        if request.name and not (claims.may_use(request.name) and request.name in self._catalog.models):
            raise unknown_model(request.name)
        known = {heavy.name: heavy for heavy in self._pool.loaded}
        answer = service_pb2.ModelStatisticsResponse()
        for statistics in await self._client.statistics():
            heavy = known.get(statistics.name)
            if heavy is None or not claims.may_use(heavy.model) or request.name not in ("", heavy.model):
                continue
            statistics.name, statistics.version = heavy.model, str(heavy.version)
            if request.version in ("", statistics.version):
                answer.model_stats.append(statistics)
        return answer


def _serialize(message: Any) -> bytes:
    return bytes(message.SerializeToString())


def _suffix(model: str, version: int) -> bytes:
    """Return the bytes that, appended to an answer, set its model name, version and one parameter."""
    extra = service_pb2.ModelInferResponse(model_name=model, model_version=str(version))
    set_parameter(extra, "isthmus.cloud_version", version)
    return _serialize(extra)


def _request_id(given: str, context: _Context) -> str:
    if given:
        return given[:_MAX_ID]
    metadata = context.invocation_metadata() or ()
    return next((str(value)[:_MAX_ID] for key, value in metadata if key == _REQUEST_ID), uuid.uuid4().hex)
