"""The one place where calls are let in: token, then scope, then the method; for all four kinds of methods.

- `METHOD_SCOPES` says what each method asks for; a method that is not in the table is refused.
- A refused call is answered before its request is read, so that a stranger cannot make the server parse megabytes.
- The claims of the caller are a context variable, set before the method runs in the task that runs it. So one handler
  serves all callers of a method (isthmus.status.MethodInterceptor).
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping
from contextvars import ContextVar
from functools import partial
from typing import Any, Final

import grpc
import structlog

from isthmus.errors import IdentityError, IsthmusError, PermissionDeniedError
from isthmus.status import MethodInterceptor, fail
from security.authenticator import Authenticator
from security.binding import Guard
from security.scopes import AUTHENTICATED, ENDLESS, METHOD_SCOPES, PUBLIC, UPLOADS
from security.tenancy import TENANT_HEADER, check_tenant
from security.tokens import ALL_MODELS, Claims, TokenVerifier

log = structlog.get_logger(__name__)

_HEADER: Final = "authorization"
_SCHEME: Final = "bearer "
_claims: ContextVar[Claims] = ContextVar("isthmus_claims")
_claims_again: ContextVar[Callable[[], Claims]] = ContextVar("isthmus_claims_again")


def current_claims() -> Claims:
    """Return the claims of the caller of the running method.

    Raises:
        IdentityError: The method is public, so nobody was asked who they are.
    """
    claims = _claims.get(None)
    if claims is None:
        raise IdentityError("this call carries no token", reason="missing-token")
    return claims


def check_all_models(what: str) -> Claims:
    """Return the claims of a caller who may use all models of its tenant.

    Args:
        what: Who must be: the beginning of what is said to others.

    Raises:
        PermissionDeniedError: The caller may use some models only.
    """
    claims = current_claims()
    if ALL_MODELS not in claims.models:
        raise PermissionDeniedError(f"{what}: this needs a role for all models", reason="not-all-models")
    return claims


def known_claims() -> Claims | None:
    """Return the claims of the caller of the running method, as far as anybody asked; they may not have been enough."""
    return _claims.get(None)


class AuthInterceptor(MethodInterceptor):
    """Lets a call pass when its token has the scope that the method asks for.

    Args:
        verifier: Tells who calls; a verifier of tokens where tokens of this cloud are all there is.
        method_scopes: What each method asks for, by its full path.
        guard: Knows who is revoked, and which tokens are good on which connection.
        tenant: The only tenant whose callers are let in; None for all, each to what is its own.
    """

    def __init__(
        self,
        verifier: Authenticator | TokenVerifier,
        method_scopes: Mapping[str, str] = METHOD_SCOPES,
        *,
        guard: Guard | None = None,
        tenant: str | None = None,
    ) -> None:
        super().__init__()
        self._authenticator = verifier if isinstance(verifier, Authenticator) else Authenticator(verifier)
        self._method_scopes, self._tenant = method_scopes, tenant
        self._guard = guard or Guard()
        self._authenticator.on_change(self._guard.judge_again)

    def refusal(self, call: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler[Any, Any] | None:
        """Set the caller's claims for this call, or return what refuses it."""
        method = str(call.method)
        try:
            self._admit(method, call.invocation_metadata or ())
        except IsthmusError as error:
            log.info("call refused", method=method, reason=error.reason)
            return _refusal(error)
        return None

    def wrap(self, method: str, handler: grpc.RpcMethodHandler[Any, Any]) -> grpc.RpcMethodHandler[Any, Any]:
        """Look at the certificates of those who call, and again at what they may do, where a method is not public."""
        if self._method_scopes.get(method) == PUBLIC:
            return handler
        return self._guard.wrap(handler, current_claims, _claims_again.get, uploads=method in UPLOADS)

    def wrap_refusal(self, method: str, handler: grpc.RpcMethodHandler[Any, Any]) -> grpc.RpcMethodHandler[Any, Any]:
        """Let a refusal be: it is the same for everybody, and nobody has asked yet who calls."""
        del method
        return handler

    def _admit(self, method: str, metadata: Any) -> None:
        needed = self._method_scopes.get(method)
        if needed is None:
            raise PermissionDeniedError("this method is not offered", reason="method-not-allowed")
        if needed == PUBLIC:
            return
        credential, tenant = _bearer_token(metadata), _tenant(metadata)
        claims = self._authenticator.verify(credential, tenant)
        _claims.set(claims)  # whoever records a refusal wants to know whose it is
        _claims.set(self._checked(claims, needed))
        at_s = None if method in ENDLESS else self._authenticator.now()
        _claims_again.set(partial(self._judged_again, credential, tenant, needed, at_s))

    def _judged_again(self, credential: str, tenant: str, needed: str, at_s: float | None) -> Claims:
        return self._checked(self._authenticator.verify(credential, tenant, at_s=at_s), needed)

    def _checked(self, claims: Claims, needed: str) -> Claims:
        """Return the claims that a caller has for a method that asks for `needed`.

        Raises:
            IdentityError: The caller is a revoked device.
            PermissionDeniedError: The caller may not call the method.
        """
        if self._tenant not in (None, claims.tenant):
            raise PermissionDeniedError("this is not for callers of another tenant", reason="wrong-tenant")
        self._guard.admit(claims)
        if needed != AUTHENTICATED and needed not in claims.scopes:
            raise PermissionDeniedError(
                f"this method needs the scope {needed}",
                reason="missing-scope",
                hint="use a token of a role that has it: isthmus token mint --role ROLE",
            )
        return claims if needed == AUTHENTICATED else claims.narrowed_to(needed)


def _bearer_token(metadata: Any) -> str:
    values = [value for key, value in metadata if key.lower() == _HEADER]
    if not values:
        raise IdentityError("this method needs a token and none was sent", reason="missing-token")
    value = values[0]
    if len(values) > 1 or not isinstance(value, str) or value[: len(_SCHEME)].lower() != _SCHEME:
        raise IdentityError("expected one authorization header, 'Bearer TOKEN'", reason="malformed-token")
    return value[len(_SCHEME) :].strip()


def _tenant(metadata: Any) -> str:
    values = [value for key, value in metadata if key.lower() == TENANT_HEADER]
    if len(values) > 1 or not all(isinstance(value, str) for value in values):
        raise IdentityError(f"expected one {TENANT_HEADER} header", reason="malformed-token")
    return check_tenant(values[0]) if values else ""


def _refusal(error: IsthmusError) -> grpc.RpcMethodHandler[Any, Any]:
    async def refuse(requests: Any, context: grpc.aio.ServicerContext[Any, Any]) -> AsyncIterator[bytes]:
        del requests
        fail(context, error)
        return
        yield b""  # never reached: it makes this function a stream, which ends with a status and no answer

    # Whatever the method's kind, a stream of requests can be refused before the first one is read.
    handler: grpc.RpcMethodHandler[Any, Any] = grpc.stream_stream_rpc_method_handler(refuse)
    return handler
