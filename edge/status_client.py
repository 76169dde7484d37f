"""Calls to a running agent from the command line: where it is, how to be let in, and its status."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import grpc

from edge.policy import ROUTES
from isthmus.address import is_local
from isthmus.errors import IdentityError, InputError, PermissionDeniedError, UnavailableError
from isthmus.status import from_rpc
from isthmus.v1 import agent_pb2, agent_pb2_grpc
from security.tls import channel_credentials

TIMEOUT_S: Final = 5.0
IMPORT_S: Final = 3600.0  # sticks are slow, and a shadow run takes as long as requests take to come
_MINT: Final = "an operator's `isthmus token mint` makes one"
_HINTS: Final = {
    UnavailableError: "is the agent running, and is --address what it listens on? `isthmus edge run` prints it",
    IdentityError: f"expected --token-file with a token of this device's cloud; {_MINT}",
    PermissionDeniedError: f"expected a token with the scope that this method asks for; {_MINT}",
}


@dataclass(frozen=True, slots=True)
class AgentAddress:
    """A running agent and what it takes to call it; made by `find_agent`."""

    address: str
    credentials: grpc.ChannelCredentials | None
    token: str | None

    def call(self, method: Callable[[Any, tuple[tuple[str, str], ...]], Any]) -> Any:
        """Return what `method` gets from the agent's stub with this metadata.

        Raises:
            IsthmusError: The agent cannot be reached, or refuses.
        """
        if self.credentials is None:
            channel = grpc.insecure_channel(self.address)
        else:
            channel = grpc.secure_channel(self.address, self.credentials)
        metadata = () if self.token is None else (("authorization", f"Bearer {self.token}"),)
        with channel:
            try:
                return method(agent_pb2_grpc.AgentServiceStub(channel), metadata)
            except grpc.RpcError as error:
                raise from_rpc(error, f"agent at {self.address}", hints=_HINTS) from error


def find_agent(address: str, *, ca: Path | None = None, token_file: Path | None = None) -> AgentAddress:
    """Return how to call the agent at `address`.

    Args:
        address: HOST:PORT or unix:PATH.
        ca: CA of an agent that listens with TLS; None for one on this machine.
        token_file: Holds the access token that such an agent wants.

    Raises:
        InputError: The agent is on another machine and `ca` is missing, or the token file holds no token.
        ConfigError: `address` is none, or a file cannot be read.
    """
    if not is_local(address, "--address") and ca is None:
        raise InputError(
            f"{address} is another machine: expected --ca and --token-file, got none",
            hint="--ca is trust/ca.pem of the agent's folder; an operator's `isthmus token mint` makes a token",
            reason="tls-required",
        )
    token = None if token_file is None else _read_token(token_file)
    return AgentAddress(address, None if ca is None else channel_credentials(ca), token)


def fetch_status(address: str, *, ca: Path | None = None, token_file: Path | None = None) -> dict[str, Any]:
    """Return GetStatus of the agent at `address` as plain values.

    Raises:
        InputError, ConfigError: As `find_agent` does.
        UnavailableError: No agent answers.
    """
    agent = find_agent(address, ca=ca, token_file=token_file)
    request = agent_pb2.GetStatusRequest()
    return _plain(agent.call(lambda stub, metadata: stub.GetStatus(request, timeout=TIMEOUT_S, metadata=metadata)))


def _read_token(path: Path) -> str:
    try:
        token = path.read_text(encoding="ascii").strip()
    except UnicodeDecodeError:
        token = ""
    if not token or len(token.split()) != 1:
        raise InputError(f"--token-file {path}: expected one access token, got something else", hint=_MINT)
    return token


def _plain(status: agent_pb2.GetStatusResponse) -> dict[str, Any]:
    models = [
        _fields(model)
        | {
            "answers": {route: model.answers[route] for route in ROUTES},
            "last_update": _update(model),
            "trial": _fields(model.trial) if model.HasField("trial") else None,
            "audit": _fields(model.audit) if model.HasField("audit") else None,
            "measured": _measured(model.measured) if model.HasField("measured") else None,
        }
        for model in status.models
    ]
    deferred = _fields(status.deferred) if status.HasField("deferred") else None
    return {"device_id": status.device_id, "uplink": _fields(status.uplink), "deferred": deferred, "models": models}


def _measured(measured: agent_pb2.MeasuredVariant) -> dict[str, Any]:
    latency_ms = measured.latency_ms if measured.HasField("latency_ms") else None
    return _fields(measured) | {"latency_ms": latency_ms}


def _update(model: agent_pb2.ModelStatus) -> dict[str, Any] | None:
    if not model.HasField("last_update"):
        return None
    return _fields(model.last_update) | {"files": [_fields(file) for file in model.last_update.files]}


def _fields(message: Any) -> dict[str, Any]:
    # Scalars only: json_format would turn 64-bit counters into strings.
    scalars = (field for field in message.DESCRIPTOR.fields if field.message_type is None)
    return {field.name: getattr(message, field.name) for field in scalars}


def import_version(agent: AgentAddress, path: Path, *, accept_stale: bool) -> dict[str, Any]:
    """Have a running agent install a version that was carried to its machine; return what became of it.

    Raises:
        IsthmusError: The agent cannot be reached, or cannot read it.
    """
    request = agent_pb2.ImportVersionRequest(path=str(path.absolute()), accept_stale=accept_stale)
    answer = agent.call(lambda stub, metadata: stub.ImportVersion(request, metadata=metadata, timeout=IMPORT_S))
    return {
        "model": answer.model,
        "version": answer.version,
        "variant": answer.variant,
        "installed": answer.installed,
        "reason": answer.reason,
        "detail": answer.detail,
        "bytes_read": answer.bytes_read,
        "bytes_full": answer.bytes_full,
    }
