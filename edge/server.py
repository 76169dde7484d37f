"""The agent's gRPC listener: Open Inference Protocol, the agent's own service, health and reflection.

Handlers take the request's bytes: ModelInfer keeps them, so that escalation forwards a request as it came, and
bytes that cannot be parsed are the caller's error (INVALID_ARGUMENT) in every method. Methods that are not in the
tables answer UNIMPLEMENTED. Without TLS the listener binds loopback addresses and Unix sockets only.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import grpc
import structlog
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from edge import describe
from edge.messages import parse_message, serialize_message
from edge.model import LiveModel, ServedModels
from edge.offline import Imports
from edge.request import FINAL_RESPONSE_PARAMETER
from edge.router import Router
from edge.stream import answer_stream
from edge.unoffered import UNOFFERED
from isthmus import __version__
from isthmus.address import UNIX, check_free, is_local
from isthmus.errors import ConfigError, InputError, IsthmusError, NotFoundError, UnavailableError
from isthmus.oip import SERVICE, service_pb2, set_parameter
from isthmus.status import MethodInterceptor, status_of, translate_errors
from isthmus.v1 import agent_pb2
from security.limits import ListenerLimits
from security.listener import Listener

log = structlog.get_logger(__name__)

AGENT_SERVICE: Final = "isthmus.v1.AgentService"

_OWN_MACHINE: Final = ListenerLimits(age_s=0)

Handler = Callable[[bytes, Any], Awaitable[Any]]
StreamHandler = Callable[[AsyncIterator[bytes], Any], Awaitable[None]]


def may_use_all(model: str) -> bool:
    """Let every caller use every model: what holds on this machine's own addresses."""
    del model
    return True


