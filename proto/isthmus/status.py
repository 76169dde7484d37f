"""One table from errors to gRPC status codes, and the two places that apply it.

Servers translate on the way out (`StatusInterceptor`): the caller gets the message of our own errors, and of any
other exception only "internal error"; details go to the log. Clients translate on the way in (`from_rpc`).

What a status code cannot say travels as trailing metadata: the error's class (FAILED_PRECONDITION stands for five of
them), its reason, its hint, percent-encoded as the message itself is, and when to try again: in milliseconds under the
name that gRPC's own retries know (gRFC A6), and in whole seconds under HTTP's.
"""

from __future__ import annotations

import asyncio
import inspect
import math
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Any, Final, NoReturn
from urllib.parse import quote, unquote

import grpc
import structlog

from isthmus import errors

# Most specific first: the first class that matches wins.
STATUS_OF: Final[tuple[tuple[type[errors.IsthmusError], grpc.StatusCode], ...]] = (
    (errors.NotFoundError, grpc.StatusCode.NOT_FOUND),
    (errors.InputError, grpc.StatusCode.INVALID_ARGUMENT),
    (errors.ConflictError, grpc.StatusCode.ABORTED),
    (errors.ConfigError, grpc.StatusCode.FAILED_PRECONDITION),
    (errors.IdentityError, grpc.StatusCode.UNAUTHENTICATED),
    (errors.PermissionDeniedError, grpc.StatusCode.PERMISSION_DENIED),
    (errors.TrustError, grpc.StatusCode.FAILED_PRECONDITION),
    (errors.BundleError, grpc.StatusCode.FAILED_PRECONDITION),
    (errors.DeltaError, grpc.StatusCode.FAILED_PRECONDITION),
    (errors.VerificationError, grpc.StatusCode.FAILED_PRECONDITION),
    (errors.QuotaError, grpc.StatusCode.RESOURCE_EXHAUSTED),
    (errors.OverloadedError, grpc.StatusCode.RESOURCE_EXHAUSTED),
    (errors.UnavailableError, grpc.StatusCode.UNAVAILABLE),
)
_KIND_OF: Final = {  # for codes that say enough; a peer that sends no class is translated by its code alone
    grpc.StatusCode.NOT_FOUND: errors.NotFoundError,
    grpc.StatusCode.INVALID_ARGUMENT: errors.InputError,
    grpc.StatusCode.ABORTED: errors.ConflictError,
    grpc.StatusCode.ALREADY_EXISTS: errors.ConflictError,
    grpc.StatusCode.UNAUTHENTICATED: errors.IdentityError,
    grpc.StatusCode.PERMISSION_DENIED: errors.PermissionDeniedError,
    grpc.StatusCode.FAILED_PRECONDITION: errors.TrustError,
}
KIND_KEY: Final = "isthmus-error"  # the `reason` of the class in isthmus.errors
# Initial metadata of answers to devices: what the time is for the server, Unix milliseconds, and where it asks for
# certificates.
TIME_KEY: Final = "isthmus-time"
ADDRESS_KEY: Final = "isthmus-device-address"
REASON_KEY: Final = "isthmus-reason"
HINT_KEY: Final = "isthmus-hint"
PUSHBACK_KEY: Final = "grpc-retry-pushback-ms"
RETRY_AFTER_KEY: Final = "retry-after"
TOO_LATE: Final = "deadline-exceeded"  # the reason of an UnavailableError for which time ran out
_READABLE: Final = "".join(chr(code) for code in range(32, 127) if chr(code) != "%")
# A status that is larger than the peer's limit for metadata (8 KiB by default) would be lost as a whole.
_MAX_MESSAGE: Final = 2000  # characters
_MAX_HINT: Final = 1000  # bytes, encoded
_NO_HINTS: Final[Mapping[type[errors.IsthmusError], str]] = {}

log = structlog.get_logger(__name__)


def status_of(error: errors.IsthmusError) -> grpc.StatusCode:
    """Return the status code that callers see for `error`."""
    if isinstance(error, errors.UnavailableError) and error.reason == TOO_LATE:
        return grpc.StatusCode.DEADLINE_EXCEEDED  # whichever side's clock strikes first, the caller sees the same
    return next((code for kind, code in STATUS_OF if isinstance(error, kind)), grpc.StatusCode.INTERNAL)


