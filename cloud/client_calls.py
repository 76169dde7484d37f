"""A connection to a cloud, over TLS and with a token, and calls on it that fail with a sentence and a hint."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import grpc

from isthmus.address import split_address
from isthmus.errors import ConfigError, IsthmusError, UnavailableError
from isthmus.status import from_rpc
from security.keyfiles import read_file
from security.tenancy import TENANT_HEADER, check_tenant
from security.tls import channel_credentials

LONG_S: Final = 1800.0  # deltas and loading a large heavy model take their time
MAX_MESSAGE_BYTES: Final = 64 << 20
_TOKEN: Final = re.compile(r"[A-Za-z0-9_-]+\.[A-Za-z0-9_-]+\.[A-Za-z0-9_-]+|isk_[a-z0-9]+_[A-Za-z0-9_-]+")
_MINTING: Final = "isthmus token mint --home DIR/cloud --role operator --subject YOU --output FILE makes one"
# What gRPC says of a connection that cannot be made, and what a person can do about it.
_CONNECTION_HINTS: Final = {
    "Hostname Verification": "the cloud's certificate is not for this host; use one that was named in "
    "isthmus keys init --host",
    "CERTIFICATE_VERIFY_FAILED": "that cloud is from another workspace than the folder given as --trust, or its "
    "certificate expired",
    "Connection refused": "start it with isthmus cloud serve, or name its HOST:PORT with --cloud",
    "resolving": "name the cloud's HOST:PORT with --cloud",
    "WRONG_VERSION_NUMBER": "there is something else than a cloud at this address; name its HOST:PORT with --cloud",
    "Deadline": "the cloud did not answer in time; look at its log, or name another HOST:PORT with --cloud",
}


@dataclass(frozen=True, slots=True)
class Address:
    """Where a cloud is and what proves who we are."""

    cloud: str
    trust: Path  # folder with ca.pem
    token_file: Path
    tenant: str = ""  # that an admin of the cloud acts in; "" for the caller's own


class _Tenant(grpc.AuthMetadataPlugin):
    """Names the tenant to act in with every call."""

    def __init__(self, tenant: str) -> None:
        self._metadata = ((TENANT_HEADER, tenant),)

    def __call__(self, context: grpc.AuthMetadataContext, callback: grpc.AuthMetadataPluginCallback) -> None:
        del context
        callback(self._metadata, None)


class CloudCalls:
    """A connection to a cloud; use it as a context manager. The calls of each service are a class that adds to this."""

    def __init__(self, address: Address, *, timeout_s: float = 30.0) -> None:
        token = read_file(address.token_file, hint=_MINTING).decode("ascii", "replace").strip()
        if not _TOKEN.fullmatch(token):
            raise ConfigError(f"{address.token_file} holds no token", hint=_MINTING)
        split_address(address.cloud, "cloud")
        proof = [grpc.access_token_call_credentials(token)]
        if address.tenant:
            proof.append(grpc.metadata_call_credentials(_Tenant(check_tenant(address.tenant))))
        credentials = grpc.composite_channel_credentials(channel_credentials(address.trust / "ca.pem"), *proof)
        options = (
            ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
            ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
            ("grpc.keepalive_time_ms", 30_000),  # a publish may be silent for minutes
        )
        self._channel = grpc.secure_channel(address.cloud, credentials, options=options)
        self._cloud, self._timeout_s = address.cloud, timeout_s

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._channel.close()

    def stub(self, kind: Callable[[grpc.Channel], Any]) -> Any:
        """Return a stub of another service on this connection."""
        return kind(self._channel)

    def call(self, what: str, method: Any, request: Any, timeout_s: float | None = None) -> Any:
        """Return the answer of one call.

        Raises:
            IsthmusError: It failed; the message begins with what could not be done.
        """
        return self._call(what, method, request, timeout_s)

    def _call(self, what: str, method: Any, request: Any, timeout_s: float | None = None) -> Any:
        try:
            return method(request, timeout=timeout_s or self._timeout_s)
        except grpc.RpcError as error:
            raise self._explained(error, f"cannot {what}") from error

    def _explained(self, error: grpc.RpcError, what: str) -> IsthmusError:
        """Return one of our errors; one of the connection says in a sentence what to do, without gRPC's own words."""
        explained = from_rpc(error, what)
        if not isinstance(explained, UnavailableError) or explained.hint or explained.reason != UnavailableError.reason:
            return explained
        hint = next((hint for words, hint in _CONNECTION_HINTS.items() if words in explained.message), "")
        if not hint:
            return explained
        return UnavailableError(f"{what}: no answer from the cloud at {self._cloud}", hint=hint)
