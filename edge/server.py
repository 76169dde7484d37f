"""The agent's gRPC listener: Open Inference Protocol, the agent's own service, health and reflection.

Handlers take the request's bytes: ModelInfer keeps them, so that escalation forwards a request as it came, and
bytes that cannot be parsed are the caller's error (INVALID_ARGUMENT) in every method. Methods that are not in the
tables answer UNIMPLEMENTED. Without TLS the listener binds loopback addresses and Unix sockets only.
"""

from __future__ import annotations

import ipaddress
import operator
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Final

import grpc
from google.protobuf.message import DecodeError
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from edge import describe
from edge.model import LiveModel, ServedModels
from edge.router import Router
from isthmus import __version__
from isthmus.address import UNIX, check_free, split_address
from isthmus.errors import ConfigError, InputError, NotFoundError, UnavailableError
from isthmus.oip import SERVICE, service_pb2
from isthmus.status import translate_errors
from isthmus.v1 import agent_pb2

AGENT_SERVICE: Final = "isthmus.v1.AgentService"

Handler = Callable[[bytes, Any], Awaitable[Any]]

_serialize: Final = operator.methodcaller("SerializeToString")


def is_local(address: str, what: str = "listen") -> bool:
    """Return whether only this machine can reach a listener at `address` (HOST:PORT or unix:PATH).

    Raises:
        ConfigError: It is no address; `what` names the option that it was given for.
    """
    if address.startswith(UNIX):
        return True
    host, _ = split_address(address, what)
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


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
    """

    def __init__(self, models: ServedModels, router: Router, *, may_use: Callable[[str], bool] = may_use_all) -> None:
        self._models = models
        self._router = router
        self._may_use = may_use

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
        }

    async def model_infer(self, raw: bytes, context: Any) -> Any:
        """Answer one inference request."""
        request = _parse(service_pb2.ModelInferRequest, raw)
        self._check_allowed(request.model_name)
        return await self._router.answer(raw, request, context.time_remaining())

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


def _parse(kind: Any, raw: bytes) -> Any:
    try:
        return kind.FromString(raw)
    except DecodeError as error:
        raise InputError(
            f"expected a serialized {kind.DESCRIPTOR.full_name}, got {len(raw)} bytes that are not one",
            reason="malformed-request",
        ) from error


def _parsed(kind: Any, method: Callable[[Any], Awaitable[Any]]) -> Handler:
    async def call(raw: bytes, context: Any) -> Any:
        del context
        return await method(_parse(kind, raw))

    return call


def _generic(service: str, methods: dict[str, Handler]) -> Any:
    handlers: dict[str, grpc.RpcMethodHandler[bytes, Any]] = {
        name: translate_errors(grpc.unary_unary_rpc_method_handler(method, response_serializer=_serialize))
        for name, method in methods.items()
    }
    return grpc.method_handlers_generic_handler(service, handlers)


class AgentServer:
    """The listener; `start` binds it, `stop` lets requests in progress finish.

    Args:
        listen: HOST:PORT or unix:PATH.
        service: Answers the inference protocol.
        status: Returns the agent's counters and versions.
        credentials: TLS; may be None for local addresses only.
        interceptors: Run before every call; they answer with statuses, not with our errors.
        concurrent_calls: Calls in progress; more are refused with RESOURCE_EXHAUSTED.
        message_bytes: Largest message.
    """

    def __init__(
        self,
        listen: str,
        service: InferenceService,
        status: Callable[[], agent_pb2.GetStatusResponse],
        *,
        credentials: grpc.ServerCredentials | None = None,
        interceptors: Sequence[grpc.aio.ServerInterceptor] = (),
        concurrent_calls: int = 128,
        message_bytes: int = 64 << 20,
    ) -> None:
        if credentials is None and not is_local(listen):
            raise ConfigError(f"{listen} can be reached from other machines: expected TLS credentials, got none")
        self._listen = listen
        self._credentials = credentials
        self._health = health.aio.HealthServicer()
        self._server = grpc.aio.server(
            interceptors=tuple(interceptors),
            maximum_concurrent_rpcs=concurrent_calls,
            options=(
                ("grpc.max_receive_message_length", message_bytes),
                ("grpc.max_send_message_length", message_bytes),
                ("grpc.so_reuseport", 0),  # a second agent on the port must fail, not take half of the requests
            ),
        )

        async def get_status(request: agent_pb2.GetStatusRequest) -> agent_pb2.GetStatusResponse:
            del request
            return status()

        agent = {"GetStatus": _parsed(agent_pb2.GetStatusRequest, get_status)}
        self._server.add_generic_rpc_handlers((_generic(SERVICE, service.handlers()), _generic(AGENT_SERVICE, agent)))
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        names = (SERVICE, AGENT_SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, self._server)

    async def start(self) -> str:
        """Listen; return the address with the port that was bound.

        Raises:
            ConfigError: The address cannot be bound.
        """
        check_free(self._listen, "listen")
        try:
            if self._credentials is None:
                port = self._server.add_insecure_port(self._listen)
            else:
                port = self._server.add_secure_port(self._listen, self._credentials)
        except RuntimeError as error:  # what check_free does not see, such as the missing folder of a unix:PATH
            raise ConfigError(
                f"listen: cannot listen on {self._listen}", hint="expected HOST:PORT or unix:PATH of this machine"
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
        await self._server.stop(grace_s)