class InferenceService:
    """`inference.GRPCInferenceService`, one method for each rpc that is answered.

    Args:
        models: What is served.
        router: Answers inference requests.
        may_use: Returns whether the caller of the current rpc may use a model; others do not exist for it.
        stream_requests: Requests of one stream in progress.
    """

    def __init__(
        self,
        models: ServedModels,
        router: Router,
        *,
        may_use: Callable[[str], bool] = may_use_all,
        stream_requests: int = 32,
    ) -> None:
        self._models = models
        self._router = router
        self._may_use = may_use
        self._stream_requests = stream_requests
        self._stopping = asyncio.Event()

    def handlers(self) -> dict[str, Handler]:
        """Return the table of methods."""
        pb = service_pb2
        return {
            "ServerLive": _parsed(pb.ServerLiveRequest, self.server_live),
            "ServerReady": _parsed(pb.ServerReadyRequest, self.server_ready),
            "ModelReady": _parsed(pb.ModelReadyRequest, self.model_ready),
            "ServerMetadata": _parsed(pb.ServerMetadataRequest, self.server_metadata),
            "ModelMetadata": _parsed(pb.ModelMetadataRequest, self.model_metadata),
            "ModelConfig": _parsed(pb.ModelConfigRequest, self.model_config),
            "ModelStatistics": _parsed(pb.ModelStatisticsRequest, self.model_statistics),
            "RepositoryIndex": _parsed(pb.RepositoryIndexRequest, self.repository_index),
            "ModelInfer": self.model_infer,
            **{method: _unoffered(instead) for method, instead in UNOFFERED.items()},
        }

    def stream_handlers(self) -> dict[str, StreamHandler]:
        """Return the table of methods that take and return streams."""
        return {"ModelStreamInfer": self.model_stream_infer}

    def stop(self) -> None:
        """End the streams after the requests that were read from them."""
        self._stopping.set()

    async def model_infer(self, raw: bytes, context: Any) -> Any:
        """Answer one inference request."""
        return await self._infer(self._read(raw), raw, context)

    async def model_stream_infer(self, requests: AsyncIterator[bytes], context: Any) -> None:
        """Answer inference requests as they come."""

        async def answer(raw: bytes) -> Any:
            request_id = ""
            try:
                request = self._read(raw)
                request_id = request.id
                response = await self._infer(request, raw, context)
            except IsthmusError as error:
                told = f"{status_of(error).name}: {error.message}"
                failed = service_pb2.ModelInferResponse(id=request_id)
                return service_pb2.ModelStreamInferResponse(error_message=told, infer_response=failed)
            except Exception:  # a defect costs this request its answer, not the others their stream
                log.exception("internal error")
                return service_pb2.ModelStreamInferResponse(
                    error_message="INTERNAL: internal error; see the agent's log"
                )
            if FINAL_RESPONSE_PARAMETER in request.parameters:
                set_parameter(response, "triton_final_response", True)
            return service_pb2.ModelStreamInferResponse(infer_response=response)

        await answer_stream(requests, answer, context.write, in_progress=self._stream_requests, stopping=self._stopping)

    async def _infer(self, request: Any, raw: bytes, context: Any) -> Any:
        return await self._router.answer(raw, request, context.time_remaining())

    def _read(self, raw: bytes) -> Any:
        try:
            request = parse_message(service_pb2.ModelInferRequest, raw)
            self._check_allowed(request.model_name)
        except InputError as error:
            self._models.unserved.failed(error, 0)
            raise
        return request

    async def server_live(self, request: Any) -> Any:
        """Say that the process answers."""
        del request
        return service_pb2.ServerLiveResponse(live=True)

    async def server_ready(self, request: Any) -> Any:
        """Say whether every model serves."""
        del request
        return service_pb2.ServerReadyResponse(ready=self._models.ready)

    async def model_ready(self, request: Any) -> Any:
        """Say whether one model serves."""
        try:
            self._find(request)
        except UnavailableError:
            return service_pb2.ModelReadyResponse(ready=False)
        return service_pb2.ModelReadyResponse(ready=True)

    async def server_metadata(self, request: Any) -> Any:
        """Name this program."""
        del request
        extensions = ("model_configuration", "statistics", "model_repository")
        return service_pb2.ServerMetadataResponse(name="isthmus-agent", version=__version__, extensions=extensions)

    async def model_metadata(self, request: Any) -> Any:
        """Describe a model's inputs and outputs."""
        return describe.metadata(self._find(request))

    async def model_config(self, request: Any) -> Any:
        """Describe a model as Triton would."""
        return describe.config(self._find(request))

    async def model_statistics(self, request: Any) -> Any:
        """Count answers, in all and by route."""
        if request.name:
            self._find(request)
        return describe.statistics(self._models, self._may_use, request.name)

    async def repository_index(self, request: Any) -> Any:
        """List the models."""
        return describe.index(self._models, self._may_use, ready_only=request.ready)

    def _find(self, request: Any) -> LiveModel:
        self._check_allowed(request.name)
        return self._models.find(request.name, request.version)

    def _check_allowed(self, name: str) -> None:
        if not self._may_use(name):
            raise NotFoundError(f"no model {name[:80]!r} for this caller", reason="unknown-model")


def _parsed(kind: Any, method: Callable[[Any], Awaitable[Any]]) -> Handler:
    async def call(raw: bytes, context: Any) -> Any:
        del context
        return await method(parse_message(kind, raw))

    return call


def _unoffered(instead: str) -> Handler:
    async def refuse(raw: bytes, context: Any) -> Any:
        del raw
        await context.abort(grpc.StatusCode.UNIMPLEMENTED, instead)

    return refuse


def _generic(
    service: str,
    methods: dict[str, Handler],
    *,
    streams: Mapping[str, StreamHandler] | None = None,
    others: Mapping[str, grpc.RpcMethodHandler[bytes, Any]] | None = None,
) -> Any:
    handlers: dict[str, grpc.RpcMethodHandler[bytes, Any]] = {
        name: grpc.unary_unary_rpc_method_handler(method, response_serializer=serialize_message)
        for name, method in methods.items()
    }
    for name, stream in (streams or {}).items():
        handler: Any = grpc.stream_stream_rpc_method_handler
        handlers[name] = handler(stream, response_serializer=serialize_message)
    every = handlers | dict(others or {})
    return grpc.method_handlers_generic_handler(
        service, {name: translate_errors(handler) for name, handler in every.items()}
    )