def from_rpc(
    error: grpc.RpcError, what: str, *, hints: Mapping[type[errors.IsthmusError], str] = _NO_HINTS
) -> errors.IsthmusError:
    """Turn a failed call into one of our errors.

    The peer's message is kept: our own servers send only messages that are meant for callers.

    Args:
        error: How the call failed.
        what: What was being done.
        hints: What a person can do next, by the class of the error; a hint of the peer goes first.
    """
    code = error.code() if isinstance(error, grpc.Call | grpc.aio.AioRpcError) else grpc.StatusCode.UNKNOWN
    detail = (error.details() if isinstance(error, grpc.Call | grpc.aio.AioRpcError) else str(error)) or code.name
    told = _trailing(error)
    kind = _kind(told.get(KIND_KEY, ""), code) or _KIND_OF.get(code, errors.UnavailableError)
    hint = unquote(told.get(HINT_KEY, "")) or hints.get(kind, "")
    if kind is errors.QuotaError:
        wait_ms = told.get(PUSHBACK_KEY, "")
        retry_after_s = int(wait_ms) / 1000 if wait_ms.isascii() and wait_ms.isdigit() else None
        return errors.QuotaError(
            f"{what}: {detail}", reason=told.get(REASON_KEY, ""), hint=hint, retry_after_s=retry_after_s
        )
    return kind(f"{what}: {detail}", reason=told.get(REASON_KEY, ""), hint=hint)


def _trailing(error: grpc.RpcError) -> dict[str, str]:
    if not isinstance(error, grpc.Call | grpc.aio.AioRpcError):
        return {}
    metadata: Any = error.trailing_metadata() or ()
    return {key: value for key, value in metadata if isinstance(value, str)}


def _kind(name: str, code: grpc.StatusCode) -> type[errors.IsthmusError] | None:
    """Return the class that the peer named, when it is one that goes with the code."""
    return next((kind for kind, with_code in STATUS_OF if kind.reason == name and with_code is code), None)


def trailing_metadata(error: errors.IsthmusError) -> tuple[tuple[str, str], ...]:
    """Return what a status code and message do not say of `error`, as trailing metadata."""
    kind = next((kind for kind, _ in STATUS_OF if isinstance(error, kind)), errors.IsthmusError)
    metadata: tuple[tuple[str, str], ...] = ((KIND_KEY, kind.reason), (REASON_KEY, error.reason))
    if isinstance(error, errors.QuotaError) and error.retry_after_s is not None:
        wait_ms = math.ceil(error.retry_after_s * 1000)
        metadata += ((PUSHBACK_KEY, str(wait_ms)), (RETRY_AFTER_KEY, str(math.ceil(wait_ms / 1000))))
    hint = quote(error.hint, safe=_READABLE)
    return (*metadata, (HINT_KEY, hint)) if 0 < len(hint) <= _MAX_HINT else metadata


class MethodInterceptor(grpc.aio.ServerInterceptor):
    """An interceptor that makes one handler of a method, which serves all of its calls that are not refused.

    What a call alone knows, the handler finds in its context (`contextvars`). So a server that knows this kind makes
    the handlers of its methods once, and of each call it only asks whether it is refused; grpc's own servers ask for a
    handler at each call.
    """

    def __init__(self) -> None:
        self._made: dict[str, tuple[Any, Any]] = {}  # by method: the handler, and what was made of it

    def refusal(self, call: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler[Any, Any] | None:
        """Return what refuses a call, in place of its method; None lets it pass, in the same context."""
        del call
        return None

    def wrap(self, method: str, handler: grpc.RpcMethodHandler[Any, Any]) -> grpc.RpcMethodHandler[Any, Any]:
        """Return what serves the calls of a method in place of its handler.

        Args:
            method: The method's full path.
            handler: What the interceptors behind this one have made of it.
        """
        raise NotImplementedError

    def wrap_refusal(self, method: str, handler: grpc.RpcMethodHandler[Any, Any]) -> grpc.RpcMethodHandler[Any, Any]:
        """Return what refuses one call, in place of what an interceptor behind this one refuses it with."""
        return self.wrap(method, handler)

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any] | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        """Return what serves one call; None where there is no such method."""
        handler = await continuation(handler_call_details)
        if handler is None:  # grpc answers UNIMPLEMENTED
            return None
        refusal = self.refusal(handler_call_details)
        if refusal is not None:
            return refusal
        method = str(handler_call_details.method)
        known = self._made.get(method)
        if known is None or known[0] is not handler:
            known = self._made[method] = (handler, self.wrap(method, handler))
        made: grpc.RpcMethodHandler[Any, Any] = known[1]
        return made


