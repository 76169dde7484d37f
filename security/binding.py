"""Who is at the other end of a connection, and whether the caller's token may be used there.

A device's token is bound to the device's certificate (RFC 8705 section 3): whoever copies the token has nothing. The
peer's certificate is known to the running call only, so the rules are applied there; where `security.guard` reads the
requests, that is before they are read.

1. A bound token is good on a connection with exactly the certificate that it names.
2. A revoked device, and a revoked key whatever certificate it comes with, is refused, at once; calls of theirs that
   are running end with UNAUTHENTICATED and the reason `revoked`.
3. A stream, which may never end by itself, ends when its caller would not be let in any more: with what a new call is
   answered; or with `access-changed` where that would be let in, for fewer models. One answer that is being worked out
   is still given. The end of a credential's own time ends streams that have no end; a transfer may take longer.

TLS has verified the certificate before: that it comes from the authority for devices, and is valid now.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import inspect
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import aclosing, contextmanager, nullcontext
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Final, cast

import grpc
import structlog
from cryptography import x509
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from isthmus.errors import IdentityError, IsthmusError, PermissionDeniedError
from isthmus.status import wrap_handler
from security.jws import EXPIRY_LEEWAY_S
from security.scopes import DEVICE
from security.tokens import ALL_MODELS, Claims

DEVICE_URI: Final = "isthmus://device/"
_GRACE_S: Final = 2.0
_LATE_S: Final = 0.1
_REMEMBERED: Final = 4096  # certificates, of devices that are connected

_NOT_WATCHED: Final = nullcontext()

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Peer:
    """The certificate at the other end of a connection.

    `thumbprint` is its SHA-256 as tokens name it (base64url, no padding), `key_sha256` that of its public key
    (hexadecimal), `device_id` the device that it was issued to, `expires_at` its end in Unix seconds: a connection may
    outlast it.
    """

    thumbprint: str
    key_sha256: str
    device_id: str
    expires_at: float


@dataclass(frozen=True, slots=True)
class Revoked:
    """Devices by name, and keys by the SHA-256 of their public half (hexadecimal)."""

    devices: frozenset[str] = frozenset()
    keys: frozenset[str] = frozenset()


@dataclass(slots=True, eq=False)
class _Call:
    claims: Claims
    key_sha256: str = ""
    claims_again: Callable[[], Claims] | None = None  # of a stream, which ends when it would not be let in again
    refusal: IsthmusError | None = None
    sending: bool = False  # gRPC has the call, and waits for the peer to take a message


def peer_of(context: grpc.aio.ServicerContext[Any, Any]) -> Peer | None:
    """Return the certificate that the peer has shown; None when it has shown none."""
    # The stubs promise more than plain mappings of names to byte strings; this is what arrives.
    properties = cast("dict[str, list[bytes]]", context.auth_context())
    shown = properties.get("x509_pem_cert")
    return _peer(shown[0]) if shown else None


@lru_cache(maxsize=_REMEMBERED)
def _peer(pem: bytes) -> Peer:
    certificate = x509.load_pem_x509_certificate(pem)
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        names = x509.SubjectAlternativeName([])
    devices = [
        uri.removeprefix(DEVICE_URI)
        for uri in names.get_values_for_type(x509.UniformResourceIdentifier)
        if uri.startswith(DEVICE_URI)
    ]
    device_id, until = devices[0] if len(devices) == 1 else "", certificate.not_valid_after_utc.timestamp()
    return Peer(thumbprint_of(certificate), key_digest(certificate), device_id, until)


def thumbprint_of(certificate: x509.Certificate) -> str:
    """Return a certificate's SHA-256 as `cnf` holds it (RFC 8705 section 3.1)."""
    return base64.urlsafe_b64encode(certificate.fingerprint(SHA256())).rstrip(b"=").decode()


def key_digest(certified: x509.Certificate | x509.CertificateSigningRequest) -> str:
    """Return the SHA-256 (hexadecimal) of a certificate's or signing request's public key (SubjectPublicKeyInfo)."""
    spki = certified.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    return hashlib.sha256(spki).hexdigest()