class AgentServer:
    """The listener; `start` binds it, `stop` lets requests in progress finish.

    Args:
        listen: HOST:PORT or unix:PATH.
        imports: Installs what was carried to this machine; None where nothing can be.
        unix_socket: One to listen on as well, in plain text; callers need tokens where those of `listen` do.
        service: Answers the inference protocol.
        status: Returns the agent's counters and versions.
        credentials: TLS; may be None for local addresses only.
        deferred: Methods of the agent's service that are about deferred requests.
        interceptors: Run before every call; they answer with statuses, not with our errors.
        concurrent_calls: Calls in progress; more are refused with RESOURCE_EXHAUSTED.
        limits: What the listener takes from whoever connects.
        message_bytes: Largest message.
    """

    def __init__(
        self,
        listen: str,
        service: InferenceService,
        status: Callable[[], agent_pb2.GetStatusResponse],
        *,
        imports: Imports | None = None,
        unix_socket: Path | None = None,
        credentials: grpc.ServerCredentials | None = None,
        deferred: Mapping[str, grpc.RpcMethodHandler[bytes, Any]] | None = None,
        interceptors: Sequence[MethodInterceptor] = (),
        concurrent_calls: int = 128,
        message_bytes: int = 64 << 20,
        limits: ListenerLimits = _OWN_MACHINE,
    ) -> None:
        if credentials is None and not is_local(listen):
            raise ConfigError(f"{listen} can be reached from other machines: expected TLS credentials, got none")
        self._listen = listen
        self._socket = None if unix_socket is None else f"{UNIX}{unix_socket}"
        self._service = service
        self._credentials = credentials
        self._health = health.aio.HealthServicer()
        self._server = Listener(
            limits, message_bytes=message_bytes, calls=concurrent_calls, interceptors=tuple(interceptors)
        )

        async def get_status(request: agent_pb2.GetStatusRequest) -> agent_pb2.GetStatusResponse:
            del request
            return status()

        async def import_version(request: agent_pb2.ImportVersionRequest) -> agent_pb2.ImportVersionResponse:
            if imports is None:
                raise NotFoundError("this agent installs nothing")
            if "\0" in request.path:
                raise InputError("path: expected the path of a stick, got one with a null character")
            outcome = await imports.install(Path(request.path), accept_stale=request.accept_stale)
            return agent_pb2.ImportVersionResponse(
                model=outcome.model,
                version=outcome.to_version,
                variant=outcome.variant,
                installed=outcome.active,
                reason=outcome.reason,
                detail=outcome.detail,
                bytes_read=outcome.bytes_fetched,
                bytes_full=outcome.bytes_full,
            )

        agent = {
            "GetStatus": _parsed(agent_pb2.GetStatusRequest, get_status),
            "ImportVersion": _parsed(agent_pb2.ImportVersionRequest, import_version),
        }
        inference = _generic(SERVICE, service.handlers(), streams=service.stream_handlers())
        self._server.add_generic_rpc_handlers((inference, _generic(AGENT_SERVICE, agent, others=deferred)))
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        names = (SERVICE, AGENT_SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, self._server)

    async def start(self) -> str:
        """Listen; return the address with the port that was bound.

        Raises:
            ConfigError: The address cannot be bound.
        """
        check_free(self._listen, "listen")
        if self._socket is not None:
            check_free(self._socket, "unix_socket")
        try:
            if self._socket is not None:
                self._server.add_insecure_port(self._socket)
            if self._credentials is None:
                port = self._server.add_insecure_port(self._listen)
            else:
                port = self._server.add_secure_port(self._listen, self._credentials)
        except RuntimeError as error:  # what check_free does not see, such as a path that is no place for a socket
            addresses = self._listen if self._socket is None else f"{self._listen} and {self._socket}"
            raise ConfigError(
                f"listen: cannot listen on {addresses}", hint="expected HOST:PORT or unix:PATH of this machine"
            ) from error
        await self.set_ready(ready=False)
        await self._server.start()
        return self._listen if self._listen.startswith(UNIX) else f"{self._listen.rpartition(':')[0]}:{port}"

    async def set_ready(self, *, ready: bool) -> None:
        """Tell health checks whether every model serves."""
        state = health_pb2.HealthCheckResponse.SERVING if ready else health_pb2.HealthCheckResponse.NOT_SERVING
        for name in ("", SERVICE):
            await self._health.set(name, state)

    async def stop(self, grace_s: float) -> None:
        """Take no new calls; give those in progress `grace_s` seconds."""
        await self._health.enter_graceful_shutdown()
        self._service.stop()
        await self._server.stop(grace_s)