class StatusInterceptor(MethodInterceptor):
    """Lets servicers raise our errors; sends callers a status, a safe message and the reason as trailing metadata."""

    def wrap(self, method: str, handler: grpc.RpcMethodHandler[Any, Any]) -> grpc.RpcMethodHandler[Any, Any]:
        """Wrap the method's behaviour, whichever of the four kinds it is."""
        del method
        return translate_errors(handler)


def translate_errors(handler: grpc.RpcMethodHandler[Any, Any]) -> grpc.RpcMethodHandler[Any, Any]:
    """Return what the interceptor makes of a method's handler, for servers to which every microsecond counts."""
    return wrap_handler(handler, _translated, _translated_stream)


def wrap_handler(
    handler: grpc.RpcMethodHandler[Any, Any],
    unary: Callable[[Callable[..., Any]], Callable[..., Any]],
    stream: Callable[[Callable[..., Any]], Callable[..., Any]],
) -> grpc.RpcMethodHandler[Any, Any]:
    """Return `handler` with its behaviour wrapped by `unary` or `stream`, by the kind of its response."""
    parts: Any = handler
    make = {
        (False, False): grpc.unary_unary_rpc_method_handler,
        (False, True): grpc.unary_stream_rpc_method_handler,
        (True, False): grpc.stream_unary_rpc_method_handler,
        (True, True): grpc.stream_stream_rpc_method_handler,
    }[parts.request_streaming, parts.response_streaming]
    behaviour = next(
        b for b in (parts.unary_unary, parts.unary_stream, parts.stream_unary, parts.stream_stream) if b is not None
    )
    wrapped = stream(behaviour) if parts.response_streaming else unary(behaviour)
    wrapped_handler: grpc.RpcMethodHandler[Any, Any] = make(
        wrapped,
        request_deserializer=parts.request_deserializer,
        response_serializer=parts.response_serializer,
    )
    return wrapped_handler


def _translated(behaviour: Callable[..., Any]) -> Callable[..., Any]:
    async def call(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
        try:
            result = behaviour(request, context)
            return await result if inspect.isawaitable(result) else result
        except errors.IsthmusError as error:
            fail(context, error)
        except Exception as error:
            _fail_internal(context, error)

    return call


def _translated_stream(behaviour: Callable[..., Any]) -> Callable[..., Any]:
    async def call(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> AsyncIterator[Any]:
        try:
            result = behaviour(request, context)
            if inspect.isawaitable(result):  # a streaming behaviour may also be a coroutine that writes to the context
                await result
                return
            async for response in result:
                yield response
        except errors.IsthmusError as error:
            fail(context, error)
        except Exception as error:
            _fail_internal(context, error)

    return call


# Not `context.abort`: its exception is kept by the call that it ended, with every frame that it has passed, and so with
# the request and its metadata, until the garbage collector comes by. That is seldom, and they can be megabytes.


def fail(context: grpc.aio.ServicerContext[Any, Any], error: errors.IsthmusError) -> None:
    """Set the status of a call that returns now; where one answer is expected, grpc sends an empty one with it."""
    context.set_trailing_metadata(trailing_metadata(error))
    context.set_details(error.message[:_MAX_MESSAGE])
    context.set_code(status_of(error))


async def refuse(context: grpc.aio.ServicerContext[Any, Any], error: errors.IsthmusError) -> NoReturn:
    """End a call with a status and nothing else: an empty answer would wait for as long as the caller opens no window.

    Raises:
        AbortError: Always; it is for grpc.
    """
    await end_call(context, status_of(error), error.message[:_MAX_MESSAGE], trailing_metadata(error))


async def end_call(
    context: grpc.aio.ServicerContext[Any, Any], code: grpc.StatusCode, details: str, trailing: Any = ()
) -> NoReturn:
    """End a call with a status and nothing else.

    Raises:
        AbortError: Always; it is for grpc.
    """
    try:
        await context.abort(code, details, trailing)
    except grpc.aio.AbortError as abort:
        # Once it has passed all frames of this call, it lets go of them.
        asyncio.get_running_loop().call_soon(abort.with_traceback, None)
        raise


def _fail_internal(context: grpc.aio.ServicerContext[Any, Any], error: Exception) -> None:
    if isinstance(error, grpc.aio.AbortError | grpc.aio.AioRpcError):
        raise error
    log.exception("internal error", kind=type(error).__name__)
    context.set_details("internal error; the server's log has the details")
    context.set_code(grpc.StatusCode.INTERNAL)