class Guard:
    """Applies the rules of this module to the calls of one server; lives in one event loop."""

    def __init__(self) -> None:
        self._revoked = Revoked()
        self._running: dict[asyncio.Task[Any], _Call] = {}

    def replace(self, revoked: Revoked) -> None:
        """Refuse these from now on, and no others; end their running calls."""
        self._revoked = revoked
        for task, call in self._running.items():
            if _concerns(call.claims) and self._is_revoked(call.claims.subject, call.key_sha256):
                self._end(task, call, _revoked())

    def judge_again(self) -> None:
        """End the streams whose callers would not be let in any more, or for fewer models."""
        for task in self._running:
            self._judge(task)

    def _judge(self, task: asyncio.Task[Any]) -> None:
        call = self._running[task]
        if (refusal := _refusal(call)) is not None:
            self._end(task, call, refusal)

    def _end(self, task: asyncio.Task[Any], call: _Call, refusal: IsthmusError) -> None:
        """End a call; one whose peer takes no messages hears why when it takes one, or is cut off after a grace."""
        if call.refusal is not None:
            return
        call.refusal = refusal
        log.info("call ended", subject=call.claims.subject, reason=refusal.reason)
        if call.sending:
            asyncio.get_running_loop().call_later(_GRACE_S, self._cut_off, task)
        else:
            task.cancel()

    def _cut_off(self, task: asyncio.Task[Any]) -> None:
        if task in self._running:
            task.cancel()

    def check_device(self, device_id: str, key_sha256: str) -> None:
        """Check that neither a device nor its key is revoked.

        Raises:
            IdentityError: One is.
        """
        if self._is_revoked(device_id, key_sha256):
            raise _revoked()

    def admit(self, claims: Claims) -> None:
        """Check what can be said of a caller without its connection.

        Raises:
            IdentityError: The caller is a revoked device.
        """
        if _concerns(claims):
            self.check_device(claims.subject, "")

    def wrap(
        self,
        handler: grpc.RpcMethodHandler[Any, Any],
        claims_of_call: Callable[[], Claims],
        claims_again: Callable[[], Callable[[], Claims]],
        *,
        uploads: bool,
    ) -> grpc.RpcMethodHandler[Any, Any]:
        """Return a method's handler that follows the rules.

        Args:
            handler: The method's.
            claims_of_call: Returns the claims of the caller of the running call.
            claims_again: Returns, of a stream that runs, what works its caller's claims out anew, or raises what a new
                call is answered.
            uploads: Whether its requests are a stream, as the handler of `security.guard` does not say.
        """

        def unary(behaviour: Callable[..., Any]) -> Callable[..., Any]:
            async def call(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
                claims = claims_of_call()
                watched = _concerns(claims) or uploads
                again = claims_again() if uploads else None
                with self._watched(claims, again, context) if watched else _NOT_WATCHED:
                    result = behaviour(request, context)
                    return await result if inspect.isawaitable(result) else result

            return call

        def stream(behaviour: Callable[..., Any]) -> Callable[..., Any]:
            async def call(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> AsyncIterator[Any]:
                with self._watched(claims_of_call(), claims_again(), context) as running:
                    result = behaviour(request, context)
                    if inspect.isawaitable(result):  # a method that calls context.write itself
                        await result
                        return
                    async with aclosing(result):
                        async for response in result:
                            running.sending = True
                            yield response
                            running.sending = False
                            if running.refusal is not None:
                                raise running.refusal

            return call

        return wrap_handler(handler, unary, stream)

    @contextmanager
    def _watched(
        self, claims: Claims, again: Callable[[], Claims] | None, context: grpc.aio.ServicerContext[Any, Any]
    ) -> Iterator[_Call]:
        """Let a call run while its caller is let in.

        Raises:
            IdentityError: The token is not good on this connection, or the caller is or becomes revoked.
            PermissionDeniedError: The caller of a stream has lost what let it in.
        """
        call = _Call(claims, claims_again=again)
        if _concerns(claims):
            peer = peer_of(context)
            _check_bound(claims, peer)
            call.key_sha256 = peer.key_sha256 if peer else ""
            self.check_device(claims.subject, call.key_sha256)
        if (refusal := _refusal(call)) is not None:  # much may have changed since it was let in
            raise refusal
        task = cast("asyncio.Task[Any]", asyncio.current_task())  # grpc runs each call in one
        self._running[task] = call
        ends = None if again is None else self._at_end_of(claims, task)
        try:
            yield call
        except asyncio.CancelledError:
            if call.refusal is None:
                raise
            task.uncancel()
            raise call.refusal from None
        finally:
            del self._running[task]
            if ends is not None:
                ends.cancel()

    def _at_end_of(self, claims: Claims, task: asyncio.Task[Any]) -> asyncio.TimerHandle:
        """Judge a stream again when its caller's credential has ended, for certain."""
        left_s = claims.expires_at.timestamp() + EXPIRY_LEEWAY_S - time.time()
        return asyncio.get_running_loop().call_later(max(left_s, 0.0) + _LATE_S, self._judge, task)

    def _is_revoked(self, subject: str, key_sha256: str) -> bool:
        return subject in self._revoked.devices or key_sha256 in self._revoked.keys


def _concerns(claims: Claims) -> bool:
    return bool(claims.thumbprint) or DEVICE in claims.scopes


def _check_bound(claims: Claims, peer: Peer | None) -> None:
    if not claims.thumbprint:
        return
    if peer is None:
        raise IdentityError(
            "the token is bound to a certificate and this connection has none",
            reason="certificate-required",
            hint="devices call the address of their own, which asks for certificates (device_listen)",
        )
    if peer.thumbprint != claims.thumbprint:
        raise IdentityError("the token is bound to another certificate", reason="certificate-mismatch")


def _refusal(call: _Call) -> IsthmusError | None:
    """Return what a stream ends with; None for one that goes on."""
    if call.claims_again is None:
        return None
    before = call.claims
    try:
        now = call.claims_again()
    except IsthmusError as error:
        return error
    kept = ALL_MODELS in now.models or before.models <= now.models
    if kept and now.tenant == before.tenant:
        return None
    return PermissionDeniedError(
        "what this caller may use has changed", reason="access-changed", hint="begin again: a new call is judged anew"
    )


def _revoked() -> IdentityError:
    return IdentityError(
        "the device was revoked", reason="revoked", hint="an operator can invite it again: isthmus device invite DEVICE"
    )
