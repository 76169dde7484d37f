"""The client of Triton: the only file that speaks to it, over the Open Inference Protocol.

Rules:
1. Only `wait_until_live` waits for a connection: a Triton that is down is UnavailableError in milliseconds.
2. Inference requests and answers pass as the bytes they are; nothing here decodes a tensor on the request path.
3. Every call has a deadline: a load whose stub cannot start would hang for ever.
4. Triton's error texts reach callers only where they describe the caller's tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import grpc
import structlog
from google.protobuf import json_format, text_format
from google.protobuf.message import DecodeError

from cloud.unary_call import CallError
from cloud.unary_channel import UnaryChannel
from isthmus.errors import BundleError, ConfigError, InputError, IsthmusError, UnavailableError
from isthmus.oip import MODEL_INFER, SERVICE, model_config_pb2, service_pb2, service_pb2_grpc
from isthmus.status import TOO_LATE
from security.tls import channel_credentials

CONFIG: Final = "config.pbtxt"
CONTROL_S: Final = 5.0  # deadline of calls that neither infer nor load
FAILED: Final = "heavy-failed"
_DEAD_STUB: Final = "is not healthy"
_BUSY: Final = "Exceeds maximum queue size"
_NOT_TAKEN: Final = ("stopped accepting new inference requests", "has no available versions", "Server not ready")
_SERVER_LIVE: Final = f"/{SERVICE}/ServerLive"
_MOST_BYTES: Final = 1 << 30  # of an answer
LOST: Final = "triton-unavailable"  # the reason of errors of the connection, not of an answer
_OPTIONS: Final = (
    # A restarted Triton is found again within half a second, not after gRPC's default back-off of up to two minutes.
    ("grpc.initial_reconnect_backoff_ms", 50),
    ("grpc.min_reconnect_backoff_ms", 50),
    ("grpc.max_reconnect_backoff_ms", 500),
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.max_receive_message_length", _MOST_BYTES),
    ("grpc.max_send_message_length", -1),  # a model pushed to an external Triton is one message
)

log = structlog.get_logger(__name__)


class DeadStubError(UnavailableError):
    """The process that runs a model is gone; Triton does not restart it, an unload and a load do."""

    reason = FAILED


class NotAcceptedError(UnavailableError):
    """Triton has not taken the request: it did not run, and may be tried elsewhere."""


class TritonClient:
    """Connections to one Triton server: one for inference, one for the rest."""

    def __init__(self, address: str, *, ca: Path | None = None) -> None:
        self.address = address
        if ca is None:
            self._channel = grpc.aio.insecure_channel(address, options=_OPTIONS)
        else:
            credentials = channel_credentials(ca)
            self._channel = grpc.aio.secure_channel(address, credentials, options=_OPTIONS)
        self._stub: Any = service_pb2_grpc.GRPCInferenceServiceStub(self._channel)
        # Inference has a connection of its own that the event loop reads and writes itself.
        self._inference = UnaryChannel(address, ca=ca, most_bytes=_MOST_BYTES)

    async def close(self) -> None:
        """Close the connection; calls that run are cancelled."""
        await self._inference.close()
        await self._channel.close()

    async def infer(self, request: bytes, *, timeout_s: float) -> bytes:
        """Return the serialized answer to a serialized ModelInferRequest.

        Raises:
            InputError: Triton refused the tensors.
            DeadStubError: The model's process is dead.
            NotAcceptedError: It has not run: Triton is down, the model is not loaded, or its queue is full.
            UnavailableError: The connection broke while it may have run, or time ran out.
            IsthmusError: The model itself failed on this request.
        """
        try:
            return await self._inference.call(MODEL_INFER, request, timeout_s=timeout_s)
        except CallError as error:
            if error.unsent:
                raise NotAcceptedError("the heavy model is not available now", reason=LOST) from error
            raise _inference_error(error.code, error.details) from error

    async def is_live(self) -> bool:
        """Return whether Triton answers, on the connection for inference."""
        try:
            answer = await self._inference.call(_SERVER_LIVE, b"", timeout_s=CONTROL_S)
            return bool(service_pb2.ServerLiveResponse.FromString(answer).live)
        except (CallError, DecodeError):
            return False

    async def wait_until_live(self, timeout_s: float) -> None:
        """Wait until Triton answers on these very connections.

        Calls that failed while Triton was down have made a connection pause before its next attempt. Until then it
        refuses everything, although a new connection would be answered.

        Raises:
            UnavailableError: It does not answer in time.
        """
        try:
            await self._stub.ServerLive(service_pb2.ServerLiveRequest(), timeout=timeout_s, wait_for_ready=True)
            await self._inference.wait_until_connected(timeout_s)
        except (grpc.aio.AioRpcError, TimeoutError) as error:
            raise UnavailableError("Triton does not answer", reason="triton-unavailable") from error

    async def is_ready(self, name: str) -> bool:
        """Return whether Triton says that the model is ready (it says so of a model with a dead stub, too)."""
        try:
            answer = await self._stub.ModelReady(service_pb2.ModelReadyRequest(name=name), timeout=CONTROL_S)
        except grpc.aio.AioRpcError:
            return False
        return bool(answer.ready)

    async def server_version(self) -> str:
        """Return Triton's version.

        Raises:
            UnavailableError: It does not answer.
        """
        answer = await self._control("ask Triton's version", "ServerMetadata", service_pb2.ServerMetadataRequest())
        return str(answer.version)

    async def metadata(self, name: str) -> Any:
        """Return the model's ModelMetadataResponse.

        Raises:
            UnavailableError: Triton is down or the model is not loaded.
        """
        return await self._control(f"describe {name}", "ModelMetadata", service_pb2.ModelMetadataRequest(name=name))

    async def statistics(self) -> list[Any]:
        """Return the ModelStatistics messages of all loaded models.

        Raises:
            UnavailableError: Triton does not answer.
        """
        answer = await self._control("read statistics", "ModelStatistics", service_pb2.ModelStatisticsRequest())
        return list(answer.model_stats)

    async def load(self, name: str, config: str, *, files: Mapping[str, bytes] | None = None, timeout_s: float) -> None:
        """Load a model, or load it again when its configuration differs.

        Args:
            name: Triton's name for the model.
            config: Its configuration as JSON.
            files: Path below the model folder to content, for a Triton that does not share our disk.
            timeout_s: How long it may take.

        Raises:
            BundleError: Triton cannot load the model; the message says why.
            UnavailableError: Triton is down, or the load did not end in time.
        """
        request = service_pb2.RepositoryModelLoadRequest(model_name=name)
        request.parameters["config"].string_param = config
        for path, data in (files or {}).items():
            request.parameters[f"file:{path}"].bytes_param = data
        try:
            await self._stub.RepositoryModelLoad(request, timeout=timeout_s)
        except grpc.aio.AioRpcError as error:
            if error.code() in (grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.UNAVAILABLE):
                log.warning("Triton did not load a model", heavy=name, code=error.code().name, detail=error.details())
                raise UnavailableError(
                    f"Triton did not load {name} within {timeout_s:g} s, or is down", reason="triton-unavailable"
                ) from error
            raise BundleError(f"Triton cannot load {name}: {error.details()}", reason="heavy-not-loadable") from error

    async def unload(self, name: str) -> None:
        """Unload a model; requests that run finish first.

        Raises:
            UnavailableError: Triton does not answer.
        """
        request = service_pb2.RepositoryModelUnloadRequest(model_name=name)
        await self._control(f"unload {name}", "RepositoryModelUnload", request)

    async def _control(self, what: str, method: str, request: Any) -> Any:
        try:
            return await getattr(self._stub, method)(request, timeout=CONTROL_S)
        except grpc.aio.AioRpcError as error:
            # The details name our socket and Triton's own names of models: nothing for callers.
            log.info("Triton refused a call", method=method, code=error.code().name, detail=error.details())
            raise UnavailableError(f"cannot {what}: Triton does not answer", reason="triton-unavailable") from error


def _inference_error(code: grpc.StatusCode, detail: str) -> IsthmusError:
    if code is grpc.StatusCode.INVALID_ARGUMENT:
        return InputError(detail.removeprefix("[request id: <id_unknown>] "))
    if code is grpc.StatusCode.INTERNAL and _DEAD_STUB in detail:
        return DeadStubError("the heavy model's process died; it is being started again")
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return UnavailableError("the heavy model did not answer in time", reason=TOO_LATE)
    if code is grpc.StatusCode.NOT_FOUND:
        return NotAcceptedError("the heavy model is not loaded now", reason="heavy-not-loaded")
    if code is grpc.StatusCode.UNAVAILABLE:
        if _BUSY in detail:
            return NotAcceptedError("the heavy model's queue is full", reason="heavy-busy")
        if any(words in detail for words in _NOT_TAKEN):
            return NotAcceptedError("the heavy model is not loaded now", reason="heavy-not-loaded")
    if code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED):
        return UnavailableError("the heavy model is not available now", reason=LOST)
    return IsthmusError("the heavy model failed on this request", reason=FAILED)


def read_config(text: str, *, name: str, what: str) -> tuple[str, int]:
    """Return a config.pbtxt as the JSON that Triton takes, under another model name, and its number of instances.

    A dynamic batcher without a queue policy of its own gets one that limits nothing: with one, Triton drops requests
    whose callers have gone from the queue, and takes their `timeout`; without, it runs some of them all the same.

    Raises:
        BundleError: It is not a model configuration; `what` names it.
    """
    try:
        config = text_format.Parse(text, model_config_pb2.ModelConfig())
    except text_format.ParseError as error:
        raise BundleError(f"{what}: not a Triton model configuration: {error}") from error
    config.name = name
    if config.HasField("dynamic_batching") and not config.dynamic_batching.HasField("default_queue_policy"):
        config.dynamic_batching.default_queue_policy.allow_timeout_override = True
    instances = sum(max(group.count, 1) for group in config.instance_group) or 1
    return json_format.MessageToJson(config, preserving_proto_field_name=True), instances


def check_link(address: str, *, ca: Path | None, plaintext: bool) -> None:
    """Check that the way to an external Triton is allowed.

    Raises:
        ConfigError: It would carry requests in plain text over a network, and nobody said that this is meant.
    """
    host = address.rpartition(":")[0].strip("[]")
    if ca is None and not plaintext and host not in ("localhost", "127.0.0.1", "::1"):
        raise ConfigError(
            f"the link to Triton at {address} would be plain text over a network",
            hint="set triton_ca, or triton_plaintext where the network itself is private",
        )
