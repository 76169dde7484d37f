"""What one caller may cost while its calls are in progress: their number, and the time that its messages may take.

gRPC's core ends connections, not calls: a request whose last byte never comes would be waited for as long as its
connection lives. So requests are read here, under a time limit, before the method is called; and bytes that are no
message are the caller's error, which grpc.aio would report as its own.

The guard stands behind the check of tokens: what is refused there costs nothing here.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import AsyncIterator, Callable, Mapping
from functools import partial
from typing import Any, Final

import grpc
from google.protobuf.message import DecodeError

from isthmus.errors import IdentityError, InputError, OverloadedError, UnavailableError
from isthmus.status import TOO_LATE, MethodInterceptor, fail, refuse
from security.binding import peer_of
from security.interceptors import current_claims
from security.limits import ListenerLimits
from security.scopes import METHOD_SCOPES, PUBLIC

_TOO_MANY: Final = "too-many-calls"
# Streams of requests that may be silent for as long as their callers have nothing to ask.
_PATIENT: Final = frozenset({"/inference.GRPCInferenceService/ModelStreamInfer"})


class CallGuard(MethodInterceptor):
    """Reads requests under a time limit and counts each caller's calls.

    Args:
        limits: The listener's.
        method_scopes: What each method asks for, by its full path.
    """

    def __init__(self, limits: ListenerLimits, method_scopes: Mapping[str, str] = METHOD_SCOPES) -> None:
        super().__init__()
        self._limits = limits
        self._method_scopes = method_scopes
        self._calls: dict[str, int] = {}  # in progress, by caller
        self._strangers = 0

    def refusal(self, call: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler[Any, Any] | None:
        """Refuse metadata that is too large."""
        size = _size(call.invocation_metadata or ())
        return _too_large(size, self._limits.metadata_bytes) if size > self._limits.metadata_bytes else None

    def wrap(self, method: str, handler: grpc.RpcMethodHandler[Any, Any]) -> grpc.RpcMethodHandler[Any, Any]:
        """Return a handler that reads requests itself; to gRPC, each is a stream of bytes."""
        public = self._method_scopes.get(method) == PUBLIC
        parts: Any = handler
        parse = parts.request_deserializer
        behaviour = next(
            b for b in (parts.unary_unary, parts.unary_stream, parts.stream_unary, parts.stream_stream) if b is not None
        )
        idle_s = None if method in _PATIENT else self._limits.stream_idle_s

        async def argument(context: Any) -> Any:
            if parts.request_streaming:
                return _messages(context, parse, idle_s)
            raw = await _read(context, self._limits.request_s)
            if raw is grpc.aio.EOF:
                raise InputError("expected a request, and the stream ended", reason="malformed-request")
            return _parsed(raw, parse)

        async def call(_requests: Any, context: Any) -> Any:
            await self._enter(context, public=public)
            result = behaviour(await argument(context), context)
            return await result if inspect.isawaitable(result) else result

        async def stream(_requests: Any, context: Any) -> AsyncIterator[Any]:
            await self._enter(context, public=public)
            result = behaviour(await argument(context), context)
            if inspect.isawaitable(result):  # a method that calls context.write itself
                await result
                return
            async for response in result:
                yield response

        make: Any = grpc.stream_unary_rpc_method_handler
        if parts.response_streaming:
            make = grpc.stream_stream_rpc_method_handler
        guarded: grpc.RpcMethodHandler[Any, Any] = make(
            stream if parts.response_streaming else call, None, parts.response_serializer
        )
        return guarded

    async def _enter(self, context: Any, *, public: bool) -> None:
        """Count a call in, or refuse it: its caller has as many in progress as it may have, or strangers do.

        It counts until its answer is sent, which a caller can put off.
        """
        caller, limit, known = self._caller(context)
        stranger = public and not known
        count = self._calls.get(caller, 0)
        if count >= limit:
            await refuse(context, OverloadedError(f"this caller has {count} calls in progress", reason=_TOO_MANY))
        if stranger and self._strangers >= self._limits.stranger_calls:
            await refuse(context, OverloadedError("too many calls without a token in progress", reason=_TOO_MANY))
        self._calls[caller] = count + 1
        self._strangers += stranger
        task = asyncio.current_task()
        assert task is not None  # noqa: S101 - tells mypy that this is a coroutine
        task.add_done_callback(partial(self._leave, caller, stranger))

    def _caller(self, context: Any) -> tuple[str, int, bool]:
        """Return who calls, how many calls it may have in progress, and whether it has shown who it is.

        That is by token, by certificate or else by address: devices that ask for their tokens share neither the limit
        of the address that they are behind nor that of strangers, who could otherwise keep all of them out.
        """
        try:
            claims = current_claims()
        except IdentityError:
            peer = peer_of(context)
            if peer is not None:
                return f"key {peer.key_sha256}", self._limits.peer_calls, True
            return f"peer {str(context.peer()).rpartition(':')[0]}", self._limits.peer_calls, False
        return f"{claims.tenant} {claims.subject}", self._limits.caller_calls, True

    def _leave(self, caller: str, stranger: bool, _task: asyncio.Task[Any]) -> None:
        self._strangers -= stranger
        left = self._calls[caller] - 1
        if left:
            self._calls[caller] = left
        else:
            del self._calls[caller]


def _size(metadata: Any) -> int:
    """Return the size of metadata as HTTP/2 counts it."""
    return sum(len(key) + len(value) + 32 for key, value in metadata)


def _too_large(size: int, limit: int) -> grpc.RpcMethodHandler[Any, Any]:
    """Refuse metadata that gRPC's core let through: it looks at each frame of a header block by itself."""

    error = OverloadedError(f"metadata: expected at most {limit} bytes, got {size}", reason="metadata-too-large")

    async def end(_requests: Any, context: Any) -> AsyncIterator[bytes]:
        fail(context, error)
        return
        yield b""  # never reached: it makes this function a stream, which ends with a status and no answer

    handler: grpc.RpcMethodHandler[Any, Any] = grpc.stream_stream_rpc_method_handler(end)
    return handler


async def _read(context: Any, seconds: float | None) -> Any:
    raw: Any = None
    try:
        async with asyncio.timeout(seconds):
            raw = await context.read()
    except TimeoutError:
        await refuse(context, UnavailableError(f"no whole message came within {seconds:g} s", reason=TOO_LATE))
    return raw


async def _messages(context: Any, parse: Any, idle_s: float | None) -> AsyncIterator[Any]:
    while (raw := await _read(context, idle_s)) is not grpc.aio.EOF:
        yield _parsed(raw, parse)


def _parsed(raw: bytes, parse: Callable[[bytes], Any] | None) -> Any:
    if parse is None:
        return raw
    try:
        return parse(raw)
    except DecodeError as error:
        raise InputError(
            f"expected a serialized message, got {len(raw)} bytes that are not one", reason="malformed-request"
        ) from error
